"""The ONNX dialect: the file's numbers against NumPy, the engines against the integer reference model."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.integer import convert

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from wnq.export.engines import open_engine  # noqa: E402
from wnq.export.onnx import trace, unpack_, write_onnx  # noqa: E402
from wnq.export.onnx.biases import best_biases, integer_biases  # noqa: E402
from wnq.export.onnx.blocks import packed  # noqa: E402
from wnq.export.onnx.graph import array_of, initializers  # noqa: E402
from wnq.export.onnx.runtime import tune_  # noqa: E402
from wnq.export.onnx.small import affine_codes, planes_of  # noqa: E402
from wnq.export.onnx.split import halves, saturating  # noqa: E402
from wnq.export.onnx.twin import float_twin  # noqa: E402
from wnq.export.proof import sizes  # noqa: E402

try:
    import openvino  # noqa: F401

    ENGINES = ["onnxruntime", "openvino"]
except ModuleNotFoundError:
    ENGINES = ["onnxruntime"]


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


def images(count, seed=1, scale=3.0):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * scale


def settled(model):
    g = torch.Generator().manual_seed(0)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.weight.data.copy_(torch.rand(m.num_features, generator=g) + 0.3)
            m.bias.data.copy_(torch.randn(m.num_features, generator=g) * 0.3)
            m.weight.data[::3] *= -1  # negative factors, and one of zero
            m.weight.data[1] = 0
    return model


@pytest.fixture(scope="module", params=[("wnq", 2, 2), ("lsq", 3, 4)], ids=["wnq-w2a2", "lsq-w3a4"])
def exported(request, tmp_path_factory):
    """A conversion, its reference outputs on inputs that saturate, the traced model and the written files."""
    name, w_bits, a_bits = request.param
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = settled(Net())
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(name, w_bits=w_bits, a_bits=a_bits), first_last_bits=None))
    wnq.calibrate_(model, images(8, scale=1.0)).eval()
    conversion = convert(model, images(2))
    traced = trace(conversion.model, (images(1),))
    folder = tmp_path_factory.mktemp("onnx")
    files = {
        (engine, flavour): write_onnx(
            conversion, (images(2),), folder / f"{engine}-{flavour}.onnx",
            engine=engine, flavour=flavour, calibration=[(images(64, seed=7),)], traced=traced,
        )
        for engine in ("onnxruntime", "openvino")
        for flavour in ("fast", "small")
    }  # fmt: skip
    return conversion, traced, files


def outputs(engine, path, x):
    return open_engine(engine, path).run([x.numpy()])


def test_the_file_is_plain(exported):
    _, traced, files = exported
    assert traced.ir_version == 10 and [e.version for e in traced.opset_import if e.domain == ""] == [21]
    assert not traced.metadata_props and not traced.graph.value_info
    assert all(not node.metadata_props and not node.doc_string for node in traced.graph.node)
    kinds = {node.op_type for node in traced.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Clip", "Conv"} <= kinds and "BatchNormalization" not in kinds
    for node in traced.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert len(node.input) == 3, "zero points are explicit"
    for file in files.values():
        assert file.bytes["file"] == file.path.stat().st_size == sum(v for k, v in file.bytes.items() if k != "file")


def gap(ours, theirs):
    """Mean difference in units of the outputs' spread."""
    return float(np.abs(ours - theirs).mean() / theirs.std())


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_what_the_reference_gives(exported, engine):
    """At batches of 1, 3 and 64, on inputs beyond every clip."""
    conversion, _, files = exported
    loaded = open_engine(engine, files[engine, "fast"].path)
    with torch.no_grad():
        for count in (1, 3, 64):
            x = images(count, seed=count)
            expected = conversion.model(x).numpy()
            got = loaded.run([x.numpy()])
            if engine == "openvino":
                # Float sums in another order, which a rounding may turn into a step in a few places.
                assert (np.abs(got - expected) > 1e-5).mean() < 0.02
            else:
                # 8-bit values where nothing quantizes, and biases rounded to the unit of the sums.
                assert gap(got, expected) < 0.05


