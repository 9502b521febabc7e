"""A normalizer in front of any method, and in front of any layer: laws, values, and the gradient through the maximum."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import wnq
from wnq.methods import MethodInfo, list_methods
from wnq.normalized import Preceded
from wnq.normalizers import NORMALIZERS, Normalization, named_normalizer, normalize_
from wnq.testing import LAWS

IN_FRONT = [name for name in NORMALIZERS if name != "none"]
HELD = ("exact", "integer_codes", "few_values", "gradients", "degenerate", "non_finite", "pure", "portable")
EPS = torch.finfo(torch.float32).eps


def method_with(name, normalize, **options):
    width = MethodInfo.of(name).widths[0]
    return wnq.get_method(name, **{"w_bits": width, "a_bits": 32, "normalize": normalize, **options})


def run(method, w, g, axis=0):
    x = torch.tensor(w, requires_grad=True)
    y = method.weight(x.detach(), axis)(x)
    y.backward(torch.tensor(g, dtype=x.dtype))
    return y.detach().numpy(), x.grad.numpy()


# Every method


@pytest.mark.parametrize("normalize", IN_FRONT)
@pytest.mark.parametrize("name", [info.name for info in list_methods() if not info.no_normalizer])
def test_laws_hold_behind_every_normalizer(name, normalize):
    method = method_with(name, normalize)
    assert isinstance(method.weight(torch.ones(2, 3), 0), Preceded)
    broken = []
    # What stands in front decides these; the rest needs one normalizer to be seen.
    held = HELD if normalize == "max_abs" else HELD[:5]
    for law in LAWS:
        for axis in (0, 1) if law.__name__ == "exact" else (0,) if law.__name__ in held else ():
            try:
                law(lambda x, axis=axis: method.weight(x, axis))
            except AssertionError as error:
                broken.append(f"axis {axis}: {error}")
    assert not broken, broken


@pytest.mark.parametrize("name", [info.name for info in list_methods() if info.no_normalizer])
def test_methods_without_a_normalizer_refuse_with_their_reason(name):
    with pytest.raises(ValueError, match=f"method {name!r} takes no normalizer in front: ") as error:
        method_with(name, "max_abs")
    assert MethodInfo.of(name).no_normalizer in str(error.value)
    assert method_with(name, "none").weight is not None


@pytest.mark.parametrize("name", ["twn", "bwn", "minmax", "wnq"])
def test_no_normalizer_is_no_wrapper(name):
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert not isinstance(method_with(name, "none").weight(w, 0), Preceded)


# The maximum, in front of rules that do not depend on the scale


@pytest.mark.parametrize("gain", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["bwn", "twn"])
def test_max_abs_in_front_keeps_the_values_and_adds_the_term_through_the_maximum(name, gain):
    generator = np.random.default_rng(0)
    for shape in ((5, 7), (4, 3, 3, 3)):
        w, g = generator.standard_t(3, size=shape) * 0.1, generator.normal(size=shape)
        for dtype, eps in ((np.float64, np.finfo(np.float64).eps), (np.float32, np.finfo(np.float32).eps)):
            plain, plain_gradient = run(method_with(name, "none"), w.astype(dtype), g)
            y, gradient = run(method_with(name, "max_abs", normalize_gain=gain), w.astype(dtype), g)
            # Q(w/m) m = Q(w), but for the rounding of the quotients, of their mean and of the product.
            assert np.abs(y - plain).max() <= 8 * eps * np.abs(plain).max()
            # y_j = m Q_j, u = w/m, dQ/du = 1: dL/dm = sum g_j (Q_j - u_j), on the largest weight, with its sign.
            m = np.abs(w).max()
            added = gain * np.sign(w) * (np.abs(w) == m) * (g * (plain - w)).sum() / m
            tolerance = 20 * eps * max(1, np.abs(added).max(), np.abs(g).max())
            assert np.abs(gradient - (plain_gradient + added)).max() <= tolerance
            assert gain == 0 or np.abs(added).max() > 1000 * tolerance


def test_tied_maxima_share_the_term():
    w, g = np.array([[0.5, -0.5, 0.1, 0.2]]), np.array([[1.0, 2.0, 3.0, 4.0]])
    y, gradient = run(method_with("bwn", "max_abs"), w, g)
    added = (g * (y - w)).sum() / 0.5
    assert gradient == pytest.approx(g + added * np.array([[0.5, -0.5, 0, 0]]))


@pytest.mark.parametrize("normalize", IN_FRONT)
def test_the_weight_keeps_its_size(normalize):
    """The result is multiplied by the normalizer's scale: at 8 bits it is near the weights (less their mean, squashed by tanh)."""
    w = np.random.default_rng(1).normal(size=(20, 30)) * 0.2 + 0.05
    y, _ = run(method_with("minmax", normalize, w_bits=8), w, np.ones_like(w))
    expected = {"standardize": w - w.mean(), "tanh": np.tanh(w)}.get(normalize, w)
    assert np.abs(y - expected).max() < (w.max() - w.min()) / 255


# tanh and DoReFa


