"""The ``executorch`` dialect: the numbers XNNPACK gets, and what it makes of them. The engine's tests need executorch."""

import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq import cli
from wnq.export.dialect import Options
from wnq.export.engines import open_engine
from wnq.export.program.executorch import for_executorch
from wnq.export.program.graph import dequantize_apart_, following, operator_name, quantize_ahead_, weighted_products
from wnq.export.program.layers import program_form
from wnq.export.program.tracing import trace_program
from wnq.export.program.xnnpack import STYLE, tuned
from wnq.integer import convert

try:
    import executorch  # noqa: F401

    HERE = True
except ModuleNotFoundError:
    HERE = False
needs_engine = pytest.mark.skipif(not HERE, reason="executorch is not installed")


class Net(nn.Module):
    """A stem, a depthwise and a pointwise convolution beside a shortcut, a pooling, a linear layer that nothing rounds."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.pointwise, self.bn3 = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 6, 3, padding=1)
        self.relu, self.fc = nn.ReLU(), nn.Linear(54, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.stem(x)))
        x = F.relu(self.bn3(self.pointwise(F.relu(self.bn2(self.depthwise(x))))) + x)
        return self.fc(F.max_pool2d(F.relu(self.last(x)), 2).flatten(1))


def images(count, seed=1, scale=3.0):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * scale


def converted(bits, **options):
    """A conversion of the net, with negative BatchNorm factors and one of zero."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Net()
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.copy_(torch.rand(m.num_features, generator=g) + 0.3)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * 0.3)
            m.weight.data[::3] *= -1
            m.weight.data[1] = 0
    method = wnq.get_method("wnq", w_bits=bits, a_bits=bits)
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None, **options))
    return convert(wnq.calibrate_(model, images(8, scale=1.0)).eval(), images(2))


def share_of_others(ours, theirs, tolerance=1e-5):
    return float((np.abs(np.asarray(ours) - np.asarray(theirs)) > tolerance * np.abs(np.asarray(theirs)).max()).mean())


def test_poolings_change_places_with_roundings():
    conversion = converted(3)
    program = trace_program(program_form(conversion.model, STYLE), (images(2),))
    x = images(32, scale=10)
    with torch.no_grad():
        before = program.module()(x)
        quantize_ahead_(program)
        assert torch.equal(program.module()(x), before)
    node = dict(weighted_products(program))["last"]
    path = following(node)
    assert [operator_name(step) for step in path.nodes] == ["hardtanh"] and path.quantization is not None


class Clips(nn.Module):
    """Clips of every kind behind each other, disjoint ones too, and one that another operator reads as well."""

    def forward(self, x):
        a = F.hardtanh(F.relu(x), -2.0, 3.0)
        b = F.hardtanh(F.relu6(x - 1), 1.0, 2.0)
        c = F.hardtanh(torch.clamp(x, min=-0.5), -4.0, -1.0) + F.hardtanh(torch.clamp(x, max=4.0))
        d = F.relu(x + 1)
        return torch.stack([a, b, c, F.hardtanh(d, 0.0, 2.0) + d], 1)


def test_clips_behind_each_other_become_one():
    x = images(8, scale=5)
    program = trace_program(Clips(), (x,))
    with torch.no_grad():
        assert torch.equal(program.module()(x), Clips()(x))
    names = [operator_name(node) for node in program.graph_module.graph.nodes]
    assert names.count("hardtanh") == 5 and names.count("relu") == 1 and not {"relu6", "clamp"} & set(names)


