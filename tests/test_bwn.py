"""BWN against NumPy typed from its paper: the least-squares scale, and both gradients."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.bwn import ScaledSign
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)
QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def run(method, w, g=None, axis=0, dtype=torch.float64):
    x = torch.tensor(w, dtype=dtype, requires_grad=True)
    y = method.weight(x.detach(), axis)(x)
    y.backward(torch.tensor(np.ones_like(w) if g is None else g, dtype=dtype))
    return y.detach().double().numpy(), x.grad.double().numpy()


def test_bwn_by_hand():
    y, gradient = run(wnq.get_method("bwn"), np.array([[1.0, -3.0], [0.5, 0.1]]))
    assert np.allclose(y, [[2.0, -2.0], [0.3, 0.3]])
    assert (gradient == 1).all()


def test_the_scale_is_the_least_squares_optimum():
    w = GENERATOR.normal(size=(7, 20))
    y, _ = run(wnq.get_method("bwn"), w)
    alpha = np.abs(y[:, 0])
    signs = np.sign(w)
    solved = [np.linalg.lstsq(s[:, None], row, rcond=None)[0][0] for s, row in zip(signs, w, strict=True)]
    assert np.abs(alpha - solved).max() < 1e-12

    def error(a):
        return ((w - a[:, None] * signs) ** 2).sum(1)

    assert (error(alpha) < error(1.001 * alpha)).all()
    assert (error(alpha) < error(0.999 * alpha)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("shape", "axis"), [((5, 8), 0), ((4, 3, 3, 3), 0), ((4, 6, 2, 2), 1)])
def test_the_papers_gradient_equals_its_equation(shape, axis, dtype, tolerance):
    w, g = GENERATOR.normal(size=shape), GENERATOR.normal(size=shape)
    y, gradient = run(wnq.get_method("bwn", gradient="paper"), w, g, axis, dtype)
    others = tuple(d for d in range(w.ndim) if d != axis)
    n = w.size // w.shape[axis]
    alpha = np.abs(w).mean(others, keepdims=True)
    assert np.abs(y - alpha * np.where(w >= 0, 1, -1)).max() < tolerance
    assert (np.abs(w) > 1).any()
    assert np.abs(gradient - g * (1 / n + alpha * (np.abs(w) <= 1))).max() < tolerance
    identity_values, identity_gradient = run(wnq.get_method("bwn"), w, g, axis, dtype)
    assert (identity_values == y).all()
    assert np.abs(identity_gradient - g).max() < tolerance


def test_the_papers_gradient_by_hand():
    # alpha = 1, n = 4: 1/4 + 1 inside [-1, 1], 1/4 outside.
    _, gradient = run(wnq.get_method("bwn", gradient="paper"), np.array([[0.5, -0.5, 1.0, -2.0]]))
    assert gradient.tolist() == [[1.25, 1.25, 1.25, 0.25]]


def test_ewgs_scales_the_papers_gradient():
    w = np.array([[0.5, -0.5, 1.0, -2.0]])
    _, plain = run(wnq.get_method("bwn", gradient="paper"), w)
    _, scaled = run(wnq.get_method("bwn", gradient="paper", ewgs=0.1), w)
    # The distance x - Q(x), as a share of the span 2, at most one half: -0.25, 0.25, 0, -0.5.
    assert np.abs(scaled - plain * (1 + 0.1 * np.array([[-0.25, 0.25, 0.0, -0.5]]))).max() < 1e-12


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
@pytest.mark.parametrize("gradient", ["identity", "paper"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_laws(law, granularity, gradient):
    law(lambda _: ScaledSign(granularity, 0, gradient))


@pytest.mark.parametrize("gradient", ["identity", "paper"])
def test_compiles(gradient):
    COMPILES(lambda x: wnq.get_method("bwn", gradient=gradient).weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"gradient": "paper", "a_bits": 3}])
def test_method_laws(law, options):
    law(wnq.get_method("bwn", **options))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 2"):
        wnq.get_method("bwn", w_bits=2)
    with pytest.raises(ValueError, match="gradient must be one of 'identity', 'paper', got 'exact'"):
        wnq.get_method("bwn", gradient="exact")
