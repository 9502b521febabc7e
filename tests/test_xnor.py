"""XNOR-Net: the scale map against NumPy loops and convolutions with explicit ones, and models that carry it everywhere."""

import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.methods.xnor import ScaleMap, convolution_map
from wnq.testing import LAWS, METHOD_LAWS

QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def prepared(layer, **options):
    """Quantize a layer alone and return it."""
    model = nn.Sequential(layer)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("xnor", **options), first_last_bits=None))
    return model[0]


# The map


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 0, 1), (2, 1, 1), (1, 2, 2), ((2, 1), (0, 3), (1, 2))])
def test_the_map_equals_a_loop_in_numpy(stride, padding, dilation):
    layer = nn.Conv2d(4, 3, (3, 2), stride=stride, padding=padding, dilation=dilation).double()
    x = tensor(2, 4, 9, 8)
    k = convolution_map(layer, x).numpy()
    (sy, sx), (py, px), (dy, dx) = layer.stride, layer.padding, layer.dilation
    a = np.pad(np.abs(x.numpy()).mean(1), ((0, 0), (py, py), (px, px)))
    height = (a.shape[1] - dy * 2 - 1) // sy + 1
    width = (a.shape[2] - dx * 1 - 1) // sx + 1
    assert k.shape == (2, 1, height, width)
    for i in range(height):
        for j in range(width):
            window = a[:, i * sy : i * sy + 2 * dy + 1 : dy, j * sx : j * sx + dx + 1 : dx]
            assert window.shape[1:] == (3, 2)
            assert np.abs(k[:, 0, i, j] - window.sum((1, 2)) / 6).max() < 1e-12


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_the_map_of_each_kind_equals_a_convolution_with_ones(dims, dtype, tolerance):
    layer = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dims - 1](6, 4, 3, stride=2, padding=1, dilation=2).to(dtype)
    x = tensor(2, 6, *[9] * dims, dtype=dtype)
    convolve = [F.conv1d, F.conv2d, F.conv3d][dims - 1]
    ones = torch.ones(1, 6, *[3] * dims, dtype=dtype) / (6 * 3**dims)
    expected = convolve(x.abs(), ones, stride=2, padding=1, dilation=2)
    assert (convolution_map(layer, x) - expected).abs().max() < tolerance
    assert (convolution_map(layer, x[0]) - expected[0]).abs().max() < tolerance  # without a batch dimension


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_each_group_has_its_own_map(groups):
    layer = nn.Conv2d(6, 12, 3, padding=1, groups=groups).double()
    x = tensor(2, 6, 5, 5)
    k = convolution_map(layer, x)
    assert k.shape == (2, 12, 5, 5)
    for g, part in enumerate(x.abs().chunk(groups, 1)):
        expected = F.conv2d(part.mean(1, keepdim=True), torch.ones(1, 1, 3, 3).double() / 9, padding=1)
        own = k[:, g * 12 // groups : (g + 1) * 12 // groups]
        assert (own - expected).abs().max() < 1e-12


@pytest.mark.parametrize("padding", [0, 1, (2, 1), "same", "valid"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_is_the_layers(mode, padding):
    """A layer of one channel whose weights are all 1/9 computes the map itself."""
    layer = nn.Conv2d(1, 1, 3, padding=padding, padding_mode=mode, bias=False).double()
    layer.weight.data.fill_(1 / 9)
    x = tensor(2, 1, 6, 7)
    assert (convolution_map(layer, x) - layer(x.abs())).abs().max() < 1e-12


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # torch says so of the layer itself
@pytest.mark.parametrize("mode", ["zeros", "replicate"])
def test_uneven_same_padding_is_the_layers(mode):
    layer = nn.Conv2d(1, 1, (2, 4), padding="same", padding_mode=mode, dilation=(1, 3), bias=False).double()
    layer.weight.data.fill_(1 / 8)
    x = tensor(2, 1, 12, 11)
    assert (convolution_map(layer, x) - layer(x.abs())).abs().max() < 1e-12


# The layer


def test_a_convolution_equals_the_papers_formula():
    """(sign(x) * sign(w)) times K times alpha, and the bias behind it."""
    torch.manual_seed(0)
    layer = prepared(nn.Conv2d(3, 5, 3, padding=1, stride=2).double())
    x, w, b = tensor(2, 3, 7, 7), layer.parametrizations.weight.original.detach(), layer.bias.detach()
    signs = F.conv2d(torch.where(x >= 0, 1.0, -1.0).double(), torch.where(w >= 0, 1.0, -1.0).double(), None, 2, 1)
    alpha = w.abs().mean((1, 2, 3)).reshape(1, -1, 1, 1)
    k = F.conv2d(x.abs().mean(1, keepdim=True), torch.ones(1, 1, 3, 3).double() / 9, None, 2, 1)
    assert (layer(x) - (signs * k * alpha + b.reshape(1, -1, 1, 1))).abs().max() < 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6)])
