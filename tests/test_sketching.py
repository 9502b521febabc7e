"""Network Sketching against NumPy typed from its two algorithms, and the bound that the paper proves."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws from the start, whichever tests run before it."""
    global GENERATOR
    GENERATOR = np.random.default_rng(0)


def numpy_sketch(w, terms, refined):
    """One filter."""
    signs, a, residual = [], [], w.copy()
    for _ in range(terms):
        signs.append(np.where(residual >= 0, 1.0, -1.0))
        if refined:
            a = list(np.linalg.lstsq(np.stack(signs, 1), w, rcond=None)[0])
        else:
            a.append(np.abs(residual).mean())
        residual = w - np.stack(signs, 1) @ np.array(a)
    return w - residual


def sketched(w, bits, refined=True, axis=0):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("sketching", w_bits=bits, refined=refined).weight(x.detach(), axis)(x)
    y.backward(torch.ones_like(y))
    assert (x.grad == 1).all()
    return y.detach().numpy()


def test_by_hand():
    # mean |w| = 2: signs + - + -, residual 2, 1, -1, 0: mean 1, signs + + - +: values 3, -1, 1, -1.
    w = np.array([[4.0, -1.0, 1.0, -2.0]])
    assert sketched(w, 1).tolist() == [[2, -2, 2, -2]]
    assert sketched(w, 2, refined=False).tolist() == [[3, -1, 1, -1]]


@pytest.mark.parametrize("refined", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_values_equal_the_algorithm(bits, refined):
    w = GENERATOR.normal(size=(5, 4, 25))
    y = sketched(w, bits, refined)
    expected = np.stack([numpy_sketch(row.reshape(-1), bits, refined) for row in w]).reshape(w.shape)
    # Refined: the ridge of 1e-10 against an exact fit.
    assert np.abs(y - expected).max() < (1e-8 if refined else 1e-12)
    y = sketched(w.transpose(1, 0, 2).copy(), bits, refined, axis=1)
    assert np.abs(y - expected.transpose(1, 0, 2)).max() < (1e-8 if refined else 1e-12)
    y = wnq.get_method("sketching", w_bits=min(bits, 3), refined=refined).weight(torch.tensor(w), 0)(
        torch.tensor(w).float()
    )
    expected = np.stack(
        [numpy_sketch(row.reshape(-1), min(bits, 3), refined) for row in w.astype(np.float32).astype(float)]
    )
    assert np.abs(y.numpy() - expected.reshape(w.shape)).max() < 1e-6


@pytest.mark.parametrize("refined", [False, True])
def test_residual_is_within_the_papers_bound(refined):
    for t in (3, 9, 50):
        w = GENERATOR.standard_t(3, size=(20, t))
        for bits in range(1, 9):
            residual = ((w - sketched(w, bits, refined)) ** 2).sum(1)
            assert (residual <= (1 - 1 / t) ** bits * (w**2).sum(1) * (1 + 1e-9)).all()


def test_refining_never_hurts_the_same_signs_and_pays_on_average():
    w = GENERATOR.normal(size=(200, 30))
    errors = {r: [((w - sketched(w, bits, r)) ** 2).sum(1) for bits in range(1, 9)] for r in (False, True)}
    # The first two terms have the same signs in both; later residuals differ, so that single filters may end worse.
    assert np.array_equal(errors[True][0], errors[False][0])
    assert (errors[True][1] <= errors[False][1] * (1 + 1e-9)).all()
    for refined, direct in zip(errors[True][2:], errors[False][2:], strict=True):
        assert refined.mean() < direct.mean()
    for bits in range(1, 8):  # one term more never hurts
        assert (errors[True][bits] <= errors[True][bits - 1] * (1 + 1e-9)).all()


def test_one_term_is_bwn():
    w = torch.tensor(GENERATOR.normal(size=(6, 7, 3)))
    for refined in (False, True):
        ours = wnq.get_method("sketching", w_bits=1, refined=refined).weight(w, 0)(w)
        assert (ours - wnq.get_method("bwn").weight(w, 0)(w)).abs().max() < 1e-15


def test_a_greedy_sign_may_miss_the_nearest_level():
    """Codes come from the signs, not from rounding to the codebook."""
    w = torch.tensor(GENERATOR.normal(size=(50, 12)))
    quantizer = wnq.get_method("sketching", w_bits=4).weight(w, 0)
    book = quantizer.quantize(w).codebook
    rounded = (w.unsqueeze(-1) - book.unsqueeze(1)).abs().amin(-1)
    distance = (quantizer(w) - w).abs()
    assert (distance >= rounded - 1e-15).all() and (distance > rounded + 1e-3).any()


def test_one_weight_a_filter_is_exact():
    w = torch.tensor([[0.7], [-2.0], [0.0]])
    for bits in (1, 3, 8):
        assert torch.allclose(wnq.get_method("sketching", w_bits=bits).weight(w, 0)(w), w, rtol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 5])
def test_laws_of_the_direct_form(bits):
    """Those of the refined one: test_laws.py."""
    method = wnq.get_method("sketching", w_bits=bits, refined=False)
    for law in LAWS[:-1]:
        law(lambda x: method.weight(x, 0))
    for law in LAWS[:4]:
        law(lambda x: method.weight(x, 1))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("sketching", w_bits=2, a_bits=3))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match="refined must be true or false, got 1"):
        wnq.get_method("sketching", refined=1)
    with pytest.raises(ValueError, match="w_bits must be an integer from 1 to 8"):
        wnq.get_method("sketching", w_bits=9)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        wnq.get_method("sketching").weight(torch.ones(3), 0)(torch.ones(3))
