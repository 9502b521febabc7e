"""TTQ against NumPy typed from its equations: values, both learned scales, and the three gradients."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS, METHOD_LAWS


def numpy_ttq(w, g, positive, negative, t):
    """Values, dL/dw, dL/dWp and dL/dWn for dL/dw_q = g."""
    delta = t * np.abs(w).max()
    above, below = w > delta, w < -delta
    value = positive * above - negative * below
    slope = np.where(above, positive, np.where(below, negative, 1.0))
    return value, slope * g, g[above].sum(), -g[below].sum()


def heavy(shape, seed):
    return np.random.default_rng(seed).standard_t(3, size=shape) * 0.1


@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 9), (11,)])
def test_values_and_gradients_equal_the_equations(shape, threshold):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        x = torch.tensor(heavy(shape, 1), dtype=dtype, requires_grad=True)
        g = torch.tensor(np.random.default_rng(2).normal(size=shape), dtype=dtype)
        quantizer = wnq.get_method("ttq", threshold=threshold).weight(x.detach(), 0)
        with torch.no_grad():
            quantizer.positive.fill_(0.7)
            quantizer.negative.fill_(0.2)
        y = quantizer(x)
        y.backward(g)
        values = (quantizer.positive.item(), quantizer.negative.item())
        expected = numpy_ttq(x.detach().double().numpy(), g.double().numpy(), *values, threshold)
        seen = (y.detach(), x.grad, quantizer.positive.grad, quantizer.negative.grad)
        for a, b in zip(seen, expected, strict=True):
            assert np.abs(a.double().numpy() - b).max() <= tolerance * max(1, np.abs(b).max())


def test_by_hand():
    # The threshold is 0.05 * 2 = 0.1 and is not passed by 0.1 itself; means 0.8 above (1.2, 0.4) and 1.3 below (2.0, 0.6).
    w = torch.tensor([[1.2, 0.4, 0.1], [-2.0, -0.6, -0.05]], dtype=torch.float64, requires_grad=True)
    quantizer = wnq.get_method("ttq").weight(w.detach(), 0)
    assert quantizer.positive.item() == pytest.approx(0.8, abs=1e-12)
    assert quantizer.negative.item() == pytest.approx(1.3, abs=1e-12)
    y = quantizer(w)
    y.backward(torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], dtype=torch.float64))
    assert torch.allclose(y, torch.tensor([[0.8, 0.8, 0.0], [-1.3, -1.3, 0.0]], dtype=torch.float64), atol=1e-12)
    assert (quantizer.positive.grad.item(), quantizer.negative.grad.item()) == (3.0, -9.0)
    expected = torch.tensor([[0.8, 1.6, 3.0], [5.2, 6.5, 6.0]], dtype=torch.float64)
    assert torch.allclose(w.grad, expected, atol=1e-12)


def test_the_start_is_the_least_squares_value_of_each_side():
    w = torch.tensor(heavy((20, 30), 3))
    quantizer = wnq.get_method("ttq").weight(w, 0)
    best = (quantizer(w) - w).square().sum().item()
    for value in (quantizer.positive, quantizer.negative):
        for factor in (0.99, 1.01):
            with torch.no_grad():
                value.mul_(factor)
                assert (quantizer(w) - w).square().sum().item() > best
                value.div_(factor)


@pytest.mark.parametrize(("weights", "positive", "negative"), [
    ([1.0, 3.0], 2.0, 2.0),  # no weight below: the other side's mean
    ([-1.0, -3.0], 2.0, 2.0),
    ([0.0, 0.0], 1.0, 1.0),
])  # fmt: skip
def test_an_empty_side_starts_positive(weights, positive, negative):
    quantizer = wnq.get_method("ttq").weight(torch.tensor(weights), 0)
    assert (quantizer.positive.item(), quantizer.negative.item()) == (positive, negative)


@pytest.mark.parametrize(("positive", "negative", "levels", "codes"), [
    (0.5, 0.25, [-0.25, 0.0, 0.5], [2, 1, 0]),
    (-0.5, 0.25, [-0.5, -0.25, 0.0], [0, 2, 1]),
    (0.5, -0.25, [0.0, 0.25, 0.5], [2, 0, 1]),
    (-0.5, -0.25, [-0.5, 0.0, 0.25], [0, 1, 2]),
    (0.0, 0.25, [-0.25, 0.0, 0.0], None),
])  # fmt: skip
def test_learned_values_of_any_sign_are_stored_in_order_and_exactly(positive, negative, levels, codes):
    w = torch.tensor([0.9, 0.01, -1.0])
    quantizer = wnq.get_method("ttq").weight(w, 0)
    with torch.no_grad():
        quantizer.positive.fill_(positive)
        quantizer.negative.fill_(negative)
    quantized = quantizer.quantize(w)
    assert quantized.levels.tolist() == levels
    assert quantized.scale.item() == 1
    assert torch.equal(quantized.dequantize(), quantizer(w))
    assert quantizer(w).tolist() == [positive, 0.0, -negative]
    if codes is not None:
        assert quantized.codes.tolist() == codes


def test_a_model_whose_value_turned_negative_freezes_to_the_same_outputs():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("ttq"), first_last_bits=None))
    with torch.no_grad():
        model[0].parametrizations.weight[0].negative.fill_(-0.3)
    x = torch.randn(4, 6)
    expected = model(x)
    assert torch.equal(wnq.freeze_(model)(x), expected)


def test_the_maximum_is_a_constant_of_the_gradient():
    w = torch.tensor([0.3, -0.8, 0.1], requires_grad=True)
    wnq.get_method("ttq", threshold=0.5).weight(w.detach(), 0)(w)[0].backward()
    assert w.grad[1] == 0  # the largest weight sets the threshold that 0.3 stays below


def test_ewgs_scales_the_gradient_of_the_weights_only():
    w = torch.tensor(heavy((4, 6), 4))
    grads = []
    for ewgs in (0.0, 0.5):
        x = w.clone().requires_grad_()
        quantizer = wnq.get_method("ttq", ewgs=ewgs).weight(w, 0)
        quantizer(x).square().sum().backward()
        grads.append((x.grad, quantizer.positive.grad, quantizer.negative.grad))
    assert not torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])
    assert torch.equal(grads[0][2], grads[1][2])


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.0}, {"threshold": 0.4, "normalize": "max_abs"}], ids=str)
def test_laws(options, law):
    law(lambda x: wnq.get_method("ttq", **options).weight(x, 0))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("ttq").weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("ttq", a_bits=3))


@pytest.mark.parametrize(("options", "message"), [
    ({"threshold": -0.1}, "threshold must be at least 0 and below 1, got -0.1"),
    ({"threshold": 1}, "threshold must be at least 0 and below 1, got 1"),
    ({"threshold": float("nan")}, "threshold must be at least 0 and below 1, got nan"),
    ({"w_bits": 3}, "w_bits must be 2 \\(or 32 for float weights\\), got 3"),
    ({"activation": "relu"}, "activation must be one of"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("ttq", **options)
