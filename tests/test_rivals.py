"""Each rival against NumPy typed from its paper, hand-computed tensors, and the optimality its paper claims."""

import numpy as np
import pytest
import torch

import wnq
from wnq.activations import PACT, ClippedReLU
from wnq.learned_step import LearnedStep, RoundToStep

GENERATOR = np.random.default_rng(0)


def run(method, w, g=None, axis=0):
    x = torch.tensor(w, requires_grad=True)
    y = method.weight(x.detach(), axis)(x)
    y.backward(torch.tensor(np.ones_like(w) if g is None else g))
    return y.detach().numpy(), x.grad.numpy()


# DoReFa-Net


@pytest.mark.parametrize("bits", range(2, 9))
def test_dorefa_equals_equation_9_and_differentiates_tanh_and_maximum(bits):
    w = GENERATOR.standard_t(3, size=(5, 8))
    g = GENERATOR.normal(size=w.shape)
    y, gradient = run(wnq.get_method("dorefa", w_bits=bits), w, g)
    t = np.tanh(w)
    m = np.abs(t).max()
    top = 2**bits - 1
    assert np.abs(y - (2 * np.floor(top * (t / (2 * m) + 0.5) + 0.5) / top - 1)).max() < 1e-12
    # y = t/m straight through the rounding: dy_j/dt_j = 1/m, and the maximum m carries -t_j/m^2.
    at_max = np.abs(t) == m
    expected = (g / m - at_max * np.sign(t) * (g * t).sum() / m**2) * (1 - t**2)
    assert np.abs(gradient - expected).max() < 1e-12 * max(1, np.abs(expected).max())


def test_dorefa_one_bit_is_the_sign_times_the_layers_mean():
    y, gradient = run(wnq.get_method("dorefa", w_bits=1), np.array([[0.5, -1.0], [0.0, 2.5]]))
    assert y.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    assert (gradient == 1).all()


# BWN


def test_bwn_by_hand_and_optimal():
    y, gradient = run(wnq.get_method("bwn"), np.array([[1.0, -3.0], [0.5, 0.1]]))
    assert np.allclose(y, [[2.0, -2.0], [0.3, 0.3]])
    assert (gradient == 1).all()
    w = GENERATOR.normal(size=(7, 20))
    y, _ = run(wnq.get_method("bwn"), w)
    least_squares = (w * np.sign(w)).sum(1) / w.shape[1]
    assert np.abs(np.abs(y[:, 0]) - least_squares).max() < 1e-12


# TWN


def test_twn_by_hand():
    # mean |w| = 1, threshold 0.7: 0.5 and -0.5 vanish, alpha = mean(1, 2) = 1.5.
    y, gradient = run(wnq.get_method("twn"), np.array([[0.5, -0.5, 1.0, -2.0]]))
    assert y.tolist() == [[0.0, 0.0, 1.5, -1.5]]
    assert (gradient == 1).all()


def test_twn_threshold_is_near_the_optimum_on_a_gaussian():
    """The paper approximates the best threshold of a Gaussian, 0.6 sigma = 0.75 mean|w|; its error is within 1 % of the best."""
    w = np.random.default_rng(1).normal(size=(1, 200_000))

    def error(threshold):
        y, _ = run(wnq.get_method("twn", threshold=threshold), w)
        return ((w - y) ** 2).mean()

    best = min(error(t) for t in np.linspace(0.5, 1.0, 26))
    assert error(0.75) < 1.01 * best


# min-max


@pytest.mark.parametrize("bits", range(1, 9))
def test_minmax_equals_the_affine_rule(bits):
    for w in (
        GENERATOR.normal(size=(6, 9)),
        np.abs(GENERATOR.normal(size=(6, 9))),
        -np.abs(GENERATOR.normal(size=(2, 9))),
    ):
        y, gradient = run(wnq.get_method("minmax", w_bits=bits), w)
        top = 2**bits - 1
        high, low = max(w.max(), 0), min(w.min(), 0)
        step = (high - low) / top
        zero = np.rint(-low / step)
        expected = (np.clip(np.rint(w / step) + zero, 0, top) - zero) * step
        assert np.abs(y - expected).max() < 1e-12
        assert (gradient == 1).all()
        assert 0 in wnq.get_method("minmax", w_bits=bits).weight(torch.tensor(w), 0).quantize(torch.tensor(w)).levels


# LSQ


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


# PACT and the fixed clip


def test_pact_equals_equations_1_to_3():
    v = GENERATOR.normal(size=(40,)) * 2
    g = GENERATOR.normal(size=v.shape)
    x = torch.tensor(v, requires_grad=True)
    quantizer = PACT(3, start=1.5)
    y = quantizer(x)
    y.backward(torch.tensor(g))
    clipped = 0.5 * (np.abs(v) - np.abs(v - 1.5) + 1.5)  # the paper's form of clip(x, 0, alpha)
    step = 1.5 / 7
    assert np.abs(y.detach().numpy() - np.rint(clipped / step) * step).max() < 1e-7  # alpha is a float32 parameter
    assert (x.grad.numpy() == g * ((v >= 0) & (v < 1.5))).all()
    assert quantizer.alpha.grad.item() == pytest.approx((g * (v >= 1.5)).sum(), rel=1e-6)


def test_fixed_clip_equals_dorefas_activation():
    v = GENERATOR.normal(size=(60,))
    x = torch.tensor(v, requires_grad=True)
    y = ClippedReLU(2)(x)
    y.sum().backward()
    assert np.abs(y.detach().numpy() - np.rint(np.clip(v, 0, 1) * 3) / 3).max() < 1e-7
    assert (x.grad.numpy() == ((v > 0) & (v < 1))).all()


@pytest.mark.parametrize(("build", "message"), [
    (lambda: wnq.get_method("lsq", w_bits=1), "w_bits must be an integer from 2 to 8 \\(or 32 for float weights\\), got 1"),
    (lambda: wnq.get_method("twn", threshold=0), "threshold must be positive, got 0"),
    (lambda: wnq.get_method("twn", granularity="x"), "granularity must be one of"),
    (lambda: wnq.get_method("minmax", granularity="x"), "granularity must be one of"),
    (lambda: wnq.get_method("minmax", w_bits=0), "w_bits must be an integer from 1 to 8 \\(or 32 for float weights\\), got 0"),
    (lambda: wnq.get_method("dorefa", w_bits=33), "from 1 to 8 \\(or 32 for float weights\\), got 33"),
    (lambda: PACT(3, start=0), "start must be positive"),
    (lambda: ClippedReLU(3, clip=-1), "clip must be positive"),
])  # fmt: skip
def test_bad_options_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()