@pytest.mark.parametrize("bits", range(2, 9))
def test_tanh_in_front_of_wnq_is_dorefa(bits):
    """Scale one gives DoReFa's values in [-1, 1]; the normalizer's scale, max|tanh w|, multiplies them."""
    generator = np.random.default_rng(bits)
    w, g = generator.normal(size=(6, 7)), generator.normal(size=(6, 7))
    t = np.tanh(w)
    m = np.abs(t).max()
    dorefa, attached = run(wnq.get_method("dorefa", w_bits=bits), w, g)
    y, gradient = run(method_with("wnq", "tanh", w_bits=bits, scale="one"), w, g)
    assert np.abs(y / m - dorefa).max() < 1e-14
    # y = m times dorefa's result, so its gradient is m times that of dorefa plus sum g_j q_j through the factor m.
    through_factor = (1 - t**2) * np.sign(t) * (np.abs(t) == m) * (g * dorefa).sum()
    assert np.abs(gradient - (m * attached + through_factor)).max() < 1e-12
    detached = method_with("wnq", "tanh", w_bits=bits, scale="one", max_gain=0.0, normalize_gain=0.0)
    y, gradient = run(detached, w, g)
    expected, expected_gradient = run(wnq.get_method("dorefa_rescaled", w_bits=bits), w, g)
    assert np.abs(y - expected).max() < 1e-14
    assert np.abs(gradient - expected_gradient).max() < 1e-14


# Bad options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"normalize": "max"},
            "normalize must be one of 'none', 'max_abs', 'tanh', 'standardize', 'l1_mean', got 'max'",
        ),
        ({"normalize_gain": -1}, "normalize_gain must be a finite number >= 0, got -1"),
        ({"normalize_gain": float("nan")}, "normalize_gain must be a finite number >= 0, got nan"),
        ({"normalize_gain": float("inf")}, "normalize_gain must be a finite number >= 0, got inf"),
        ({"normalize_gain": True}, "normalize_gain must be a finite number >= 0, got True"),
        ({"normalize_gain": "1"}, "normalize_gain must be a finite number >= 0, got '1'"),
    ],
)
@pytest.mark.parametrize("name", ["wnq", "sawb"])
def test_bad_options_are_explained(name, options, message):
    with pytest.raises(ValueError, match=message):
        wnq.get_method(name, **options)


# A layer of someone else


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Linear(6, 4)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_a_normalized_layer_starts_as_it_was(name, learned):
    layer = linear()
    w = layer.weight.detach().clone()
    assert normalize_(layer, name, learned=learned) is layer
    expected = {"standardize": w - w.mean(), "tanh": torch.tanh(w)}.get(name, w)
    # A quotient and a product round, and so does the mean.
    assert (layer.weight - expected).abs().max() <= 4 * EPS * w.abs().max()
    assert isinstance(layer.parametrizations.weight[0].scale, nn.Parameter) is learned
    assert isinstance(layer, nn.Linear)


@pytest.mark.parametrize("gain", [0.0, 0.5, 1.0])
def test_the_gradient_of_a_normalized_layer(gain):
    layer = normalize_(linear().double(), max_gain=gain)
    original, scale = layer.parametrizations.weight.original, layer.parametrizations.weight[0].scale
    with torch.no_grad():
        scale.mul_(1.7)
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    layer.weight.backward(g)
    w, g, factor = original.detach().numpy(), g.numpy(), scale.item()
    m = np.abs(w).max()
    u = w / m
    # y = factor * u, and u_j = w_j / m: the largest weight also carries -sum g_j u_j / m.
    at_max = np.abs(w) == m
    expected = factor / m * (g - gain * np.sign(w) * at_max * (g * u).sum())
    assert np.abs(original.grad.numpy() - expected).max() < 1e-14
    assert scale.grad.item() == pytest.approx((g * u).sum(), rel=1e-12)


def test_a_normalized_layer_with_the_exact_gradient_does_not_depend_on_the_scale_of_its_weight():
    layer = normalize_(linear().double())
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(4)
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", list(NORMALIZERS))
def test_state_dict_deepcopy_and_removal(name):
    layer = normalize_(linear(0), name)
    with torch.no_grad():
        layer.parametrizations.weight[0].scale.mul_(1.3)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    expected = layer(x).detach()
    other = normalize_(linear(1), name)
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x), expected)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(3)
    assert torch.equal(layer(x), expected) and not torch.equal(twin(x), expected)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer(x), expected)
    assert type(layer) is nn.Linear and sorted(layer.state_dict()) == ["bias", "weight"]


def test_a_normalized_layer_trains_also_from_zero():
    layer = linear()
    with torch.no_grad():
        layer.weight.zero_()
    normalize_(layer)
    assert not layer.weight.any()
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    y = x @ torch.randn(6, 4, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        loss = (layer(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05 * y.square().mean().item()


def test_half_precision_weights_keep_their_type():
    layer = normalize_(linear().to(torch.bfloat16), "standardize")
    assert layer.weight.dtype == torch.bfloat16
    assert "'standardize', learned=True" in repr(layer.parametrizations.weight[0])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: normalize_(linear(), "max"), "unknown normalizer 'max'. Did you mean 'max_abs'"),
        (lambda: normalize_(linear(), max_gain=-1.0), "gain must be a finite number >= 0, got -1.0"),
        (lambda: named_normalizer("tanh", float("nan")), "gain must be a finite number >= 0, got nan"),
        (lambda: Normalization(torch.ones(2), "maxabs"), "Did you mean 'max_abs'"),
        (lambda: normalize_(nn.ReLU()), "normalize_ needs a layer with a weight, got ReLU"),
    ],
)
def test_bad_layers_and_names_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_all_input_quantizers_are_known_from_the_start():
    # In a fresh process: the papers' input quantizers register themselves when the methods are imported.
    code = "import wnq; print(' '.join(info.name for info in wnq.list_inputs()))"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"clip", "hwgq", "lqnets", "lsq", "pact", "qil", "sign"} <= set(names)
