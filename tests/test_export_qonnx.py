"""The QONNX dialect: what the file says against qonnx's own reading of it, what it computes against the integer reference model."""

import copy
import dataclasses
import json
import math
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq import cli
from wnq.integer import DeployedLayer, convert

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("qonnx", reason='qonnx is not installed: pip install "wnq[qonnx]"')

from qonnx.core.modelwrapper import ModelWrapper  # noqa: E402
from qonnx.core.onnx_exec import execute_onnx  # noqa: E402
from qonnx.custom_op.general.intquant import max_int, min_int  # noqa: E402
from qonnx.transformation.infer_shapes import InferShapes  # noqa: E402
from qonnx.util.cleanup import cleanup_model  # noqa: E402
from qonnx.util.inference_cost import inference_cost  # noqa: E402

from wnq.export.dialect import Options  # noqa: E402
from wnq.export.engines import open_engine  # noqa: E402
from wnq.export.onnx.graph import array_of, initializers  # noqa: E402
from wnq.export.proof import sizes  # noqa: E402
from wnq.export.qonnx import DOMAIN, width_of, write_qonnx  # noqa: E402


class Net(nn.Module):
    """A stem, a depthwise and a grouped convolution, a residual sum, a transposed and a 1-D convolution, a linear layer."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped, self.bn3 = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.line = nn.Conv1d(4, 6, 12, stride=12)
        self.fc = nn.Linear(72, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        y = F.relu(self.bn2(self.depthwise(x)))
        x = F.relu(self.bn3(self.grouped(y)) + x)
        x = F.relu(self.up(x)).flatten(2)
        return self.fc(F.relu(self.line(x)).flatten(1))


class Pair(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, between=F.relu):
        super().__init__()
        self.first, self.last = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


def images(count, seed=1, size=6, scale=8.0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * scale


def converted(model, x, name="wnq", first_last_bits=None, **options):
    """Quantize and convert a model whose BatchNorms have factors of either sign, and one of zero."""
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.copy_(torch.rand(m.num_features, generator=g) + 0.3)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * 0.3)
            m.weight.data[::3] *= -1
            m.weight.data[1] = 0
    plan = wnq.make_plan(model, wnq.get_method(name, **options), first_last_bits=first_last_bits)
    wnq.quantize_(model, plan)
    wnq.calibrate_(model, x).eval()
    return convert(model, x[:2])


def on_powers_of_two(conversion):
    """Change steps, scales and biases of a conversion so that floats hold all its sums exactly, whatever their order.

    No step is 1, of which qonnx speaks otherwise.
    """
    model = copy.deepcopy(conversion.model)
    for layer in model.modules():
        if isinstance(layer, DeployedLayer):
            layer.scale = layer.scale.sign() * torch.exp2(layer.scale.abs().log2().round())
            layer.bias = (layer.bias * 256).round() / 256
            layer.grid = dataclasses.replace(layer.grid, step=min(0.5, 2.0 ** math.floor(math.log2(layer.grid.step))))
    return dataclasses.replace(conversion, model=model)


def reached(model, x):
    """Layer -> whether its input reaches beyond both ends of its integers, or beyond the upper one where they start at zero."""
    found = {}

    def look(name, layer, x):
        ends = float(x.min()) / layer.grid.step, float(x.max()) / layer.grid.step
        found[name] = (layer.grid.low == 0 or ends[0] < layer.grid.low - 0.5) and ends[1] > layer.grid.high + 0.5

    handles = [
        layer.register_forward_pre_hook(lambda layer, args, name=name: look(name, layer, args[0]))
        for name, layer in deployed(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return found


def deployed(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, DeployedLayer)}


@dataclasses.dataclass
class Case:
    conversion: object
    path: object
    written: object
    file: object

    @property
    def layers(self):
        return deployed(self.conversion.model)

    @property
    def nodes(self):
        return {name: node for node in self.file.graph.node for name in node.output}

    def quant_of(self, layer, side):
        """Return the quantizer of a product's input (0) or weight (1)."""
        product = next(node for node in self.file.graph.node if node.name == layer)
        return self.nodes[product.input[side]]

    def said(self, layer, side):
        """Return (bits, signed, narrow, rounding, zero point) of a quantizer, or its kind."""
        node = self.quant_of(layer, side)
        if node.op_type != "Quant":
            return node.op_type
        values = {name: array_of(value) for name, value in initializers(self.file).items()}
        told = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert node.domain == DOMAIN and set(told) == {"signed", "narrow", "rounding_mode"}
        zero, bits = (values[name] for name in node.input[2:])
        assert zero.shape == bits.shape == ()
        return int(bits), bool(told["signed"]), bool(told["narrow"]), told["rounding_mode"].decode(), float(zero)

    def fixed(self, batch):
        """Return qonnx's model for a batch."""
        proto = copy.deepcopy(self.file)
        proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = batch
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        return ModelWrapper(proto)


