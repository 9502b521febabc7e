"""BinaryConnect against NumPy typed from its algorithm: sign, clip, and the drawn signs."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.methods.binaryconnect import ClippedSign
from wnq.prepared import deployed
from wnq.testing import LAWS, METHOD_LAWS

QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def seeded(stochastic):
    """Build from a set state of the generator, so that quantizers of equal weights draw equal numbers."""

    def make(x):
        torch.manual_seed(0)
        return wnq.get_method("binaryconnect", stochastic=stochastic).weight(x, 0)

    return make


def test_by_hand():
    x = torch.tensor([[0.3, -2.0], [0.0, 1.5]], requires_grad=True)
    quantizer = wnq.get_method("binaryconnect").weight(x.detach(), 0)
    y = quantizer(x)
    assert y.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    g = torch.tensor([[1.0, -2.0], [3.0, 4.0]])
    y.backward(g)
    assert torch.equal(x.grad, g)  # also for |w| > 1
    quantized = quantizer.quantize(x)
    assert quantized.codes.tolist() == [[1, 0], [1, 1]]
    assert quantized.codebook.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_training_equals_the_algorithm_that_clips_after_the_update(dtype, tolerance, momentum):
    """Sign in the passes, then w = clip(w - update): typed in NumPy for a least-squares problem."""
    generator = np.random.default_rng(0)
    inputs, target = generator.normal(size=(20, 6)), generator.normal(size=(20, 3))
    w, velocity = generator.normal(size=(3, 6)), np.zeros((3, 6))
    layer = nn.Linear(6, 3, bias=False).to(dtype)
    layer.weight.data.copy_(torch.tensor(w))
    model = nn.Sequential(layer)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("binaryconnect"), first_last_bits=None))
    optimizer = torch.optim.SGD(model.parameters(), lr=2.0, momentum=momentum)
    w = np.clip(w, -1, 1)
    clipped = 0
    for _ in range(12):
        optimizer.zero_grad()
        output = model(torch.tensor(inputs, dtype=dtype))
        expected = inputs @ np.where(w >= 0, 1.0, -1.0).T
        assert np.abs(output.detach().numpy() - expected).max() < 50 * tolerance
        (0.5 * (output - torch.tensor(target, dtype=dtype)).square().mean()).backward()
        optimizer.step()
        velocity = momentum * velocity + (expected - target).T @ inputs / target.size
        clipped += (np.abs(w - 2 * velocity) > 1).sum()
        w = np.clip(w - 2 * velocity, -1, 1)
    assert clipped > 10
    stored = model[0].parametrizations.weight.original.detach().clamp(-1, 1).numpy()
    assert np.abs(stored - w).max() < 50 * tolerance


def test_weights_are_clipped_in_place_in_training_only():
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].weight.data.fill_(3.0)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("binaryconnect"), first_last_bits=None))
    original = model[0].parametrizations.weight.original
    model.eval()(torch.ones(2, 4))
    assert (original == 3).all()
    model.train()(torch.ones(2, 4))
    assert (original == 1).all()


@pytest.mark.parametrize("name", ["binaryconnect", "bnn"])
def test_a_second_forward_before_the_backward_is_allowed(name):
    """The clip must not count as a change of what the first pass saved."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(name, a_bits=32), first_last_bits=None))
    x = torch.randn(5, 4)
    (model(x).sum() + model(2 * x).sum()).backward()
    expected = 3 * x.sum(0).expand(3, 4)
    assert torch.allclose(model[0].parametrizations.weight.original.grad, expected, atol=1e-5)


def test_signs_are_drawn_with_the_hard_sigmoids_probability():
    quantizer = ClippedSign(window=False, stochastic=True)
    weights = torch.tensor([-1.0, -0.5, 0.0, 0.4, 1.0])
    w = weights.repeat(20_000, 1)
    torch.manual_seed(0)
    quantizer.observe_(w)
    y = quantizer(w)
    assert set(y.unique().tolist()) == {-1.0, 1.0}
    share = (y > 0).double().mean(0)
    expected = ((weights + 1) / 2).clamp(0, 1).double()
    # Five standard deviations of a mean of 20000 draws; certain at the ends.
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / 20_000).sqrt()).all()