def test_a_linear_layer_scales_by_the_mean_of_its_features(shape, bias):
    torch.manual_seed(0)
    layer = prepared(nn.Linear(6, 5, bias=bias).double())
    x, w = tensor(*shape), layer.parametrizations.weight.original.detach()
    expected = np.sign(x.numpy()) @ np.sign(w.numpy()).T * np.abs(w.numpy()).mean(1)
    expected = expected * np.abs(x.numpy()).mean(-1, keepdims=True)
    expected = expected + layer.bias.detach().numpy() if bias else expected
    assert np.abs(layer(x).detach().numpy() - expected).max() < 1e-12


def test_the_map_brings_the_scale_of_the_float_product_back():
    """On random data alpha * K makes the binary product a far better estimate than the signs alone."""
    torch.manual_seed(0)
    layer = nn.Conv2d(32, 16, 3, bias=False).double()
    x = tensor(4, 32, 10, 10) * torch.tensor([0.1, 1.0, 5.0, 20.0]).double().reshape(-1, 1, 1, 1)
    exact = layer(x)
    with_map, without = (prepared(copy.deepcopy(layer), scale_map=on)(x) for on in (True, False))

    def error(y):
        return ((y - exact).square().mean((1, 2, 3)) / exact.square().mean((1, 2, 3))).max()

    assert error(with_map) < 0.8
    assert error(without) > 10


def test_the_map_is_differentiated():
    """Linear, all |x| below 1: dy/dx = alpha (s_w K + (s_x . s_w) sign(x) / n)."""
    torch.manual_seed(0)
    layer = prepared(nn.Linear(6, 1, bias=False).double())
    x = (tensor(6) / 5).requires_grad_()
    assert x.abs().max() < 1
    layer(x).backward(torch.ones(1).double())
    w, v = layer.parametrizations.weight.original.detach().numpy()[0], x.detach().numpy()
    alpha, k = np.abs(w).mean(), np.abs(v).mean()
    expected = alpha * (np.sign(w) * k + (np.sign(v) * np.sign(w)).sum() * np.sign(v) / 6)
    assert np.abs(x.grad.numpy() - expected).max() < 1e-12


@pytest.mark.parametrize("groups", [1, 2])
def test_the_map_of_a_convolution_is_differentiated(groups):
    """Where all |x| exceed 1 the signs have no gradient, so that the layer's own derivative is the map's alone."""
    torch.manual_seed(0)
    layer = prepared(nn.Conv2d(4, 2, 3, padding=1, stride=2, groups=groups).double())
    x = tensor(1, 4, 5, 5)
    x = (x + x.sign()).requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    layer(x).sum().backward()
    assert x.grad.any()


def test_the_weights_gradient_carries_the_map():
    """dL/dw_q of a convolution whose incoming gradient is multiplied by K; identity or the paper's factor after that."""
    torch.manual_seed(0)
    float_layer = nn.Conv2d(2, 3, 3, bias=False).double()
    x, g = tensor(2, 2, 6, 6), tensor(2, 3, 4, 4, seed=1)
    k = convolution_map(float_layer, x)
    w = float_layer.weight.detach()
    signs = torch.where(x >= 0, 1.0, -1.0).double()
    expected = torch.nn.grad.conv2d_weight(signs, w.shape, g * k)
    alpha = w.abs().mean((1, 2, 3), keepdim=True)
    for gradient, factor in (("identity", 1.0), ("paper", 1 / 18 + alpha)):
        layer = prepared(copy.deepcopy(float_layer), gradient=gradient)
        layer(x).backward(g)
        assert (layer.parametrizations.weight.original.grad - expected * factor).abs().max() < 1e-12


@pytest.mark.parametrize("options", [{"scale_map": False}, {"a_bits": 32}, {"a_bits": 3, "activation": "lsq"}])
def test_without_a_map_it_is_bwn_behind_an_input_quantizer(options):
    assert wnq.get_method("xnor", **options).output is None
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    x = tensor(4, 6, dtype=torch.float32)
    ours = prepared(copy.deepcopy(layer), **options)
    assert not hasattr(ours, "output_module")
    assert hasattr(ours, "input_quantizer") == (options.get("a_bits") != 32)
    ours(x)
    seen = ours.input_quantizer(x) if hasattr(ours, "input_quantizer") else x
    expected = F.linear(seen, wnq.get_method("bwn").weight(layer.weight, 0)(layer.weight), layer.bias)
    assert torch.equal(ours(x), expected)


def test_float_weights_have_no_map():
    assert wnq.get_method("xnor", w_bits=32).output is None


