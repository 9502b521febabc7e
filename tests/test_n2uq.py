"""N2UQ: weights and learned thresholds against NumPy typed from the rule, and the gradients against finite differences."""

import copy

import numpy as np
import pytest
import torch

import wnq
from wnq.learned_step import LearnedStep
from wnq.methods import MethodInfo
from wnq.methods.n2uq import SMALLEST, LearnedThresholds
from wnq.testing import LAWS

NO_COMPILE = [law for law in LAWS if law.__name__ != "compiles"]


def run(w, g, axis=0, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("n2uq", **options).weight(x.detach(), axis)(x)
    y.backward(torch.tensor(g, dtype=x.dtype))
    return y.detach().numpy(), x.grad.numpy()


# Weights


def numpy_clip(w, bits, dims):
    return (2**bits - 1) / 2 ** (bits - 1) * np.abs(w).mean(dims, keepdims=True)


def numpy_n2uq(w, bits, dims):
    s = numpy_clip(w, bits, dims)
    half = (2**bits - 1) / 2
    return s * (np.floor((np.clip(w / s, -1, 1) + 1) * half + 0.5).clip(0, 2 * half) / half - 1)


@pytest.mark.parametrize("by_scale", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_weights_equal_the_rule(bits, by_scale):
    generator = np.random.default_rng(bits)
    for w in (generator.normal(size=(6, 5, 3, 3)), generator.standard_t(3, size=(4, 50)) * 0.02):
        for axis in (0, 1):
            dims = tuple(d for d in range(w.ndim) if d != axis)
            g = generator.normal(size=w.shape)
            y, gradient = run(w, g, axis, w_bits=bits, by_scale=by_scale)
            assert np.abs(y - numpy_n2uq(w, bits, dims)).max() < 1e-12
            expected = g / numpy_clip(w, bits, dims) if by_scale else g
            assert np.abs(gradient - expected).max() <= (1e-12 * np.abs(expected).max() if by_scale else 0)
            single, _ = run(w.astype(np.float32), g, axis, w_bits=bits, by_scale=by_scale)
            # In float32 a weight at a threshold may take the neighbouring level: at most one in a hundred here.
            assert (np.abs(single - y) > 1e-6 * np.abs(y).max()).mean() < 0.01


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_levels_of_uniform_weights_are_equally_likely(bits):
    w = torch.tensor(np.random.default_rng(0).uniform(-0.3, 0.3, size=(1, 100_000)))
    codes = wnq.get_method("n2uq", w_bits=bits).weight(w, 0).quantize(w).codes
    share = torch.bincount(codes.reshape(-1), minlength=2**bits) / w.numel()
    assert (share - 2**-bits).abs().max() < 0.01


@pytest.mark.parametrize("by_scale", [False, True])
def test_a_channel_of_zeros_stays_finite(by_scale):
    y, gradient = run(np.array([[0.0, 0.0], [1.0, -2.0]]), np.ones((2, 2)), w_bits=2, by_scale=by_scale)
    assert (y[0] == 0).all() and (y[1] != 0).all() and (gradient[0] == 1).all()


@pytest.mark.parametrize("law", NO_COMPILE, ids=lambda law: law.__name__)
@pytest.mark.parametrize("by_scale", [False, True])
def test_weight_laws(law, by_scale):
    for bits in range(1, 9):
        method = wnq.get_method("n2uq", w_bits=bits, by_scale=by_scale)
        law(lambda x, method=method: method.weight(x, 0))


# Inputs


def random_thresholds(bits, signed, seed=0):
    """A quantizer in float64 with unequal intervals, as after some training, and its parameters as NumPy arrays."""
    generator = np.random.default_rng(seed)
    quantizer = LearnedThresholds(bits).double()
    batch = torch.tensor(generator.normal(size=(16, 50)))
    quantizer.observe_(batch if signed else batch.abs())
    with torch.no_grad():
        quantizer.intervals.mul_(torch.tensor(generator.uniform(0.3, 2.0, size=quantizer.count)))
        quantizer.start.add_(0.07)
        quantizer.scale_in.mul_(1.3)
        quantizer.scale_out.mul_(0.8)
    return quantizer, [p.detach().numpy().copy() for p in quantizer.parameters()]


def numpy_edges(start, intervals):
    return start + np.concatenate([[0.0], np.cumsum(intervals)])


def numpy_mean(x, start, intervals, scale_in, scale_out, offset):
    """The mean output of stochastic rounding: in segment i up with probability (z - b_i) / a_i, certain outside all segments."""
    count = len(intervals)
    mean_code = np.interp(scale_in * x, numpy_edges(start, intervals), np.arange(count + 1))
    return 2 * scale_out / count * (mean_code - offset)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_forward_counts_the_thresholds_below(bits, signed):
    quantizer, (start, intervals, scale_in, scale_out) = random_thresholds(bits, signed)
    x = np.random.default_rng(1).normal(size=(30, 20)) * 2
    thresholds = numpy_edges(start, intervals)[:-1] + intervals / 2
    codes = (scale_in * x[..., None] > thresholds).sum(-1)
    offset = 2 ** (bits - 1) if signed else 0
    quantized = quantizer.quantize(torch.tensor(x))
    assert (quantized.codes.numpy() == codes).all()
    assert quantized.levels.tolist() == list(range(-offset, 2**bits - offset))
    expected = 2 * scale_out / (2**bits - 1) * (codes - offset)
    assert np.abs(quantizer(torch.tensor(x)).detach().numpy() - expected).max() < 1e-12
    # The threshold lies where the mean code is half-way: T_i has mean i - 1/2.
    means = np.interp(thresholds, numpy_edges(start, intervals), np.arange(2**bits))
    assert np.abs(means - (np.arange(2**bits - 1) + 0.5)).max() < 1e-12


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_gradients_are_those_of_the_mean_of_stochastic_rounding(bits, signed):
    quantizer, parameters = random_thresholds(bits, signed, seed=bits)
    generator = np.random.default_rng(100 + bits)
    v = generator.normal(size=(40, 30)) * 2
    g = generator.normal(size=v.shape)
    x = torch.tensor(v, requires_grad=True)
    quantizer(x).backward(torch.tensor(g))
    offset = quantizer.offset.item()

    # Finite differences of the mean, with respect to everything that the mean's gradient serves.
    def loss(v, start, intervals, scale_in):
        return (g * numpy_mean(v, start, intervals, scale_in, parameters[3], offset)).sum()

    values = [v, *parameters[:3]]
    gradients = [x.grad, *(p.grad for p in (quantizer.start, quantizer.intervals, quantizer.scale_in))]
    epsilon = 1e-7
    for place, gradient in enumerate(gradients):
        size = max(1.0, gradient.abs().max().item())
        for index in list(np.ndindex(values[place].shape))[:20]:
            ends = []
            for sign in (-1, 1):
                moved = copy.deepcopy(values)
                moved[place] = np.array(moved[place], dtype=float)
                moved[place][index] += sign * epsilon
                ends.append(loss(*moved))
            # Rounding of the sums over epsilon is 1e-6; an input within epsilon of an edge would add its kink.
            assert gradient[index].item() == pytest.approx((ends[1] - ends[0]) / (2 * epsilon), abs=3e-5 * size)

    # The closed form, typed from the docstring, is exact.
    start, intervals, scale_in, scale_out = parameters
    edges = numpy_edges(start, intervals)
    z = scale_in * v
    h = 2 * scale_out / len(intervals) * g
    segments = [(z > edges[i]) & (z <= edges[i + 1]) for i in range(len(intervals))]
    inflow = np.array([h[s].sum() for s in segments]) / intervals
    dx = sum(h * scale_in / a * s for a, s in zip(intervals, segments, strict=True))
    own = [-(h[s] * (z[s] - edges[i])).sum() / intervals[i] ** 2 for i, s in enumerate(segments)]
    da = np.array(own) - (inflow.sum() - np.cumsum(inflow))
    codes = (z[..., None] > edges[:-1] + intervals / 2).sum(-1)
    expected = [dx, -inflow.sum(), da, (dx * v).sum() / scale_in, (g * 2 / len(intervals) * (codes - offset)).sum()]
    for actual, exact in zip([*gradients, quantizer.scale_out.grad], expected, strict=True):
        # 1200 terms of either sign, divided by intervals down to 2 / 255 / 3: relative to the largest gradient.
        assert np.abs(actual.numpy() - exact).max() < 1e-11 * max(1, np.abs(exact).max())


def test_a_random_code_has_that_mean():
    """The formulation itself, once, by sampling: up with probability (z - b_i) / a_i."""
    quantizer, parameters = random_thresholds(2, signed=False)
    edges = numpy_edges(*parameters[:2])
    generator = np.random.default_rng(5)
    for x in (0.1, 0.7, 1.3):
        z = parameters[2] * x
        i = np.searchsorted(edges, z) - 1
        assert 0 <= i < 3
        draws = i + (generator.uniform(size=100_000) < (z - edges[i]) / parameters[1][i])
        expected = numpy_mean(np.array(x), *parameters, 0)
        assert abs(2 * parameters[3] / 3 * draws.mean() - expected) < 0.01  # 100 000 draws: 3 standard errors are 0.005
    assert quantizer.signed is False


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_starts_as_the_learned_step(bits, signed):
    generator = np.random.default_rng(bits)
    v = generator.normal(size=(16, 25))
    v = v if signed else np.abs(v)
    results = []
    for quantizer in (LearnedThresholds(bits), LearnedStep(bits, is_weight=False)):
        with pytest.raises(RuntimeError, match="calibrate_"):
            quantizer(torch.tensor(v))
        assert quantizer.signed is None
        quantizer.observe_(torch.tensor(v))
        quantizer.observe_(100 * torch.tensor(v))  # later batches change nothing
        assert quantizer.signed is signed
        x = torch.tensor(v, requires_grad=True)
        y = quantizer(x)
        y.backward(torch.ones_like(x))
        results.append((y.detach().numpy(), x.grad.numpy()))
    (y, gradient), (expected, expected_gradient) = results
    # The parameters are float32 in both; an input at a threshold may take the neighbouring level.
    far = (np.abs(y - expected) > 1e-5) | (np.abs(gradient - expected_gradient) > 1e-5)
    assert far.mean() <= 0.005


def test_first_batch_of_zeros_still_gives_a_range():
    quantizer = LearnedThresholds(3)
    quantizer.observe_(torch.zeros(4, 5))
    assert quantizer(torch.tensor([[0.0, 1 / 7, 1.0]])).tolist()[0] == pytest.approx([0, 1 / 7, 1])


def test_intervals_stay_positive_and_come_back():
    quantizer, _ = random_thresholds(2, signed=False)
    x = torch.tensor(np.random.default_rng(0).normal(size=(20, 50))).abs()
    with torch.no_grad():
        quantizer.intervals[1] = -0.5
    values = quantizer(x)
    assert torch.isfinite(values).all() and torch.equal(values, quantizer.quantize(x).dequantize())
    values.sum().backward()
    assert quantizer.intervals.grad[1] == 0  # below the bound there is no gradient ...
    quantizer.observe_(x)
    assert quantizer.intervals.min().item() == SMALLEST
    quantizer.zero_grad()
    quantizer(x).sum().backward()
    assert quantizer.intervals.grad[1] != 0  # ... at the bound there is


def test_a_quantizer_called_twice_in_a_step_trains():
    """The projection must not look like an in-place change to autograd."""
    quantizer, _ = random_thresholds(2, signed=False)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    first = quantizer(x)
    quantizer.observe_(x)
    (first + quantizer(x)).sum().backward()
    assert torch.isfinite(quantizer.intervals.grad).all()


def test_thresholds_become_unequal_where_that_lowers_the_error():
    """Inputs in three clusters at unequal distances: training the intervals puts a threshold between each pair."""
    torch.manual_seed(0)
    centres = torch.tensor([0.0, 0.3, 0.5, 2.0])
    which = torch.randint(4, (256,), generator=torch.Generator().manual_seed(1))
    x = centres[which] + 0.02 * torch.randn(256, generator=torch.Generator().manual_seed(2)).abs()
    quantizer = LearnedThresholds(2)
    quantizer.observe_(x[:, None])
    before = (quantizer.quantize(x).codes != which).float().mean()
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.02)
    for _ in range(300):
        quantizer.observe_(x)
        optimizer.zero_grad()
        (quantizer(x) - which.float()).square().mean().backward()
        optimizer.step()
    assert before > 0.2
    assert (quantizer.quantize(x).codes != which).float().mean() < 0.02
    intervals = quantizer.intervals.detach()
    assert intervals.max() > 2 * intervals.min()


def test_memory_layout_does_not_matter():
    quantizer, _ = random_thresholds(3, signed=True)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(quantizer(x), quantizer(turned))
    assert torch.equal(quantizer.quantize(x).codes, quantizer.quantize(turned).codes)


@pytest.mark.parametrize("law", NO_COMPILE, ids=lambda law: law.__name__)
def test_input_laws(law):
    for bits in range(1, 9):
        law(lambda _, bits=bits: LearnedThresholds(bits))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("n2uq", by_scale=True).weight(x, 0))
    LAWS[-1](lambda _: LearnedThresholds(3))


def test_the_papers_settings():
    info = MethodInfo.of("n2uq")
    assert info.recommended.weight_decay == 0
    assert isinstance(wnq.get_method("n2uq").input(), LearnedThresholds)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wnq.get_method("n2uq", w_bits=0), "w_bits must be an integer from 1 to 8"),
        (lambda: wnq.get_method("n2uq", activation="x"), "activation must be one of"),
        (lambda: LearnedThresholds(9), "bits must be an integer from 1 to 8, got 9"),
    ],
)
def test_bad_options_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()
