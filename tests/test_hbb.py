"""Heterogeneous bitwidth binarization against NumPy typed from its definition."""

import numpy as np
import pytest
import torch

import wnq
from wnq.methods.hbb import MixedBinary
from wnq.testing import LAWS, METHOD_LAWS

GENERATOR = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def same_numbers():
    """Every test draws from the start, whichever tests run before it."""
    global GENERATOR
    GENERATOR = np.random.default_rng(0)


def numpy_hbb(w, bits, share):
    flat = w.reshape(-1)
    distance = np.abs(np.abs(flat) - np.abs(flat).mean())
    more = int(np.floor(share * flat.size + 0.5))
    owned = np.full(flat.size, bits - 1)
    owned[np.argsort(distance, kind="stable")[: flat.size - more]] = bits - 2
    error, value = flat.copy(), np.zeros_like(flat)
    for n in range(1, bits):
        owner = owned >= n
        if owner.any():
            step = np.where(owner, np.where(error >= 0, 1, -1) * np.abs(error[owner]).mean(), 0)
            error, value = error - step, value + step
    return value.reshape(w.shape), owned.reshape(w.shape)


def mixed(w, **options):
    x = torch.tensor(w, requires_grad=True)
    y = wnq.get_method("hbb", **options).weight(x.detach(), 0)(x)
    y.backward(torch.ones_like(y))
    assert (x.grad == 1).all()
    return y.detach().numpy()


def test_by_hand():
    # mean |w| = 2; 2.5, -1.5 and 1.9 are nearest and own one sign, of 2; the residuals of 0.1 and -4 are -1.9 and -2, mean 1.95.
    w = np.array([[2.5, -1.5, 1.9, 0.1, -4.0]])
    y = mixed(w, share=0.4)
    assert np.abs(y - [[2, -2, 2, 0.05, -3.95]]).max() < 1e-12
    quantized = wnq.get_method("hbb").weight(torch.tensor(w), 0).quantize(torch.tensor(w))
    assert np.abs(quantized.levels.numpy() - [-3.95, -2, -0.05, 0.05, 2, 3.95]).max() < 1e-12
    assert quantized.codes.tolist() == [[4, 1, 4, 3, 0]]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.4, 1.0])
@pytest.mark.parametrize("bits", range(3, 9))
def test_values_equal_the_definition(bits, share):
    w = GENERATOR.standard_t(4, size=(6, 5, 7))
    assert np.abs(mixed(w, w_bits=bits, share=share) - numpy_hbb(w, bits, share)[0]).max() < 1e-12
    w32 = w.astype(np.float32)
    assert np.abs(mixed(w32, w_bits=bits, share=share) - numpy_hbb(w32.astype(float), bits, share)[0]).max() < 2e-6


def test_the_default_is_1_4_bits_a_weight():
    w = GENERATOR.normal(size=(50, 40))
    _, owned = numpy_hbb(w, 3, 0.4)
    assert owned.mean() == 1.4
    quantizer = wnq.get_method("hbb").weight(torch.tensor(w), 0)
    assert quantizer.average_bits == pytest.approx(1.4)
    assert "average_bits=1.4" in repr(quantizer)
    more = quantizer._owns_more(torch.tensor(w).reshape(-1)).reshape(50, 40).numpy()
    assert np.array_equal(more, owned == 2)
    quantized = quantizer.quantize(torch.tensor(w))
    assert quantized.n_levels == 6 and len(quantized.codes.unique()) == 6


def test_middle_out_gives_fewest_signs_to_the_weights_that_one_sign_fits_best():
    w = GENERATOR.normal(size=(30, 30))
    one_sign = np.abs(np.abs(w) - np.abs(w).mean())
    _, owned = numpy_hbb(w, 3, 0.4)
    assert one_sign[owned == 1].max() <= one_sign[owned == 2].min()
    # So it beats giving the same number of second signs to weights drawn at random.
    error = ((mixed(w) - w) ** 2).mean()
    second = GENERATOR.permutation(w.size).reshape(w.shape) < 0.4 * w.size
    mu = np.abs(w).mean()
    residual = w - mu * np.sign(w)
    drawn = residual - np.where(second, np.sign(residual) * np.abs(residual[second]).mean(), 0)
    assert error < (drawn**2).mean()


def test_ends_of_the_share_are_plain_residual_binarization():
    w = GENERATOR.normal(size=(4, 30))
    mu = np.abs(w).mean()
    once = mu * np.sign(w)
    twice = once + np.sign(w - once) * np.abs(w - once).mean()
    assert np.abs(mixed(w, share=0.0) - once).max() < 1e-12
    assert np.abs(mixed(w, share=1.0) - twice).max() < 1e-12


def test_a_mix_beats_the_same_number_of_signs_for_every_weight():
    """The paper's point: the second sign pays for the weights far from the mean magnitude and costs the others."""
    w = GENERATOR.normal(size=(100, 100))
    error = {share: ((mixed(w, share=share) - w) ** 2).mean() for share in (0.0, 0.2, 0.4, 0.6, 1.0)}
    assert error[0.0] > error[0.2] > error[0.4] > error[0.6]
    assert error[0.4] < error[1.0]  # 1.4 bits against 2


def test_ties_keep_the_share_exact():
    quantizer = MixedBinary(3, 0.3)
    assert quantizer._owns_more(torch.ones(10)).tolist() == [False] * 7 + [True] * 3


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("bits", [3, 6])
def test_laws(bits, share):
    method = wnq.get_method("hbb", w_bits=bits, share=share)
    for law in LAWS[:-1]:
        law(lambda x: method.weight(x, 0))
    for law in LAWS[:4]:
        law(lambda x: method.weight(x, 1))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws(law):
    law(wnq.get_method("hbb", a_bits=3))


@pytest.mark.parametrize(("options", "message"), [
    ({"share": 1.4}, r"share must be a number from 0 to 1.*owns 2 bits instead of 1; got 1.4. For an average of b bits"),
    ({"share": -0.1, "w_bits": 4}, r"owns 3 bits instead of 2; got -0.1.*set it to b - 2"),
    ({"share": True}, "share must be a number from 0 to 1"),
    ({"share": float("nan")}, "share must be a number from 0 to 1"),
    ({"w_bits": 2}, r"w_bits must be an integer from 3 to 8 \(or 32 for float weights\), got 2"),
])  # fmt: skip
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method("hbb", **options)


def test_float_weights_are_left_alone():
    assert wnq.get_method("hbb", w_bits=32).weight is None
