"""WNQ against functions typed from its formulas in NumPy, in float64."""

import numpy as np
import pytest
import torch

import wnq
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform


def numpy_rounding(u, bits, grid):
    """Q_k as written in the method's definition; ties and zero go up on the full grid."""
    if grid == "full":
        top = 2**bits - 1
        if bits == 1:
            return np.where(u >= 0, 1.0, -1.0)
        return 2 * np.floor(top * (u + 1) / 2 + 0.5) / top - 1
    top = 2 ** (bits - 1) - 1
    return np.rint(top * u) / top


def numpy_wnq(w, bits, grid, scale):
    m = np.abs(w).max()
    q = numpy_rounding(w / m, bits, grid)
    factor = {"max": m, "one": 1.0, "optimal": (w * q).sum() / (q * q).sum()}[scale]
    return factor * q


def numpy_gradient(w, g, bits, grid, scale, gain):
    """dL/dw for dL/dw_q = g, from the closed form, with the share ``gain`` of what flows through the maximum."""
    m = np.abs(w).max()
    u = w / m
    q = numpy_rounding(u, bits, grid)
    at_max = np.abs(w) == m
    direction = np.sign(w) * at_max / at_max.sum()
    if scale == "one":
        return g / m + gain * direction * (-(g * u).sum() / m)
    if scale == "max":
        return g + gain * direction * (g * (q - u)).sum()
    factor = (w * q).sum() / (q * q).sum()
    return factor / m * (g + gain * direction * -(g * u).sum())


def weights(shape, seed, tail=True):
    generator = np.random.default_rng(seed)
    return generator.standard_t(3, size=shape) * 0.1 if tail else generator.normal(size=shape) * 0.1


CASES = [
    (bits, grid) for bits in range(1, 9) for grid in ("full", "symmetric") if not (bits == 1 and grid == "symmetric")
]


@pytest.mark.parametrize(("bits", "grid"), CASES)
@pytest.mark.parametrize("scale", ["max", "one", "optimal"])
@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
def test_values_and_gradient_equal_the_closed_form(bits, grid, scale, gain):
    for seed, shape in enumerate([(6, 4, 3, 3), (5, 9), (1, 7)]):
        w = weights(shape, seed)
        g = np.random.default_rng(100 + seed).normal(size=shape)
        method = wnq.get_method("wnq", w_bits=bits, grid=grid, scale=scale, max_gain=gain)
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            x = torch.tensor(w, dtype=dtype, requires_grad=True)
            y = method.weight(x.detach(), 0)(x)
            y.backward(torch.tensor(g, dtype=dtype))
            # The formula is evaluated at the weights the quantizer sees. Sums of some hundred terms: relative to their size.
            seen = x.detach().double().numpy()
            seen_g = torch.tensor(g, dtype=dtype).double().numpy()
            expected = numpy_wnq(seen, bits, grid, scale)
            assert np.abs(y.detach().double().numpy() - expected).max() <= tolerance * max(1, np.abs(expected).max())
            gradient = numpy_gradient(seen, seen_g, bits, grid, scale, gain)
            assert np.abs(x.grad.double().numpy() - gradient).max() <= tolerance * max(1, np.abs(gradient).max())


def test_gradient_at_the_maximum_is_minus_the_others_sum():
    # Section 3 of the definition, scale one: dL/dw_i* = -(s*/m) sum over j != i* of g_j u_j.
    w = torch.tensor([0.3, -0.8, 0.1, 0.5], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64)
    wnq.get_method("wnq", w_bits=3, scale="one").weight(w.detach(), 0)(w).backward(g)
    u = w.detach() / 0.8
    others = (g * u).sum() - g[1] * u[1]
    assert w.grad[1].item() == pytest.approx(-(-1 / 0.8) * others.item(), abs=1e-12)
    assert torch.allclose(w.grad[[0, 2, 3]], g[[0, 2, 3]] / 0.8, atol=1e-12)


