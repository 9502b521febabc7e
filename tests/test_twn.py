"""TWN: the rule by hand, against NumPy, and the optimality that the paper claims of threshold and scale."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS, METHOD_LAWS


def run(method, w, g=None, axis=0):
    x = torch.tensor(w, requires_grad=True)
    y = method.weight(x.detach(), axis)(x)
    y.backward(torch.tensor(np.ones_like(w) if g is None else g))
    return y.detach().numpy(), x.grad.numpy()


def numpy_twn(w, t):
    above = np.abs(w) > t * np.abs(w).mean()
    return np.sign(w) * above * np.abs(w)[above].mean()


def test_by_hand():
    # mean |w| = 1, threshold 0.7: 0.5 and -0.5 vanish, alpha = mean(1, 2) = 1.5.
    y, gradient = run(wnq.get_method("twn"), np.array([[0.5, -0.5, 1.0, -2.0]]))
    assert y.tolist() == [[0.0, 0.0, 1.5, -1.5]]
    assert (gradient == 1).all()


@pytest.mark.parametrize("threshold", [0.3, 0.7, 0.75, 1.2])
def test_values_equal_the_equations_and_the_gradient_passes(threshold):
    w = np.random.default_rng(0).standard_t(3, size=(6, 4, 3, 3))
    g = np.random.default_rng(1).normal(size=w.shape)
    for dtype, tolerance in ((np.float64, 1e-12), (np.float32, 1e-6)):
        y, gradient = run(wnq.get_method("twn", threshold=threshold), w.astype(dtype), g.astype(dtype))
        expected = numpy_twn(w.astype(dtype).astype(np.float64), threshold)
        assert np.abs(y - expected).max() < tolerance * max(1, np.abs(expected).max())
        assert (gradient == g.astype(dtype)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_is_each_channel_alone(axis):
    w = np.random.default_rng(2).normal(size=(5, 4, 3))
    whole, _ = run(wnq.get_method("twn", granularity="channel"), w, axis=axis)
    for channel in range(w.shape[axis]):
        alone = numpy_twn(w.take(channel, axis), 0.7)
        assert np.abs(whole.take(channel, axis) - alone).max() < 1e-12


def test_threshold_is_near_the_optimum_on_a_gaussian():
    """The paper approximates the best threshold of a Gaussian, 0.6 sigma = 0.75 mean|w|; its error is within 1 % of the best."""
    w = np.random.default_rng(1).normal(size=(1, 200_000))

    def error(threshold):
        y, _ = run(wnq.get_method("twn", threshold=threshold), w)
        return ((w - y) ** 2).mean()

    best = min(error(t) for t in np.linspace(0.5, 1.0, 26))
    assert error(0.75) < 1.01 * best


def test_alpha_is_the_least_squares_scale_of_its_ternary_tensor():
    w = np.random.default_rng(3).normal(size=(8, 20))
    y, _ = run(wnq.get_method("twn"), w)
    q = np.sign(y)
    assert np.abs(y).max() == pytest.approx((w * q).sum() / (q * q).sum(), rel=1e-12)


def test_codes_and_levels():
    quantized = wnq.get_method("twn").weight(torch.zeros(1), 0).quantize(torch.tensor([[0.5, -0.5, 1.0, -2.0]]))
    assert quantized.codes.tolist() == [[1, 1, 2, 0]]
    assert quantized.levels.tolist() == [-1, 0, 1]
    assert quantized.scale.item() == 1.5


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.75, "granularity": "channel"}, {"ewgs": 0.01}], ids=str)
def test_laws(options, law):
    law(lambda x: wnq.get_method("twn", **options).weight(x, 0))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("twn", granularity="channel").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("twn", a_bits=3, granularity="channel"))


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": 0}, "threshold must be positive, got 0"),
    ({"granularity": "x"}, "granularity must be one of"),
    ({"w_bits": 1}, "w_bits must be 2 \\(or 32 for float weights\\), got 1"),
    ({"activation": "x"}, "activation must be one of"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("twn", **options)
