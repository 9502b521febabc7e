"""EWGS: its own quantizer, and the gradient scaling as an option of every method, against NumPy typed from the equations."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.ewgs import LearnedRange
from wnq.testing import LAWS, METHOD_LAWS

(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def made(bits, low, high, scale, *, is_weight, delta=1e-3):
    """A float64 quantizer with these parameters."""
    quantizer = LearnedRange(bits, is_weight=is_weight).double()
    quantizer.ewgs = delta
    for name, value in (("low", low), ("high", high), ("scale", scale)):
        getattr(quantizer, name).data.fill_(value)
    quantizer.initialized.fill_(True)
    return quantizer


@pytest.mark.parametrize("delta", [0.0, 1e-3, 0.2])
@pytest.mark.parametrize("is_weight", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_values_and_gradients_equal_the_equations(bits, is_weight, delta):
    x0 = np.random.default_rng(bits).normal(size=(7, 11))
    g = np.random.default_rng(60 + bits).normal(size=x0.shape)
    low, high, scale, top = -0.9, 1.3, -0.4, 2**bits - 1  # of a negative scale the size counts
    quantizer = made(bits, low, high, scale, is_weight=is_weight, delta=delta)
    x = torch.tensor(x0, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    xn = np.clip((x0 - low) / (high - low), 0, 1)
    xq = np.rint(xn * top) / top
    unit, per_level = (2 * (xq - 0.5), 2.0) if is_weight else (xq, 1.0)
    assert np.abs(y.detach().numpy() - abs(scale) * unit).max() < 1e-12
    gq = g * abs(scale) * per_level
    gn = gq * (1 + delta * np.sign(gq) * (xn - xq))
    inside = (x0 > low) & (x0 < high)
    assert (~inside).any()
    assert np.abs(x.grad.numpy() - gn * inside / (high - low)).max() < 1e-12
    assert quantizer.low.grad.item() == pytest.approx((gn * inside * (xn - 1)).sum() / (high - low), abs=1e-12)
    assert quantizer.high.grad.item() == pytest.approx(-(gn * inside * xn).sum() / (high - low), abs=1e-12)
    assert quantizer.scale.grad.item() == pytest.approx(np.sign(scale) * (g * unit).sum(), abs=1e-12)


def test_by_hand():
    # One bit on [-1, 1]: -0.5 is a quarter of the way, rounded to 0, that is to -1; 0.6 is at 0.8, rounded to 1.
    quantizer = made(1, -1.0, 1.0, 1.0, is_weight=True, delta=0.1)
    w = torch.tensor([-0.5, 0.6], dtype=torch.float64, requires_grad=True)
    y = quantizer(w)
    assert y.tolist() == [-1.0, 1.0]
    y.backward(torch.tensor([1.0, 1.0], dtype=torch.float64))
    assert w.grad.tolist() == pytest.approx([1 + 0.1 * 0.25, 1 - 0.1 * 0.2])


@pytest.mark.parametrize("bits", [1, 3])
def test_weight_starts_at_three_deviations_and_keeps_its_size(bits):
    w = np.random.default_rng(bits).normal(size=(20, 30)) * 0.05
    x = torch.tensor(w)
    quantizer = wnq.get_method("ewgs", w_bits=bits).weight(x, 0)
    assert quantizer.high.item() == -quantizer.low.item() == pytest.approx(3 * w.std(), rel=1e-6)
    assert quantizer(x).abs().mean().item() == pytest.approx(np.abs(w).mean(), rel=1e-5)
    assert quantizer.scale.item() > 0


def test_input_starts_at_three_deviations_of_a_half_normal():
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for batch, low in ((x.relu(), 0.0), (x, x.min().item())):
        quantizer = LearnedRange(4, is_weight=False)
        with pytest.raises(RuntimeError, match="calibrate_"):
            quantizer(batch)
        quantizer.observe_(batch)
        quantizer.observe_(10 * batch)
        assert quantizer.low.item() == pytest.approx(low, rel=1e-6)
        expected = 3 * batch.numpy().std() / np.sqrt(1 - 2 / np.pi)
        assert quantizer.high.item() == pytest.approx(expected, rel=1e-6)
        assert quantizer.scale.item() == pytest.approx(expected - low, rel=1e-6)
    # 3 / sqrt(1 - 2 / pi) deviations of |N(0, 1)| are 3.
    half = LearnedRange(4, is_weight=False)
    half.observe_(x.abs())
    assert half.high.item() == pytest.approx(3, rel=0.03)


def test_a_layer_of_zeros_stays_zero_and_can_leave():
    quantizer = wnq.get_method("ewgs").weight(torch.zeros(4, 5), 0)
    y = quantizer(torch.zeros(4, 5))
    assert not y.any()
    y.sum().backward()
    assert quantizer.scale.grad.item() != 0


def test_a_collapsed_range_stays_finite():
    quantizer = made(3, 1.0, -1.0, 1.0, is_weight=True)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert torch.isfinite(y).all()
    assert all(torch.isfinite(p.grad).all() for p in (x, *quantizer.parameters()))


def test_its_own_factor_the_common_option_and_plain_straight_through():
    w = torch.randn(6, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert wnq.get_method("ewgs").weight(w, 0).ewgs == 1e-3
    assert wnq.get_method("ewgs", a_bits=2).input().ewgs == 1e-3
    assert wnq.get_method("ewgs", ewgs=0.02).weight(w, 0).ewgs == 0.02
    assert wnq.get_method("ewgs", ewgs=0.02, a_bits=2).input().ewgs == 0.02
    gradients = []
    for quantizer in (wnq.get_method("ewgs", ewgs=0).weight(w, 0), wnq.get_method("ewgs").weight(w, 0)):
        if gradients:
            quantizer.ewgs = 0.0
        x = w.clone().requires_grad_()
        quantizer(x).pow(3).sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


# The common option. Each entry: method, options, and the reach from the least to the largest value of the grid.


def reach_of_levels(quantized):
    book = quantized.codebook
    return (book.amax(-1) - book.amin(-1)).double().numpy()


COMMON = [
    ("wnq", {"w_bits": 3}),
    ("wnq", {"w_bits": 2, "granularity": "channel", "scale": "max"}),
    ("dorefa", {"w_bits": 3}),
    ("lsq", {"w_bits": 3}),
    ("bwn", {}),
    ("twn", {}),
    ("minmax", {"w_bits": 3}),
    ("lsqplus", {"w_bits": 3}),
]


def values_and_gradient(name, options, w, g, ewgs):
    x = torch.tensor(w, requires_grad=True)
    method = wnq.get_method(name, **options, **({} if ewgs is None else {"ewgs": ewgs}))
    quantizer = method.weight(x.detach(), 0)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    return y.detach().numpy(), x.grad.numpy(), quantizer


@pytest.mark.parametrize(("name", "options"), COMMON, ids=[n + "".join(f"-{v}" for v in o.values()) for n, o in COMMON])
def test_common_option_scales_the_gradient_and_leaves_the_values(name, options):
    delta = 0.3
    w = np.random.default_rng(7).normal(size=(6, 9)) * 0.5
    g = np.random.default_rng(8).normal(size=w.shape)
    plain_y, plain_g, _ = values_and_gradient(name, options, w, g, None)
    zero_y, zero_g, _ = values_and_gradient(name, options, w, g, 0.0)
    y, gradient, quantizer = values_and_gradient(name, options, w, g, delta)
    assert (zero_y == plain_y).all()
    assert (zero_g == plain_g).all()
    assert (y == plain_y).all()
    if name in ("wnq", "dorefa"):
        # The rounding is of u = w/m, on a grid from -1 to 1, with gradient h = g m (h = g for dorefa, scale one).
        t = np.tanh(w) if name == "dorefa" else w
        axis = 1 if options.get("granularity") == "channel" else None
        m = np.abs(t).max(axis, keepdims=True)
        factor = 1.0 if name == "dorefa" else m
        h, u, q = g * factor, t / m, plain_y / factor
        scaled = h * (1 + delta * np.sign(h) * (u - q) / 2)
        at_max = np.abs(t) == m
        # Through u's denominator, and for wnq through the factor m as well.
        through = -(scaled * u).sum(axis, keepdims=True) / m
        if name == "wnq":
            through = through + (g * q).sum(axis, keepdims=True)
        expected = scaled / m + at_max * np.sign(t) * through
        if name == "dorefa":
            expected = expected * (1 - t**2)
    else:
        span = reach_of_levels(quantizer.quantize(torch.tensor(w)))
        span = span[:, None] if span.ndim else span
        error = np.clip((w - plain_y) / span, -0.5, 0.5)
        expected = plain_g * (1 + delta * np.sign(plain_g) * error)
    assert np.abs(gradient - expected).max() < 1e-12
    assert np.abs(gradient - plain_g).max() > 1e-4


def test_common_option_leaves_the_gradient_of_lsqs_step():
    w = np.random.default_rng(9).normal(size=(6, 9))
    g = np.random.default_rng(10).normal(size=w.shape)
    steps = [values_and_gradient("lsq", {}, w, g, delta)[2].step.grad.item() for delta in (0.0, 0.3)]
    assert steps[0] == pytest.approx(steps[1], rel=1e-6)


def test_common_option_reaches_the_inputs():
    x = torch.rand(5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    g = torch.randn(5, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for activation in ("lsq", "pact", "clip", "lsqplus"):
        quantizer = wnq.get_method("wnq", a_bits=2, activation=activation, ewgs=0.3).input()
        quantizer.observe_(x)
        a = x.clone().requires_grad_()
        y = quantizer(a)
        y.backward(g)
        book = quantizer.quantize(x).codebook
        error = (x - y.detach()) / (book.amax() - book.amin())
        inside = (x > book.amin()) & (x < book.amax())
        expected = torch.where(inside, g * (1 + 0.3 * g.sign() * error), 0)
        assert torch.allclose(a.grad, expected, atol=1e-7), activation


def test_weight_compiles():
    COMPILES(lambda x: wnq.get_method("ewgs").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"w_bits": 1}, {"w_bits": 2, "ewgs": 0.1}], ids=str)
def test_method_keeps_the_laws(options, law):
    law(wnq.get_method("ewgs", a_bits=3, **options))


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 0}, "w_bits must be an integer from 1 to 8"),
    ({"a_bits": 9}, "a_bits .* from 1 to 8, got 9"),
    ({"ewgs": -1}, "ewgs must be a finite number >= 0, got -1"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("ewgs", **options)
