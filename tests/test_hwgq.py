"""HWGQ: the levels are optimal for a half-wave Gaussian, values and the three gradients equal the equations."""

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.activations import input_builder
from wnq.methods.hwgq import BACKWARDS, HalfWaveGaussian, optimal_levels, optimal_step
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)
QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]

# Gauss-Legendre on [0, 10] in 20000 panels of 4 nodes; the density beyond is below 1e-22.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(4)
_EDGES = np.linspace(0, 10, 20_001)
_X = (_EDGES[:-1, None] + (_NODES + 1) / 2 * np.diff(_EDGES)[:, None]).ravel()
_MASS = (_WEIGHTS / 2 * np.diff(_EDGES)[:, None]).ravel() * np.exp(-(_X**2) / 2) / np.sqrt(2 * np.pi)


def expected_error(levels):
    """Integral over x > 0 of density times squared distance to the nearest level."""
    levels = np.asarray(levels)
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, _X)]
    return (_MASS * (_X - nearest) ** 2).sum()


def uniform(step, bits):
    return step * np.arange(1, 2**bits)


def test_the_quadrature_is_right():
    assert _MASS.sum() == pytest.approx(0.5, abs=1e-12)
    assert expected_error([0.0]) == pytest.approx(0.5, abs=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_step_is_the_minimum_of_the_expected_error(bits):
    step = optimal_step(bits)
    best = expected_error(uniform(step, bits))
    assert best < expected_error(uniform(0.999 * step, bits))
    assert best < expected_error(uniform(1.001 * step, bits))
    # The best of all, not a local one.
    assert best < min(expected_error(uniform(f * step, bits)) for f in np.linspace(0.1, 4, 80))


@pytest.mark.parametrize("bits", range(1, 9))
def test_free_levels_are_the_means_of_their_cells(bits):
    levels = np.array(optimal_levels(bits))
    assert (np.diff(levels) > 0).all()
    bounds = [0, *(levels[1:] + levels[:-1]) / 2, np.inf]
    density = [np.exp(-(b**2) / 2) / np.sqrt(2 * np.pi) for b in bounds]
    above = [float(torch.special.erfc(torch.tensor(b / 2**0.5, dtype=torch.float64))) / 2 for b in bounds]
    means = np.diff(density) / np.diff(above)
    assert np.abs(levels - means).max() < 1e-11
    if bits > 1:
        assert expected_error(levels) < expected_error(uniform(optimal_step(bits), bits))


def test_levels_equal_published_ones():
    assert optimal_step(1) == pytest.approx(np.sqrt(2 / np.pi), abs=1e-14)
    assert optimal_step(2) == pytest.approx(0.538, abs=1e-3)  # HWGQ's code
    # Max, Quantizing for minimum distortion, 1960, Table I: 6 levels of a Gaussian, by symmetry 3 of its half.
    assert optimal_levels(2) == pytest.approx((0.3177, 1.0, 1.894), abs=5e-4)


def test_two_bits_by_hand():
    x = torch.tensor([-3.0, 0.0, 1e-6, 0.8, 0.82, 1.34, 1.36, 50.0], requires_grad=True)
    y = HalfWaveGaussian(2)(x)
    d = 0.5388119
    assert torch.allclose(y, torch.tensor([0.0, 0.0, d, d, 2 * d, 2 * d, 3 * d, 3 * d]))
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]


def test_a_relu_in_front_changes_nothing():
    x = torch.randn(200, generator=torch.Generator().manual_seed(0))
    quantizer = HalfWaveGaussian(3)
    assert torch.equal(quantizer(x), quantizer(x.relu()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("free", [False, True], ids=["uniform", "free"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_and_gradients_equal_the_equations(bits, free, backward, dtype, tolerance):
    v, g = 2 * GENERATOR.normal(size=(40, 30)), GENERATOR.normal(size=(40, 30))
    x = torch.tensor(v, dtype=dtype, requires_grad=True)
    y = HalfWaveGaussian(bits, uniform=not free, backward=backward)(x)
    y.backward(torch.tensor(g, dtype=dtype))
    levels = np.array(optimal_levels(bits)) if free else uniform(optimal_step(bits), bits)
    thresholds = (levels[1:] + levels[:-1]) / 2
    seen, top = x.detach().double().numpy(), levels[-1]
    expected = np.where(seen > 0, levels[np.searchsorted(thresholds, seen)], 0.0)
    if bits > 1:
        clear = np.abs(seen[..., None] - thresholds).min(-1) > 1e-6  # of a threshold's rounding in float32
        assert clear.mean() > 0.99
    else:
        clear = np.ones_like(seen, dtype=bool)
    assert np.abs(y.detach().double().numpy() - expected)[clear].max() < 5 * tolerance
    slope = (seen > 0).astype(float)
    if backward == "clipped":
        slope *= seen <= top
    if backward == "log_tailed":
        slope = np.where(seen > top, 1 / np.maximum(seen - (top - 1), 1e-9), slope)
    assert bits == 8 or (seen > top).any()
    assert np.abs(x.grad.double().numpy() - g * slope).max() < 5 * tolerance


def test_the_log_tailed_gradient_is_continuous_at_the_top():
    quantizer = HalfWaveGaussian(2, backward="log_tailed")
    x = torch.tensor([quantizer.top - 1e-9, quantizer.top, quantizer.top + 1e-9], dtype=torch.float64).requires_grad_()
    quantizer(x).sum().backward()
    assert torch.allclose(x.grad, torch.ones(3, dtype=torch.float64), atol=1e-8)


def test_it_has_no_state_and_is_unsigned():
    quantizer = input_builder("hwgq", 2)()
    assert not quantizer.state_dict()
    assert quantizer.signed is False
    assert torch.equal(quantizer.quantize(torch.randn(9)).levels, torch.arange(4.0))


def test_the_levels_do_not_depend_on_the_default_device():
    optimal_levels.cache_clear()
    with torch.device("meta"):
        levels = optimal_levels(2)
    optimal_levels.cache_clear()
    assert levels == optimal_levels(2)


def test_weights_are_those_of_bwn():
    w = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wnq.get_method("hwgq").weight(w, 0)(w), wnq.get_method("bwn").weight(w, 0)(w))


def test_a_stored_model_gives_equal_logits(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("hwgq"), first_last_bits=None))
    model(x)
    expected = model.eval()(x)
    wnq.save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    assert torch.equal(wnq.load(tmp_path / "model.safetensors", fresh)(x), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_laws_at_every_width(bits):
    for law in QUICK:
        law(lambda _: input_builder("hwgq", bits)())


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("bits", [1, 2, 8])
def test_laws_of_free_levels(bits, backward):
    for law in QUICK:
        law(lambda _: HalfWaveGaussian(bits, uniform=False, backward=backward))


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
def test_laws_of_the_weight(law):
    law(lambda x: wnq.get_method("hwgq").weight(x, 0))


def test_compiles():
    COMPILES(lambda _: HalfWaveGaussian(2))
    COMPILES(lambda _: HalfWaveGaussian(3, uniform=False, backward="log_tailed"))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("a_bits", [1, 2, 3, 32])
def test_method_laws(law, a_bits):
    law(wnq.get_method("hwgq", a_bits=a_bits))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 2"):
        wnq.get_method("hwgq", w_bits=2)
    with pytest.raises(ValueError, match="a_bits"):
        wnq.get_method("hwgq", a_bits=9)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got 0"):
        HalfWaveGaussian(0)
    with pytest.raises(ValueError, match="backward must be one of 'clipped', 'vanilla', 'log_tailed', got 'none'"):
        HalfWaveGaussian(2, backward="none")