def written(conversion, x, folder):
    path = folder / "model.onnx"
    result = write_qonnx(conversion, (x[:2],), path, Options())
    return Case(conversion, path, result, onnx.load(path))


@pytest.fixture(autouse=True)
def loadable(monkeypatch):
    """Let qonnx make files that ONNX Runtime loads, where a test calls it without our engine."""
    monkeypatch.setattr(onnx, "IR_VERSION", 10)


@pytest.fixture(
    scope="module",
    params=[(Net, "wnq", 2, 2), (Net, "wnq", 1, 2), (Pair, "jacob", 4, 4), (Pair, "wnq", 8, 8)],
    ids=["wnq-w2a2", "wnq-w1a2", "jacob-w4a4", "wnq-w8a8"],
)
def exact(request, tmp_path_factory):
    """A net whose sums are exact in floats, and its file."""
    kind, name, w_bits, a_bits = request.param
    torch.manual_seed(0)
    conversion = converted(kind(), images(8, scale=1.0), name, w_bits=w_bits, a_bits=a_bits)
    return (name, w_bits), written(on_powers_of_two(conversion), images(2), tmp_path_factory.mktemp("qonnx"))


def test_qonnx_computes_what_the_reference_computes(exact):
    """Bit for bit, at batches of 1, 3 and 64, on inputs beyond every clip."""
    _, case = exact
    engine = open_engine("qonnx", case.path)
    with torch.no_grad():
        for count in (1, 3, 64):
            x = images(count, seed=count)
            assert np.array_equal(engine.run([x.numpy()]), case.conversion.model(x).numpy())
        assert reached(case.conversion.model, images(64)) == dict.fromkeys(case.layers, True)
    assert [(o.layer, o.integer) for o in engine.operators()] == [(name, True) for name in case.layers]


def test_the_file_says_the_widths(exact):
    (name, bits), case = exact
    signed = {("wnq", 2): 3, ("wnq", 1): 2, ("jacob", 4): 5, ("wnq", 8): 9}[name, bits]
    for layer in case.layers:
        integers = case.conversion.model.get_submodule(layer).table().numpy()
        wide, said = signed, case.said(layer, 1)
        if (name, bits) == ("wnq", 1) and np.all(np.abs(integers) == 1):
            assert said == "BipolarQuant" and layer in (
                "up",
                "line",
                "fc",
            )  # behind the others there is a factor of zero
            continue
        if name == "jacob" and integers.max() < 8:
            wide = 4  # no 8, so that four bits do
        narrow = integers.min() > -(2 ** (wide - 1))
        assert said == (wide, True, narrow, "ROUND", 0.0), layer
        low, high = (f(True, narrow, np.float32(wide)) for f in (min_int, max_int))
        assert low <= integers.min() and integers.max() <= high
        grid = case.conversion.model.get_submodule(layer).grid
        said = case.said(layer, 0)
        if grid.low == 0:
            assert said == (grid.bits, False, False, "ROUND", 0.0)
        else:
            skewed = name == "jacob"  # from -7 to 8
            assert said == (grid.bits + skewed, True, skewed, "ROUND", 0.0)
    clips = [node for node in case.file.graph.node if node.op_type == "Clip"]
    assert len(clips) == (name == "jacob")
    opsets = {entry.domain: entry.version for entry in case.file.opset_import}
    assert case.file.ir_version == 10 and opsets == {"": 21, DOMAIN: 1}
    notes = " ".join(case.written.notes)
    wider = {("wnq", 2): "stem (3 for 2)", ("wnq", 1): "stem (2 for 1)", ("wnq", 8): "first (9 for 8)"}.get(
        (name, bits)
    )
    assert wider is None or wider in notes
    assert ("Clip before the Quant" in notes) == (name == "jacob") and "dequantized" not in notes
    if (name, bits) == ("wnq", 1):
        assert "fc (" not in notes and "floats: up, line, fc." in notes