def test_what_is_tuned_and_what_is_left():
    conversion = converted(2)
    plain, calibrated = (tuned(conversion.model, (images(2),), sample) for sample in ([], [(images(64, seed=7),)]))
    assert plain.floats == {"stem", "pointwise", "fc"} and not plain.outputs
    assert calibrated.floats == {"fc"} and list(calibrated.outputs) == ["stem", "pointwise"]
    assert calibrated.outputs["stem"].low == 0, "behind a ReLU no level is spent on what it cuts off"
    assert calibrated.outputs["pointwise"].low < 0
    for name in ("depthwise", "last"):
        layer, before = calibrated.model.get_submodule(name), conversion.model.get_submodule(name)
        assert layer.weight.abs().max() > 64 >= before.weight.abs().max(), "integers with a gain"
        unit = layer.scale.double() * layer.grid.step
        whole = layer.bias.double() / unit
        assert (whole - whole.round()).abs().max() < 1e-2, "biases are whole units"
    x = images(64, seed=3, scale=10)
    with torch.no_grad():
        expected = conversion.model(x)
        # Without calibration nothing else is rounded; integer biases then move no decision, but where a sum lies on a threshold.
        assert share_of_others(plain.program((images(2),), largest_batch=None).module()(x), expected) < 0.02


def test_training_with_rounded_branches_leaves_nothing_to_calibrate():
    conversion = converted(3, residual_bits=8)
    found = tuned(conversion.model, (images(2),), [(images(64, seed=7),)])
    assert found.floats == {"fc"} and not found.outputs
    x = images(64, seed=3, scale=10)
    with torch.no_grad():
        assert share_of_others(found.program((images(2),), largest_batch=None).module()(x), conversion.model(x)) < 0.1


def test_each_reader_has_a_dequantization_of_its_own():
    conversion = converted(3, residual_bits=8)
    x, form = images(32, scale=10), program_form(conversion.model, STYLE)
    program = trace_program(form, (images(2),))

    def readers():
        nodes = program.graph_module.graph.nodes
        return [len(n.users) for n in nodes if operator_name(n).startswith("dequantize_per_tensor")]

    with torch.no_grad():
        before, shared = program.module()(x), readers()
        dequantize_apart_(program)
        assert max(shared) > 1 and set(readers()) == {1} and sum(readers()) == sum(shared)
        assert torch.equal(program.module()(x), before)


@needs_engine
def test_a_rounded_stem_that_a_sum_reads_too_loads_and_runs(tmp_path):
    conversion = converted(3, residual_bits=8)
    for_executorch(conversion, (images(2),), tmp_path / "m.pte", Options())
    engine, x = open_engine("executorch", tmp_path / "m.pte"), images(64, seed=3, scale=10)
    assert [o.integer for o in engine.operators()] == [True] * 4 + [False]
    with torch.no_grad():
        assert share_of_others(engine.run([x.numpy()]), conversion.model(x), 1e-4) < 0.1


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    if not HERE:
        pytest.skip("executorch is not installed")
    conversion = converted(2)
    path = tmp_path_factory.mktemp("executorch") / "m.pte"
    sample = [(images(64, seed=7),)]
    written = for_executorch(conversion, (images(2),), path, Options(calibration=sample))
    return conversion, tuned(conversion.model, (images(2),), sample), path, written


def test_xnnpack_gives_what_the_program_gives(exported):
    """At batches of 1, 3 and of more than it takes at once, on inputs beyond every clip."""
    conversion, model, path, written = exported
    engine = open_engine("executorch", path)
    assert engine.largest_batch == written.details["largest_batch"] == 32
    program = model.program((images(2),), largest_batch=None).module()
    with torch.no_grad():
        for count in (1, 3, 70):
            x = images(count, seed=count, scale=10)
            got = engine.run([x.numpy()])
            # XNNPACK multiplies a sum by one float32 number where the program adds floats; a tie may fall on the other side.
            assert share_of_others(got, program(x), 1e-4) < 0.02
            assert np.abs(got - conversion.model(x).numpy()).mean() < 0.1 * conversion.model(images(64)).std()
    assert sum(v for k, v in written.bytes.items() if k != "file") == written.bytes["file"] == path.stat().st_size


def test_xnnpack_runs_convolutions_in_integers(exported):
    operators = open_engine("executorch", exported[2]).operators()
    assert [(o.layer, o.kind, o.integer) for o in operators] == [
        ("stem", "Conv2d", True),
        ("depthwise", "DepthwiseConv2d", True),
        ("pointwise", "Conv2d", True),
        ("last", "Conv2d", True),
        ("fc", "FullyConnected", False),
    ]