def test_smooth_part_passes_gradcheck():
    w = torch.tensor(weights((4, 5), 7), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: max_abs(x)[0], (w,))
    assert torch.autograd.gradcheck(lambda x: max_abs(x, 0, granularity="channel")[0], (w,))
    assert torch.autograd.gradcheck(lambda x: max_abs(x)[1], (w,))


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_scale_invariance(bits, granularity):
    """With scale one the output does not change when w grows, so sum w dL/dw = 0 and |w| cannot shrink without decay."""
    w = torch.tensor(weights((6, 11), 3), requires_grad=True)
    quantizer = wnq.get_method("wnq", w_bits=bits, scale="one", granularity=granularity).weight(w.detach(), 0)
    quantizer(w).backward(torch.randn(6, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    product = (w * w.grad).sum(1 if granularity == "channel" else (0, 1))
    assert product.abs().max() < 1e-12 * (w.abs() * w.grad.abs()).sum()
    assert torch.equal(quantizer(4 * w), quantizer(w))


def test_behind_a_batchnorm_the_maximum_gets_the_step_gradient():
    """Scale one behind a BatchNorm: sum g Q = 0, so dL/dm = (1/m) sum g (Q - u)."""
    torch.manual_seed(0)
    w = torch.tensor(weights((8, 6), 5), requires_grad=True)
    x = torch.randn(64, 6, dtype=torch.float64)
    quantizer = wnq.get_method("wnq", w_bits=2, scale="one").weight(w.detach(), 0)
    q = quantizer(w)
    q.retain_grad()
    z = x @ q.T
    normalized = (z - z.mean(0)) / z.var(0, unbiased=False).sqrt()
    normalized.pow(3).mul(torch.randn(64, 8, dtype=torch.float64)).sum().backward()
    u, m = w.detach() / w.detach().abs().max(), w.detach().abs().max()
    assert (q.grad * q.detach()).sum().abs() < 1e-9 * (q.grad * q.detach()).abs().sum()
    through_max = -(q.grad * u).sum() / m
    assert through_max.item() == pytest.approx((q.grad * (q.detach() - u)).sum().item() / m.item(), rel=1e-9)


def test_tied_maxima_share_the_gradient_evenly():
    w = torch.tensor([0.5, -0.5, 0.2, 0.1], dtype=torch.float64, requires_grad=True)
    g = torch.tensor([1.0, -2.0, 3.0, 4.0], dtype=torch.float64)
    wnq.get_method("wnq", w_bits=3).weight(w.detach(), 0)(w).backward(g)
    expected = numpy_gradient(w.detach().numpy(), g.numpy(), 3, "full", "max", 1.0)
    assert np.abs(w.grad.numpy() - expected).max() < 1e-12
    through = w.grad - g
    assert through[0].item() == pytest.approx(-through[1].item(), abs=1e-12)  # same share, opposite signs
    assert through[2:].abs().max() == 0
    # Their order in memory does not matter.
    flipped = w.detach().flip(0).requires_grad_()
    wnq.get_method("wnq", w_bits=3).weight(w.detach(), 0)(flipped).backward(g.flip(0))
    assert torch.allclose(flipped.grad.flip(0), w.grad, atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_equals_each_channel_alone(axis):
    w = torch.tensor(weights((5, 4, 3), 9))
    per_channel = wnq.get_method("wnq", w_bits=3, granularity="channel").weight(w, axis)
    alone = wnq.get_method("wnq", w_bits=3)
    for channel, whole in zip(w.unbind(axis), per_channel(w).unbind(axis), strict=True):
        assert torch.equal(alone.weight(channel, 0)(channel), whole)


def test_learned_scale_starts_at_the_maximum_and_learns():
    w = torch.tensor(weights((4, 6), 11), dtype=torch.float32)
    quantizer = wnq.get_method("wnq", w_bits=2, scale="learned").weight(w, 0)
    assert torch.equal(quantizer(w), wnq.get_method("wnq", w_bits=2).weight(w, 0)(w))
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    quantizer(w).backward(g)
    q = numpy_rounding((w / w.abs().max()).double().numpy(), 2, "full")
    assert quantizer.gain.grad.item() == pytest.approx((g.double().numpy() * q).sum(), rel=1e-5)


def test_optimal_scale_is_the_least_squares_one():
    w = torch.tensor(weights((30, 20), 12))
    best = wnq.get_method("wnq", w_bits=2, scale="optimal").weight(w, 0)
    error = (best(w) - w).square().sum()
    for factor in (0.97, 0.999, 1.001, 1.03):
        assert (factor * best(w) - w).square().sum() > error


@pytest.mark.parametrize(("bits", "grid", "levels"), [
    (1, "full", [-1, 1]),
    (2, "full", [-3, -1, 1, 3]),
    (2, "symmetric", [-1, 0, 1]),
    (3, "symmetric", [-3, -2, -1, 0, 1, 2, 3]),
    (3, "full", [-7, -5, -3, -1, 1, 3, 5, 7]),
])  # fmt: skip
def test_levels_by_hand(bits, grid, levels):
    quantized = Uniform(bits, grid).quantize(torch.linspace(-1, 1, 501))
    assert quantized.levels.tolist() == levels
    assert quantized.scale.item() == pytest.approx(1 / max(levels))
    assert sorted(set(quantized.codes.tolist())) == list(range(len(levels)))


def test_zero_is_the_smallest_positive_level_of_the_full_grid_and_exact_on_the_symmetric_one():
    for bits in range(1, 9):
        assert Uniform(bits)(torch.zeros(1)).item() == pytest.approx(1 / (2**bits - 1))
    for bits in range(2, 9):
        assert Uniform(bits, "symmetric")(torch.zeros(1)).item() == 0


def test_an_eight_bit_symmetric_grid_fits_int8():
    levels = Uniform(8, "symmetric").quantize(torch.randn(4)).levels
    assert (levels.min(), levels.max()) == (-127, 127)


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 0}, "bits must be an integer from 1 to 8 \\(or 32 for float weights\\), got 0"),
    ({"w_bits": 9}, "\\(or 32 for float weights\\), got 9"),
    ({"w_bits": 2.5}, "\\(or 32 for float weights\\), got 2.5"),
    ({"w_bits": True}, "got True"),
    ({"w_bits": 1, "grid": "symmetric"}, "bits of the symmetric grid must be an integer from 2 to 8"),
    ({"a_bits": 12}, "a_bits .* from 1 to 8, got 12"),
    ({"grid": "ful"}, "grid must be one of 'full', 'symmetric', got 'ful'"),
    ({"scale": "maximum"}, "scale must be one of"),
    ({"granularity": "row"}, "granularity must be one of"),
    ({"max_gain": -1}, "max_gain must be a finite number >= 0, got -1"),
    ({"max_gain": float("nan")}, "max_gain"),
    ({"activation": "relu"}, "activation must be one of"),
    ({"wbits": 3}, "no option 'wbits'. Did you mean 'w_bits'"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("wnq", **options)


def test_unknown_method_names_the_closest():
    with pytest.raises(ValueError, match=r"unknown method 'wqn'. Did you mean 'wnq'.*Available: "):
        wnq.get_method("wqn")


def test_registering_a_taken_name_or_a_method_without_defaults_is_refused():
    def wnq_again():
        raise NotImplementedError

    wnq_again.__name__ = "wnq"
    with pytest.raises(ValueError, match="'wnq' is registered already"):
        wnq.register(paper="")(wnq_again)

    def needs_bits(w_bits):
        raise NotImplementedError

    with pytest.raises(ValueError, match=r"parameters \['w_bits'\] need defaults"):
        wnq.register(paper="")(needs_bits)


def test_steps_toward_zero_shrink_the_tail():
    """The mechanism in one layer: regression on a heavy-tailed teacher lowers the crest factor only with gradient attached."""
    crests = {}
    for gain in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        teacher = torch.tensor(weights((1, 400), 21), dtype=torch.float32)
        w = teacher.clone().requires_grad_()
        quantizer = wnq.get_method("wnq", w_bits=3, max_gain=gain).weight(w.detach(), 0)
        for _ in range(800):
            x = torch.randn(64, 400, generator=generator)
            loss = ((x @ (quantizer(w) - teacher).T) ** 2).mean()
            (gradient,) = torch.autograd.grad(loss, w)
            with torch.no_grad():
                w -= 0.002 * gradient
        crests[gain] = (w.abs().max() / w.square().mean().sqrt()).item()
    assert crests[1.0] < 0.75 * crests[0.0]