def test_other_layers_are_refused_with_a_remedy():
    with pytest.raises(ValueError, match="defined for Conv1d, Conv2d, Conv3d and Linear, got ConvTranspose2d; give"):
        prepared(nn.ConvTranspose2d(3, 3, 2))
    prepared(nn.ConvTranspose2d(3, 3, 2), scale_map=False)(torch.ones(1, 3, 4, 4))


def test_an_embedding_keeps_its_indices_and_has_no_map():
    layer = prepared(nn.Embedding(7, 3))
    assert not hasattr(layer, "output_module")
    assert layer(torch.tensor([1, 2])).shape == (2, 3)


def test_the_output_keeps_the_layers_type_under_autocast():
    layer, linear = prepared(nn.Conv2d(3, 4, 3)), prepared(nn.Linear(6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(tensor(2, 3, 5, 5, dtype=torch.float32)).dtype == torch.bfloat16
        assert linear(tensor(2, 6, dtype=torch.float32)).dtype == torch.bfloat16


def test_the_input_may_come_by_name():
    layer = prepared(nn.Linear(6, 5))
    x = tensor(4, 6, dtype=torch.float32)
    assert torch.equal(layer(input=x), layer(x))


# Models


class Net(nn.Module):
    """The paper's block, BatchNorm, sign, convolution, pooling, with groups, 1-d layers and a shared weight."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect", groups=8)
        self.line = nn.Conv1d(8, 8, 3, padding="same")
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = F.max_pool2d(self.conv(self.bn1(self.stem(x))), 2)
        x = self.line(self.depthwise(self.bn2(x)).flatten(2)).mean(2)
        return self.head(self.second(self.first(x)))


def images(n=6):
    return tensor(n, 3, 8, 8, seed=5, dtype=torch.float32)


def trained(**options):
    torch.manual_seed(0)
    model = Net()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("xnor", **options)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("options", [{}, {"scale_map": False}, {"gradient": "paper", "ewgs": 0.01}, {"a_bits": 32}])
def test_logits_are_equal_wherever_the_model_goes(options, tmp_path):
    model = trained(**options)
    x = images(16)
    expected = model(x)
    mapped = {name for name, m in model.named_modules() if isinstance(getattr(m, "output_module", None), ScaleMap)}
    inner = {"conv", "depthwise", "line", "first", "second"}
    assert mapped == (inner if options.get("scale_map", True) and options.get("a_bits") != 32 else set())
    assert torch.equal(copy.deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    wnq.save(model, tmp_path / "model.safetensors")
    loaded = wnq.load(tmp_path / "model.safetensors", Net())
    assert torch.equal(loaded(x), expected)
    frozen = wnq.freeze_(copy.deepcopy(model))
    assert torch.equal(frozen(x), expected)
    wnq.save(frozen, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_the_map_matters_in_the_model():
    assert not torch.allclose(trained()(images()), trained(scale_map=False)(images()))


def test_no_input_is_kept_after_a_pass():
    model = trained()
    model(images())
    assert not any("float_input" in vars(module) for module in model.modules())
    assert model.state_dict().keys() == trained(scale_map=False).state_dict().keys()  # the map has no state


def test_a_float_checkpoint_loads():
    torch.manual_seed(1)
    model, plain = trained(), Net()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.conv.parametrizations.weight.original, plain.conv.weight)


def test_it_learns_with_signs_and_maps():
    """Which of four directions a point lies in; blocks of linear, BatchNorm, sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    x = torch.randn(512, 2)
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("xnor")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.8


# Laws


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
@pytest.mark.parametrize("gradient", ["identity", "paper"])
def test_laws_of_the_weight(law, gradient):
    law(lambda x: wnq.get_method("xnor", gradient=gradient).weight(x, 0))


def test_a_mapped_layer_compiles():
    torch.manual_seed(0)
    layer = prepared(nn.Conv2d(3, 4, 3, padding=1))
    x = tensor(2, 3, 6, 6, dtype=torch.float32)
    expected = layer(x)
    assert torch.allclose(torch.compile(layer)(x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("law", METHOD_LAWS[:2], ids=lambda law: law.__name__)
def test_method_laws_with_signs_as_inputs(law):
    """Not the third: the task of that law has a ReLU in front of the layer, whose signs are all +1."""
    law(wnq.get_method("xnor"))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("options", [{"a_bits": 32}, {"a_bits": 3, "activation": "lsq"}])
def test_method_laws_with_other_inputs(law, options):
    law(wnq.get_method("xnor", **options))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 2"):
        wnq.get_method("xnor", w_bits=2)
    with pytest.raises(ValueError, match=r"activation 'sign' defines a_bits 1, or 32 for float; got 2"):
        wnq.get_method("xnor", a_bits=2)
    with pytest.raises(ValueError, match="gradient must be one of 'identity', 'paper', got 'ste'"):
        wnq.get_method("xnor", gradient="ste")
