"""The integer reference model against the quantized model, computed in float64 and, for the sums, in int64."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.activations import list_inputs
from wnq.integer import DeployedEmbedding, DeployedLayer, convert, input_grid
from wnq.layers import INDEX_INPUT, channel_axis
from wnq.quantizer import Quantized, Quantizer
from wnq.readers import foldable_pairs

EPS = 2.0**-24


class Net(nn.Module):
    """A convolution, BatchNorm, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        return self.fc(F.relu(self.bn(self.conv(x))).mean((2, 3)))


def settle(model, seed=0, signs=True):
    """Give every BatchNorm statistics and factors of a trained net, some negative, one zero, one tiny."""
    g = torch.Generator().manual_seed(seed)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            n = m.num_features
            m.running_mean.copy_(torch.randn(n, generator=g))
            m.running_var.copy_(torch.rand(n, generator=g) + 0.3)
            m.weight.data.copy_(torch.rand(n, generator=g) + 0.3)
            m.bias.data.copy_(torch.randn(n, generator=g))
            if signs:
                m.weight.data[::2] *= -1
                m.weight.data[1] = 0
                m.weight.data[2] = 1e-30
    return model


def prepared(model, method, *inputs, **plan):
    settle(model)
    wnq.quantize_(model, wnq.make_plan(model, method, **{"first_last_bits": None, **plan}))
    return wnq.calibrate_(model, *inputs).eval()


