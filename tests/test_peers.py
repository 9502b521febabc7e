"""The same numbers as other people's code: bit for bit, or a test says by how much, and why.

torch's own fused kernels are always there; brevitas and torchao are compared where they are installed.
"""

import math

import pytest
import torch

import wnq
from wnq.learned_step import LearnedStep
from wnq.methods import list_methods

REGISTERED = {info.name for info in list_methods()}
GRANULARITIES = ("tensor", "channel")
DTYPES = (torch.float32, torch.float64)


def weights(dtype=torch.float32, *, seed=0, shape=(12, 40), power=2):
    """Weights with a tail, and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    g = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (w * w.abs() ** (power - 1)).to(dtype), g.to(dtype)


def ours(w, g, name, **options):
    """Values and gradient of one of the library's methods."""
    x = w.clone().requires_grad_()
    quantizer = wnq.get_method(name, **options).weight(w, 0)
    y = quantizer(x)
    y.backward(g)
    return y.detach(), x.grad


# torch.fake_quantize_per_tensor_affine and its relatives


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", range(1, 9))
def test_minmax_equals_torchs_fake_quantize(bits, granularity):
    """Values and gradients bit for bit: torch's mask never bites, because the range covers every weight."""
    w, g = weights()
    w = w + 0.3
    codes = wnq.get_method("minmax", w_bits=bits, granularity=granularity).weight(w, 0).quantize(w)
    x = w.clone().requires_grad_()
    top = 2**bits - 1
    if granularity == "tensor":
        zero = int(-codes.levels[0])
        expected = torch.fake_quantize_per_tensor_affine(x, codes.scale.item(), zero, 0, top)
    else:
        zero = -codes.levels[:, 0]
        assert len(zero.unique()) > 1 or bits == 1
        expected = torch.fake_quantize_per_channel_affine(x, codes.scale, zero, 0, 0, top)
    expected.backward(g)
    value, gradient = ours(w, g, "minmax", w_bits=bits, granularity=granularity)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, x.grad)