def test_weights_pass_their_quantizers_unchanged(exact):
    """With true scales, by NumPy."""
    _, case = exact
    rng = np.random.default_rng(0)
    values = {name: array_of(value) for name, value in initializers(case.file).items()}
    for layer in case.layers:
        node = case.quant_of(layer, 1)
        weight, scale = values[node.input[0]], values[node.input[1]]
        integers = np.rint(weight / scale)
        assert np.array_equal(integers * scale, weight) and weight.dtype == np.float32
        if node.op_type == "BipolarQuant":
            assert np.array_equal(np.where(weight >= 0, 1, -1) * scale, weight) and np.all(scale > 0)
            continue
        scale = (scale * rng.uniform(1, 2, scale.shape)).astype(np.float32)  # any other scale does as well
        bits, signed, narrow, *_ = case.said(layer, 1)
        low, high = (float(f(signed, narrow, np.float32(bits))) for f in (min_int, max_int))
        weight = integers.astype(np.float32) * scale
        assert np.array_equal(np.rint(np.clip(weight / scale, low, high)) * scale, weight)


def test_a_relu_stands_before_unsigned_integers_alone(exact):
    """FINN takes such a Quant from a ReLU that nothing else reads, and refuses it elsewhere."""
    _, case = exact
    for layer in case.layers:
        node = case.quant_of(layer, 0)
        if not case.said(layer, 0)[1]:
            relu = case.nodes[node.input[0]]
            readers = [other for other in case.file.graph.node if relu.output[0] in other.input]
            assert relu.op_type == "Relu" and readers == [node]


def test_widths_are_the_narrowest_of_qonnx_that_hold_the_integers():
    def holds(width, low, high):
        if width.signed and width.bits == 1:
            return False  # qonnx takes it for -1 and 1
        ends = [f(width.signed, width.narrow, width.bits) for f in (min_int, max_int)]
        return ends == [width.low, width.high] and width.low <= low and high <= width.high

    for low in range(-20, 1):
        for high in range(21):
            width = width_of(low, high)
            assert holds(width, low, high) and width.signed == (low < 0)
            smaller = [dataclasses.replace(width, bits=bits, narrow=False) for bits in range(1, width.bits)]
            assert not any(holds(other, low, high) for other in smaller)
            assert not (width.signed and not width.narrow and holds(dataclasses.replace(width, narrow=True), low, high))
            assert width_of(low, high, 7).bits == max(7, width.bits)


# ResNet-20 with its own scales: floats round in another order than the reference.


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    """At 2 bits, its first and last layer at 8."""
    torch.manual_seed(0)
    model, x = wnq.build_model("resnet20"), images(16, size=32, scale=1.0)
    conversion = converted(model, x, first_last_bits=8, w_bits=2, a_bits=2)
    return model, written(conversion, x, tmp_path_factory.mktemp("resnet"))


def test_resnet20_is_the_model(resnet):
    model, case = resnet
    x = images(32, size=32)
    ours = open_engine("qonnx", case.path).run([x.numpy()])
    with torch.no_grad():
        for theirs in (model(x).numpy(), case.conversion.model(x).numpy()):
            gap = np.abs(ours - theirs).max(1) / theirs.std()
            rounding = gap < 1e-5
            # Of the 200,000 values of an image one may lie within a rounding of a threshold, and then moves by one step.
            assert rounding.mean() >= 0.75 and gap.max() < 0.5
            same = ours.argmax(1) == theirs.argmax(1)
            assert same[rounding].all() and same.mean() >= 31 / 32
        assert [name for name, there in reached(case.conversion.model, x).items() if not there] == ["fc"]