def images(*shape, seed=1, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def layers_of(model):
    return {n: m for n, m in model.named_modules() if channel_axis(m) is not None}


def along_output(layer, y, per_channel):
    return layer.along_output(per_channel, y)


def check_layers(model, *inputs):
    """Every deployed layer against its float64 twin, on the inputs that the quantized model has there. Returns the conversion."""
    conversion = convert(model, *inputs)
    seen = {}

    def keep(name):
        return lambda m, args: seen.__setitem__(name, args[0].detach())

    layers = layers_of(model)
    handles = []
    for name, layer in layers.items():  # before the input quantizer
        handles.append(layer.register_forward_pre_hook(keep(name), prepend=True))
    with torch.no_grad():
        model(*inputs)
    for handle in handles:
        handle.remove()
    norms = dict(model.named_modules())
    records = {record.name: record for record in conversion.layers}
    checked = 0
    for name, layer in layers.items():
        new = conversion.model.get_submodule(name) if name else conversion.model
        if not isinstance(new, (DeployedLayer, DeployedEmbedding)):
            continue
        checked += 1
        x = seen[name]
        if isinstance(layer, INDEX_INPUT):
            assert torch.equal(new(x), layer(x))
            continue
        weight = layer.weight.detach().double()
        h = (layer.input_quantizer(x) if hasattr(layer, "input_quantizer") else x).double()
        if new.grid is not None:
            assert torch.equal((new.grid.integers(x) * new.grid.step), h.float())
        bias = None if layer.bias is None else layer.bias.double()
        exact, size = new.combine(h, weight), new.combine(h.abs(), weight.abs())
        shape = functools.partial(along_output, new, exact)
        y = exact if bias is None else exact + shape(bias)
        extra = torch.zeros(len(new.bias)).double() if bias is None else bias.abs()
        if new.output_module is not None:
            y = new.output_module(new.geometry, x.double(), y)
            size = size * (1 + x.abs().double().mean())  # the map is a mean of magnitudes
        if records[name].batchnorm:
            norm = norms[records[name].batchnorm]
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            y = (y - shape(norm.running_mean.double())) * shape(factor) + shape(norm.bias.double())
            size = size * shape(factor.abs())
            extra = (extra + norm.running_mean.abs().double()) * factor.abs() + norm.bias.abs().double()
        # Two rounded factors a product in the quantized model (weight, input), and here the step, the scale, their product, the
        # bias and the last two operations; a float sum adds one rounding a term.
        terms = 8 if new.is_integer else 8 + weight[0].numel()
        bound = terms * EPS * (size + shape(extra)) + 1e-30
        assert ((new(x).double() - y).abs() <= bound).all(), (name, ((new(x).double() - y).abs() / bound).max())
    assert checked
    return conversion


METHODS = [(info.name, bits) for info in wnq.list_methods() for bits in info.widths]


@pytest.mark.parametrize(("name", "bits"), METHODS, ids=[f"{n}-w{b}" for n, b in METHODS])
def test_every_method_and_width(name, bits):
    torch.manual_seed(0)
    x = images(4, 3, 6, 6, scale=3.0)  # beyond the last level on both sides
    model = prepared(Net(), wnq.get_method(name, w_bits=bits), x)
    conversion = check_layers(model, images(4, 3, 6, 6, seed=2, scale=9.0))
    for record, (_, layer, quantizer) in zip(
        (r for r in conversion.layers if r.kind in ("Conv2d", "Linear")), wnq.quantized_layers(model), strict=True
    ):
        quantized = quantizer.quantize(layer.parametrizations.weight.original)
        used = quantized._replace(scale=torch.tensor(1.0)).dequantize()
        whole = torch.equal(quantized.levels, quantized.levels.round())
        if whole and used.abs().max() != 128:
            assert record.form == ("integer" if used.abs().max() <= 127 else "codebook"), record
        assert whole or record.form == "codebook"
    assert all(record.why for record in conversion.layers)


@pytest.mark.parametrize("bits", range(1, 9))
def test_full_grids_are_odd_integers_up_to_seven_bits(bits):
    torch.manual_seed(0)
    model = prepared(Net(), wnq.get_method("wnq", w_bits=bits, a_bits=4), images(4, 3, 6, 6))
    record = convert(model, images(1, 3, 6, 6)).layers[0]
    if bits == 8:
        assert record.form == "codebook" and record.sums == "float" and "255" in record.why
        return
    weight = convert(model, images(1, 3, 6, 6)).model.conv.weight
    assert record.form == "integer" and weight.dtype == torch.int8
    assert set(weight.flatten().tolist()) <= {0, *range(-(2**bits - 1), 2**bits, 2)}  # 0 where BatchNorm's factor is


SHAPES = {
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), nn.BatchNorm2d(4), (2, 4, 5, 5)),
    "depthwise-multiplied": (nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8), (2, 4, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, stride=2, dilation=2), nn.BatchNorm2d(6), (2, 4, 9, 9)),
    "circular": (nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(6), (2, 3, 5, 5)),
    "same": (nn.Conv2d(3, 6, 3, padding="same"), nn.BatchNorm2d(6), (2, 3, 5, 5)),
    "1-d": (nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5), (2, 3, 9)),
    "3-d": (nn.Conv3d(2, 5, 2), nn.BatchNorm3d(5), (2, 2, 3, 3, 3)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed-grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 5, 5)),
    "transposed-1-d": (nn.ConvTranspose1d(3, 5, 3, bias=False), nn.BatchNorm1d(5), (2, 3, 9)),
    "linear": (nn.Linear(7, 5), nn.BatchNorm1d(5), (4, 7)),
    "no-batchnorm": (nn.Conv2d(3, 5, 3), nn.Identity(), (2, 3, 5, 5)),
    "batch-1": (nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), (1, 3, 5, 5)),
}
KINDS = {
    "wnq-w2a2": ("wnq", {"w_bits": 2, "a_bits": 2}),
    "wnq-w3-channel": ("wnq", {"w_bits": 3, "a_bits": 4, "granularity": "channel"}),
    "lsq-w8a8": ("lsq", {"w_bits": 8, "a_bits": 8}),
    "lqnets-w2": ("lqnets", {"w_bits": 2, "a_bits": 2}),
    "jacob-w8a8": ("jacob", {"w_bits": 8, "a_bits": 8}),
}