@pytest.mark.parametrize("is_weight", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_equals_torchs_learnable_kernel_but_at_the_edge_of_the_range(bits, is_weight):
    """Values bit for bit. Gradients differ only where x/s lies at a bound or within half a step outside it.

    LSQ clips first (Eq. 1 and 3: gradient 1 strictly inside the bounds), torch rounds first and asks whether the integer is in
    range. So torch also passes the gradient in the half step outside, and gives the step round(x/s) - x/s there.
    """
    x, g = weights(power=1, seed=bits)
    x = x if is_weight else x.relu()
    quantizer = LearnedStep(bits, is_weight=is_weight)
    (quantizer.reset_ if is_weight else quantizer.observe_)(x)
    low = -(2 ** (bits - 1)) if is_weight else 0
    high = low + 2**bits - 1
    factor = ((x.numel() if is_weight else x[0].numel()) * high) ** -0.5

    def run(g):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantizer.step.grad = None
        y = quantizer(a)
        y.backward(g)
        step, zero = quantizer.step.detach().reshape(1).clone().requires_grad_(), torch.zeros(1, requires_grad=True)
        expected = torch._fake_quantize_learnable_per_tensor_affine(b, step, zero, low, high, factor)
        expected.backward(g)
        assert torch.equal(y, expected)
        return a.grad, b.grad, quantizer.step.grad.item(), step.grad.item()

    scaled = x / quantizer.step.detach()
    integer = scaled.round()
    edge = (integer >= low) & (integer <= high) & ~((scaled > low) & (scaled < high))
    ours_x, torchs_x, _, _ = run(g)
    assert torch.equal(ours_x == torchs_x, ~edge)
    assert (ours_x[edge] == 0).all() and torch.equal(torchs_x[edge], g[edge])
    # Of the step: without the edge, the same sum in another order (float32, 480 terms).
    _, _, ours_s, torchs_s = run(g * ~edge)
    size = (g * integer.clamp(low, high)).abs().sum().item() * factor
    assert abs(ours_s - torchs_s) < 1e-6 * size
    # With it, each element of the edge carries the bound here and what rounding added there.
    _, _, ours_s, torchs_s = run(g * edge)
    bound, added = integer[edge], (integer - scaled)[edge]
    assert ours_s == pytest.approx((g[edge] * bound).sum().item() * factor, abs=1e-6 * size)
    assert torchs_s == pytest.approx((g[edge] * added).sum().item() * factor, abs=1e-6 * size)


# brevitas


def brevitas_weight(quant, w, g, **options):
    layers = pytest.importorskip("brevitas.nn", exc_type=ImportError, reason="brevitas is not installed")
    layer = layers.QuantLinear(w.shape[1], w.shape[0], bias=False, weight_quant=quant(), **options).to(w.dtype)
    with torch.no_grad():
        layer.weight.copy_(w)
    value = layer.quant_weight().value
    value.backward(g)
    return value.detach(), layer.weight.grad


def brevitas_uniform(granularity):
    from brevitas import quant

    return quant.Int8WeightPerTensorFloat if granularity == "tensor" else quant.Int8WeightPerChannelFloat


def brevitas_mean(kind, granularity, **options):
    """Binary or ternary weights with the mean absolute value as scale, which brevitas composes but does not name."""
    from brevitas.inject.enum import (
        BitWidthImplType,
        QuantType,
        RestrictValueType,
        ScalingImplType,
        ScalingPerOutputType,
        StatsOp,
    )
    from brevitas.quant.solver import WeightQuantSolver

    settings = {
        "quant_type": QuantType[kind],
        "scaling_impl_type": ScalingImplType.STATS,
        "scaling_stats_op": StatsOp.AVE,
        "restrict_scaling_type": RestrictValueType.FP,
        "scaling_per_output_type": ScalingPerOutputType[granularity.upper()],
        "bit_width_impl_type": BitWidthImplType.CONST,
        "bit_width": 1 if kind == "BINARY" else 2,
        "narrow_range": True,
        "signed": True,
    }
    return type(WeightQuantSolver)("Mean", (WeightQuantSolver,), settings | options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_wnq_symmetric_equals_brevitas_default_weight_quantizer(bits, granularity, dtype):
    """Values bit for bit. Gradients to a few roundings: brevitas multiplies by the scale and divides by it again."""
    w, g = weights(dtype)
    expected, slope = brevitas_weight(lambda: brevitas_uniform(granularity), w, g, weight_bit_width=bits)
    value, gradient = ours(w, g, "wnq", w_bits=bits, grid="symmetric", scale="max", granularity=granularity)
    assert torch.equal(value, expected)
    assert (gradient - slope).abs().max() < 8 * torch.finfo(dtype).eps * slope.abs().max()
    # The gradient through the maximum is really there, in both.
    _, detached = ours(w, g, "wnq", w_bits=bits, grid="symmetric", max_gain=0.0, granularity=granularity)
    assert (gradient - detached).abs().max() > 1e-3 * slope.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_bit_equals_brevitas_binary_with_mean_scale(granularity, dtype):
    """Values bit for bit; gradients differ by design.

    brevitas differentiates through the mean and multiplies by it: XNOR-Net's formula 1/n + alpha, without its window |w| <= 1.
    bwn and one-bit DoReFa pass the gradient straight through.
    """
    w, g = weights(dtype)
    expected, slope = brevitas_weight(lambda: brevitas_mean("BINARY", granularity), w, g)
    value, gradient = ours(w, g, *(["dorefa"] if granularity == "tensor" else ["bwn"]), w_bits=1)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, g)
    dims = (0, 1) if granularity == "tensor" else (1,)
    alpha, sign = w.abs().mean(dims, keepdim=True), w.sign()
    count = math.prod(w.shape[d] for d in dims)
    formula = alpha * g + sign * (g * sign).sum(dims, keepdim=True) / count
    assert (slope - formula).abs().max() < 16 * torch.finfo(dtype).eps * formula.abs().max()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_twn_keeps_the_weights_that_brevitas_ternary_keeps(granularity):
    """The same ternary pattern; other magnitudes: brevitas has one statistic, for the threshold and for the value."""
    w, g = weights()
    expected, _ = brevitas_weight(lambda: brevitas_mean("TERNARY", granularity, threshold=0.7), w, g)
    value, _ = ours(w, g, "twn", threshold=0.7, granularity=granularity)
    assert torch.equal(value.sign(), expected.sign())
    assert 0 < (value == 0).float().mean() < 1
    assert (value - w).square().sum() < (expected - w).square().sum()


# torchao's PARQ


def parq():
    return pytest.importorskip("torchao.prototype.parq.quant", exc_type=ImportError, reason="torchao is not installed")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize(
    ("grid", "bits"), [("full", 1), *((grid, k) for grid in ("full", "symmetric") for k in (2, 3, 4, 8))]
)
def test_wnq_equals_parqs_uniform_quantizers(grid, bits, granularity, dtype):
    """Values bit for bit (PARQ's quantizers define no gradient): UnifQuantizer by the maximum, and MaxUnifQuantizer."""
    quantizers = parq()
    w, g = weights(dtype)
    peer = quantizers.UnifQuantizer(scale_method="max") if grid == "full" else quantizers.MaxUnifQuantizer()
    expected, _ = peer.quantize(w, bits, dim=None if granularity == "tensor" else 1)
    value, _ = ours(w, g, "wnq", w_bits=bits, grid=grid, granularity=granularity)
    assert torch.equal(value, expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_one_bit_equals_parqs_least_squares_binary(granularity):
    """To one rounding: PARQ returns w - (w - v), this library v."""
    w, g = weights()
    expected, _ = parq().LSBQuantizer().quantize(w, 1, dim=None if granularity == "tensor" else 1)
    value, _ = ours(w, g, *(["dorefa"] if granularity == "tensor" else ["bwn"]), w_bits=1)
    assert torch.equal(value.sign(), expected.sign())
    assert (value - expected).abs().max() <= torch.finfo(w.dtype).eps * w.abs().max()


@pytest.mark.skipif("sketching" not in REGISTERED, reason="the method is not there")
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_direct_sketching_equals_parqs_greedy_binary(bits):
    """To a few roundings: PARQ subtracts the last residual from the weights, this library adds the terms up."""
    w, g = weights(torch.float64)
    expected, _ = parq().LSBQuantizer().quantize(w, bits, dim=1)
    value, gradient = ours(w, g, "sketching", w_bits=bits, refined=False)
    assert (value - expected).abs().max() <= 4 * torch.finfo(w.dtype).eps * w.abs().max()
    assert torch.equal(gradient, g)


@pytest.mark.skipif("lqnets" not in REGISTERED, reason="the method is not there")
def test_lqnets_comes_near_parqs_optimal_two_bits():
    """PARQ solves two bits exactly; LQ-Nets' alternation is a descent to a local optimum, here within 3 % of it."""
    w, g = weights(torch.float64, power=1, shape=(1, 600))
    expected, _ = parq().LSBQuantizer(optimal=True).quantize(w, 2)
    greedy, _ = parq().LSBQuantizer().quantize(w, 2)
    value, _ = ours(w, g, "lqnets", w_bits=2, a_bits=32)
    best, ours_, first = ((w - q).square().sum() for q in (expected, value, greedy))
    assert best <= ours_ * (1 + 1e-9) < 1.03 * best < first


def test_twn_is_another_rule_than_parqs_ternary_and_nearer_to_the_weights():
    """PARQ's are the grid by the maximum, thresholds at a third of it, and 1.1 mean|w|, thresholds at half of that."""
    w, g = weights(power=1, shape=(8, 500))
    value, _ = ours(w, g, "twn")
    quantizers = parq()
    for peer, scale in (
        (quantizers.TernaryUnifQuantizer(), w.abs().max() / 1.5),
        (quantizers.LSBQuantizer(), 1.1 * w.abs().mean()),
    ):
        expected, _ = peer.quantize(w, 0)
        assert torch.allclose(expected, (w / scale).round().clamp(-1, 1) * scale)
        assert (value - w).square().sum() < 0.9 * (expected - w).square().sum()