@pytest.mark.parametrize("engine", ENGINES)
def test_the_inputs_saturate(exported, engine, tmp_path):
    """Without the clips the difference is of another size, so the test above does test them."""
    conversion, traced, _ = exported
    broken = copy.deepcopy(traced)
    for node in [node for node in broken.graph.node if node.op_type == "Clip"]:
        for reader in broken.graph.node:
            reader.input[:] = [node.input[0] if name == node.output[0] else name for name in reader.input]
        broken.graph.node.remove(node)
    path = tmp_path / "broken.onnx"
    path.write_bytes(broken.SerializeToString())
    x = images(64)
    with torch.no_grad():
        assert gap(outputs(engine, path, x), conversion.model(x).numpy()) > 0.3


@pytest.mark.parametrize("engine", ENGINES)
def test_both_flavours_give_the_same_bits(exported, engine):
    _, _, files = exported
    x = images(32, seed=5)
    fast, small = files[engine, "fast"], files[engine, "small"]
    assert np.array_equal(outputs(engine, fast.path, x), outputs(engine, small.path, x))
    assert small.bytes["weights"] < 0.7 * fast.bytes["weights"]


def test_small_files_unpack_to_the_fast_ones_integers(exported):
    _, _, files = exported
    fast, small = (onnx.load(files["openvino", flavour].path) for flavour in ("fast", "small"))
    ours, theirs = initializers(unpack_(small)), initializers(fast)
    names = [name for name in theirs if name.endswith(".weight")]
    assert len(names) == 6 and len(ours) == len(theirs)
    assert all(np.array_equal(array_of(ours[name]), array_of(theirs[name])) for name in names)


def test_onnxruntime_runs_every_convolution_in_integers(exported):
    _, _, files = exported
    engine = open_engine("onnxruntime", files["onnxruntime", "fast"].path)
    operators = engine.operators()
    # It has no integer kernel for transposed convolutions.
    assert [(o.layer, o.kind) for o in operators if not o.integer] == [("up", "ConvTranspose")]
    assert {o.layer for o in operators} == {"stem", "depthwise", "grouped", "up", "line", "fc"}
    assert sum(o.kind == "QLinearConv" for o in operators) == 4


@pytest.mark.skipif("openvino" not in ENGINES, reason="openvino is not installed")
def test_openvino_runs_every_convolution_in_integers(exported):
    _, _, files = exported
    operators = open_engine("openvino", files["openvino", "fast"].path).operators()
    assert all(o.integer for o in operators if o.kind in ("Convolution", "FullyConnected")), operators
    assert {o.layer for o in operators if o.kind != "Deconvolution"} == {"stem", "depthwise", "grouped", "line", "fc"}