@pytest.mark.parametrize("method", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kinds_of_layers(shape, method):
    layer, norm, size = SHAPES[shape]
    model = nn.Sequential(copy.deepcopy(layer), copy.deepcopy(norm))
    name, options = KINDS[method]
    model = prepared(model, wnq.get_method(name, **options), images(*size))
    if method == "lsq-w8a8":  # a weight of -128, which a negative factor makes 128
        q = model[0].parametrizations.weight[0]
        model[0].parametrizations.weight.original.data.flatten()[0] = -1e3 * q.step.item()
    conversion = check_layers(model, images(*size, seed=3, scale=4.0))
    assert conversion.layers[0].batchnorm == (None if shape == "no-batchnorm" else "1")
    assert shape == "no-batchnorm" or isinstance(conversion.model[1], nn.Identity)
    new = conversion.model[0]
    assert new.weight is None or (new.scale > 0).all()
    assert torch.isfinite(new.scale).all() and torch.isfinite(new.bias).all()
    assert torch.equal(conversion.model(images(*size, seed=3, scale=4.0)), new(images(*size, seed=3, scale=4.0)))


def test_sums_are_exact_integers():
    torch.manual_seed(0)
    model = prepared(
        nn.Sequential(nn.Conv2d(5, 4, 3, padding=1)), wnq.get_method("wnq", w_bits=7, a_bits=8), images(2, 5, 6, 6)
    )
    x = images(2, 5, 6, 6, scale=5.0)
    new = convert(model, x).model[0]
    a, w = new.grid.integers(x).long(), new.weight.long()
    total = torch.zeros(2, 4, 6, 6, dtype=torch.int64)
    padded = F.pad(a, (1, 1, 1, 1))
    for o, c, i, j in itertools.product(range(4), range(5), range(3), range(3)):
        total[:, o] += w[o, c, i, j] * padded[:, c, i : i + 6, j : j + 6]
    assert total.abs().max() <= new.largest_sum
    expected = total.float() * (new.scale.double() * new.grid.step).float().view(1, -1, 1, 1) + new.bias.view(
        1, -1, 1, 1
    )
    assert torch.equal(new(x), expected)


def test_sums_beyond_float32_are_taken_in_float64():
    """200,000 products of 127 and 127 go past 2**24."""
    torch.manual_seed(0)
    linear = nn.Linear(200_000, 1, bias=False)
    linear.weight.data.fill_(1.0).flatten()[::2] = 0.99
    method = wnq.get_method("wnq", w_bits=7, a_bits=8, activation="clip")
    model = prepared(nn.Sequential(linear), method, torch.rand(1, 200_000))
    new = convert(model, torch.rand(1, 200_000)).model[0]
    x = torch.rand(1, 200_000, generator=torch.Generator().manual_seed(5))
    total = (new.grid.integers(x).long() * new.weight.long()).sum()
    assert new.largest_sum > 2**24 and total > 2**24
    assert float(new(x)) == float((total.double() * (new.scale.double() * new.grid.step)).float() + new.bias)


class Tiny(nn.Module):
    """A transformer: embedding, attention in linear layers, LayerNorm; the head is tied to the embedding."""

    def __init__(self, tied):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x)
        x = x + F.scaled_dot_product_attention(self.query(h), self.key(h), self.value(h))
        return self.head(x + self.down(F.gelu(self.up(self.norm(x)))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", ["wnq", "twn", "lqnets", "apot"])
def test_a_small_transformer(name, tied):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (2, 7), generator=torch.Generator().manual_seed(0))
    bits = {"twn": 2}.get(name, 3)
    model = prepared(Tiny(tied), wnq.get_method(name, w_bits=bits, a_bits=4), tokens)
    conversion = check_layers(model, tokens)
    new = conversion.model
    if tied and name != "lqnets":
        assert torch.equal(new.embed.weight, new.head.weight)
    assert [r.kind for r in conversion.layers if r.form == "float"] == ["LayerNorm"]
    assert (
        new(tokens[:1]) - model(tokens[:1])
    ).abs().max() < 0.5  # one flipped rounding at most, see the layers' bound


def test_weights_alone():
    torch.manual_seed(0)
    model = prepared(Net(), wnq.get_method("wnq", w_bits=4, a_bits=32), images(2, 3, 6, 6))
    conversion = check_layers(model, images(2, 3, 6, 6))
    assert [(r.form, r.sums) for r in conversion.layers] == [("integer", "float")] * 2


def test_inputs_alone():
    torch.manual_seed(0)
    model = prepared(Net(), wnq.get_method("wnq", w_bits=32, a_bits=4), images(2, 3, 6, 6))
    conversion = check_layers(model, images(2, 3, 6, 6))
    assert [(r.form, r.sums) for r in conversion.layers] == [("float", "float")] * 2


def test_a_packed_file_converts_to_the_same_integers(tmp_path):
    torch.manual_seed(0)
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(settle(model), wnq.make_plan(model, wnq.get_method("lsq", w_bits=3, a_bits=3)))
    wnq.calibrate_(model, x).eval()
    wnq.save(model, tmp_path / "m.safetensors")
    ours, theirs = convert(model, x), convert(wnq.load(tmp_path / "m.safetensors"), x)
    assert ours.layers == theirs.layers
    assert torch.equal(ours.model(x), theirs.model(x))
    assert torch.equal(convert(wnq.freeze_(copy.deepcopy(model)), x).model(x), ours.model(x))


def test_the_model_is_only_read():
    torch.manual_seed(0)
    model = prepared(Net(), wnq.get_method("wnq"), images(2, 3, 6, 6)).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    convert(model, images(2, 3, 6, 6))
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_training_time_folding_is_merged():
    torch.manual_seed(0)
    model, x = settle(Net(), signs=False), images(4, 3, 6, 6)
    pairs = wnq.batchnorm_pairs(model, x)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=4, a_bits=8), first_last_bits=None))
    wnq.fold_batchnorm_(model, pairs)
    wnq.calibrate_(model, x).eval()
    assert (convert(model, x).model(x) - model(x)).abs().max() < 1e-4


