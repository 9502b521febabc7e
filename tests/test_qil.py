"""QIL against NumPy typed from its transformer, and its derivatives against finite differences."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.qil import Interval
from wnq.testing import LAWS, METHOD_LAWS

FAST_LAWS = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def transformer(w, c, d, gamma, signed=True):
    alpha, beta = 1 / (2 * d), 0.5 - c / (2 * d)
    size = np.abs(w) if signed else w
    with np.errstate(invalid="ignore"):
        inner = np.where(size < c - d, 0.0, np.where(size > c + d, 1.0, (alpha * size + beta) ** gamma))
    return np.sign(w) * inner if signed else inner


def made(bits, c, d, gamma=None, *, is_weight=True, scale="one"):
    """A float64 quantizer with these parameters."""
    quantizer = Interval(bits, is_weight=is_weight, learn_gamma=gamma is not None, scale=scale).double()
    quantizer.centre.data.fill_(c)
    quantizer.halfwidth.data.fill_(d)
    if gamma is not None:
        quantizer.gamma.data.fill_(gamma)
    quantizer.initialized.fill_(True)
    return quantizer


CASES = [(0.3, 0.2, 1.0), (0.3, 0.2, 0.7), (0.25, 0.25, 1.6), (0.2, 0.35, 0.9)]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("c", "d", "gamma"), CASES)
def test_weight_equals_the_transformer(bits, c, d, gamma):
    w = np.random.default_rng(bits).normal(size=(7, 9)) * 0.4
    top = 2 ** (bits - 1) - 1
    for scale, factor in (("one", 1.0), ("clip", c + d)):
        y = made(bits, c, d, gamma, scale=scale)(torch.tensor(w)).detach().numpy()
        assert np.abs(y - factor * np.rint(transformer(w, c, d, gamma) * top) / top).max() < 1e-12
    single = made(bits, c, d, gamma).float()(torch.tensor(w).float()).detach().numpy()
    seen = torch.tensor(w).float().double().numpy()
    near_tie = np.abs(np.abs(transformer(seen, c, d, gamma) * top % 1) - 0.5) < 1e-4
    off = np.abs(single - np.rint(transformer(seen, c, d, gamma) * top) / top)
    assert off[~near_tie].max() < 1e-6


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_input_equals_the_transformer(bits):
    x = np.random.default_rng(bits).normal(size=(40,)) * 2
    y = made(bits, 0.9, 0.7, is_weight=False)(torch.tensor(x)).detach().numpy()
    top = 2**bits - 1
    assert np.abs(y - np.rint(transformer(x, 0.9, 0.7, 1.0, signed=False) * top) / top).max() < 1e-12
    assert y.min() == 0
    assert y.max() == 1


@pytest.mark.parametrize("scale", ["one", "clip"])
@pytest.mark.parametrize(("c", "d", "gamma"), CASES)
def test_gradients_equal_the_formulas(c, d, gamma, scale):
    w = np.random.default_rng(5).normal(size=(6, 9)) * 0.4
    g = np.random.default_rng(6).normal(size=w.shape)
    quantizer = made(3, c, d, gamma, scale=scale)
    x = torch.tensor(w, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    t = (np.abs(w) - c) / (2 * d) + 0.5
    inside = (t > 0) & (t <= 1)
    assert inside.any()
    assert (~inside).any()
    t = np.where(inside, t, 1.0)
    slope = inside * gamma * t ** (gamma - 1) / (2 * d)
    factor = c + d if scale == "clip" else 1.0
    rounded = (g * y.detach().numpy()).sum() / (c + d) if scale == "clip" else 0.0
    assert np.abs(x.grad.numpy() - factor * g * slope).max() < 1e-12
    expected = {
        "centre": -factor * (g * np.sign(w) * slope).sum() + rounded,
        "halfwidth": factor * (g * np.sign(w) * slope * (1 - 2 * t)).sum() + rounded,
        "gamma": factor * (g * np.sign(w) * inside * t**gamma * np.log(t)).sum(),
    }
    for name, value in expected.items():
        assert getattr(quantizer, name).grad.item() == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize("is_weight", [True, False])
def test_derivatives_of_the_transformer_equal_finite_differences(is_weight):
    x = torch.randn(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    g = torch.randn(40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    values = {"centre": 0.8, "halfwidth": 0.5} | ({"gamma": 0.8} if is_weight else {})

    def loss(**changed):
        at = values | changed
        return (made(3, at["centre"], at["halfwidth"], at.get("gamma"), is_weight=is_weight).transformed(x) * g).sum()

    quantizer = made(3, 0.8, 0.5, values.get("gamma"), is_weight=is_weight)
    # Away from the rounding, the gradient of the quantizer is that of the transformer.
    quantizer(x).backward(g)
    for name, value in values.items():
        h = 1e-7
        slope = (loss(**{name: value + h}) - loss(**{name: value - h})).item() / (2 * h)
        assert getattr(quantizer, name).grad.item() == pytest.approx(slope, rel=1e-5, abs=1e-6), name


def test_start_prunes_and_clips_nothing():
    w = torch.randn(5, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    quantizer = wnq.get_method("qil", w_bits=4).weight(w, 0)
    assert quantizer.centre.item() == quantizer.halfwidth.item() == pytest.approx(w.abs().max().item() / 2, rel=1e-6)
    assert quantizer.gamma.item() == 1
    without = wnq.get_method("qil", w_bits=4, learn_gamma=False).weight(w, 0)
    assert without.gamma is None
    expected = torch.round(w / w.abs().max() * 7) / 7
    assert torch.allclose(quantizer(w), expected, atol=1e-12)
    assert torch.equal(without(w), quantizer(w))
    inputs = Interval(2, is_weight=False)
    inputs.observe_(torch.tensor([-3.0, 0.0, 1.0, 2.0]))
    assert inputs(torch.tensor([-3.0, 0.0, 1.1, 2.0, 9.0])).tolist() == pytest.approx([0, 0, 2 / 3, 1, 1])


def test_two_bits_by_hand():
    # c = 0.5, d = 0.3: below 0.2 pruned, from 0.8 on clipped, the middle 0.5 rounds to even, that is to 0.
    y = made(2, 0.5, 0.3)(torch.tensor([-0.9, -0.6, 0.1, 0.5, 0.51, 0.8], dtype=torch.float64))
    assert y.tolist() == [-1.0, -1.0, 0.0, 0.0, 1.0, 1.0]
    levels = [wnq.get_method("qil", w_bits=b).weight(torch.ones(2, 2), 0).quantize(torch.ones(2, 2)) for b in (2, 3)]
    assert [q.levels.tolist() for q in levels] == [[-1, 0, 1], [-3, -2, -1, 0, 1, 2, 3]]


@pytest.mark.parametrize("gamma", [0.3, 0.5, 1.0, 2.0])
def test_gradients_stay_finite_at_the_pruning_point(gamma):
    quantizer = made(3, 0.5, 0.5, gamma)
    w = torch.tensor([0.0, 1e-300, 1e-12, 1e-7, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    quantizer(w).sum().backward()
    for tensor in (w, *quantizer.parameters()):
        assert torch.isfinite(tensor.grad).all()
    assert w.grad.max() <= max(gamma, gamma * 1e-6 ** (gamma - 1))
    with torch.no_grad():  # an interval that collapsed to the fifth weight, a power that turned negative
        quantizer.halfwidth.fill_(0.0)
        quantizer.centre.fill_(1.0)
        quantizer.gamma.fill_(-1.0)
        quantizer.zero_grad()
    quantizer(w).sum().backward()
    assert torch.isfinite(quantizer(w)).all()
    assert torch.isfinite(quantizer.halfwidth.grad)


@pytest.mark.parametrize("law", FAST_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_laws_of_the_other_form(bits, law):
    law(lambda x: wnq.get_method("qil", w_bits=bits, learn_gamma=False, scale="clip").weight(x, 0))


def test_weight_compiles():
    COMPILES(lambda x: wnq.get_method("qil").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"w_bits": 2, "learn_gamma": False}, {"scale": "clip", "activation": "lsq"}], ids=str
)
def test_method_keeps_the_laws(options, law):
    law(wnq.get_method("qil", a_bits=3, **options))


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 1}, "w_bits must be an integer from 2 to 8"),
    ({"scale": "max"}, "scale must be one of 'one', 'clip', got 'max'"),
    ({"a_bits": 9}, "a_bits .* from 1 to 8, got 9"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("qil", **options)
