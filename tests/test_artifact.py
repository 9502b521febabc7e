"""Artifacts: exact logits, small and reproducible files, and a clear sentence for every file that does not fit."""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import wnq
from wnq.artifact import inspect_file, load, save, unpack_file
from wnq.artifact.bundle import bundle, unbundle
from wnq.artifact.container import ArtifactError, read_artifact, write_artifact
from wnq.artifact.content import read_levels, store_levels
from wnq.artifact.manifest import Manifest
from wnq.models import registered_model


class Net(nn.Module):
    """Every kind of state: convolutions, a transposed one, BatchNorm, a bias, tied weights, an own buffer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2, bias=False)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.head = nn.Linear(width, 10)
        self.register_buffer("offset", torch.arange(10.0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.bn(self.stem(x)))).mean((2, 3))
        return self.head(torch.relu(self.second(torch.relu(self.first(x))))) + self.offset


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, method: wnq.Method, x: Tensor, **plan: Any) -> nn.Module:
    """Quantize and take a few optimizer steps, so that no state is at its initial value."""
    wnq.quantize_(model, wnq.make_plan(model, method, **plan))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model.eval()


def net(method: str = "wnq", seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return trained(Net(), wnq.get_method(method, **options), images())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("method", "bits"),
    [(info.name, bits) for info in wnq.list_methods() for bits in info.widths if bits in (1, 2, 3, 5, 8)],
)
def test_logits_are_equal_bit_for_bit_for_every_method(method: str, bits: int, path: Path) -> None:
    torch.manual_seed(0)
    # Net has a transposed convolution, which XNOR-Net's scale map is not defined for; tests/test_xnor.py stores the map.
    options = {"scale_map": False} if method == "xnor" else {}
    model = trained(Net(), wnq.get_method(method, w_bits=bits, **options), images())
    save(model, path)
    assert torch.equal(load(path, Net())(images(16)), model(images(16)))


@pytest.mark.parametrize("options", [{"granularity": "channel"}, {"scale": "learned"}, {"a_bits": 32}, {"w_bits": 32}])
def test_logits_are_equal_for_other_options(options: dict[str, Any], path: Path) -> None:
    model = net(**options)
    save(model, path)
    loaded = load(path, Net())
    assert not loaded.training
    assert torch.equal(loaded(images(16)), model(images(16)))
    assert wnq.get_plan(loaded) == wnq.get_plan(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_point_types_are_kept(dtype: torch.dtype, path: Path) -> None:
    torch.manual_seed(0)
    model = trained(Net().to(dtype), wnq.get_method("wnq"), images().to(dtype))
    save(model, path)
    assert torch.equal(load(path, Net().to(dtype))(images().to(dtype)), model(images().to(dtype)))
    with pytest.raises(ArtifactError, match=rf"has dtype {dtype} in the file but torch.float32 in the model"):
        load(path, Net())


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_registered_models_rebuild_without_being_passed(name: str, path: Path) -> None:
    torch.manual_seed(0)
    model = registered_model(name, num_classes=7)
    x = torch.randn(2, 1, 8, 8) if name == "digits_cnn" else torch.randn(2, 3, 32, 32)
    trained(model, wnq.get_method("wnq", w_bits=3), x)
    save(model, path)
    state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(x), model(x))


def test_a_loaded_or_frozen_model_saves_to_the_same_bytes(path: Path) -> None:
    model = net(w_bits=4, granularity="channel")
    first = save(model, path)
    assert save(load(path, Net()), path).sha256 == first.sha256
    assert save(wnq.freeze_(model), path).sha256 == first.sha256


def test_the_same_model_gives_the_same_bytes_in_another_process(path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from test_artifact import net, save; print(save(net(), sys.argv[2]).sha256)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent), str(path)],
        env={**os.environ, "PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    there = path.read_bytes()
    assert run.stdout.strip() == hashlib.sha256(there).hexdigest()
    save(net(), path)
    assert path.read_bytes() == there


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_size_of_a_resnet20_is_within_its_bound(bits: int, path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    report = save(trained(registered_model("resnet20"), wnq.get_method("wnq", w_bits=bits, a_bits=bits), x), path)
    ideal = sum(row.weights * row.bits / 8 for row in report.layers) + report.float_bytes - 4 * report.weights
    assert report.file_bytes <= 1.02 * ideal + 16 * 1024


def test_the_report_adds_up(path: Path) -> None:
    model = net(w_bits=3, granularity="channel")
    report = save(model, path)
    assert report == inspect_file(path)
    assert report.file_bytes == path.stat().st_size
    assert report.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    parts = report.packed_bytes + report.codebook_bytes + report.rest_bytes + report.header_bytes
    assert parts == report.file_bytes
    rows = {row.name: row for row in report.layers}
    assert list(rows) == ["stem", "up", "first", "head"]  # "second" is tied to "first"
    assert (rows["stem"].bits, rows["up"].bits, rows["head"].bits) == (8, 3, 8)
    assert rows["up"].shape == (8, 8, 2, 2)
    assert rows["up"].packed_bytes == 8 * 8 * 4 * 3 / 8
    assert rows["up"].float_bytes == 8 * 8 * 4 * 4
    unique = {id(t): t for t in Net().state_dict(keep_vars=True).values()}
    assert report.float_bytes == sum(t.nbytes for t in unique.values())
    assert report.ratio == report.float_bytes / report.file_bytes


def test_unpacked_weights_load_strictly_into_the_float_model(path: Path) -> None:
    model = net(w_bits=2, a_bits=32)
    save(model, path)
    state = unpack_file(path)
    plain = Net()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.eval()(images()), model(images()))
    assert torch.equal(state["up.weight"], model.up.weight)
    assert state["second.weight"] is state["first.weight"]
    save(net(w_bits=2, a_bits=2), path)
    assert unpack_file(path).keys() == Net().state_dict().keys()


def test_tied_weights_stay_tied_and_a_float_layer_keeps_its_own_copy(path: Path) -> None:
    save(net(), path)
    loaded = load(path, Net())
    assert loaded.first.weight is loaded.second.weight
    torch.manual_seed(0)
    half = trained(Net(), wnq.get_method("wnq", w_bits=2), images(), keep_float=["second"])
    save(half, path)
    loaded = load(path, Net())
    assert torch.equal(loaded(images()), half(images()))
    assert not torch.equal(loaded.first.weight, loaded.second.weight)


def test_a_module_under_two_names_is_stored_once(path: Path) -> None:
    def build() -> nn.Module:
        shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        return nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 5))

    torch.manual_seed(0)
    model = trained(build(), wnq.get_method("wnq"), images())
    assert [row.name for row in save(model, path).layers] == ["0.0", "4"]
    assert torch.equal(load(path, build())(images()), model(images()))
    build().load_state_dict(unpack_file(path), strict=True)


def test_a_bare_layer_is_a_model_too(path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    model = trained(nn.Linear(6, 4), wnq.get_method("wnq", w_bits=3), x)
    save(model, path)
    assert torch.equal(load(path, nn.Linear(6, 4))(x), model(x))


def test_wrapped_models_are_saved_under_their_own_names(path: Path) -> None:
    model = net()
    assert save(nn.DataParallel(model), path) == save(model, path)


@pytest.mark.parametrize(
    ("levels", "name", "nbytes"),
    [
        (torch.arange(-255.0, 256.0, 2), "weight_grid", 6),
        (torch.arange(-7.0, 8.0).repeat(64, 1), "weight_grid", 384),
        (torch.tensor([0.0]), "weight_grid", 6),
        (torch.tensor([-3.0, -1.0, 2.0]), "weight_levels", 3),
        (torch.tensor([-300.0, -1.0, 2.0]), "weight_levels", 6),
        (torch.tensor([-0.5, 0.0, 0.5]), "weight_levels", 12),
        (torch.tensor([0.0, 40_000.0]), "weight_levels", 8),
    ],
)
def test_levels_take_the_smallest_exact_form(levels: Tensor, name: str, nbytes: int) -> None:
    ((stored_name, stored),) = store_levels(levels).items()
    assert (stored_name, stored.nbytes) == (name, nbytes)
    back = read_levels(stored, torch.float32) if name == "weight_grid" else stored.to(torch.float32)
    assert torch.equal(back, levels)


def test_bundles_round_trip_and_refuse_tables_that_do_not_add_up() -> None:
    tensors = {
        "a.step": torch.tensor(0.5),
        "b.step": torch.tensor(1.5),
        "n": torch.tensor(3),
        "b.on": torch.tensor(True),
        "a.w": torch.zeros(0, 2),
        "c.w": torch.arange(6.0).reshape(2, 3),
    }
    bundles, table = bundle(tensors)
    back = unbundle(bundles, json.loads(json.dumps(table)))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    for broken in (None, {}, {"kinds": [], "modules": [["a", 0]]}, {"kinds": [], "modules": []}, {**table, "x": 1}):
        with pytest.raises(ValueError, match="table of small tensors"):
            unbundle(bundles, broken)
    huge = {"kinds": [{"w": ["float32", [2**40, 2**40]]}], "modules": [["a", 0]]}
    with pytest.raises(ValueError, match=r"tensor 'a.w' of float32 .* is not in the file"):
        unbundle(bundles, huge)


def test_a_model_without_a_plan_or_with_changed_layers_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="carries no plan"):
        save(Net(), path)
    model = net()
    model.up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
    with pytest.raises(ValueError, match=r"are not those of its plan: \['up'\]"):
        save(model, path)
    assert not path.exists()


def test_a_model_from_elsewhere_must_be_passed(path: Path) -> None:
    save(net(), path)
    with pytest.raises(ArtifactError, match=r"names no registered model; pass the float model"):
        load(path)


class Extra(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)


class Shorter(Net):
    def __init__(self) -> None:
        super().__init__()
        del self.offset


def without_up() -> nn.Module:
    model = Net()
    model.up = nn.Identity()
    return model


def quantized() -> nn.Module:
    return net()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Net(16), "layer 'stem' has shape (8, 3, 3, 3) in the file but (16, 3, 3, 3) in the model."),
        (Extra, "tensor 'extra.bias' (and 1 more) is in the model but not in the file"),
        (Shorter, "tensor 'offset' is in the file but not in the model"),
        (without_up, "layer 'up' is a quantized ConvTranspose2d in the file but it is a Identity in the model"),
        (lambda: nn.Linear(2, 2), "layer 'stem' is a quantized Conv2d in the file but there is no such layer"),
        (quantized, "layer 'stem' of the model is quantized already; load into the float model"),
    ],
)
def test_a_file_that_does_not_fit_the_model(build: Callable[[], nn.Module], message: str, path: Path) -> None:
    save(net(), path)
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ArtifactError, match=re.escape(f"{path}: {message}")):
        load(path, model)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_files_that_are_no_artifacts(path: Path, tmp_path: Path) -> None:
    def refused(message: str) -> None:
        for read in (lambda: load(path, Net()), lambda: inspect_file(path), lambda: unpack_file(path)):
            with pytest.raises(ArtifactError, match=message):
                read()

    refused("cannot read .*model.safetensors: No such file or directory")
    for foreign in (b"", b"short", b"a text file of some length", (2**50).to_bytes(8, "little") + b"{}"):
        path.write_bytes(foreign)
        refused("not a safetensors file")
    path.write_bytes((4).to_bytes(8, "little") + b"{ooo")
    refused("the header is not valid JSON")
    nested = b'{"a":' * 100_000
    path.write_bytes(len(nested).to_bytes(8, "little") + nested)
    refused("the header is not valid JSON")
    torch.save({"weight": torch.zeros(3)}, path)
    refused("not a safetensors file")
    save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    refused("a safetensors file, but not one of wnq")


def test_truncation_is_noticed_at_every_length(path: Path) -> None:
    save(net(), path)
    data = path.read_bytes()
    for length in [*range(0, 64), *range(64, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(ArtifactError):
            inspect_file(path)


def test_every_changed_byte_is_noticed(path: Path) -> None:
    save(net(), path)
    data = path.read_bytes()
    for position in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError):
            inspect_file(path)


def test_a_changed_tensor_is_named(path: Path) -> None:
    save(net(), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["up.weight_packed"][3] ^= 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"tensor 'up.weight_packed' does not match its checksum"):
        load(path, Net())
    tensors["up.weight_packed"][3] ^= 1
    tensors["small.float32"][0] += 1
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ArtifactError, match=r"the metadata or a tensor that is not packed does not match"):
        load(path, Net())


def rewritten(path: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change an artifact's content and write it with valid checksums, as a hostile author would."""
    tensors, document = read_artifact(path)
    change(tensors, document)
    write_artifact(
        path, tensors, {k: v for k, v in document.items() if k not in ("format", "format_version", "sha256")}
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, d: d.update(extra=1), "the metadata has the unknown key 'extra'"),
        (lambda t, d: d["plan"].update(extra=1), "plan has the unknown key 'extra'"),
        (lambda t, d: d.pop("plan"), "the metadata has no 'plan'"),
        (lambda t, d: d.update(plan=[]), "'plan' must be dict, got list"),
        (lambda t, d: d.update(dtype="int8"), "dtype must be one of float32"),
        (lambda t, d: d.update(aliases={"second.weight": 3}), r"aliases\['second.weight'\] must be str, got int"),
        (lambda t, d: d.update(aliases={"second.weight": "nothing"}), "'second.weight' is said to share 'nothing'"),
        (lambda t, d: d["plan"]["methods"][0].update(name="os.system"), "unknown method 'os.system'"),
        (lambda t, d: d["plan"]["methods"][0]["options"].update(w_bits=10**9), "must be an integer from 1 to 8"),
        (lambda t, d: d["plan"]["methods"][0]["options"].update(w_bits=[]), "must be an integer from 1 to 8"),
        (lambda t, d: d["plan"]["methods"][0]["options"].update(cmd="x"), "has no option 'cmd'"),
        (lambda t, d: d["plan"]["layers"].append(d["plan"]["layers"][0]), "layer 'stem' stands twice"),
        (lambda t, d: d["plan"]["layers"].append(["x", 99]), "layer 'x' has kind number 99"),
        (lambda t, d: d["plan"]["layers"].append(["x", True]), "a layer must be a list of str, int"),
        (lambda t, d: d["plan"]["layers"].append(["x", 0, "y"]), "layer 'x' is tied to 'y', which is no earlier layer"),
        (lambda t, d: d["plan"]["kinds"][0].update(bits=9), "layer 'stem' must have 1 to 8 bits, got 9"),
        (lambda t, d: d["plan"]["kinds"][0].update(bits=7), "layer 'stem': unpack_codes: 216 codes of shape"),
        (lambda t, d: d["plan"]["kinds"][0].update(axis=4), "layer 'stem' of 4 dimensions has channel axis 4"),
        (lambda t, d: d["plan"]["kinds"][0].update(shape=[10**6, 10**6]), "layer 'stem': unpack_codes"),
        (lambda t, d: d["plan"]["kinds"][0].update(shape=[-1, 3]), "layer 'stem' has the impossible shape"),
        (lambda t, d: d["plan"]["kinds"][0].update(method=7), "layer 'stem' has method number 7"),
        (lambda t, d: d["plan"]["floats"].append(["x", 1, 9]), "float layer 'x' has reason number 9"),
        (lambda t, d: d.update(model={"name": "resnet20"}), "the metadata has no 'options'"),
        (lambda t, d: d.update(model={"name": 3, "options": {}}), "'name' must be str, got int"),
        (lambda t, d: t.pop("stem.weight_scale"), "tensor 'stem.weight_scale' is missing"),
        (lambda t, d: t.pop("stem.weight_grid"), "tensor 'stem.weight_levels' is missing"),
        (lambda t, d: t.update({"stem.weight_scale": torch.ones(5)}), "cannot have a scale of torch.float32"),
        (lambda t, d: t.update({"stem.weight_grid": torch.tensor([0, 1, 300]).short()}), "cannot have levels of"),
        (lambda t, d: t.update({"stem.weight_grid": torch.tensor([0, 1, 5]).short()}), "has code .* but only 5 levels"),
        (lambda t, d: t.pop("bn.bias"), "tensor 'bn.bias' is in the model but not in the file"),
        (lambda t, d: t.update({"evil": torch.ones(2)}), "tensor 'evil' is in the file but not in the model"),
        (
            lambda t, d: t.update({"bn.bias": torch.ones(9)}),
            r"tensor 'bn.bias' has shape \(9,\) in the file but \(8,\)",
        ),
    ],
)
def test_hostile_content_is_refused_with_a_reason(change: Callable[..., object], message: str, path: Path) -> None:
    save(net(), path)
    rewritten(path, change)
    with pytest.raises(ArtifactError, match=message):
        load(path, Net())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "os.system", "options": {}}, "cannot rebuild its model 'os.system': unknown model 'os.system'"),
        ({"name": "resnet20", "options": {"path": "x"}}, "does not take path"),
        ({"name": "resnet20", "options": {"num_classes": 65_536}}, "layer 'fc' has shape|has shape"),
        ({"name": "resnet20", "options": {"num_classes": 10**12}}, "must be an integer from 1 to"),
    ],
)
def test_a_hostile_model_entry_builds_nothing(model: dict[str, Any], message: str, path: Path) -> None:
    torch.manual_seed(0)
    small = trained(registered_model("digits_mlp"), wnq.get_method("wnq"), torch.randn(2, 1, 8, 8))
    save(small, path)
    rewritten(path, lambda tensors, document: document.update(model=model))
    with pytest.raises(ArtifactError, match=f"{message}|there is no such layer"):
        load(path)


