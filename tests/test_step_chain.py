"""The fast paths of a training step, against chains of plain differentiable operations."""

import copy
import itertools

import pytest
import torch

import wnq
from wnq.learned_step import SMALLEST_STEP, LearnedStep, RoundToStep, positive
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform, along_axis
from wnq.ste import grad_scale, straight_through


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def weight_chain(w, bits, grid, granularity, axis, gain):
    """m * Q(w / m), one operation after another."""
    u, scale = max_abs(w, axis, granularity=granularity, max_gain=gain)
    rounding = Uniform(bits, grid)
    return rounding.integers(u) * (scale / rounding.divisor)


def step_chain(step, factor):
    return grad_scale(straight_through(step.abs().clamp(min=SMALLEST_STEP), step.abs()), factor)


def input_chain(x, step, low, high):
    scaled = x / step
    inside = (scaled > low) & (scaled < high)
    passed = torch.where(inside, scaled, scaled.detach().clamp(low, high))
    return straight_through(scaled.clamp(low, high).round(), passed) * step


def both(function, chain, *tensors, grad):
    """Return values and gradients of two functions of the same leaves."""
    found = []
    for run in (function, chain):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = run(*leaves)
        y.backward(grad)
        found.append([y.detach(), *(leaf.grad for leaf in leaves)])
    return found


GRIDS = [(1, "full"), (2, "full"), (3, "full"), (8, "full"), (2, "symmetric"), (3, "symmetric"), (8, "symmetric")]


def weights(kind, dtype):
    w = randn(6, 4, 3, 3, dtype=dtype)
    if kind == "heavy":
        return w**3
    if kind == "tied":
        w[0, 0], w[2, 1, 1], w[4, 3, 2, 2] = 4.0, -4.0, 4.0
    if kind == "dead channel":
        w[1], w[:, 2] = 0.0, 0.0
    if kind == "zeros":
        w.zero_()
    if kind == "close":  # the neighbours of the maximum are no maxima
        w.clamp_(-1, 1)[0, 0, 0] = torch.tensor([3.0, 3.0, 3.0], dtype=dtype)
        w[0, 0, 0, 1:] = torch.nextafter(w[0, 0, 0, 1:], torch.zeros(2, dtype=dtype))
    return w


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "tied", "dead channel", "zeros", "close"])
@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_weights_by_their_maximum_equal_the_chain(bits, grid, kind):
    for dtype, granularity, axis, gain in itertools.product(
        (torch.float64, torch.float32), ("tensor", "channel"), (0, 1), (1.0, 0.3, 0.0)
    ):
        w, g = weights(kind, dtype), randn(6, 4, 3, 3, seed=1, dtype=dtype)
        options = {"w_bits": bits, "grid": grid, "granularity": granularity, "max_gain": gain}
        quantizer = wnq.get_method("wnq", **options).weight(w, axis)
        fast, chain = both(
            quantizer, lambda x: weight_chain(x, bits, grid, granularity, axis, gain), w, grad=g  # noqa: B023
        )  # fmt: skip
        assert torch.equal(fast[0], chain[0])
        assert torch.equal(fast[0], quantizer.quantize(w).dequantize())
        # At the maximum a sum of n <= 216 terms, in another order: n/2 ulp of their size, and the chain's own rounding.
        size = (g * (fast[0] - w)).abs().sum() / w.abs().max().clamp(min=1e-30) + g.abs().max()
        allowed = 1e-12 if dtype == torch.float64 else 216 * torch.finfo(dtype).eps
        assert (fast[1] - chain[1]).abs().max() <= allowed * size


def test_the_chain_is_kept_where_rounding_scales_the_gradient():
    w, g = randn(5, 7), randn(5, 7, seed=1)
    plain, scaled = (wnq.get_method("wnq", ewgs=delta).weight(w, 0) for delta in (0.0, 0.02))
    a, b = both(plain, scaled, w, grad=g)
    assert torch.equal(a[0], b[0])
    assert not torch.allclose(a[1], b[1])


