"""The ``torch`` dialect: the program and its compiled kernels against the integer reference model."""

import io
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.compile_fx import compile_fx

import wnq
from wnq import cli
from wnq.export.dialect import Options
from wnq.export.engines import open_engine, processor
from wnq.export.program.graph import operator_name
from wnq.export.program.layers import program_form, saturates
from wnq.export.program.tracing import register_operators, trace_program
from wnq.export.program.weights import StoredWeight
from wnq.export.program.writing import for_torch
from wnq.integer import convert


class Net(nn.Module):
    """Seven kinds of layers: a stem, depthwise, grouped (beside a shortcut), pooling, transposed, 1-D, linear."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, padding="same", groups=2, padding_mode="circular")
        self.bn3 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=2)
        self.line = nn.Conv1d(4, 6, 9, stride=9)
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.stem(x)))
        y = F.relu(self.bn2(self.depthwise(x)))
        x = F.relu(self.bn3(self.grouped(y)) + x)
        x = F.relu(self.up(F.max_pool2d(x, 2))).flatten(2)
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


def quantized(model, bits, x, **options):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    method = wnq.get_method("wnq", w_bits=bits, a_bits=bits, **({"grid": "symmetric"} if bits == 8 else {}))
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None, **options))
    return wnq.calibrate_(model, x).eval()


@pytest.fixture(scope="module", params=[2, 8], ids=["w2a2", "w8a8"])
def exported(request, tmp_path_factory):
    """A conversion and its files; inputs saturate, and at 8 bits sums would too."""
    model = quantized(settled(Net()), request.param, images(8, scale=1.0))
    conversion = convert(model, images(2))
    folder = tmp_path_factory.mktemp("torch")
    files, written = {}, {}
    for flavour in ("fast", "small") if request.param < 8 else ("fast",):
        files[flavour] = folder / f"{flavour}.pt2"
        written[flavour] = for_torch(conversion, (images(2),), files[flavour], Options(flavour))
    return request.param, conversion, files, written


def loaded(path):
    register_operators()
    with path.open("rb") as file:
        return torch.export.load(file).module()


def fused(path):
    """The graph that torch's compiler makes of a program, integer kernels and all, without C++ code for what lies between them."""

    def keep(graph, *_, **__):
        made.append([operator_name(node) for node in graph.graph.nodes])
        return make_boxed_func(graph.forward)

    made = []
    program = torch.compile(loaded(path), dynamic=False, backend=lambda g, x: compile_fx(g, x, inner_compile=keep))

    def run(x):
        with torch.no_grad(), torch._inductor.config.patch(freezing=True):
            return program(x)

    return run, made


def test_integer_kernels_give_what_the_reference_gives(exported):
    """On inputs beyond every clip; where there is a small file, its weights must be folded for its products to be integer ones."""
    _, conversion, files, _ = exported
    run, made = fused(files.get("small", files["fast"]))
    x = images(64, scale=10)
    with torch.no_grad():
        expected = conversion.model(x)
    assert expected.std() > 0.01
    # A float sum in another order may turn a rounding into a step, in a few places.
    assert ((run(x) - expected).abs() > 1e-5 * expected.abs().max()).float().mean() < 0.02
    kinds = [name for name in made[0] if "conv" in name or "linear" in name]
    assert kinds[:3] + kinds[4:] == ["qconv_pointwise"] * 4 + ["qlinear_pointwise"]
    assert not kinds[3].startswith("q"), "a transposed convolution has no integer kernel"