class Chain(nn.Module):
    """Convolutions with a clip behind each."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


@needs_engine
def test_xnnpack_adds_integer_biases(tmp_path):
    """Every sum is exact and every bias a whole number of units: NumPy's integers give the same codes, to the last one.

    With 8 bits on both sides, where other engines' sums saturate. The last layer has a float output, and is left out.
    """
    torch.manual_seed(0)
    model, x = Chain(), torch.rand(4, 8, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    method = wnq.get_method("wnq", w_bits=8, a_bits=8, grid="symmetric")
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    conversion = convert(wnq.calibrate_(model, x).eval(), x)
    x = x * 20
    found = tuned(conversion.model, (x,), [])
    assert found.floats == {"convs.3"}
    for_executorch(conversion, (x,), tmp_path / "m.pte", Options())
    got = open_engine("executorch", tmp_path / "m.pte").run([x.numpy()])
    layers = [found.model.get_submodule(f"convs.{i}") for i in range(4)]
    codes = np.clip(np.rint(x.numpy() * np.float32(1 / layers[0].grid.step)), 0, 255).astype(np.int64)
    for layer, behind in itertools.pairwise(layers):
        total = np.zeros((4, 8, 8, 8), np.int64)
        padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
        weight = layer.weight.numpy().astype(np.int64)
        for i in range(3):
            for j in range(3):
                total += np.einsum("bchw,oc->bohw", padded[:, :, i : i + 8, j : j + 8], weight[:, :, i, j])
        unit = np.float32(layer.grid.step) * layer.scale.numpy()
        total += np.rint(layer.bias.numpy() / unit).astype(np.int64)[:, None, None]
        scaled = total.astype(np.float32) * (unit / np.float32(behind.grid.step))[:, None, None]
        codes = np.clip(np.rint(scaled), 0, 255).astype(np.int64)
    last = layers[3]
    values = torch.from_numpy(codes * last.grid.step)
    weight = last.weight.double() * last.scale.double().reshape(-1, 1, 1, 1)
    expected = F.relu(F.conv2d(values, weight, last.bias.double(), padding=1)).numpy()
    assert len(np.unique(codes)) > 200 and (codes == 255).mean() > 0.01
    assert share_of_others(got, expected, 1e-6) == 0


@needs_engine
def test_a_layer_without_a_kernel_is_named(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU()), torch.rand(2, 2, 4, 4, 4)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=4, a_bits=4), first_last_bits=None))
    conversion = convert(wnq.calibrate_(model, x).eval(), x)
    with pytest.raises(ValueError, match="layer '0' is a convolution of three dimensions"):
        for_executorch(conversion, (x,), tmp_path / "m.pte", Options())
    assert not list(tmp_path.iterdir())


@needs_engine
def test_the_command(tmp_path, capsys):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    wnq.calibrate_(model, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))).eval()
    wnq.save(model, tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as exit_:
        cli.main([
            "export", str(tmp_path / "m.safetensors"), "--to", "executorch", "--data", "digits", "--out", str(tmp_path / "d"),
            "--images", "60", "--json",
        ])  # fmt: skip
    proof = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0 and proof == json.loads((tmp_path / "d" / "model.pte.proof.json").read_text())
    assert proof["bytes"]["file"] == (tmp_path / "d" / "model.pte").stat().st_size
    assert proof["operators"]["products"] == 4 and proof["operators"]["integer"] == 3
    assert proof["engine_vs_trained"]["agreement"] > 80 and proof["largest_batch"] == 32
    assert [row["batch"] for row in proof["latency"]] == [1, 32]


@pytest.mark.skipif(HERE, reason="executorch is installed")
def test_a_missing_package_is_named(tmp_path):
    with pytest.raises(ModuleNotFoundError, match=r'executorch is not installed: pip install "wnq\[executorch\]"'):
        for_executorch(converted(2), (images(2),), tmp_path / "m.pte", Options())
    assert not list(tmp_path.iterdir())