def test_qonnx_cleans_the_file_up(resnet):
    """The first step of FINN and hls4ml, with a batch of one. Its costs are wnq's, as far as wnq has any: bits of weights.

    Products of integers are counted here, from the shapes that pass through the layers.
    """
    _, case = resnet
    model = cleanup_model(case.fixed(1))
    x = images(1, size=32)
    (ours,) = execute_onnx(model, {model.graph.input[0].name: x.numpy()}).values()
    assert np.array_equal(ours, open_engine("qonnx", case.path).run([x.numpy()]))
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Quant") == 40 and kinds.count("Conv") == 19 and kinds.count("MatMul") == 1
    layers = case.layers
    with torch.no_grad():
        macs = macs_of(case.conversion, x)
    cost = inference_cost(model, discount_sparsity=False)["total_cost"]
    # The odd integers of the full grid are stated with one bit more than planned; those of 8 bits are symmetric.
    stated = {name: layer.bits + (layer.bits == 2) for name, layer in layers.items()}
    assert cost["total_macs"] == sum(macs.values()) == 40_551_040
    assert cost["total_bops"] == sum(macs[name] * stated[name] * layers[name].grid.bits for name in layers)
    assert cost["total_mem_w_elems"] == sum(layer.weight.numel() for layer in layers.values())
    odd = sum(layer.weight.numel() for name, layer in layers.items() if stated[name] > layer.bits)
    assert cost["total_mem_w_bits"] == 8 * sizes(case.conversion)["true_width"] + odd


def macs_of(conversion, x):
    """Layer -> products for these inputs."""
    found = {}

    def count(name, layer, y):
        found[name] = y.numel() * (layer.geometry.in_features if layer.is_linear else layer.table()[0].numel())

    layers = deployed(conversion.model).items()
    handles = [m.register_forward_hook(lambda m, _, y, name=name: count(name, m, y)) for name, m in layers]
    conversion.model(x)
    for handle in handles:
        handle.remove()
    return found


def test_costs_of_each_layer(exact):
    """By the types that qonnx infers. It does not count transposed convolutions."""
    _, case = exact
    with torch.no_grad():
        macs = macs_of(case.conversion, images(1))
    model = case.fixed(1).transform(InferShapes())
    costs = {sparse: inference_cost(model, discount_sparsity=sparse)["total_cost"] for sparse in (False, True)}
    for sparse, cost in costs.items():
        expected = {}
        for layer in (layer for layer in case.layers if layer != "up"):
            integers = case.conversion.model.get_submodule(layer).table()
            said = case.said(layer, 1)
            # qonnx takes a BipolarQuant with a scale for floats; without a scale FINN and hls4ml would need one behind the product.
            kind = "FLOAT32" if said == "BipolarQuant" else f"SCALEDINT<{said[0]}>"
            key = f"op_mac_SCALEDINT<{case.said(layer, 0)[0]}>_{kind}"
            # Zeros are left out where asked: of the grid, and of channels with a factor of zero.
            zero = case.conversion.model.get_submodule(layer).scale == 0
            used = integers.clone()
            used[zero] = 0
            share = int(used.count_nonzero()) / used.numel() if sparse else 1
            expected[key] = expected.get(key, 0) + macs[layer] * share
        found = {key: value for key, value in cost.items() if key.startswith("op_mac")}
        assert found == pytest.approx(expected, rel=1e-12)
    assert costs[True]["total_macs"] <= costs[False]["total_macs"]


# What is not a convolution of integers.


