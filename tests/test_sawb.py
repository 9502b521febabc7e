"""SAWB against NumPy typed from its equation, and its clip on a Gaussian."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.sawb import COEFFICIENTS
from wnq.testing import LAWS

CASES = sorted(COEFFICIENTS)


def run(w, g=None, axis=0, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("sawb", **options).weight(x.detach(), axis)(x)
    y.backward(torch.ones_like(y) if g is None else torch.tensor(g, dtype=x.dtype))
    return y.detach().numpy(), x.grad.numpy()


def numpy_alpha(w, bits, grid, dims=None):
    c1, c2 = COEFFICIENTS[grid, bits]
    magnitude = np.abs(w)
    alpha = c1 * np.sqrt((w**2).mean(dims, keepdims=True)) + c2 * magnitude.mean(dims, keepdims=True)
    return np.where(alpha > 0, alpha, magnitude.max(dims, keepdims=True))


def numpy_sawb(w, bits, grid, dims=None):
    alpha = numpy_alpha(w, bits, grid, dims)
    u = np.clip(w / alpha, -1, 1)
    if grid == "full":
        top = 2**bits - 1
        return alpha * (2 * np.floor(top * (u + 1) / 2 + 0.5).clip(0, top) / top - 1)
    top = 2 ** (bits - 1) - 1
    return alpha * np.rint(top * u) / top


@pytest.mark.parametrize(("grid", "bits"), CASES)
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_values_equal_the_equation_and_the_gradient_is_one(grid, bits, granularity):
    generator = np.random.default_rng(bits)
    for w in (generator.normal(size=(6, 5, 3, 3)), generator.standard_t(3, size=(4, 50)) * 0.02):
        for axis in (0, 1):
            dims = None if granularity == "tensor" else tuple(d for d in range(w.ndim) if d != axis)
            y, gradient = run(w, axis=axis, w_bits=bits, grid=grid, granularity=granularity)
            assert np.abs(y - numpy_sawb(w, bits, grid, dims)).max() < 1e-12
            assert (gradient == 1).all()  # also where the weight lies outside the clip
            assert (np.abs(w) > numpy_alpha(w, bits, grid, dims)).any() or bits > 4
            single, _ = run(w.astype(np.float32), axis=axis, w_bits=bits, grid=grid, granularity=granularity)
            # In float32 a weight at a threshold may take the neighbouring level: at most one in a hundred here.
            far = np.abs(single - y) > 1e-6 * max(1, np.abs(y).max())
            assert far.mean() < 0.01


@pytest.mark.parametrize(
    ("grid", "bits", "sigmas"),
    [("symmetric", 2, 1.24), ("full", 2, 1.47), ("full", 3, 2.01), ("full", 4, 2.47), ("full", 8, 3.80)],
)
def test_clip_of_a_gaussian(grid, bits, sigmas):
    w = torch.tensor(np.random.default_rng(0).normal(size=(1000, 1000)) * 0.3)
    quantizer = wnq.get_method("sawb", w_bits=bits, grid=grid).weight(w, 0)
    assert quantizer.clip(w).item() == pytest.approx(sigmas * 0.3, rel=0.01)


@pytest.mark.parametrize(("grid", "bits"), [("full", 2), ("full", 3), ("full", 4), ("symmetric", 2), ("symmetric", 4)])
def test_clip_is_near_the_best_one_on_a_gaussian(grid, bits):
    """What the coefficients were fitted for: the error at alpha is within 5 % of the smallest over all clips."""
    w = np.random.default_rng(1).normal(size=100_000)
    top = 2**bits - 1 if grid == "full" else 2 ** (bits - 1) - 1

    def error(clip):
        u = np.clip(w / clip, -1, 1)
        q = 2 * np.rint(top * (u + 1) / 2) / top - 1 if grid == "full" else np.rint(top * u) / top
        return ((w - clip * q) ** 2).mean()

    best = min(error(clip) for clip in np.linspace(0.5, 4, 71))
    assert error(numpy_alpha(w, bits, grid).item()) < 1.05 * best


def test_levels_at_two_bits():
    w = torch.linspace(-2, 2, 101, dtype=torch.float64)[None]
    alpha = numpy_alpha(w.numpy(), 2, "full").item()
    full = wnq.get_method("sawb", w_bits=2).weight(w, 0).quantize(w)
    assert full.codebook.tolist() == pytest.approx([-alpha, -alpha / 3, alpha / 3, alpha])
    assert full.codes.unique().tolist() == [0, 1, 2, 3]
    ternary = wnq.get_method("sawb", w_bits=2, grid="symmetric").weight(w, 0).quantize(w)
    alpha = numpy_alpha(w.numpy(), 2, "symmetric").item()
    assert ternary.codebook.tolist() == pytest.approx([-alpha, 0, alpha])
    assert wnq.get_method("sawb", w_bits=4, grid="symmetric").weight(w, 0).quantize(w).n_levels == 15


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_a_clip_that_would_be_negative_is_the_maximum(granularity):
    # One magnitude: 12.68 - 12.80 < 0.
    w = np.array([[0.5, -0.5, 0.5], [0.5, 0.5, -0.5]])
    y, gradient = run(w, w_bits=4, granularity=granularity)
    assert np.abs(y - w).max() < 1e-15
    assert (gradient == 1).all()
    y, gradient = run(np.zeros((2, 3)), w_bits=4, granularity=granularity)
    assert (y == 0).all() and (gradient == 1).all()
    # A channel of zeros beside another one.
    y, _ = run(np.array([[0.0, 0.0, 0.0], [1.0, -2.0, 0.1]]), w_bits=2, granularity="channel")
    assert (y[0] == 0).all() and np.isfinite(y).all() and (y[1] != 0).all()


def test_ewgs_scales_by_the_distance_in_its_own_channel():
    w = np.random.default_rng(3).normal(size=(3, 40)) * np.array([[1.0], [10.0], [0.1]])
    g = np.random.default_rng(4).normal(size=w.shape)
    y, gradient = run(w, g, w_bits=2, granularity="channel", ewgs=0.2)
    span = 2 * numpy_alpha(w, 2, "full", 1)
    assert np.abs(gradient - g * (1 + 0.2 * np.sign(g) * np.clip((w - y) / span, -0.5, 0.5))).max() < 1e-12


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize(("grid", "bits"), CASES)
def test_laws(law, grid, bits):
    for granularity in ("tensor", "channel"):
        method = wnq.get_method("sawb", w_bits=bits, grid=grid, granularity=granularity)
        law(lambda x, method=method: method.weight(x, 0))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("sawb", w_bits=3, granularity="channel").weight(x, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"w_bits": 1}, "w_bits must be one of 2, 3, 4, 5, 8 \\(or 32 for float weights\\), got 1"),
        ({"w_bits": 6}, "got 6"),
        ({"w_bits": 3, "grid": "symmetric"}, "grid 'symmetric' has published coefficients at w_bits 2, 4, 8; got 3"),
        ({"grid": "x"}, "grid must be one of 'full', 'symmetric', got 'x'"),
        ({"granularity": "x"}, "granularity must be one of"),
        ({"activation": "pacd"}, "Did you mean 'pact'"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("sawb", **options)
