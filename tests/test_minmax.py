"""Min-max, affine and symmetric, against NumPy."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS

GENERATOR = np.random.default_rng(0)
SAMPLES = [
    GENERATOR.normal(size=(6, 9)),
    np.abs(GENERATOR.normal(size=(6, 9))),
    -np.abs(GENERATOR.normal(size=(2, 9))),
]
CASES = [
    (bits, granularity, symmetric)
    for bits in range(1, 9)
    for granularity in ("tensor", "channel")
    for symmetric in (False, True)
    if bits > symmetric
]


def run(w, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("minmax", **options).weight(x.detach(), 0)(x)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_the_affine_rule(bits, granularity):
    dims = None if granularity == "tensor" else 1
    for w in SAMPLES:
        y, gradient = run(w, w_bits=bits, granularity=granularity)
        top = 2**bits - 1
        high = np.maximum(w.max(dims, keepdims=True), 0)
        low = np.minimum(w.min(dims, keepdims=True), 0)
        step = (high - low) / top
        zero = np.rint(-low / step)
        expected = (np.clip(np.rint(w / step) + zero, 0, top) - zero) * step
        assert np.abs(y - expected).max() < 1e-12
        assert (gradient == 1).all()
        method = wnq.get_method("minmax", w_bits=bits, granularity=granularity)
        quantized = method.weight(torch.tensor(w), 0).quantize(torch.tensor(w))
        assert (quantized.levels == 0).any(-1).all()


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_equals_the_symmetric_rule(bits, granularity):
    dims = None if granularity == "tensor" else 1
    top = 2 ** (bits - 1) - 1
    for w in SAMPLES:
        y, gradient = run(w, w_bits=bits, granularity=granularity, symmetric=True)
        step = np.abs(w).max(dims, keepdims=True) / top
        assert np.abs(y - np.clip(np.rint(w / step), -top, top) * step).max() < 1e-12
        assert (gradient == 1).all()
        method = wnq.get_method("minmax", w_bits=bits, granularity=granularity, symmetric=True)
        quantized = method.weight(torch.tensor(w), 0).quantize(torch.tensor(w))
        levels = quantized.levels.reshape(-1, quantized.n_levels)
        assert (levels == torch.arange(-top, top + 1)).all()
        relative, _ = run(w.astype(np.float32), w_bits=bits, granularity=granularity, symmetric=True)
        assert np.abs(relative - y).max() < 1e-6 * np.abs(w).max()


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_symmetric_range_is_wnq_detached(bits):
    w = torch.tensor(SAMPLES[0])
    mine = wnq.get_method("minmax", w_bits=bits, symmetric=True).weight(w, 0)
    other = wnq.get_method("wnq", w_bits=bits, grid="symmetric", max_gain=0.0).weight(w, 0)
    assert torch.equal(mine.quantize(w).codes, other.quantize(w).codes)
    # S = max|w|/N in both; the two compute w/S in a different order.
    assert torch.allclose(mine(w), other(w), rtol=1e-14)


def test_symmetric_by_hand():
    # N = 3, S = 0.5: 0.2 -> 0, 0.3 -> 1, -1.5 -> -3.
    y, _ = run(np.array([[0.2, 0.3, -1.5], [0.8, 1.2, 0.0]]), w_bits=3, symmetric=True)
    assert y.tolist() == [[0.0, 0.5, -1.5], [1.0, 1.0, 0.0]]


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_laws(law):
    for bits, granularity, symmetric in CASES:
        method = wnq.get_method("minmax", w_bits=bits, granularity=granularity, symmetric=symmetric)
        law(lambda x, method=method: method.weight(x, 0))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("minmax", granularity="channel", symmetric=True).weight(x, 0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "x"}, "granularity must be one of"),
        ({"w_bits": 0}, "w_bits must be an integer from 1 to 8 \\(or 32 for float weights\\), got 0"),
        ({"w_bits": 1, "symmetric": True}, "w_bits of the symmetric range must be an integer from 2 to 8, got 1"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("minmax", **options)