def test_a_batchnorm_is_folded_only_where_it_alone_reads_the_layer():
    class Shortcut(Net):
        def forward(self, x):
            y = self.conv(x)
            return self.fc((F.relu(self.bn(y)) + y).mean((2, 3)))

    class Twice(Net):
        def forward(self, x):
            return self.fc(F.relu(self.bn(self.conv(x)) + self.bn(self.conv(x + 1))).mean((2, 3)))

    class Returned(Net):
        def forward(self, x):
            y = self.conv(x)
            return self.fc(F.relu(self.bn(y)).mean((2, 3))), y

    x = images(2, 3, 6, 6)
    assert foldable_pairs(Net().eval(), x) == {"conv": "bn"}
    for kind in (Shortcut, Twice, Returned):
        torch.manual_seed(0)
        assert foldable_pairs(kind().eval(), x) == {}
        model = prepared(kind(), wnq.get_method("wnq", w_bits=3, a_bits=8), x)
        ours, theirs = convert(model, x).model(x), model(x)
        ours, theirs = (ours, theirs) if isinstance(ours, torch.Tensor) else (ours[0], theirs[0])
        assert (ours - theirs).abs().max() < 1e-3
    preact = wnq.build_model("preact_resnet18").eval()
    pairs = foldable_pairs(preact, images(1, 3, 32, 32))
    assert "conv1" not in pairs and pairs["layer1.0.conv1"] == "layer1.0.bn2"


