"""TGA: the closed form against numerical integration, sampling and finite differences; the quantizer against NumPy."""

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats

import wnq
from wnq.methods.tga import inverse_mills, truncated_mean
from wnq.testing import LAWS, METHOD_LAWS

# Mean, standard deviation, threshold: centred, shifted either way, shifted past the threshold, far tails.
CASES = [(0.0, 1.0, 0.3), (0.4, 1.0, 0.3), (-0.4, 1.0, 1.5), (2.0, 0.5, 0.7), (-3.0, 0.5, 1.0), (0.01, 0.05, 0.02)]
CASES += [(0.0, 1.0, 0.0), (0.0, 1.0, 6.0), (0.5, 1.0, 9.0)]


def double(*values):
    return [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in values]


def integrated(mean, deviation, threshold):
    """E(|w| : |w| > threshold) by quadrature of the definition."""
    density = stats.norm(mean, deviation).pdf
    ends = (max(threshold, mean) + 40 * deviation, min(-threshold, mean) - 40 * deviation)
    near = (mean, threshold + deviation, -threshold - deviation)
    parts = []
    for power in (1, 0):
        right = integrate.quad(
            lambda w, power=power: abs(w) ** power * density(w), threshold, ends[0], points=[p for p in near if p > threshold],
            limit=500, epsabs=0, epsrel=1e-12,
        )[0]  # fmt: skip
        left = integrate.quad(
            lambda w, power=power: abs(w) ** power * density(w), ends[1], -threshold, points=[p for p in near if p < -threshold],
            limit=500, epsabs=0, epsrel=1e-12,
        )[0]  # fmt: skip
        parts.append(right + left)
    return parts[0] / parts[1]


@pytest.mark.parametrize("case", CASES)
def test_closed_form_equals_the_integral(case):
    alpha = truncated_mean(*double(*case)).item()
    assert alpha == pytest.approx(integrated(*case), rel=1e-9)  # the quadrature's own accuracy


@pytest.mark.parametrize("case", CASES[:6])
def test_closed_form_equals_the_mean_of_samples(case):
    mean, deviation, threshold = case
    w = np.random.default_rng(0).normal(mean, deviation, size=400_000)
    kept = np.abs(w)[np.abs(w) > threshold]
    error = kept.std() / np.sqrt(kept.size)
    assert abs(truncated_mean(*double(*case)).item() - kept.mean()) < 4 * error


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_threshold_equals_finite_differences_and_the_formula(case):
    inputs = double(*case)
    alpha = truncated_mean(*inputs)
    (gradient,) = torch.autograd.grad(alpha, inputs[2])
    mean, deviation, threshold = case
    step = 1e-5 * deviation
    up, down = (truncated_mean(*double(mean, deviation, threshold + sign * step)).item() for sign in (1, -1))
    assert gradient.item() == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)
    a, b = (threshold - mean) / deviation, (threshold + mean) / deviation
    density, mass = stats.norm.pdf(a) + stats.norm.pdf(b), stats.norm.sf(a) + stats.norm.sf(b)
    formula = (alpha.item() - threshold) * density / (deviation * mass)
    assert gradient.item() == pytest.approx(formula, rel=1e-9, abs=1e-12)


def test_closed_form_passes_gradcheck_in_all_three():
    for case in CASES[1:6]:
        assert torch.autograd.gradcheck(truncated_mean, tuple(double(*case)))


def test_centred_weights_give_the_one_sided_truncated_normal():
    for threshold in (0.1, 1.0, 3.0):
        alpha = truncated_mean(*double(0.0, 0.2, threshold)).item()
        assert alpha == pytest.approx(stats.truncnorm(threshold / 0.2, np.inf, scale=0.2).mean(), rel=1e-8)


def test_the_sign_of_the_mean_does_not_matter():
    for mean, deviation, threshold in CASES:
        pair = [truncated_mean(*double(sign * mean, deviation, threshold)).item() for sign in (1, -1)]
        assert pair[0] == pytest.approx(pair[1], rel=1e-13)