def test_drawn_signs_hold_for_one_step_and_evaluation_is_the_sign():
    w = 0.5 * torch.randn(40, 50, generator=torch.Generator().manual_seed(1))
    quantizer = ClippedSign(window=False, stochastic=True)
    assert torch.equal(quantizer(w), torch.where(w >= 0, 1.0, -1.0))  # nothing drawn yet
    torch.manual_seed(2)
    quantizer.observe_(w)
    first = quantizer(w)
    assert torch.equal(first, quantizer(w))
    assert torch.equal(first, quantizer.quantize(w).dequantize())
    quantizer.observe_(w)
    assert not torch.equal(first, quantizer(w))
    sign = torch.where(w >= 0, 1.0, -1.0)
    assert torch.equal(deployed(quantizer, w).dequantize(), sign)
    assert quantizer.training
    assert not torch.equal(quantizer(w), sign)
    assert torch.equal(quantizer.eval()(w), sign)
    assert not quantizer.state_dict()


def test_the_generators_seed_decides_the_draw():
    def trained(seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5))
        wnq.quantize_(
            model, wnq.make_plan(model, wnq.get_method("binaryconnect", stochastic=True), first_last_bits=None)
        )
        torch.manual_seed(seed)
        return model(torch.ones(1, 6))

    assert torch.equal(trained(3), trained(3))
    assert not torch.equal(trained(3), trained(4))


def test_the_gradient_of_drawn_signs_is_the_identity():
    w = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    quantizer = ClippedSign(window=False, stochastic=True)
    quantizer.observe_(w)
    w.requires_grad_()
    g = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
    quantizer(w).backward(g)
    assert torch.equal(w.grad, g)


def test_a_stochastic_model_is_stored_by_its_signs(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    fresh = copy.deepcopy(model)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("binaryconnect", stochastic=True), first_last_bits=None))
    x = torch.randn(16, 6)
    model(x)
    copied, file = copy.deepcopy(model), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    pickled = torch.load(file, weights_only=False)
    assert torch.equal(copied[0].weight, model[0].weight)  # the draw is copied and pickled
    assert torch.equal(pickled[0].weight, model[0].weight)
    model.eval()
    expected = model(x)
    wnq.save(model, tmp_path / "model.safetensors")
    assert torch.equal(wnq.load(tmp_path / "model.safetensors", fresh)(x), expected)
    # Frozen in training mode, after another draw: the signs all the same.
    assert torch.equal(wnq.freeze_(pickled.train()).eval()(x), expected)


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
@pytest.mark.parametrize("stochastic", [False, True])
def test_laws(law, stochastic):
    # The draw is no part of the state; "portable" compares two quantizers, which seeded() lets draw alike.
    law(seeded(stochastic))


def test_laws_in_evaluation_need_no_seed():
    for law in QUICK:
        law(lambda x: wnq.get_method("binaryconnect", stochastic=True).weight(x, 0).eval())


def test_compiles():
    COMPILES(seeded(True))


def test_a_model_compiles_with_its_clip():
    model = nn.Sequential(nn.Linear(4, 3))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("binaryconnect"), first_last_bits=None))
    original = model[0].parametrizations.weight.original
    compiled = torch.compile(model)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        original.data.mul_(100)
        compiled(x).sum().backward()
        assert original.abs().max() == 1
    assert torch.allclose(original.grad, 2 * x.sum(0).expand(3, 4), atol=1e-5)


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"stochastic": True}, {"a_bits": 3}])
def test_method_laws(law, options):
    law(wnq.get_method("binaryconnect", **options))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 2"):
        wnq.get_method("binaryconnect", w_bits=2)
    with pytest.raises(ValueError, match="takes no normalizer in front: its values have no scale"):
        wnq.get_method("binaryconnect", normalize="max_abs")