def test_a_layer_with_a_forward_of_its_own_is_kept_and_said():
    class Odd(nn.Conv2d):
        def forward(self, x):
            return super().forward(x) * 2

    torch.manual_seed(0)
    model = nn.Sequential(Odd(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    model = prepared(model, wnq.get_method("wnq", w_bits=3, a_bits=3), images(2, 3, 6, 6))
    conversion = convert(model, images(2, 3, 6, 6))
    assert conversion.layers[0].form == "float" and "way of its own" in conversion.layers[0].why
    assert conversion.layers[1].form == "integer"
    assert torch.equal(conversion.model[0](images(2, 3, 6, 6)), model[0](images(2, 3, 6, 6)))


def test_a_float_model_is_refused():
    with pytest.raises(ValueError, match="Net is a float model"):
        convert(Net(), images(1, 3, 6, 6))


def test_scales_survive_all_zero_weights():
    torch.manual_seed(0)
    model = Net()
    model.conv.weight.data[2:4] = 0
    model = prepared(
        model, wnq.get_method("wnq", w_bits=2, grid="symmetric", granularity="channel", a_bits=2), images(2, 3, 6, 6)
    )
    new = check_layers(model, images(2, 3, 6, 6)).model.conv
    assert (new.scale > 0).all() and not new.weight[2:4].any()


# Input quantizers.

UNIFORM = {"lsq", "pact", "clip", "minmax", "lsqplus", "jacob", "dorefa", "sawb", "ewgs", "qil"}


def started(info, bits, sign):
    torch.manual_seed(0)
    quantizer = info.build(bits)
    x = images(500, seed=bits) * 2
    quantizer.train()
    quantizer.observe_(x if sign == "signed" else x.abs())
    return quantizer.eval()


INPUTS = [(info, bits, sign) for info in list_inputs() for bits in info.widths for sign in ("signed", "unsigned")]


@pytest.mark.parametrize(("info", "bits", "sign"), INPUTS, ids=[f"{i.name}{b}-{s}" for i, b, s in INPUTS])
def test_a_grid_gives_the_codes_of_its_quantizer(info, bits, sign):
    quantizer = started(info, bits, sign)
    grid, why = input_grid(quantizer)
    if grid is None:
        assert why and not why.endswith(".")
        return
    assert grid.low <= 0 <= grid.high and grid.high - grid.low < 256
    x = torch.cat([images(20000, seed=9) * 3, torch.linspace(-4, 4, 9999) * grid.step * 2**bits])
    quantized = quantizer.quantize(x)
    assert torch.equal(quantized.levels[quantized.codes.long()], grid.integers(x))
    assert torch.equal(quantizer(x), grid.integers(x) * grid.step)


def test_which_input_quantizers_are_grids():
    found = {i.name for i in list_inputs() if input_grid(started(i, i.widths[-1], "unsigned"))[0] is not None}
    assert {"lsq", "pact", "clip"} <= found
    assert "tbn" not in found and "hwgq" not in found


def test_unequal_thresholds_are_no_grid():
    quantizer = started(next(i for i in list_inputs() if i.name == "n2uq"), 3, "unsigned")
    quantizer.intervals.data[2] *= 1.01
    grid, why = input_grid(quantizer)
    assert grid is None and "does not round to nearest" in why


def test_a_step_that_depends_on_the_batch_is_no_grid():
    class Dynamic(Quantizer):
        bits = 2

        def encode(self, x):
            step = x.abs().max() / 3
            return Quantized((x / step).round().clamp(0, 3).to(torch.uint8), torch.arange(4.0), step)

    grid, why = input_grid(Dynamic())
    assert grid is None and "step" in why


def test_one_wrong_threshold_among_255_is_found():
    class Bent(Quantizer):
        bits = 8

        def encode(self, x):
            codes = (x / 0.1).round().clamp(0, 255)
            bent = (x / 0.1 > 99.5) & (x / 0.1 < 99.5001)
            return Quantized((codes - bent.float()).to(torch.uint8), torch.arange(256.0), torch.tensor(0.1))

    grid, why = input_grid(Bent())
    assert grid is None and "does not round to nearest" in why
