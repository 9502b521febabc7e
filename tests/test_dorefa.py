"""The three variants of DoReFa-Net against NumPy: they differ in exactly what they promise."""

import numpy as np
import pytest
import torch

import wnq
from wnq.activations import ClippedReLU
from wnq.testing import LAWS

NAMES = ["dorefa", "dorefa_detached", "dorefa_rescaled"]


def run(name, w, g=None, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method(name, **options).weight(x.detach(), 0)(x)
    y.backward(torch.ones_like(y) if g is None else torch.tensor(g, dtype=x.dtype))
    return y.detach().numpy(), x.grad.numpy()


def numpy_dorefa(name, w, g, bits):
    t = np.tanh(w)
    m = np.abs(t).max()
    top = 2**bits - 1
    y = 2 * np.floor(top * (t / (2 * m) + 0.5) + 0.5) / top - 1
    # y = t/m straight through the rounding: dy_j/dt_j = 1/m, and the maximum m carries -t_j/m^2.
    if name == "dorefa":
        at_max = np.abs(t) == m
        return y, (g / m - at_max * np.sign(t) * (g * t).sum() / m**2) * (1 - t**2)
    if name == "dorefa_detached":
        return y, g / m * (1 - t**2)
    return m * y, g * (1 - t**2)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradient_equal_the_equations(name, bits):
    generator = np.random.default_rng(bits)
    w = generator.standard_t(3, size=(5, 8)) * 0.5
    g = generator.normal(size=w.shape)
    y, gradient = run(name, w, g, w_bits=bits)
    expected, expected_gradient = numpy_dorefa(name, w, g, bits)
    assert np.abs(y - expected).max() < 1e-12
    assert np.abs(gradient - expected_gradient).max() < 1e-12 * max(1, np.abs(expected_gradient).max())
    y, gradient = run(name, w.astype(np.float32), g.astype(np.float32), w_bits=bits)
    assert np.abs(y - expected).max() < 1e-6
    assert np.abs(gradient - expected_gradient).max() < 1e-6 * max(1, np.abs(expected_gradient).max())


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_variants_differ_as_promised(bits):
    generator = np.random.default_rng(10 + bits)
    w, g = generator.normal(size=(6, 7)) * 0.3, generator.normal(size=(6, 7))
    (y, attached), (y_detached, detached), (y_rescaled, rescaled) = (run(name, w, g, w_bits=bits) for name in NAMES)
    m = np.abs(np.tanh(w)).max()
    # Values: equal, and times m (not times max|w|).
    assert (y == y_detached).all()
    assert np.abs(y_rescaled - m * y).max() < 1e-15
    assert np.abs(y_rescaled).max() == pytest.approx(m) and abs(m - np.abs(w).max()) > 0.01
    # Gradients: attached and detached agree but at the maximum; the rescaled one is the detached one times m.
    largest = np.abs(w) == np.abs(w).max()
    assert largest.sum() == 1
    assert np.abs((attached - detached)[~largest]).max() < 1e-15
    assert np.abs((attached - detached)[largest]).min() > 1e-3
    assert np.abs(rescaled - m * detached).max() < 1e-14


def test_the_attached_one_is_invariant_under_the_scale_after_tanh():
    """sum_j t_j dL/dt_j = 0 for dorefa, because y does not change when t grows; not so for the others."""
    w, g = np.random.default_rng(1).normal(size=(6, 7)), np.random.default_rng(2).normal(size=(6, 7))
    t = np.tanh(w)
    along = [(run(name, w, g)[1] / (1 - t**2) * t).sum() for name in NAMES]
    assert abs(along[0]) < 1e-12
    assert abs(along[1]) > 1e-3 and abs(along[2]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_one_bit_is_the_sign_times_the_layers_mean(name):
    y, gradient = run(name, np.array([[0.5, -1.0], [0.0, 2.5]]), w_bits=1)
    assert y.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    assert (gradient == 1).all()


def test_fixed_clip_equals_equation_11():
    v = np.random.default_rng(0).normal(size=(60,))
    x = torch.tensor(v, requires_grad=True)
    y = ClippedReLU(2)(x)
    y.sum().backward()
    assert np.abs(y.detach().numpy() - np.rint(np.clip(v, 0, 1) * 3) / 3).max() < 1e-7  # the step is a float32 buffer
    assert (x.grad.numpy() == ((v > 0) & (v < 1))).all()


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", NAMES)
def test_laws(name, law):
    for bits in range(1, 9):
        method = wnq.get_method(name, w_bits=bits)
        law(lambda x, method=method: method.weight(x, 0))


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_laws_of_the_fixed_clip(law):
    for bits in range(1, 9):
        law(lambda _, bits=bits: ClippedReLU(bits))


def test_compiles():
    LAWS[-1](lambda x: wnq.get_method("dorefa_rescaled").weight(x, 0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: wnq.get_method("dorefa", w_bits=33), "from 1 to 8 \\(or 32 for float weights\\), got 33"),
        (
            lambda: wnq.get_method("dorefa_detached", w_bits=0),
            "'dorefa_detached': w_bits must be an integer from 1 to 8",
        ),
        (lambda: wnq.get_method("dorefa_rescaled", activation="x"), "activation must be one of"),
        (lambda: wnq.get_method("dorefa_detached", max_gain=1.0), "no option 'max_gain'"),
        (lambda: ClippedReLU(3, clip=-1), "clip must be positive"),
    ],
)
def test_bad_options_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()
