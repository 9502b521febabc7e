"""APoT: level sets by hand, projection, and gradients against NumPy typed from the paper's formulas."""

import numpy as np
import pytest
import torch

import wnq
from wnq.activations import input_builder
from wnq.methods.apot import AdditivePowers, apot_levels
from wnq.testing import LAWS, METHOD_LAWS

FAST_LAWS = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


@pytest.mark.parametrize(("bits", "levels"), [
    (1, [0, 1]),
    # {0, 1, 1/2, 1/4}
    (2, [0, 1, 2, 4]),
    # {0, 1, 1/2, 1/8} + {0, 1/4}, in eighths
    (3, [0, 1, 2, 3, 4, 6, 8, 10]),
    # {0, 1, 1/4, 1/16} + {0, 1/2, 1/8, 1/32}, in thirty-seconds
    (4, [0, 1, 2, 3, 4, 6, 8, 9, 12, 16, 18, 24, 32, 33, 36, 48]),
])  # fmt: skip
def test_levels_by_hand(bits, levels):
    assert apot_levels(bits) == levels


def test_levels_of_the_authors_five_and_six_bits():
    # Exponents as in the authors' code: three terms, the fifth bit's third term has one power.
    five = {a + b + c for a in (0, 64, 16, 2) for b in (0, 32, 8, 1) for c in (0, 4)}
    six = {a + b + c for a in (0, 256, 32, 4) for b in (0, 128, 16, 2) for c in (0, 64, 8, 1)}
    assert apot_levels(5) == sorted(five)
    assert apot_levels(6) == sorted(six)


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_as_many_as_codes_and_distinct(bits):
    assert len(set(apot_levels(bits))) == 2**bits


@pytest.mark.parametrize(("bits", "levels"), [
    (2, [-1, 0, 1]),
    (3, [-1, -1 / 2, -1 / 4, 0, 1 / 4, 1 / 2, 1]),
    (4, [-1, -0.8, -0.6, -0.4, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1]),
])  # fmt: skip
def test_signed_levels_by_hand(bits, levels):
    x = torch.linspace(-3, 3, 2001, dtype=torch.float64)
    quantized = AdditivePowers(bits, signed=True, start=2.0).quantize(x)
    assert quantized.codebook.tolist() == pytest.approx([2 * level for level in levels])
    assert sorted(set(quantized.codes.tolist())) == list(range(len(levels)))


def nearest(u, levels):
    """Projection to the nearest level; of two equally near ones the one of smaller magnitude."""
    levels = np.array(sorted(levels, key=abs))
    return levels[np.abs(u[..., None] - levels).argmin(-1)]


def unit_levels(bits, signed):
    positive = np.array(apot_levels(bits - 1 if signed else bits), dtype=np.float64)
    positive /= positive.max()
    return np.concatenate([-positive[1:], positive]) if signed else positive


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_clipping_and_projection_and_gradients_equal_the_formulas(bits, signed):
    x0 = np.random.default_rng(bits).normal(size=(9, 12)) * 1.3
    g = np.random.default_rng(30 + bits).normal(size=x0.shape)
    for clip_gradient in (True, False):
        quantizer = AdditivePowers(bits, signed=signed, start=1.75, clip_gradient=clip_gradient).double()
        x = torch.tensor(x0, requires_grad=True)
        y = quantizer(x)
        y.backward(torch.tensor(g))
        u = x0 / 1.75
        low = -1 if signed else 0
        projected = nearest(np.clip(u, low, 1), unit_levels(bits, signed))
        inside = (u >= low) & (u <= 1)
        assert (~inside).any()
        assert np.abs(y.detach().numpy() - 1.75 * projected).max() < 1e-12
        assert np.abs(x.grad.numpy() - g * (inside if clip_gradient else 1)).max() < 1e-12
        # sign(x) above the clip, which is the projection there; 0 below an unsigned range
        dalpha = (g * np.where(inside, projected - u, projected)).sum()
        assert quantizer.alpha.grad.item() == pytest.approx(dalpha, abs=1e-12)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_weights_are_standardised_and_the_modes_differ_by_the_normalizers_jacobian(bits):
    w0 = np.random.default_rng(bits).normal(0.03, 0.2, size=(6, 10))
    g = np.random.default_rng(40 + bits).normal(size=w0.shape)
    mean, deviation = w0.mean(), w0.std() + 1e-5
    standard = (w0 - mean) / deviation
    u = standard / 1.5
    expected = 1.5 * nearest(np.clip(u, -1, 1), unit_levels(bits, True))
    gradients = {}
    for attach in (True, False):
        method = wnq.get_method("apot", w_bits=bits, attach_statistics=attach, start=1.5)
        x = torch.tensor(w0, requires_grad=True)
        y = method.weight(x.detach(), 0)(x)
        y.backward(torch.tensor(g))
        assert np.abs(y.detach().numpy() - expected).max() < 1e-12
        gradients[attach] = x.grad.numpy()
    reaching = g * ((np.abs(u) <= 1) | (bits == 2))
    assert np.abs(gradients[False] - reaching / deviation).max() < 1e-12
    # d w~_i / d w_j = (delta_ij - 1/n - (w_i - mean)(w_j - mean) / (n sigma (sigma + eps))) / (sigma + eps)
    n, centred = w0.size, w0 - mean
    jacobian = reaching - reaching.mean() - centred * (reaching * centred).sum() / (n * w0.std() * deviation)
    assert np.abs(gradients[True] - jacobian / deviation).max() < 1e-12


