"""StatsQ against NumPy typed from its rule."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS


def run(w, axis=0, name="statsq", **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method(name, **options).weight(x.detach(), axis)(x)
    y.sum().backward()
    return y.detach().numpy(), x.grad.numpy()


def numpy_statsq(w, bits, dims):
    s = 2 * np.abs(w).mean(dims, keepdims=True)
    n = 2 ** (bits - 1)
    # The authors clip a little below 1, so that the top cell does not round up to a level that does not exist.
    u = np.clip(w / s, -1, 1 - 1e-6)
    return s * (np.floor(u * n) + 0.5) / n


@pytest.mark.parametrize("bits", range(1, 9))
def test_values_equal_the_rule_and_the_gradient_is_one(bits):
    generator = np.random.default_rng(bits)
    for w in (generator.normal(size=(6, 5, 3, 3)), generator.standard_t(3, size=(4, 50)) * 0.02):
        for axis in (0, 1):
            dims = tuple(d for d in range(w.ndim) if d != axis)
            y, gradient = run(w, axis, w_bits=bits)
            assert np.abs(y - numpy_statsq(w, bits, dims)).max() < 1e-12
            assert (gradient == 1).all()
            # In float32 a weight at a threshold may take the neighbouring level: at most one in a hundred here.
            single, _ = run(w.astype(np.float32), axis, w_bits=bits)
            assert (np.abs(single - y) > 1e-6 * np.abs(y).max()).mean() < 0.01


def test_by_hand():
    # mean|w| = 1: s = 2, levels -1.5, -0.5, 0.5, 1.5; thresholds -1, 0, 1.
    y, _ = run(np.array([[0.0, 0.9, -1.1, -0.1, 2.9, -1.0]]), w_bits=2)
    assert y.tolist() == [[0.5, 0.5, -1.5, -0.5, 1.5, -0.5]]


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_values_are_those_of_n2uq(bits):
    """Levels and thresholds of both are whole multiples of mean|w| / 2^(k-1)."""
    w = np.random.default_rng(bits).normal(size=(7, 30))
    y, _ = run(w, w_bits=bits)
    assert (y == run(w, name="n2uq", w_bits=bits)[0]).all()
    unit = np.abs(w).mean(1, keepdims=True) / 2 ** (bits - 1)
    odd = y / unit
    assert np.abs(odd - np.rint(odd)).max() < 1e-9 and (np.rint(odd) % 2 == 1).all()


def test_one_bit_is_bwn():
    w = np.random.default_rng(0).normal(size=(7, 30))
    assert np.abs(run(w, w_bits=1)[0] - run(w, name="bwn")[0]).max() < 1e-15


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_laws(law):
    for bits in range(1, 9):
        law(lambda x, bits=bits: wnq.get_method("statsq", w_bits=bits).weight(x, 0))


def test_a_channel_of_zeros_stays_finite():
    y, gradient = run(np.array([[0.0, 0.0], [1.0, -2.0]]), w_bits=2)
    assert (y[0] == 0).all() and (y[1] != 0).all() and (gradient == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"w_bits": 9}, "w_bits must be an integer from 1 to 8"), ({"activation": "x"}, "activation must be one of")],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("statsq", **options)
