"""LSQ against NumPy typed from its equations, and its fast backward pass against the definition."""

import copy

import numpy as np
import pytest
import torch

import wnq
from wnq.activations import input_builder
from wnq.learned_step import LearnedStep, RoundToStep
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)
FAST_LAWS = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def numpy_lsq(v, s, low, high, g, count):
    inside = (v / s > low) & (v / s < high)
    rounded = np.rint(np.clip(v / s, low, high))
    ds = np.where(inside, rounded - v / s, rounded)
    return rounded * s, g * inside, (g * ds).sum() / np.sqrt(count * max(high, 1))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_lsq_weight_equals_equations_1_to_5(bits):
    v = GENERATOR.normal(size=(6, 11))
    g = GENERATOR.normal(size=v.shape)
    x = torch.tensor(v, requires_grad=True)
    quantizer = wnq.get_method("lsq", w_bits=bits).weight(x.detach(), 0)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    assert quantizer.step.item() == pytest.approx(2 * np.abs(v).mean() / np.sqrt(high), rel=1e-6)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    expected, dx, ds = numpy_lsq(v, quantizer.step.double().item(), low, high, g, v.size)
    assert np.abs(y.detach().numpy() - expected).max() < 1e-12
    assert np.abs(x.grad.numpy() - dx).max() < 1e-12
    assert quantizer.step.grad.item() == pytest.approx(ds, rel=1e-5)


@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_lsq_input_decides_its_sign_on_the_first_batch(bits, negative):
    v = GENERATOR.normal(size=(8, 5, 4))
    v = v if negative else np.maximum(v, 0)
    g = GENERATOR.normal(size=v.shape)
    quantizer = LearnedStep(bits, is_weight=False)
    with pytest.raises(RuntimeError, match="calibrate_"):
        quantizer(torch.tensor(v))
    assert quantizer.signed is None
    x = torch.tensor(v, requires_grad=True)
    quantizer.observe_(x)
    quantizer.observe_(100 * x)  # later batches change nothing
    assert quantizer.signed is negative
    low = -(2 ** (bits - 1)) if negative else 0
    high = low + 2**bits - 1
    assert quantizer.step.item() == pytest.approx(2 * np.abs(v).mean() / np.sqrt(max(high, 1)), rel=1e-6)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    expected, dx, _ = numpy_lsq(v, quantizer.step.double().item(), low, high, g, 1)
    assert np.abs(y.detach().numpy() - expected).max() < 1e-12
    assert np.abs(x.grad.numpy() - dx).max() < 1e-12
    if high > 0:
        _, _, ds = numpy_lsq(v, quantizer.step.double().item(), low, high, g, v[0].size)
        assert quantizer.step.grad.item() == pytest.approx(ds, rel=1e-5)


def test_the_fast_backward_equals_the_definition_in_every_memory_layout():
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    g = torch.randn(4, 6, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, dx, ds = numpy_lsq(x.numpy(), 0.4, -2, 1, g.numpy(), 1)
    for layout in (torch.contiguous_format, torch.channels_last):
        for g_layout in (torch.contiguous_format, torch.channels_last):
            a = x.clone(memory_format=layout).requires_grad_()
            step = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
            RoundToStep.apply(a, step, -2.0, 1.0).backward(g.contiguous(memory_format=g_layout))
            assert np.abs(a.grad.numpy() - dx).max() == 0
            assert step.grad.item() == pytest.approx(ds, rel=1e-12)


def test_tensor_bounds_give_the_same_as_numbers():
    x = torch.randn(50, generator=torch.Generator().manual_seed(3))
    g = torch.randn(50, generator=torch.Generator().manual_seed(4))
    results = []
    for low, high in ((0.0, 3.0), (torch.tensor(0.0), torch.tensor(3.0))):
        a, step = x.clone().requires_grad_(), torch.tensor(0.2, requires_grad=True)
        y = RoundToStep.apply(a, step, low, high)
        y.backward(g)
        results.append((y.detach(), a.grad, step.grad))
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))


def test_half_precision_input_keeps_its_type_and_a_close_gradient():
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).relu()
    g = torch.randn(64, 32, generator=torch.Generator().manual_seed(6))
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        a, step = x.bfloat16().to(dtype).requires_grad_(), torch.tensor(0.31, requires_grad=True)
        RoundToStep.apply(a, step, 0.0, 7.0).backward(g.bfloat16().to(dtype))
        assert a.grad.dtype == dtype
        grads.append((a.grad.float(), step.grad))
    assert (grads[0][0] != grads[1][0]).float().mean() < 0.01  # an element at a bound may change sides
    # Saved values have 8 significant bits: the sum of 2048 products agrees to about 2^-8 of a typical term times sqrt(n).
    assert abs(grads[0][1] - grads[1][1]) < 2**-8 * 3 * 2048**0.5


def test_first_batch_of_zeros_still_gives_a_step():
    quantizer = LearnedStep(3, is_weight=False)
    quantizer.observe_(torch.zeros(4, 5))
    assert quantizer.step.item() == pytest.approx(1 / 7)


@pytest.mark.parametrize("law", FAST_LAWS, ids=lambda law: law.__name__)
def test_weights_and_inputs_keep_the_laws(law):
    for bits in range(2, 9):
        law(lambda x: wnq.get_method("lsq", w_bits=bits).weight(x, 0))  # noqa: B023
    for bits in range(1, 9):
        law(lambda _: input_builder("lsq", bits)())  # noqa: B023


def test_it_compiles():
    COMPILES(lambda x: wnq.get_method("lsq").weight(x, 0))
    COMPILES(lambda _: input_builder("lsq", 3)())


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("bits", [2, 4])
def test_method_keeps_the_laws(bits, law):
    law(wnq.get_method("lsq", w_bits=bits, a_bits=bits))


def test_one_bit_is_refused():
    with pytest.raises(ValueError, match=r"w_bits must be an integer from 2 to 8 \(or 32 for float weights\), got 1"):
        wnq.get_method("lsq", w_bits=1)


@pytest.mark.parametrize("name", ["lsq", "lsqplus"])
def test_a_step_carried_past_zero_is_read_as_its_magnitude(name):
    quantizer = wnq.get_method(name, a_bits=3).input()
    x = torch.linspace(0, 2, 50).reshape(5, 10)
    quantizer.observe_(x)
    with torch.no_grad():
        quantizer.step.fill_(-0.05)
    y = quantizer(x)
    assert torch.equal(y, quantizer.quantize(x).dequantize())
    assert bool((y.diff() >= 0).all()), "a negative step would turn the order of the values round"
    twin = copy.deepcopy(quantizer)
    with torch.no_grad():
        twin.step.fill_(0.05)
    assert torch.equal(y, twin(x))
    y.square().sum().backward()
    twin(x).square().sum().backward()
    assert quantizer.step.grad.item() == -twin.step.grad.item()