def test_two_bits_pass_the_gradient_of_clipped_weights():
    w = torch.tensor([0.0, 0.1, -0.1, 5.0, -5.0], dtype=torch.float64, requires_grad=True)
    method = wnq.get_method("apot", w_bits=2, attach_statistics=False, start=1.0)
    method.weight(w.detach(), 0)(w).sum().backward()
    assert (w.grad > 0).all()
    clipped = torch.tensor(w.detach().numpy(), requires_grad=True)
    wnq.get_method("apot", attach_statistics=False, start=1.0).weight(clipped.detach(), 0)(clipped).sum().backward()
    assert (clipped.grad > 0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("attach", [True, False])
def test_scaling_back_multiplies_by_the_deviation_with_its_gradient(attach):
    w = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.2
    g = torch.randn(5, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = wnq.get_method("apot", attach_statistics=attach)
    back = plain.with_options(scale_back=True)
    deviation = (w.numpy().std() + 1e-5).item()
    a, b = w.clone().requires_grad_(), w.clone().requires_grad_()
    y = plain.weight(w, 0)(a)
    y.backward(g)
    z = back.weight(w, 0)(b)
    z.backward(g)
    assert torch.allclose(z, y * deviation, atol=1e-12)
    expected = a.grad * deviation
    if attach:
        expected = expected + (g * y.detach()).sum() * (w - w.mean()) / (w.numel() * w.numpy().std())
    assert torch.allclose(b.grad, expected, atol=1e-12)


def test_standardised_values_do_not_change_with_the_size_of_the_weights():
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    quantizer = wnq.get_method("apot").weight(w, 0)
    assert torch.equal(quantizer.quantize(w).codes, quantizer.quantize(4 * w + 3).codes)


def test_starts():
    quantizer = wnq.get_method("apot", a_bits=4).weight(
        torch.randn(3, 4, generator=torch.Generator().manual_seed(3)), 0
    )
    assert quantizer.quantizer.alpha.item() == 3
    inputs = input_builder("apot", 4)()
    assert inputs.alpha.item() == 6
    assert inputs(torch.tensor([-1.0, 7.0])).tolist() == [0.0, 6.0]
    quantizer.quantizer.alpha.data.fill_(0.0)  # an optimizer that went too far
    assert torch.isfinite(quantizer(torch.ones(3, 4))).all()


@pytest.mark.parametrize("law", FAST_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("bits", range(2, 9))
def test_laws(bits, law):
    law(lambda _: input_builder("apot", bits)())
    for options in ({}, {"attach_statistics": False, "clip_gradient": False}, {"scale_back": True}):
        law(lambda x: wnq.get_method("apot", w_bits=bits, **options).weight(x, 0))  # noqa: B023


def test_weight_compiles():
    COMPILES(lambda x: wnq.get_method("apot").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"w_bits": 2, "start": 1.5}, {"scale_back": True, "activation": "lsq"}], ids=str
)
def test_method_keeps_the_laws(options, law):
    # At two bits the paper's start prunes nearly all of a fresh layer's uniform weights; once all are zero, nothing comes back.
    law(wnq.get_method("apot", a_bits=3, **options))


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 1}, "w_bits must be an integer from 2 to 8"),
    ({"a_bits": 1}, "activation 'apot' defines a_bits 2, 3, 4, 5, 6, 7, 8"),
    ({"start": 0}, "start must be positive, got 0"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("apot", **options)