class Tiny(nn.Module):
    """A transformer's block with its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 32)
        self.norm = nn.LayerNorm(32)
        self.query, self.value = nn.Linear(32, 32), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 11)

    def forward(self, tokens):
        x = self.embed(tokens)
        h = self.norm(x)
        x = x + (self.query(h) @ h.mT / 32**0.5).softmax(-1) @ self.value(h)
        return self.down(F.gelu(self.up(self.norm(x))))


def test_a_small_transformer(tmp_path, monkeypatch):
    monkeypatch.undo()  # the engine makes files loadable by itself, and leaves onnx as it was
    before = onnx.IR_VERSION
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (8, 7), generator=torch.Generator().manual_seed(0))
    conversion = converted(Tiny(), tokens, w_bits=3, a_bits=8, granularity="channel")
    case = written(conversion, tokens, tmp_path)
    engine = open_engine("qonnx", case.path)
    with torch.no_grad():
        for some in (tokens, tokens[:1]):
            expected = conversion.model(some).numpy()
            # Softmax, GELU and the order of sums differ by roundings.
            assert np.abs(engine.run([some.numpy()]) - expected).max() < 1e-5 * np.abs(expected).max()
    assert before == onnx.IR_VERSION
    table = next(node for node in case.file.graph.node if node.op_type == "Gather")
    quant = case.nodes[table.input[0]]
    assert quant.op_type == "Quant" and quant.input[0] == "embed.weight" and quant.input[3] == "bits4"
    named = {o.layer: o.integer for o in engine.operators() if o.layer}
    assert named == dict.fromkeys(("query", "value", "up", "down"), True)
    assert [o.integer for o in engine.operators() if not o.layer] == [False, False]  # attention's own products


def clamped_resized_padded(x):
    return F.pad(F.interpolate(x.clamp(max=0.5), scale_factor=2.0), (1, 1, 1, 1), "circular")


def test_codebooks_are_floats_and_said_to_be(tmp_path):
    """And operators that leave inputs out have them written out, because qonnx executes no others."""
    torch.manual_seed(0)
    conversion = converted(Pair(clamped_resized_padded), images(8), "ttq", w_bits=2, a_bits=2)
    case = written(conversion, images(2), tmp_path)
    assert {"Clip", "Resize", "Pad"} <= {node.op_type for node in case.file.graph.node}
    x = images(8, seed=3)
    engine = open_engine("qonnx", case.path)
    with torch.no_grad():
        # Sums of floats in another order.
        np.testing.assert_allclose(engine.run([x.numpy()]), conversion.model(x).numpy(), atol=1e-5)
    assert "Weights written as dequantized floats, without a Quant: first, last." in case.written.notes
    assert [o.integer for o in engine.operators()] == [False, False]


def test_an_operator_that_qonnx_does_not_execute_is_named(tmp_path):
    torch.manual_seed(0)
    x = images(4)
    resized = Pair(lambda x: F.interpolate(F.group_norm(x, 3), size=(9, 9), mode="bilinear"))
    case = written(converted(resized, x, w_bits=3, a_bits=4), x, tmp_path)
    with pytest.raises(ValueError, match=r"operator Resize behind layer 'first' leaves out .* Write that part"):
        open_engine("qonnx", case.path).run([x.numpy()])
    for node in case.file.graph.node:
        if node.op_type == "Resize":
            node.op_type, node.input[:] = "Identity", node.input[:1]
            del node.attribute[:]
    case.path.write_bytes(case.file.SerializeToString())
    with pytest.raises(ValueError, match="operator GroupNormalization behind layer 'first' has an output whose shape"):
        open_engine("qonnx", case.path).run([x.numpy()])


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "qonnx", None)
    with pytest.raises(ModuleNotFoundError, match=r'qonnx is not installed: pip install "wnq\[qonnx\]"'):
        open_engine("qonnx", tmp_path / "none.onnx")


def test_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    wnq.calibrate_(model, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))).eval()
    wnq.save(model, tmp_path / "m.safetensors")
    arguments = [
        "export",
        tmp_path / "m.safetensors",
        "--data",
        "digits",
        "--to",
        "qonnx",
        "--out",
        tmp_path / "deploy",
    ]
    with pytest.raises(SystemExit) as exit_:
        cli.main([*map(str, arguments), "--images", "200", "--require-agreement", "99.9", "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0
    assert printed == json.loads((tmp_path / "deploy" / "model.onnx.proof.json").read_text())
    assert printed["engine"].startswith("qonnx ") and printed["inputs"] == 200 and printed["latency"] == []
    assert printed["engine_vs_reference"]["agreement"] == 100
    assert printed["operators"]["kinds"] == {"Conv (integer)": 3, "MatMul (integer)": 1}
    assert printed["accuracy"]["engine"] == printed["accuracy"]["reference"]
    size = printed["bytes"]
    assert size["file"] == (tmp_path / "deploy" / "model.onnx").stat().st_size
    assert size["file"] == sum(size[part] for part in ("weights", "biases", "scales", "graph"))
    assert size["weights"] == size["weights_float32"] and size["float_file"] is None
    assert any("3 (4 for 3)" in note for note in printed["notes"])


def test_there_is_no_small_flavour(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["export", str(tmp_path / "none"), "--to", "qonnx", "--small"])
    assert exit_.value.code == 2 and "--to qonnx has no small flavour" in capsys.readouterr().err
