"""ELBNN's projection against NumPy typed from its two half-steps, in float64."""

import numpy as np
import pytest
import torch

import wnq
from wnq.testing import LAWS, METHOD_LAWS

GRIDS = [
    (1, {}, [-1, 1]),
    (2, {}, [-1, 0, 1]),
    (3, {}, [-4, -2, -1, 0, 1, 2, 4]),
    (3, {"top": 2}, [-2, -1, 0, 1, 2]),
]


def projected(w, bits, dtype=torch.float64, **options):
    x = torch.tensor(w, dtype=dtype)
    return wnq.get_method("elbnn", w_bits=bits, **options).weight(x, 0).quantize(x)


def nearest(u, integers):
    """Of two equally near integers the larger."""
    integers = np.array(integers[::-1], dtype=float)
    return integers[np.abs(u[..., None] - integers).argmin(-1)]


def numpy_projection(w, integers):
    alpha = np.abs(w).mean() * {1: 1.0, 2: 0.9, 4: 0.55}[integers[-1]]
    for _ in range(10):
        q = nearest(w / alpha, integers)
        alpha = (w * q).sum() / (q * q).sum()
    return alpha, q


def test_ternary_projection_by_hand():
    # mean|w| = 0.75. Above 0.375: 1.5, -1.0, 0.5 -> alpha = 1. Above 0.5 (a tie goes up): the same. Done.
    quantized = projected([[1.5, -1.0, 0.5, 0.0]], 2)
    assert quantized.dequantize().tolist() == [[1.0, -1.0, 1.0, 0.0]] and quantized.scale == 1.0
    # mean|w| = 0.9. Above 0.45: 2.0, 0.8 -> alpha 1.4. Above 0.7: the same. With 0.4 and -0.4 zero.
    quantized = projected([[2.0, 0.8, 0.4, -0.4]], 2)
    assert quantized.codes.tolist() == [[2, 2, 1, 1]] and quantized.scale.item() == pytest.approx(1.4, rel=1e-12)


def test_binary_projection_is_the_sign_times_the_mean():
    quantized = projected([[0.5, -1.5, 0.0, -2.0]], 1)
    assert quantized.dequantize().tolist() == [[1.0, -1.0, 1.0, -1.0]]


def test_seven_levels_by_hand():
    # On the grid already, 0.3 * (4, 2, 1, 0, -1, -4): mean|w| = 0.6, start 0.33, where every integer is right.
    w = 0.3 * np.array([[4.0, 2.0, 1.0, 0.0, -1.0, -4.0]])
    quantized = projected(w, 3)
    assert quantized.levels[quantized.codes.long()].tolist() == [[4, 2, 1, 0, -1, -4]]
    assert quantized.scale.item() == pytest.approx(0.3, rel=1e-12)


@pytest.mark.parametrize(("bits", "options", "integers"), GRIDS)
def test_projection_equals_numpy(bits, options, integers):
    for seed, shape in enumerate([(6, 4, 3, 3), (5, 9), (2, 40)]):
        w = np.random.default_rng(seed).standard_t(3, size=shape) * 0.1
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            seen = torch.tensor(w, dtype=dtype).double().numpy()
            alpha, q = numpy_projection(seen, integers)
            quantized = projected(w, bits, dtype, **options)
            assert quantized.levels.tolist() == integers
            assert np.abs(quantized.dequantize().double().numpy() - alpha * q).max() <= tolerance


@pytest.mark.parametrize(("bits", "options", "integers"), GRIDS)
@pytest.mark.parametrize("kind", ["normal", "heavy", "uniform"])
def test_projection_is_near_the_best_one(bits, options, integers, kind):
    generator = np.random.default_rng(0)
    w = {"normal": generator.normal(size=9000), "heavy": generator.standard_t(3, size=9000),
         "uniform": generator.uniform(-1, 1, size=9000)}[kind]  # fmt: skip
    error = np.square(w - projected(w[None], bits, **options).dequantize().numpy()).mean()
    scales = np.linspace(0.05, 4, 400) * np.abs(w).mean()
    best = min(np.square(w - s * nearest(w / s, integers)).mean() for s in scales)
    assert error <= 1.03 * best


def test_scale_is_the_least_squares_one_and_no_integer_has_a_nearer_one():
    w = torch.randn(50, 60, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for bits, options, integers in GRIDS:
        for granularity in ("tensor", "channel"):
            quantized = (
                wnq.get_method("elbnn", w_bits=bits, granularity=granularity, **options).weight(w, 0).quantize(w)
            )
            q = quantized.levels[quantized.codes.long()]
            rows = (w, q) if granularity == "channel" else (w.reshape(1, -1), q.reshape(1, -1))
            alpha = (rows[0] * rows[1]).sum(1) / rows[1].square().sum(1)
            assert torch.allclose(quantized.scale.reshape(-1), alpha, rtol=1e-12)
            # A few elements may still move by the last change of alpha.
            wrong = nearest((rows[0] / alpha[:, None]).numpy(), integers) != rows[1].numpy()
            assert wrong.mean() < 0.01


def test_gradient_is_the_identity():
    w = torch.randn(4, 9, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(4, 9, generator=torch.Generator().manual_seed(1))
    wnq.get_method("elbnn").weight(w.detach(), 0)(w).backward(g)
    assert torch.equal(w.grad, g)


def test_zero_channel_stays_zero():
    w = torch.zeros(2, 3)
    w[1] = torch.tensor([1.0, -1.0, 0.1])
    values = wnq.get_method("elbnn", granularity="channel").weight(w, 0)(w)
    assert values.tolist() == [[0, 0, 0], [1, -1, 0]]


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("bits", "options"), [grid[:2] for grid in GRIDS])
def test_laws(bits, options, granularity):
    method = wnq.get_method("elbnn", w_bits=bits, granularity=granularity, **options)
    for law in LAWS:
        if law.__name__ != "compiles":
            law(lambda x: method.weight(x, 0))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_method_laws(bits, law):
    law(wnq.get_method("elbnn", w_bits=bits, a_bits=3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"w_bits": 4}, "w_bits must be an integer from 1 to 3"),
        ({"top": 3}, "top must be 2 or 4, got 3"),
        ({"granularity": "layer"}, "granularity must be one of"),
        ({"normalize": "max_abs"}, "takes no normalizer in front: its projection is the nearest point"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words):
        wnq.get_method("elbnn", **options)
