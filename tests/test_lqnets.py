"""LQ-Nets against NumPy typed from its algorithm: alternation, fixed points, running basis, gradients, processes."""

import itertools

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import wnq
from wnq.activations import input_builder
from wnq.methods.lqnets import RIDGE, LearnedBasis, LearnedInputBasis, refit
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws from the start, whichever tests run before it."""
    global GENERATOR
    GENERATOR = np.random.default_rng(0)


def numpy_levels(v, low):
    """All sums, ascending, with their patterns."""
    patterns = np.array(list(itertools.product((low, 1.0), repeat=len(v))))
    order = np.argsort(patterns @ v, kind="stable")
    return (patterns @ v)[order], patterns[order]


def numpy_round(x, v, low):
    levels, patterns = numpy_levels(v, low)
    codes = (x[:, None] > (levels[1:] + levels[:-1]) / 2).sum(1)
    return levels[codes], patterns[codes]


def numpy_refit(x, v, low, ridge):
    _, b = numpy_round(x, v, low)
    return np.linalg.solve(b.T @ b + ridge * np.eye(len(v)), b.T @ x + ridge * v)


def squared_error(x, v, low):
    return ((numpy_round(x, v, low)[0] - x) ** 2).sum()


@pytest.mark.parametrize("low", [-1.0, 0.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_one_alternation_equals_the_algorithm(bits, low):
    x = np.maximum(GENERATOR.normal(size=(3, 500)), low * 10)
    v = 2.0 ** np.arange(bits) / 2**bits * GENERATOR.uniform(0.9, 1.1, size=(3, bits))  # all codes occur
    fitted = refit(torch.tensor(v), torch.tensor(x), low, 1e-3 / 500).numpy()
    expected = np.stack([numpy_refit(row, old, low, 1e-3) for row, old in zip(x, v, strict=True)])
    assert np.abs(fitted - expected).max() < 1e-12


@pytest.mark.parametrize("low", [-1.0, 0.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_no_alternation_raises_the_error_and_it_reaches_a_fixed_point(bits, low):
    x = np.maximum(GENERATOR.standard_t(4, size=300), low * 100)
    v = np.abs(GENERATOR.normal(size=bits)) + 0.1
    errors = [squared_error(x, v, low)]
    for _ in range(400):
        # The ridge pulls toward the basis before, so the bound holds with it too.
        new = refit(torch.tensor(v)[None], torch.tensor(x)[None], low, 1e-4)[0].numpy()
        errors.append(squared_error(x, new, low))
        settled, v = np.abs(new - v).max() < 1e-13, new
        if settled:
            break
    assert (np.diff(errors) <= 1e-12 * errors[0]).all() and errors[-1] < errors[0]
    assert settled
    # A fixed point: the exact normal equations hold for the codes that the basis itself gives.
    rounded, b = numpy_round(x, v, low)
    assert np.abs(b.T @ (x - rounded)).max() < 1e-8 * len(x)


def test_data_on_a_grid_of_the_family_are_a_fixed_point_with_no_error():
    v = np.array([0.1, 0.35, 0.8])
    x = torch.tensor(np.tile(numpy_levels(v, -1.0)[0], 5))[None]
    assert np.abs(refit(torch.tensor(v)[None], x, -1.0, 1e-4).numpy() - v).max() < 1e-14
    moved = torch.tensor(v)[None] * 1.05
    assert np.abs(refit(moved, x, -1.0, 1e-12).numpy() - v).max() < 1e-9  # one step from nearby: the codes are right


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_weights_have_a_basis_a_channel_and_round_to_the_nearest_level(bits, axis):
    w = GENERATOR.normal(size=(4, 5, 9)) * np.array([0.1, 1, 2, 5])[:, None, None]
    x = torch.tensor(w, requires_grad=True)
    quantizer = wnq.get_method("lqnets", w_bits=bits).weight(x.detach(), axis)
    assert quantizer.basis.shape == (w.shape[axis], bits) and not list(quantizer.parameters())
    y = quantizer(x)
    g = torch.tensor(GENERATOR.normal(size=w.shape))
    y.backward(g)
    assert torch.equal(x.grad, g)
    levels = quantizer.quantize(x.detach()).levels
    assert levels.shape == (w.shape[axis], 2**bits)
    for i, v in enumerate(quantizer.basis.numpy()):
        row = w.take(i, axis).reshape(-1)
        assert np.abs(y.detach().numpy().take(i, axis).reshape(-1) - numpy_round(row, v, -1.0)[0]).max() < 1e-12
        assert np.abs(levels[i].numpy() - numpy_levels(v, -1.0)[0]).max() < 1e-12
    seen = w.astype(np.float32)
    single = wnq.get_method("lqnets", w_bits=bits).weight(torch.tensor(seen), axis)
    for i, v in enumerate(single.basis.double().numpy()):
        expected = numpy_round(seen.take(i, axis).reshape(-1).astype(float), v, -1.0)[0]
        actual = single(torch.tensor(seen)).numpy().take(i, axis).reshape(-1)
        assert np.abs(actual - expected).max() < 1e-6 * np.abs(expected).max()


def test_start_is_the_papers_basis_for_the_spread_then_up_to_twenty_alternations():
    w = GENERATOR.normal(size=(3, 100)) * 0.3
    quantizer = LearnedBasis(2, torch.tensor(w))
    for row, basis in zip(w, quantizer.basis.numpy(), strict=True):
        v = 0.6745 * np.sqrt((row**2).mean()) * np.array([1.0, 2.0]) / 2
        for _ in range(20):
            v = numpy_refit(row, v, -1.0, RIDGE)
        assert np.abs(basis - v).max() < 1e-12


def test_one_bit_is_bwn():
    w = torch.tensor(GENERATOR.normal(size=(6, 50)))
    assert torch.allclose(wnq.get_method("lqnets", w_bits=1).weight(w, 0)(w), wnq.get_method("bwn").weight(w, 0)(w))


@pytest.mark.parametrize(("bits", "bound"), [(1, 0.37), (2, 0.12), (3, 0.038), (4, 0.0125), (8, 0.0015)])
def test_error_on_a_gaussian_is_near_the_best_known(bits, bound):
    """Lloyd-Max of N(0, 1): 0.363, 0.118, 0.0345, 0.0095; sums of K coefficients come close."""
    w = torch.tensor(np.random.default_rng(1).normal(size=(4, 5000)))
    quantizer = wnq.get_method("lqnets", w_bits=bits).weight(w, 0)
    assert (quantizer(w) - w).square().mean() < bound


def test_running_basis_keeps_nine_tenths_exactly():
    w = torch.tensor(GENERATOR.normal(size=(5, 300)))
    quantizer = wnq.get_method("lqnets", w_bits=3).weight(w, 0)
    for factor in (1.2, 0.8):  # all codes still occur, so that the equations are well posed
        before = quantizer.basis.clone().numpy()
        quantizer.observe_(factor * w)
        fitted = [numpy_refit(factor * row, v, -1.0, RIDGE) for row, v in zip(w.numpy(), before, strict=True)]
        assert np.abs(quantizer.basis.numpy() - (0.9 * before + 0.1 * np.stack(fitted))).max() < 1e-12


def test_each_training_step_moves_the_basis_once_and_evaluation_does_not():
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("lqnets", w_bits=2, a_bits=2), first_last_bits=None))
    quantizer = model.parametrizations.weight[0]
    x = torch.randn(32, 6)
    with torch.no_grad():
        model.parametrizations.weight.original.mul_(2)
    states = [(quantizer.basis.clone(), None)]
    for _ in range(3):
        model(x)
        states.append((quantizer.basis.clone(), model.input_quantizer.basis.clone()))
    weight = model.parametrizations.weight.original.detach()
    expected = 0.9 * states[0][0] + 0.1 * refit(states[0][0], weight, -1.0, RIDGE / 6)
    assert torch.allclose(states[1][0], expected)
    assert all(not torch.equal(a[0], b[0]) for a, b in itertools.pairwise(states))
    model.eval()(x)
    assert torch.equal(quantizer.basis, states[-1][0]) and torch.equal(model.input_quantizer.basis, states[-1][1])


def test_loading_a_float_checkpoint_starts_the_basis_anew():
    torch.manual_seed(0)
    model, other = nn.Linear(6, 4), nn.Linear(6, 4)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("lqnets", w_bits=2, a_bits=32), first_last_bits=None))
    model.load_state_dict(other.state_dict())
    assert torch.equal(model.parametrizations.weight[0].basis, LearnedBasis(2, other.weight).basis)


def test_a_channel_of_zeros_wakes_up():
    w = torch.zeros(2, 50)
    quantizer = wnq.get_method("lqnets", w_bits=2).weight(w, 0)
    assert (quantizer(w) == 0).all()
    w = torch.randn(2, 50, generator=torch.Generator().manual_seed(0))
    for _ in range(100):
        quantizer.observe_(w)
    assert (quantizer(w) - w).square().mean() < 0.2 * w.square().mean()


# Inputs


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_input_values_and_gradient(bits):
    x = np.maximum(GENERATOR.normal(size=(8, 3, 20)), 0)
    x[0, 0, :3] = [-1.0, 9.0, 50.0]
    quantizer = LearnedInputBasis(bits).double()
    quantizer.observe_(torch.tensor(x))
    t = torch.tensor(x, requires_grad=True)
    y = quantizer(t)
    g = torch.tensor(GENERATOR.normal(size=x.shape))
    y.backward(g)
    v = quantizer.basis[0].numpy()
    assert np.abs(y.detach().numpy().reshape(-1) - numpy_round(x.reshape(-1), v, 0.0)[0]).max() < 1e-12
    top = numpy_levels(v, 0.0)[0][-1]
    decided = np.abs(x - top) > 1e-9  # the fit may put its top level on the largest input, up to rounding
    assert decided.sum() >= x.size - 1
    assert np.array_equal((t.grad.numpy())[decided], (g.numpy() * ((x > 0) & (x < top)))[decided])
    assert 0.0 in quantizer.quantize(torch.tensor(x)).levels


def test_input_starts_at_the_first_batch_and_follows_the_later_ones():
    x = np.maximum(GENERATOR.normal(size=500), 0) * 3
    quantizer = LearnedInputBasis(2).double()
    with pytest.raises(RuntimeError, match="calibrate_"):
        quantizer(torch.tensor(x))
    quantizer.observe_(torch.tensor(x))
    v = 2 * 0.6745 * np.sqrt(2 * (x**2).mean()) * np.array([1.0, 2.0]) / 3
    for _ in range(20):
        v = numpy_refit(x, v, 0.0, 1e-6 * len(x))
    assert np.abs(quantizer.basis[0].numpy() - v).max() < 1e-12
    quantizer.observe_(torch.tensor(2 * x))
    expected = 0.9 * v + 0.1 * numpy_refit(2 * x, v, 0.0, 1e-6 * len(x))
    assert np.abs(quantizer.basis[0].numpy() - expected).max() < 1e-12


def test_bad_batches_do_not_spoil_the_running_basis():
    x = torch.rand(100, generator=torch.Generator().manual_seed(0))
    quantizer = LearnedInputBasis(3)
    quantizer.observe_(torch.full((5,), float("nan")))
    assert quantizer.basis.isfinite().all()
    quantizer.observe_(x)
    before = quantizer.basis.clone()
    quantizer.observe_(torch.cat([x, torch.tensor([float("inf")])]))
    assert torch.allclose(quantizer.basis, before)
    assert quantizer(torch.tensor([float("nan")])).isnan()


def observe_in_a_group(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    batches = torch.load(f"{folder}/batches.pt", weights_only=True)
    states = {}
    for name in ("lqnets", "abcnet"):
        quantizer = input_builder(name, 3)()
        for batch in batches:
            quantizer.observe_(batch.chunk(2)[rank])
        states[name] = quantizer.state_dict()
    torch.save(states, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_start_and_move_as_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 10, generator=generator).relu() * scale for scale in (1.0, 2.0, 0.5)]
    batches[0][:32] *= 3  # halves that differ
    torch.save(batches, tmp_path / "batches.pt")
    torch.multiprocessing.spawn(observe_in_a_group, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    for name, state in first.items():
        alone = input_builder(name, 3)()
        for batch in batches:
            alone.observe_(batch)
        for key, value in alone.state_dict().items():
            assert torch.equal(state[key], second[name][key])
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


def test_a_compiled_training_step_moves_the_bases_as_the_plain_one():
    def trained(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("lqnets", w_bits=2, a_bits=2), first_last_bits=None))
        x = torch.randn(64, 6)
        model(x)
        step = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for _ in range(2):
            step(x).square().sum().backward()
        return {**model.state_dict(), **{f"{k} grad": p.grad for k, p in model.named_parameters()}}

    plain, compiled = trained(False), trained(True)
    for key, value in plain.items():
        torch.testing.assert_close(compiled[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 6])
def test_weight_laws_along_the_other_axis(bits):
    """The first axis at every width: test_laws.py."""
    method = wnq.get_method("lqnets", w_bits=bits)
    for law in LAWS[:4]:
        law(lambda x: method.weight(x, 1))


def test_input_laws_between_those_widths_of_the_common_test():
    for law in LAWS[:-1]:
        law(lambda _: input_builder("lqnets", 5)())


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("lqnets", w_bits=2, a_bits=3))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match="w_bits must be an integer from 1 to 8"):
        wnq.get_method("lqnets", w_bits=9)
    with pytest.raises(ValueError, match="activation must be one of"):
        wnq.get_method("lqnets", activation="lq")
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        wnq.get_method("lqnets").weight(torch.ones(3), 0)