def test_a_nan_among_the_weights_stays_visible():
    for bits, granularity in itertools.product((1, 3), ("tensor", "channel")):
        w = randn(4, 5)
        w[1, 2] = float("nan")
        y = wnq.get_method("wnq", w_bits=bits, granularity=granularity).weight(randn(4, 5), 0)(w)
        assert y[1].isnan().all()
        assert y[0].isnan().all() == (granularity == "tensor")
        assert Uniform(bits)(w)[1, 2].isnan()


@pytest.mark.parametrize("value", [0.3, -0.3, 0.0, 1e-20, -1e-20])
def test_magnitude_of_a_step_equals_its_chain_bit_for_bit(value):
    for dtype in (torch.float64, torch.float32):
        step, g = torch.tensor(value, dtype=dtype), randn(seed=2, dtype=dtype)
        fast, chain = both(lambda s: positive(s, 0.037), lambda s: step_chain(s, 0.037), step, grad=g)
        assert all(torch.equal(a, b) for a, b in zip(fast, chain, strict=True))


LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.mark.parametrize(("low", "high"), [(0.0, 7.0), (-4.0, 3.0), (0.0, 1.0)])
def test_rounding_to_a_step_equals_the_chain(low, high):
    for dtype, x_layout, g_layout in itertools.product((torch.float64, torch.float32), LAYOUTS, LAYOUTS):
        x = (randn(3, 6, 5, 5, dtype=dtype) * 2).contiguous(memory_format=x_layout)
        g = randn(3, 6, 5, 5, seed=1, dtype=dtype).contiguous(memory_format=g_layout)
        step = torch.tensor(0.4, dtype=dtype)
        fast, chain = both(
            lambda x, s: RoundToStep.apply(x, s, low, high), lambda x, s: input_chain(x, s, low, high), x, step, grad=g
        )
        assert torch.equal(fast[0], chain[0])
        # The chain multiplies the gradient by the step and divides it again: two roundings.
        assert torch.allclose(fast[1], chain[1], rtol=4 * torch.finfo(dtype).eps, atol=0)
        # Sums of n = 450 terms in another order: at most n ulp of their size.
        size = ((g * fast[0]).abs().sum() + (g * x).abs().sum()) / step
        assert (fast[2] - chain[2]).abs() <= 450 * torch.finfo(dtype).eps * size


def test_an_expanded_gradient_and_an_empty_batch_pass():
    for shape in ((2, 3, 4, 4), (0, 3, 4, 4)):
        x, step = randn(*shape).requires_grad_(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        RoundToStep.apply(x, step, 0.0, 3.0).sum().backward()
        inside = (x.detach() / 0.4 > 0) & (x.detach() / 0.4 < 3)
        assert torch.equal(x.grad, inside.double())
        assert step.grad.isfinite()


def test_the_gradient_that_comes_in_is_left_as_it_was():
    x, g = randn(4, 5).requires_grad_(), randn(4, 5, seed=1)
    before = g.clone()
    RoundToStep.apply(x, torch.tensor(0.4, dtype=torch.float64), 0.0, 3.0).backward(g)
    assert torch.equal(g, before)
    assert x.grad.data_ptr() != g.data_ptr()


def test_an_input_quantizer_equals_its_chain_with_its_factor():
    x, g = randn(4, 6, 5, 5).relu(), randn(4, 6, 5, 5, seed=1)
    quantizer = LearnedStep(3, is_weight=False).double()
    quantizer.observe_(x)
    twin = copy.deepcopy(quantizer)
    quantizer(x).backward(g)
    input_chain(x, step_chain(twin.step, (150 * 7) ** -0.5), 0.0, 7.0).backward(g)
    assert quantizer.step.grad.item() == pytest.approx(twin.step.grad.item(), rel=1e-12)


def test_along_axis_broadcasts_as_the_chain_does():
    w = randn(3, 4, 2)
    for axis in (0, 1):
        scale = wnq.get_method("wnq", granularity="channel").weight(w, axis).quantize(w).scale
        assert torch.equal(along_axis(scale, 3, axis), max_abs(w, axis, granularity="channel")[1] / 7)