def test_inverse_mills_ratio_in_both_tails():
    x = torch.tensor([-200.0, -40.0, -8.0, -1.0, 0.0, 1.0, 8.0, 40.0, 1e3], dtype=torch.float64, requires_grad=True)
    expected = np.exp(stats.norm.logpdf(x.detach()) - stats.norm.logsf(x.detach()))
    assert np.allclose(inverse_mills(x).detach(), expected, rtol=1e-9, atol=0)
    (gradient,) = torch.autograd.grad(inverse_mills(x).sum(), x)
    assert torch.isfinite(gradient).all()
    assert np.allclose(gradient[:8], expected[:8] * (expected[:8] - x.detach()[:8].numpy()), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("ratio", [1.0, 15.0, 40.0, 300.0, 1e6])
def test_far_tails_stay_finite_in_float32(ratio):
    # Beyond 14 standard deviations the tail itself is zero in float32; the mean beyond it is just above the threshold.
    values = [torch.tensor(v, requires_grad=True) for v in (0.0, 0.01, 0.01 * ratio)]
    alpha = truncated_mean(*values)
    gradients = torch.autograd.grad(alpha, values)
    assert all(bool(torch.isfinite(g)) for g in gradients)
    if ratio < 1e4:
        assert 1 <= alpha.item() / values[2].item() < 1 + 1.1 / ratio**2 if ratio > 1 else alpha.item() > 0.01


def test_no_spread_gives_the_magnitude_of_the_mean():
    assert truncated_mean(*double(-0.7, 0.0, 0.1)).item() == 0.7


def numpy_tga(w, threshold):
    mean, deviation = w.mean(), w.std()
    a, b = (threshold - mean) / deviation, (threshold + mean) / deviation
    phi, tail = stats.norm.pdf, stats.norm.sf
    alpha = (deviation * (phi(a) + phi(b)) + mean * (tail(a) - tail(b))) / (tail(a) + tail(b))
    ternary = np.sign(w) * (np.abs(w) > threshold)
    return ternary, alpha, (alpha - threshold) * (phi(a) + phi(b)) / (deviation * (tail(a) + tail(b)))


@pytest.mark.parametrize("threshold", [None, 0.02, 0.15])
@pytest.mark.parametrize("mean", [0.0, 0.05])
def test_values_and_gradients_equal_the_equations(mean, threshold):
    w = np.random.default_rng(1).normal(mean, 0.1, size=(8, 4, 3, 3))
    g = np.random.default_rng(2).normal(size=w.shape)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = torch.tensor(w, dtype=dtype, requires_grad=True)
        quantizer = wnq.get_method("tga").weight(x.detach(), 0)
        if threshold is None:
            assert quantizer.threshold.item() == pytest.approx(0.05 * np.abs(w).max(), rel=1e-6)
        else:
            quantizer.threshold.data.fill_(threshold)
        y = quantizer(x)
        y.backward(torch.tensor(g, dtype=dtype))
        ternary, alpha, slope = numpy_tga(x.detach().double().numpy(), quantizer.threshold.double().item())
        assert np.abs(y.detach().double().numpy() - ternary * alpha).max() < tolerance
        assert np.abs(x.grad.double().numpy() - g).max() <= (0 if dtype == torch.float64 else 1e-6)
        # A sum of 288 products: relative to the size of its terms.
        assert quantizer.threshold.grad.item() == pytest.approx(slope * (g * ternary).sum(), abs=50 * tolerance)


def test_alpha_is_near_the_mean_of_the_kept_weights_if_they_are_gaussian():
    w = torch.tensor(np.random.default_rng(3).normal(0.0, 0.1, size=(500, 500)))
    quantizer = wnq.get_method("tga").weight(w, 0)
    kept = w.abs()[quantizer(w) != 0].mean()
    assert quantizer(w).abs().max().item() == pytest.approx(kept.item(), rel=5e-3)


@pytest.mark.parametrize(("threshold", "held"), [(-5.0, 0.001), (0.0, 0.001), (7.0, 0.99)])
def test_a_threshold_out_of_range_is_held_and_still_learns(threshold, held):
    w = torch.tensor(np.random.default_rng(4).normal(size=(6, 7)))
    quantizer = wnq.get_method("tga").weight(w, 0)
    quantizer.threshold.data.fill_(held * w.abs().max())
    expected = quantizer(w)
    quantizer.threshold.data.fill_(threshold)
    assert torch.equal(quantizer(w), expected)
    assert (expected != 0).any()
    quantizer(w).square().sum().backward()
    assert quantizer.threshold.grad.item() > 0  # alpha grows with the threshold, at either bound


def test_statistics_are_constants_of_the_gradient():
    w = torch.tensor([0.4, -0.9, 0.05, 1.3], dtype=torch.float64, requires_grad=True)
    wnq.get_method("tga").weight(w.detach(), 0)(w)[0].backward()
    assert w.grad.tolist() == [1.0, 0.0, 0.0, 0.0]


def test_descent_finds_the_threshold_whose_truncated_mean_is_wanted():
    """Fitting 1.8 sign(w), the scale has to become 1.8: the threshold must reach the point where the formula says so."""
    w = torch.tensor(np.random.default_rng(5).normal(size=(100, 100)))
    quantizer = wnq.get_method("tga").weight(w, 0)
    for _ in range(200):
        error = (quantizer(w) - 1.8 * w.sign()).square().mean()
        (gradient,) = torch.autograd.grad(error, quantizer.threshold)
        quantizer.threshold.data -= 0.5 * gradient
        quantizer.observe_(w)
    mean, deviation = w.mean().item(), w.std(correction=0).item()
    wanted = optimize.brentq(lambda t: truncated_mean(*double(mean, deviation, t)).item() - 1.8, 0.1, 3)
    assert 1 < wanted < 1.5
    assert quantizer.threshold.item() == pytest.approx(wanted, rel=1e-6)


def test_a_training_step_brings_a_runaway_threshold_back_and_evaluation_does_not():
    torch.manual_seed(0)
    model = torch.nn.Linear(6, 5)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("tga"), first_last_bits=None))
    quantizer, largest = model.parametrizations.weight[0], model.parametrizations.weight.original.abs().max()
    quantizer.threshold.data.fill_(-3.0)
    model.eval()(torch.ones(1, 6))
    assert quantizer.threshold.item() == -3
    model.train()(torch.ones(1, 6)).sum().backward()
    assert quantizer.threshold.item() == pytest.approx(0.001 * largest.item())
    assert quantizer.threshold.grad is not None
    quantizer.threshold.data.fill_(3.0)
    model(torch.ones(1, 6))
    assert quantizer.threshold.item() == pytest.approx(0.99 * largest.item())


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"normalize": "max_abs"}, {"ewgs": 0.01}], ids=str)
def test_laws(options, law):
    law(lambda x: wnq.get_method("tga", **options).weight(x, 0))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("tga").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("tga", a_bits=3))


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 1}, "w_bits must be 2 \\(or 32 for float weights\\), got 1"),
    ({"activation": "x"}, "activation must be one of"),
    ({"threshold": 0.1}, "no option 'threshold'"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("tga", **options)
