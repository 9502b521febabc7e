"""LSQ+ against NumPy typed from its forward formula and the gradients that follow from it."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.lsqplus import RANGES, SAMPLE, OffsetStep
from wnq.testing import LAWS, METHOD_LAWS

(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def started(bits, batch):
    quantizer = OffsetStep(bits)
    quantizer.observe_(torch.as_tensor(batch))
    return quantizer


def swish(seed, shape):
    x = np.random.default_rng(seed).normal(size=shape) * 2
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("bits", range(2, 9))
def test_weight_is_lsq_with_another_start(bits):
    w = np.random.default_rng(bits).normal(0.02, 0.1, size=(6, 11))
    g = np.random.default_rng(50 + bits).normal(size=w.shape)
    x = torch.tensor(w, requires_grad=True)
    quantizer = wnq.get_method("lsqplus", w_bits=bits).weight(x.detach(), 0)
    mean, deviation = w.mean(), w.std()
    expected = max(abs(mean - 3 * deviation), abs(mean + 3 * deviation)) / 2 ** (bits - 1)
    assert quantizer.step.item() == pytest.approx(expected, rel=1e-6)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    step, low, high = quantizer.step.double().item(), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    v = w / step
    rounded = np.rint(np.clip(v, low, high))
    inside = (v > low) & (v < high)
    assert np.abs(y.detach().numpy() - rounded * step).max() < 1e-12
    assert np.abs(x.grad.numpy() - g * inside).max() == 0
    ds = (g * np.where(inside, rounded - v, rounded)).sum() / np.sqrt(w.size * high)
    assert quantizer.step.grad.item() == pytest.approx(ds, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_input_values_and_gradients_equal_the_formula(bits):
    x0 = swish(bits, (8, 5, 4))
    g = np.random.default_rng(20 + bits).normal(size=x0.shape)
    quantizer = started(bits, x0)
    with torch.no_grad():  # a range that clips on both sides
        quantizer.step.mul_(0.6)
        quantizer.offset.add_(0.1)
    x = torch.tensor(x0, requires_grad=True)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    step, offset, top = quantizer.step.double().item(), quantizer.offset.double().item(), 2**bits - 1
    v = (x0 - offset) / step
    rounded = np.rint(np.clip(v, 0, top))
    inside = (v > 0) & (v < top)
    assert (v < 0).any()
    assert (v > top).any()
    assert inside.any()
    assert np.abs(y.detach().numpy() - (rounded * step + offset)).max() < 1e-12
    assert np.abs(x.grad.numpy() - g * inside).max() == 0
    factor = 1 / np.sqrt(x0[0].size * top)
    assert quantizer.step.grad.item() == pytest.approx(
        factor * (g * np.where(inside, rounded - v, rounded)).sum(), rel=1e-5, abs=1e-6
    )
    assert quantizer.offset.grad.item() == pytest.approx(factor * (g * ~inside).sum(), rel=1e-5, abs=1e-6)


def test_gradients_by_hand():
    # s = 1, beta = -1, two bits: levels -1, 0, 1, 2. Of -3, 0.3, 5: clipped to -1, rounded to 0, clipped to 2.
    quantizer = OffsetStep(2)
    quantizer.offset.data.fill_(-1.0)
    quantizer.initialized.fill_(True)
    x = torch.tensor([[-3.0], [0.3], [5.0]], requires_grad=True)
    y = quantizer(x)
    assert y.flatten().tolist() == [-1.0, 0.0, 2.0]
    y.backward(torch.tensor([[1.0], [10.0], [100.0]]))
    assert x.grad.flatten().tolist() == [0.0, 10.0, 0.0]
    assert quantizer.offset.grad.item() == pytest.approx(101 / np.sqrt(3), rel=1e-6)
    # Outside, the integers 0 and 3; inside, round(1.3) - 1.3.
    assert quantizer.step.grad.item() == pytest.approx((0 + 300 - 3.0) / np.sqrt(3), rel=1e-6)


def searched(x, bits):
    """Least squared error over the grid of ranges, by brute force."""
    top, best = 2**bits - 1, (np.inf, 0, 0)
    for i in range(1, RANGES + 1):
        for j in range(1, RANGES + 1):
            low = x.mean() + (x.min() - x.mean()) * i / RANGES
            high = x.mean() + (x.max() - x.mean()) * j / RANGES
            step = (high - low) / top
            rounded = np.rint(np.clip((x - low) / step, 0, top)) * step + low
            best = min(best, (((rounded - x) ** 2).mean(), low, step))
    return best


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_start_has_the_least_squared_error_of_the_grid(bits):
    for x in (swish(1, (16, 40)), np.maximum(np.random.default_rng(2).standard_t(3, size=(16, 40)), 0)):
        quantizer = started(bits, x)
        error, low, step = searched(x, bits)
        assert quantizer.offset.item() == pytest.approx(low, rel=1e-5, abs=1e-7)
        assert quantizer.step.item() == pytest.approx(step, rel=1e-5)
        y = quantizer(torch.tensor(x)).detach().numpy()
        assert ((y - x) ** 2).mean() == pytest.approx(error, rel=1e-4)
        full = (x.max() - x.min()) / (2**bits - 1)
        whole_range = np.rint((x - x.min()) / full) * full + x.min()
        assert error < ((whole_range - x) ** 2).mean()


def test_later_batches_change_nothing_and_a_large_batch_is_sampled():
    x = torch.randn(4, SAMPLE, generator=torch.Generator().manual_seed(0))
    quantizer = started(3, x)
    before = (quantizer.step.item(), quantizer.offset.item())
    quantizer.observe_(100 * x)
    assert (quantizer.step.item(), quantizer.offset.item()) == before
    # Every fourth element is searched, but the range is that of all.
    outlier = x.clone()
    outlier[0, 1] = 50.0
    again = started(3, outlier)
    assert again.offset.item() != before[1]


def test_negative_inputs_keep_levels():
    x = torch.tensor(swish(3, (64, 8)))
    assert (started(2, x)(x) < 0).any()
    with pytest.raises(RuntimeError, match="calibrate_"):
        OffsetStep(2)(x)


def test_input_compiles():
    COMPILES(lambda _: OffsetStep(3))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("bits", [2, 4])
def test_method_keeps_the_laws(bits, law):
    law(wnq.get_method("lsqplus", w_bits=bits, a_bits=bits))


@pytest.mark.parametrize(("options", "message"), [
    ({"w_bits": 1}, "w_bits must be an integer from 2 to 8"),
    ({"a_bits": 0}, "a_bits .* from 1 to 8, got 0"),
    ({"activation": "lsq+"}, "activation must be one of .* Did you mean 'lsq"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("lsqplus", **options)
