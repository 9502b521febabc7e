"""Files that are no artifacts, damaged ones, hostile ones, and those of another model: one clear sentence each."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import wnq
from helpers_artifact import Net, net, rewritten, trained
from wnq.artifact import inspect_file, load, save, unpack_file
from wnq.artifact.bundle import unbundle
from wnq.artifact.container import ArtifactError
from wnq.models import registered_model


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


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
        (lambda t, d: d["plan"]["kinds"][0].update(bits=7), r"'stem': 8 rows of 27 codes at 7 bits take .* \(8, 6\)"),
        (lambda t, d: d["plan"]["kinds"][0].update(shift=2), "layer 'stem' of shape .* cannot have levels of"),
        (lambda t, d: d["plan"]["kinds"][0].update(shift=256), "layer 'stem' at 8 bits has its codes shifted by 256"),
        (lambda t, d: d["plan"]["kinds"][0].update(shift=-1), "layer 'stem' at 8 bits has its codes shifted by -1"),
        (lambda t, d: d["plan"]["kinds"][0].update(axis=4), "layer 'stem' of 4 dimensions has channel axis 4"),
        (lambda t, d: d["plan"]["kinds"][0].update(shape=[10**6, 10**6]), "'stem': its weight_shape must be"),
        (lambda t, d: d["plan"]["kinds"][0].update(shape=[2] * 65), "layer 'stem' has the impossible shape"),
        (lambda t, d: d["plan"].update(methods=d["plan"]["methods"] * 2000), "'methods' has .* more than 1,024"),
        (lambda t, d: t["stem.weight_packed"].fill_(-1), "the bits after the last code of a row must be zero"),
        (lambda t, d: t.pop("stem.weight_shape"), "tensor 'stem.weight_shape' is missing"),
        (lambda t, d: t["stem.weight_shape"].fill_(6), r"must be \(8, 27\) or \(1, 216\), got \(6, 6\)"),
        (lambda t, d: d.pop("coder"), "the metadata's 'coder' must have a name of none, zstd, ans"),
        (lambda t, d: d["coder"].update(name="gzip"), "the metadata's 'coder' must have a name of none, zstd, ans"),
        (lambda t, d: d["coder"].update(name="ans"), "tensor 'weights.coded' is missing"),
        (lambda t, d: d["coder"].update(versions={"zstandard": 3}), "versions of the coder's packages must be text"),
        (lambda t, d: d["coder"].update(streams=[["ans", 3, "x"]]), "a stream must be .method of none, bytes, digest."),
        (lambda t, d: d["plan"]["kinds"][0].update(shape=[-1, 3]), "layer 'stem' has the impossible shape"),
        (lambda t, d: d["plan"]["kinds"][0].update(method=7), "layer 'stem' has method number 7"),
        (lambda t, d: d["plan"]["floats"].append(["x", 1, 9]), "float layer 'x' has reason number 9"),
        (lambda t, d: d.update(model={"name": "resnet20"}), "the metadata has no 'options'"),
        (lambda t, d: d.update(model={"name": 3, "options": {}}), "'name' must be str, got int"),
        (lambda t, d: t.pop("stem.weight_scale"), "tensor 'stem.weight_scale' is missing"),
        (lambda t, d: t.pop("stem.weight_grid"), "tensor 'stem.weight_levels' is missing"),
        (lambda t, d: t.update({"stem.weight_scale": torch.ones(5)}), "cannot have a scale of torch.float32"),
        (lambda t, d: t["stem.weight_scale"].fill_(torch.nan), "a scale of .* with NaN or infinity"),
        (lambda t, d: t["stem.weight_scale"].fill_(torch.inf), "a scale of .* with NaN or infinity"),
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
    with pytest.raises(ValueError, match=r"small tensor 'w' must have"):
        unbundle({"small.bool": torch.empty(0).bool()}, {"kinds": [{"w": ["bool", shape]}], "modules": [["a", 0]]})


def test_a_newer_version_says_so(path: Path) -> None:
    save(net(), path)
    data = path.read_bytes()
    path.write_bytes(data.replace(rb"\"format_version\":2", rb"\"format_version\":3"))
    with pytest.raises(
        ArtifactError, match="written in format version 3, but this wnq reads versions up to 2; upgrade"
    ):
        load(path, Net())
    path.write_bytes(data.replace(rb"\"format_version\":2", rb"\"format_version\":0"))
    with pytest.raises(ArtifactError, match="format_version must be a positive integer, got 0"):
        load(path, Net())