class Residual(nn.Module):
    """Two convolutions beside a shortcut, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(), nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.bn1(self.first(x)))
        return self.fc(self.relu(self.bn2(self.second(x)) + x).mean((2, 3)))


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """A conversion and its file; training rounds the residual branch, so that nothing but integers is added."""
    model = quantized(settled(Residual()), 3, images(8, scale=1.0), residual_bits=8)
    conversion = convert(model, images(2))
    path = tmp_path_factory.mktemp("torch") / "m.pt2"
    return conversion, path, for_torch(conversion, (images(2),), path, Options())


def test_the_engine_compiles(residual):
    """At batches of 1, 3 and 64."""
    conversion, path, _ = residual
    engine = open_engine("torch", path)
    assert engine.settings["torch.compile"] == "dynamic=True", "this test needs a C++ compiler"
    assert [(o.layer, o.integer) for o in engine.operators()] == [("first", True), ("second", True), ("fc", True)]
    for count in (64, 1, 3):
        x = images(count, seed=count, scale=10)
        expected = conversion.model(x).detach().numpy()
        assert (np.abs(engine.run([x.numpy()]) - expected) > 1e-5).mean() < 0.02  # as above


def test_the_inputs_saturate(exported):
    """Without the clips the difference is of another size, so the test above does test them."""
    bits, conversion, files, _ = exported
    program = loaded(files["fast"])
    for node in program.graph.nodes:
        if operator_name(node) == "hardtanh":
            node.replace_all_uses_with(node.args[0])
        if operator_name(node).endswith("quantize_per_tensor"):  # as a reader that knows whole bytes only
            node.args = (*node.args[:3], 0, 255, *node.args[5:])
    program.recompile()
    x = images(64, scale=10)
    with torch.no_grad():
        expected = conversion.model(x)
        gap = (program(x) - expected).abs().mean() / expected.std()
    assert gap > 0.1 if bits == 2 else gap < 0.01  # at 8 bits the type alone clips


def test_both_flavours_are_the_same_program(exported):
    """Bit for bit; the small one is smaller where there is something to gain, and the parts add up."""
    _, _, files, written = exported
    x = images(16, seed=5)
    if "small" in files:
        with torch.no_grad():
            assert torch.equal(loaded(files["fast"])(x), loaded(files["small"])(x))
        assert written["small"].bytes["weights"] < 0.5 * written["fast"].bytes["weights"]
    for flavour, path in files.items():
        sizes = written[flavour].bytes
        assert sizes["file"] == path.stat().st_size == sum(v for k, v in sizes.items() if k != "file")


@pytest.mark.parametrize("low,high", [(-1, 1), (-3, 3), (-7, 8), (-128, 127)])
def test_planes_give_the_weight_back(low, high):
    g = torch.Generator().manual_seed(0)
    for shape in ((5, 3, 3, 3), (7, 11), (1, 1)):
        weight = torch.randint(low, high + 1, shape, generator=g).to(torch.int8)
        stored = StoredWeight(weight, 0, planes=True)
        assert torch.equal(stored(), weight)
        if weight.numel() > 100:
            assert stored.bits == (high - low).bit_length()


def test_the_file_is_plain_and_needs_no_wnq(residual, tmp_path):
    """No word of the machine that wrote it, and it runs where wnq cannot be imported."""
    conversion, path, _ = residual
    x = images(3)
    with zipfile.ZipFile(path) as archive:
        texts = b"".join(archive.read(name) for name in archive.namelist() if name.endswith(".json"))
        assert b"stack_trace" not in texts and b"nn_module_stack" not in texts and b".py" not in texts
        assert not any(
            "sample_inputs" in name and archive.getinfo(name).file_size > 2000 for name in archive.namelist()
        )
    np.save(tmp_path / "x.npy", x.numpy())
    code = (
        "import sys; sys.modules['wnq'] = None\n"
        "import numpy as np, torch, torch.ao.quantization.fx._decomposed\n"
        f"program = torch.export.load({str(path)!r}).module()\n"
        f"np.save({str(tmp_path / 'y.npy')!r}, program(torch.from_numpy(np.load({str(tmp_path / 'x.npy')!r}))).numpy())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    with torch.no_grad():
        # Eagerly torch multiplies by 1 / step, so a value on a threshold may round otherwise.
        assert (np.abs(np.load(tmp_path / "y.npy") - conversion.model(x).numpy()) > 1e-5).mean() < 0.05


class Products(nn.Module):
    """Three kinds of products whose 16-bit pairs saturate: 8 bits on both sides."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.fc = nn.Linear(128, 6)

    def forward(self, x):
        return self.fc(self.grouped(self.conv(x).abs()).abs().flatten(1))