@pytest.mark.parametrize("value", [rb"NaN", rb"1e999", rb"\"\\ud800\"", b"[" * 900 + b"]" * 900])
def test_json_that_cannot_be_written_is_refused(value: bytes, path: Path) -> None:
    save(net(), path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(rb"\"dtype\":\"float32\"", rb"\"dtype\":" + value)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    with pytest.raises(ArtifactError):
        load(path, Net())


@pytest.mark.parametrize("shape", [[0, 10**30], [0, 2**62, 2**62]])
def test_empty_shapes_beyond_64_bits_are_refused(shape: list[int], path: Path) -> None:
    def change(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        document["plan"]["kinds"][0].update(shape=shape)
        tensors["stem.weight_packed"] = torch.empty(0, dtype=torch.uint8)

    save(net(), path)
    rewritten(path, change)
    with pytest.raises(ArtifactError, match="layer 'stem' has the impossible shape"):
        load(path, Net())
    with pytest.raises(ValueError, match=r"tensor 'a\.w' cannot have the shape"):
        unbundle({"small.bool": torch.empty(0).bool()}, {"kinds": [{"w": ["bool", shape]}], "modules": [["a", 0]]})


def test_a_newer_version_says_so(path: Path) -> None:
    save(net(), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(rb"\"format_version\":1", rb"\"format_version\":2"))
    with pytest.raises(
        ArtifactError, match="written in format version 2, but this wnq reads versions up to 1; upgrade"
    ):
        load(path, Net())
    path.write_bytes(data.replace(rb"\"format_version\":1", rb"\"format_version\":0"))
    with pytest.raises(ArtifactError, match="format_version must be a positive integer, got 0"):
        load(path, Net())


def test_the_manifest_is_the_documented_json(path: Path) -> None:
    save(net(), path)
    _, document = read_artifact(path)
    assert (document["format"], document["format_version"], document["model"]) == ("wnq", 1, None)
    manifest = Manifest.from_json(document, where="x")
    assert manifest.plan.layers[0].shape == (8, 3, 3, 3)
    assert {"second.weight": "first.weight"}.items() <= manifest.aliases.items()
    assert manifest.to_json() == {k: document[k] for k in ("plan", "aliases", "dtype", "model")}


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(path: Path) -> None:
    save(net(), path)
    before = path.read_bytes()
    model = net(seed=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: .*Free some space"):
            save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