@pytest.mark.skipif("openvino" not in ENGINES, reason="openvino is not installed")
def test_openvino_adds_shortcuts_to_convolutions_without_bias(tmp_path):
    """OpenVINO 2026.4 gets the plain file wrong: nearly every value differs by the size of the values."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2))
            self.third = nn.Conv2d(4, 4, 3, padding=1, bias=False)

        def forward(self, x):
            x = self.first(x)
            return self.third(F.relu(self.second(F.relu(x)) + x)) + x

    torch.manual_seed(0)
    model, x = Block(), torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3), first_last_bits=None))
    wnq.calibrate_(model, x).eval()
    conversion = convert(model, x)
    file = write_onnx(conversion, (x,), tmp_path / "m.onnx", engine="openvino")
    with torch.no_grad():
        expected = conversion.model(x).numpy()
    assert (np.abs(outputs("openvino", file.path, x) - expected) > 1e-4).mean() < 0.02


def test_tuned_integers_are_the_same_weights(exported):
    _, traced, _ = exported
    changed = copy.deepcopy(traced)
    tune_(changed, [(images(64, seed=7),)])
    plain, tuned = initializers(traced), initializers(changed)
    checked = 0
    for name, value in plain.items():
        if name.endswith(".weight") and f"{name[:-7]}.scale:gain" in tuned:
            old = array_of(value) * array_of(plain[f"{name[:-7]}.inner"]).reshape(-1, *[1] * (array_of(value).ndim - 1))
            new = array_of(tuned[name]).astype(np.float64)
            scale = array_of(tuned[f"{name[:-7]}.scale:gain"]).reshape(-1, *[1] * (new.ndim - 1))
            np.testing.assert_allclose(new * scale, old, rtol=0.02)  # a unit that fits the thresholds
            ratio = (new * scale)[old != 0] / old[old != 0]
            assert np.abs(ratio - 1).max() < 0.02
            assert np.abs(new).max() > np.abs(array_of(value)).max() or np.abs(array_of(value)).max() > 63
            checked += 1
    assert checked == 4


@pytest.mark.parametrize(("bits", "gain"), [(2, 42), (3, 18), (4, 8), (4, 1)])
def test_integer_biases_decide_as_exact_ones(bits, gain):
    """Brute force: every sum that can occur, decided by the exact bias and by the integer one with its unit."""
    rng = np.random.default_rng(bits)
    channels, out, high = 64, 0.3, 2**bits - 1
    unit = rng.uniform(0.2, 2.0, channels) * out / 20 / gain
    bias = rng.normal(size=channels)
    thresholds = (np.arange(high) + 0.5) * out
    found = integer_biases(bias, unit, thresholds, gain, np.full(channels, 400))
    chosen, units, wrong, asked = found.bias, found.unit, found.missed.sum(), found.asked.sum()
    assert chosen.dtype == np.int32 and asked > channels and np.abs(units / unit - 1).max() <= 0.02
    sums = np.arange(-400, 401) * gain

    def codes(offsets, unit):
        return np.clip(np.floor((sums[None] + offsets[:, None]) * unit[:, None] / out + 0.5), 0, high)

    exact = codes(bias / unit, unit)
    unequal = (codes(chosen.astype(float), units) != exact).any(1).sum()
    plain = (codes(np.rint(bias / unit), unit) != exact).any(1).sum()
    # A wrong threshold is a channel in which some sum is decided otherwise; without gain, plain rounding fails in most.
    assert unequal <= wrong and unequal <= plain and (wrong > 0 or unequal == 0)
    assert wrong <= {42: 0, 18: 0, 8: 0.01 * asked, 1: 0.2 * asked}[gain]
    assert gain > 1 or plain > 0.5 * channels


def test_integer_biases_stay_in_int32():
    bias, unit = np.array([1e9, -1e9, 0.0]), np.array([1e-9, 1e-9, 1.0])
    found = integer_biases(bias, unit, np.array([0.5]), 1, np.zeros(3))
    assert np.isfinite(found.unit).all() and found.bias[2] in (-1, 0, 1)


def test_another_gain_is_taken_where_it_decides_better():
    rng = np.random.default_rng(1)
    unit, thresholds = rng.uniform(0.02, 0.1, 200), (np.arange(15) + 0.5) * 0.3
    bias, largest = rng.normal(size=200), np.full(200, 400)
    one, best = (
        integer_biases(bias, unit / 8, thresholds, 8, largest),
        best_biases(bias, unit, thresholds, 8, largest),
    )
    assert one.missed.sum() > 0 and best.missed.sum() < one.missed.sum() and set(best.gain) <= set(range(4, 9))
    sums = np.arange(-400, 401)
    for channel in np.flatnonzero(best.missed == 0):
        exact = np.searchsorted(thresholds, sums * unit[channel] + bias[channel], side="right")
        ours = (sums * best.gain[channel] + int(best.bias[channel])) * best.unit[channel]
        assert np.array_equal(np.searchsorted(thresholds, ours, side="right"), exact)


@pytest.mark.filterwarnings("error")
def test_a_threshold_at_zero_is_passed_by_the_same_sums():
    rng = np.random.default_rng(2)
    unit, bias, thresholds = rng.uniform(0.02, 0.1, 100), rng.normal(size=100), np.arange(-3, 4) * 0.3
    bias[:10] = 0  # sums of zero then lie on the threshold
    found = best_biases(bias, unit, thresholds, 8, np.full(100, 400))
    sums = np.arange(-400, 401)
    assert (found.missed == 0).sum() > 90
    for channel in np.flatnonzero(found.missed == 0):
        exact = np.searchsorted(thresholds, sums * unit[channel] + bias[channel], side="right")
        ours = (sums * found.gain[channel] + int(found.bias[channel])) * found.unit[channel]
        assert np.array_equal(np.searchsorted(thresholds, ours, side="right"), exact)


SPLIT = {
    "linear": (nn.Linear(6, 4), (16, 6)),
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (16, 3, 5, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (16, 4, 5, 5)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4, padding=1), (16, 4, 9)),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_sums_do_not_saturate(kind, tmp_path):
    """8 bits on both sides, with the largest integers next to each other: the worst case of processors without VNNI."""
    layer, size = SPLIT[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    weight = model[0].weight.data
    weight.copy_(torch.where(torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) < 0.8, 1.0, -0.97))
    method = wnq.get_method("wnq", grid="symmetric", w_bits=8, a_bits=8, activation="clip")
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    x = torch.rand(size, generator=torch.Generator().manual_seed(1)) + 0.7  # mostly the largest code
    conversion = convert(model.eval(), x)
    traced = trace(conversion.model, (x,))
    assert saturating(traced) == ["0"]
    with torch.no_grad():
        expected = conversion.model(x).numpy()
    for engine in ENGINES:
        got = {}
        for flavour in ("fast", "small"):
            path = tmp_path / f"{engine}-{flavour}.onnx"
            file = write_onnx(conversion, (x,), path, engine=engine, flavour=flavour, traced=traced)
            assert saturating(unpack_(onnx.load(path))) == []
            assert "0 have weights split in two" in " ".join(file.notes)
            got[flavour] = outputs(engine, path, x)
            np.testing.assert_allclose(got[flavour], expected, rtol=1e-5, atol=1e-5)
        assert np.array_equal(got["fast"], got["small"])
        whole = write_onnx(conversion, (x,), tmp_path / "whole.onnx", engine=engine, traced=traced, vnni=True)
        assert any("can saturate" in note and " 0 " in note for note in whole.notes)


def test_halves_add_up():
    weight = np.arange(-128, 128).astype(np.int8)
    first, second = halves(weight)
    assert (
        np.array_equal(first.astype(int) + second, weight) and max(np.abs(first.astype(int)).max(), second.max()) <= 64
    )


# Linear layers with float inputs.


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


@pytest.mark.parametrize(("bits", "a_bits"), [(2, 32), (4, 32), (4, 8)])
def test_a_small_transformer(bits, a_bits, tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(0, 11, (4, 7), generator=torch.Generator().manual_seed(0))
    model = Tiny()
    method = wnq.get_method("wnq", w_bits=bits, a_bits=a_bits, grid="symmetric", granularity="channel")
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    wnq.calibrate_(model, tokens).eval()
    conversion = convert(model, tokens)
    traced = trace(conversion.model, (tokens,))
    with torch.no_grad():
        expected = conversion.model(tokens).numpy()
    for engine in ENGINES:
        file = write_onnx(conversion, (tokens,), tmp_path / f"{engine}.onnx", engine=engine, traced=traced)
        loaded = open_engine(engine, file.path)
        # Exact products of packed weights; GELU, softmax and sums differ by roundings, which at 8 bits may move one step.
        limit = 1e-5 if a_bits == 32 else 2e-2
        assert np.abs(loaded.run([tokens.numpy()]) - expected).max() <= limit * np.abs(expected).max()
        assert np.abs(loaded.run([tokens[:1].numpy()]) - expected[:1]).max() <= limit * np.abs(expected).max()
        if engine == "onnxruntime":
            kinds = [o.kind for o in loaded.operators() if o.layer or o.integer]
            assert kinds.count("MatMulNBits" if a_bits == 32 else "MatMulIntegerToFloat") == 4
            assert file.opset == (25 if bits == 2 and a_bits == 32 else 21)
        if a_bits == 32:
            # 11 columns are no multiple of four: 2-bit integers would be read wrongly.
            wanted = {
                name: 4 if engine == "openvino" or name == "down" else bits for name in ("query", "value", "up", "down")
            }
            assert file.blocked == wanted


# Numbers of the small flavour.


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("shape", [(3, 5), (4, 3, 3, 3), (8, 8)])
def test_planes_hold_the_codes(bits, shape):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, shape).astype(np.uint8)
    planes = planes_of(codes, bits)
    assert planes.shape == (bits, -(-codes.size // 8), 1)
    back = [sum(int(planes[j, i // 8, 0]) >> (i % 8) & 1 and 2**j for j in range(bits)) for i in range(codes.size)]
    assert back == codes.ravel().tolist()


@pytest.mark.parametrize("bits", range(1, 8))
def test_affine_codes_take_the_true_width(bits):
    rng = np.random.default_rng(bits)
    odd = (2 * rng.integers(0, 2**bits, (6, 50)) - (2**bits - 1)).astype(np.int8)
    codes, stride, start, found = affine_codes(odd, 0)
    assert found == bits and np.array_equal(stride * codes.astype(int) + start, odd)
    # A grid that is not symmetric, flipped in some channels, keeps its width by a start for each channel.
    if bits > 1:
        skewed = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (6, 50))
        skewed[:, 0], skewed[:, 1] = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        skewed[::2] *= -1
        codes, stride, start, found = affine_codes(skewed.astype(np.int8), 0)
        assert found == bits and np.array_equal(stride * codes.astype(int) + start, skewed)


@pytest.mark.parametrize("bits", range(1, 5))
def test_affine_codes_of_channels_with_multiples_of_their_own(bits):
    rng = np.random.default_rng(bits)
    odd = (2 * rng.integers(0, 2**bits, (6, 50)) - (2**bits - 1)) * np.array([5, 6, 7, 8, 8, 5])[:, None]
    codes, stride, start, found = affine_codes(odd.astype(np.int8), 0)
    assert found == bits and np.array_equal(stride * codes.astype(int) + start, odd)


def test_affine_codes_of_zeros():
    codes, stride, start, bits = affine_codes(np.zeros((2, 3), np.int8), 0)
    assert bits == 1 and np.array_equal(stride * codes.astype(int) + start, np.zeros((2, 3)))


@pytest.mark.parametrize("bits", [2, 4])
def test_packed_integers_read_back(bits):
    rng = np.random.default_rng(0)
    integers = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 7)).astype(np.int8)
    assert np.array_equal(array_of(packed("w", integers, bits)).astype(np.int8), integers)


def test_sizes_are_those_of_the_codes(exported):
    conversion, _, _ = exported
    found = sizes(conversion)
    weights = [m.weight for m in conversion.model.modules() if getattr(m, "grid", None) is not None]
    assert found["float32"] == 4 * sum(w.numel() for w in weights)
    total = 0.0
    for w in weights:
        share = np.bincount(w.numpy().ravel().astype(int) + 128) / w.numel()
        total -= sum(p * np.log2(p) for p in share if p) * w.numel() / 8
    assert abs(found["entropy"] - total) < 1e-6
    # A channel whose BatchNorm factor is zero has zeros, which the full grid has not: one symbol more than the width counts.
    assert found["entropy"] <= 1.1 * found["true_width"] < found["float32"]


def test_the_float_twin_has_no_quantization_left(exported):
    _, traced, _ = exported
    twin = float_twin(traced)
    onnx.checker.check_model(twin)
    assert {node.op_type for node in twin.graph.node}.isdisjoint({"QuantizeLinear", "DequantizeLinear", "Clip"})
    assert sum(node.op_type == "Conv" for node in twin.graph.node) == 4


def test_an_operator_without_onnx_form_is_named():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x[:, None] * x[:, :, None]).real

    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(4, 4))
    model.add_module("odd", Odd())
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", a_bits=8), first_last_bits=None))
    wnq.calibrate_(model, torch.rand(2, 4)).eval()
    with pytest.raises(ValueError, match=r"operator aten.linalg_eig in layer 'odd' has no ONNX form. Replace it"):
        trace(convert(model, torch.rand(2, 4)).model, (torch.rand(2, 4),))