@pytest.mark.skipif(
    not processor()["avx2"] or processor()["vnni"], reason="pairs saturate on processors without VNNI alone"
)
def test_sums_saturate_without_the_halves(tmp_path):
    """On this processor the plain program is wrong, and the one with halves is right; so the halves do something."""
    model = Products()
    for parameter in model.parameters():
        parameter.data.abs_()
    x = torch.rand(8, 4, 4, 4, generator=torch.Generator().manual_seed(0)) * 4
    conversion = convert(quantized(model, 8, x), x)
    assert all(saturates(conversion.model.get_submodule(name)) for name in ("conv", "grouped", "fc"))
    x = x * 100
    expected = conversion.model(x).detach()
    gaps = {}
    for vnni in (False, True):
        path = tmp_path / f"{vnni}.pt2"
        written = for_torch(conversion, (x,), path, Options(vnni=vnni))
        assert ("can saturate" in written.notes[0]) == vnni
        run, made = fused(path)
        gaps[vnni] = float((run(x) - expected).abs().max() / expected.abs().max())
        assert sum(name.startswith(("qconv", "qlinear")) for name in made[0]) == 3
    assert gaps[True] > 0.05 and gaps[False] < 1e-6


def test_the_float_twin_is_float(residual, tmp_path):
    conversion, _, written = residual
    size = written.write_float(tmp_path / "float.pt2")
    program = loaded(tmp_path / "float.pt2")
    assert size == (tmp_path / "float.pt2").stat().st_size
    assert not any("quantize" in str(node.target) or "hardtanh" in str(node.target) for node in program.graph.nodes)
    x = images(4)
    with torch.no_grad():
        assert program(x).shape == conversion.model(x).shape


def test_what_cannot_be_traced_is_refused():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(x) if x.sum() > 0 else self.fc(-x)

    x = torch.rand(4, 4, generator=torch.Generator().manual_seed(0))
    conversion = convert(quantized(Branching(), 4, x), x)
    with pytest.raises(ValueError, match=r"Branching cannot be traced: .*Write that part of the model in another way"):
        trace_program(program_form(conversion.model, None), (x,))


def test_the_command_without_a_compiler(tmp_path, capsys, monkeypatch):
    """It writes the file and its proof; the engine then runs eagerly and says so."""
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    model = quantized(
        wnq.build_model("digits_cnn"), 3, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    )
    wnq.save(model, tmp_path / "m.safetensors")
    with pytest.raises(SystemExit) as exit_:
        cli.main([
            "export", str(tmp_path / "m.safetensors"), "--to", "torch", "--data", "digits", "--small", "--out", str(tmp_path / "d"),
            "--images", "60", "--require-agreement", "95", "--json",
        ])  # fmt: skip
    proof = json.loads(capsys.readouterr().out)
    assert exit_.value.code == 0 and proof == json.loads((tmp_path / "d" / "model.pt2.proof.json").read_text())
    assert (
        proof["torch"] == torch.__version__ and proof["bytes"]["file"] == (tmp_path / "d" / "model.pt2").stat().st_size
    )
    assert (
        proof["settings"]["torch.compile"].startswith("not used")
        and "no-compiler" in proof["settings"]["torch.compile"]
    )
    assert proof["operators"]["products"] == 4 and proof["operators"]["integer"] == 0
    assert proof["operators"]["integer_layers_run_in_float"] == [row["name"] for row in proof["layers"]]
    assert any("torch.export.load" in note for note in proof["notes"])
    assert [row["batch"] for row in proof["latency"]] == [1, 32]


def test_the_same_model_gives_the_same_bytes(residual, tmp_path):
    conversion, path, _ = residual
    again = tmp_path / "again.pt2"
    for_torch(conversion, (images(1),), again, Options())
    assert again.read_bytes() == path.read_bytes()
    assert zipfile.ZipFile(io.BytesIO(again.read_bytes())).testzip() is None
