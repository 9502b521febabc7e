"""ABC-Net against NumPy typed from its equations: bases, least squares, gradients of weights and inputs."""

import numpy as np
import pytest
import torch

import wnq
from wnq.activations import input_builder
from wnq.methods.abcnet import BinaryActivations, nested_table
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws from the start, whichever tests run before it."""
    global GENERATOR
    GENERATOR = np.random.default_rng(0)


def numpy_bases(w, m):
    """Bases (n, m) and their least-squares coefficients."""
    flat = w.reshape(-1)
    u = [-1 + 2 * (i - 1) / (m - 1) for i in range(1, m + 1)] if m > 1 else [0.0]
    bases = np.stack([np.where(flat - flat.mean() + ui * flat.std() >= 0, 1.0, -1.0) for ui in u], 1)
    return bases, np.linalg.lstsq(bases, flat, rcond=None)[0]


def run(w, g, m, granularity="tensor", axis=0, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("abcnet", w_bits=m, granularity=granularity, **options).weight(x.detach(), axis)(x)
    y.backward(torch.tensor(g))
    return y.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("m", range(1, 9))
def test_values_are_the_combination_and_the_gradient_is_the_sum_of_alpha(m):
    for w in (GENERATOR.normal(size=(6, 5, 9)), GENERATOR.standard_t(3, size=(20, 10)) + 0.3):
        g = GENERATOR.normal(size=w.shape)
        bases, alpha = numpy_bases(w, m)
        for dtype, tolerance in ((np.float64, 1e-8), (np.float32, 2e-6)):  # 1e-8: the ridge of 1e-10
            y, gradient = run(w.astype(dtype), g.astype(dtype), m)
            assert np.abs(y - (bases @ alpha).reshape(w.shape)).max() < tolerance * max(1, np.abs(alpha).sum())
            # dL/dw = sum_i dL/dB_i dB_i/dw with w_q = sum_i alpha_i B_i and dB_i/dw = 1: each term is alpha_i g.
            expected = sum(a * g for a in alpha)
            assert np.abs(gradient - expected).max() < tolerance * np.abs(expected).max() * 3


def test_by_hand():
    # Mean 0, deviation 2. M = 1: signs ++--, alpha = mean|w| = 1.75.
    w = np.array([[3.0, 0.5, -0.5, -3.0]])
    assert run(w, np.ones_like(w), 1)[0] == pytest.approx(np.array([[1.75, 1.75, -1.75, -1.75]]))
    # M = 2 with thresholds at +-deviation (2.15): +3 | +-0.5 | -3: levels a+b, a-b or b-a, -a-b. By symmetry alpha = (1.5, 1.5).
    assert run(w, np.ones_like(w), 2)[0] == pytest.approx(np.array([[3.0, 0, 0, -3.0]]), abs=1e-8)
    assert run(w, np.ones_like(w), 2)[1] == pytest.approx(np.full((1, 4), 3.0))


def test_the_paper_notation_of_the_gradient():
    """sum_i alpha_i dL/dB_i with the gradient at B_i of the layer without its coefficient, by autograd through a real layer."""
    w, x = torch.tensor(GENERATOR.normal(size=(4, 6))), torch.tensor(GENERATOR.normal(size=(10, 6)))
    bases, alpha = numpy_bases(w.numpy(), 3)
    leaves = [torch.tensor(b.reshape(4, 6), requires_grad=True) for b in bases.T]
    outputs = [x @ b.T for b in leaves]
    total = sum(a * o for a, o in zip(alpha, outputs, strict=True))
    at_output = torch.autograd.grad(total.pow(3).sum(), total, retain_graph=True)[0]
    expected = sum(a * torch.autograd.grad(o, b, at_output)[0] for a, o, b in zip(alpha, outputs, leaves, strict=True))
    weight = w.clone().requires_grad_()
    (x @ wnq.get_method("abcnet", w_bits=3).weight(w, 0)(weight).T).pow(3).sum().backward()
    assert torch.allclose(weight.grad, expected, rtol=1e-7)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8])
def test_alpha_is_optimal_for_its_bases(m):
    w = GENERATOR.normal(size=(30, 20))
    bases, _ = numpy_bases(w, m)
    y, _ = run(w, np.ones_like(w), m)
    residual = (w - y).reshape(-1)
    assert np.abs(bases.T @ residual).max() < 1e-6  # normal equations


@pytest.mark.parametrize("m", range(1, 9))
def test_nested_signs_take_m_plus_one_values(m):
    w = torch.tensor(GENERATOR.normal(size=(40, 50)))
    quantized = wnq.get_method("abcnet", w_bits=m).weight(w, 0).quantize(w)
    assert quantized.n_levels == m + 1
    assert len(quantized.codes.unique()) == m + 1
    table = nested_table(m, w)
    assert table.shape == (m + 1, m)
    assert (table.diff(dim=0) >= 0).all() and (table.sum(1) == torch.arange(-m, m + 1, 2)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_per_channel_equals_each_channel_alone(axis):
    w, g = GENERATOR.normal(size=(4, 5, 8)), GENERATOR.normal(size=(4, 5, 8))
    y, gradient = run(w, g, 3, "channel", axis)
    for i in range(w.shape[axis]):
        alone, slope = run(w.take(i, axis), g.take(i, axis), 3)
        assert np.abs(y.take(i, axis) - alone).max() < 1e-12
        assert np.abs(gradient.take(i, axis) - slope).max() < 1e-12


def test_weights_far_from_zero_get_negative_coefficients_and_still_ascending_levels():
    w = torch.tensor(GENERATOR.normal(size=(10, 20)) * 0.1 + 5)
    _, alpha = numpy_bases(w.numpy(), 4)
    assert alpha.min() < 0
    quantizer = wnq.get_method("abcnet", w_bits=4).weight(w, 0)
    quantized = quantizer.quantize(w)
    assert (quantized.levels.diff() > 0).all()
    bases, alpha = numpy_bases(w.numpy(), 4)
    assert np.abs(quantizer(w).numpy() - (bases @ alpha).reshape(w.shape)).max() < 1e-7


def test_ewgs_measures_the_rounding_in_units_of_the_weight():
    w, g = GENERATOR.normal(size=(5, 8)), GENERATOR.normal(size=(5, 8))
    y, plain = run(w, g, 3)
    _, scaled = run(w, g, 3, ewgs=0.5)
    span = y.max() - y.min()
    expected = plain * (1 + 0.5 * np.sign(g) * np.clip((w - y) / span, -0.5, 0.5))
    assert np.abs(scaled - expected).max() < 1e-12


# Inputs


def made(shift, beta):
    quantizer = BinaryActivations(len(shift)).double()
    with torch.no_grad():
        quantizer.shift.copy_(torch.tensor(shift))
        quantizer.beta.copy_(torch.tensor(beta))
    quantizer.mark_ready_()
    return quantizer


@pytest.mark.parametrize("beta", [[0.5, 1.0, 0.25], [0.5, -1.0, 0.25], [-1.0, -0.5, -0.25]])
def test_input_values_and_gradients_equal_the_equations(beta):
    shift = [0.3, -0.6, 0.9]  # not in order
    x = GENERATOR.normal(size=(7, 30))
    g = GENERATOR.normal(size=x.shape)
    quantizer = made(shift, beta)
    t = torch.tensor(x, requires_grad=True)
    y = quantizer(t)
    y.backward(torch.tensor(g))
    signs = [2.0 * (np.clip(x + v, 0, 1) >= 0.5) - 1 for v in shift]
    windows = [(x + v >= 0) & (x + v <= 1) for v in shift]
    assert np.abs(y.detach().numpy() - sum(b * a for b, a in zip(beta, signs, strict=True))).max() < 1e-12
    assert np.abs(t.grad.numpy() - sum(b * o * g for b, o in zip(beta, windows, strict=True))).max() < 1e-12
    assert np.abs(quantizer.beta.grad.numpy() - [(g * a).sum() for a in signs]).max() < 1e-11
    expected = [b * (g * o).sum() for b, o in zip(beta, windows, strict=True)]
    assert np.abs(quantizer.shift.grad.numpy() - expected).max() < 1e-11
    quantized = quantizer.quantize(torch.tensor(x))
    assert quantized.n_levels == 4 and (quantized.levels.diff() > 0).all()


def test_a_threshold_belongs_to_the_upper_side():
    # x + v = 0.5 is +1, as the definition's >= says.
    assert made([0.25], [2.0])(torch.tensor([0.2, 0.25, 0.3], dtype=torch.float64)).tolist() == [-2, 2, 2]


def test_input_starts_as_a_staircase_over_the_first_batch():
    quantizer = BinaryActivations(4)
    with pytest.raises(RuntimeError, match="calibrate_"):
        quantizer(torch.zeros(3))
    x = torch.tensor([[0.0, 1.0, 2.0, 4.0, 0.0, 2.0]])
    quantizer.observe_(x)
    # Mean 1.5, deviation 1.384: from 0 (nearer than 1.5 - 2.77) to 4 (nearer than 1.5 + 2.77); two steps of 0.75, two of 1.25.
    assert (0.5 - quantizer.shift).tolist() == pytest.approx([0.375, 1.125, 2.125, 3.375])
    assert quantizer.beta.tolist() == pytest.approx([0.375, 0.375, 0.625, 0.625])
    quantizer.observe_(100 * x)  # later batches change nothing
    assert quantizer(x).tolist()[0] == pytest.approx([-2, -1.25, -0.5, 2, -2, -0.5])
    even = BinaryActivations(4)
    even.observe_(torch.linspace(-1, 1, 101))
    assert (0.5 - even.shift).tolist() == pytest.approx([-0.75, -0.25, 0.25, 0.75])
    assert even.beta.tolist() == pytest.approx([0.25] * 4)
    heavy = BinaryActivations(2)
    heavy.observe_(torch.cat([torch.tensor([-1.0, 1.0] * 500), torch.tensor([1000.0])]))
    assert (0.5 - heavy.shift).max() < 100  # two deviations, not the outlier


@pytest.mark.parametrize("bits", range(1, 9))
def test_input_laws(bits):
    for law in LAWS:
        if law.__name__ != "compiles" or bits == 3:
            law(lambda _: input_builder("abcnet", bits)())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_weight_laws(bits, granularity):
    method = wnq.get_method("abcnet", w_bits=bits, granularity=granularity)
    for law in LAWS:
        if law.__name__ != "compiles" or (bits == 3 and granularity == "tensor"):
            law(lambda x: method.weight(x, 0))
    for law in LAWS[:4]:
        law(lambda x: method.weight(x, 1))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("abcnet", w_bits=3, a_bits=3))


@pytest.mark.parametrize(("options", "message"), [
    ({"granularity": "row"}, "granularity must be one of 'tensor', 'channel', got 'row'"),
    ({"w_bits": 9}, "w_bits must be an integer from 1 to 8"),
    ({"a_bits": 9}, "a_bits .* from 1 to 8, got 9"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("abcnet", **options)
