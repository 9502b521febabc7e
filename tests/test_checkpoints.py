import json
import struct
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import wnq
from wnq.attach import freeze_, quantize_
from wnq.checkpoints import TensorInfo, is_weight, open_checkpoint, pickled
from wnq.methods import get_method
from wnq.plan import make_plan

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
TYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    *FLOAT8,
    torch.int8,
    torch.uint8,
    torch.int64,
    torch.bool,
]


def some_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 5, generator=generator) * 3
    tensors = {f"{str(dtype).split('.')[1]}.weight": base.to(dtype) for dtype in TYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "vector": torch.arange(7.0)}


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()


def check(path: Path, expected: dict[str, Tensor]) -> None:
    checkpoint = open_checkpoint(path)
    assert {info.name for info in checkpoint.tensors} == expected.keys()
    for info in checkpoint.tensors:
        tensor = checkpoint.read(info.name)
        assert same(tensor, expected[info.name]), info.name
        assert (info.shape, info.dtype, info.bytes) == (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
        assert info.file.is_file()


def sharded(
    folder: Path, tensors: dict[str, Tensor], save: Callable[[dict[str, Tensor], Path], None], name: str
) -> Path:
    names = sorted(tensors)
    stem, ending = name.split(".")
    table = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"{stem}-{i:05}-of-00002.{ending}"
        save({key: tensors[key] for key in part}, folder / file)
        table |= dict.fromkeys(part, file)
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return index


def test_safetensors_file_and_folder_of_one(tmp_path: Path):
    for name in ("model.safetensors", "other.safetensors"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        save_file(some_tensors(), folder / name)
        check(folder / name, some_tensors())
        check(folder, some_tensors())


@pytest.mark.parametrize("name", ["model.safetensors", "diffusion.safetensors", "pytorch_model.bin"])
def test_shards_by_their_folder_and_by_their_index(tmp_path: Path, name: str):
    save = save_file if name.endswith("safetensors") else torch.save
    index = sharded(tmp_path, some_tensors(), save, name)
    check(tmp_path, some_tensors())
    check(index, some_tensors())
    index.unlink()
    check(tmp_path, some_tensors())


def test_shards_that_are_links_open_as_in_a_download_cache(tmp_path: Path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    index = sharded(tmp_path / "blobs", some_tensors(), save_file, "model.safetensors")
    for file in sorted((tmp_path / "blobs").iterdir()):
        (tmp_path / "snapshot" / file.name).symlink_to(Path("../blobs") / file.name)
    check(tmp_path / "snapshot" / index.name, some_tensors())


NESTINGS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "flat": lambda state: state,
    "ordered": lambda state: OrderedDict(state),
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": torch.ones(2, 2)}},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(2, 2)}}},
    "beside other things": lambda state: {**state, "epoch": 3, "name": "x"},
}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt"])
@pytest.mark.parametrize("nesting", NESTINGS)
def test_torch_files(tmp_path: Path, nesting: str, suffix: str):
    file = tmp_path / f"model{suffix}"
    torch.save(NESTINGS[nesting](some_tensors()), file)
    check(file, some_tensors())


def test_torch_file_of_the_oldest_kind(tmp_path: Path):
    tensors = {name: value for name, value in some_tensors().items() if value.dtype not in FLOAT8}
    torch.save(tensors, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    check(tmp_path / "old.pt", tensors)


def test_torch_file_of_views_ties_and_parameters_opened_anew_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pickled, "KEPT", 0)
    base = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    state = {"a": base.t(), "b": base[3:7, ::2], "c": nn.Parameter(base[1]), "d": base.t()}
    torch.save(state, tmp_path / "views.pt")
    check(tmp_path / "views.pt", {name: value.detach() for name, value in state.items()})
    assert not open_checkpoint(tmp_path / "views.pt").read("c").requires_grad


def test_what_was_read_is_the_readers_own(tmp_path: Path):
    save_file(some_tensors(), tmp_path / "m.safetensors")
    torch.save(some_tensors(), tmp_path / "m.pt")
    for file in (tmp_path / "m.safetensors", tmp_path / "m.pt"):
        checkpoint = open_checkpoint(file)
        first = checkpoint.read("float32.weight")
        first.zero_()
        assert same(checkpoint.read("float32.weight"), some_tensors()["float32.weight"])
        check(file, some_tensors())


def test_unaligned_tensors_are_read(tmp_path: Path):
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    raw = b"\x01" + values.numpy().tobytes()
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [5, 3], "data_offsets": [1, 61]},
    }
    write(tmp_path / "u.safetensors", header, raw)
    got = open_checkpoint(tmp_path / "u.safetensors").read("w")
    assert same(got, values)
    assert got.data_ptr() % 4 == 0


def test_names_are_those_of_the_float_model(tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))
    floats = {name: value.clone() for name, value in model.state_dict().items()}
    for method in ("lsq", "wnq"):
        quantized = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 5))
        quantized.load_state_dict(floats)
        quantize_(quantized, make_plan(quantized, get_method(method, w_bits=3)))
        assert "0.parametrizations.weight.original" in quantized.state_dict()
        (tmp_path / method).mkdir()
        save_file(quantized.state_dict(), tmp_path / method / "model.safetensors")
        check(tmp_path / method, floats)
        frozen = freeze_(quantized).state_dict()
        save_file({name: value.clone() for name, value in frozen.items()}, tmp_path / "frozen.safetensors")
        assert {info.name for info in open_checkpoint(tmp_path / "frozen.safetensors").tensors} == floats.keys()


def test_weight_norm_of_torch_is_not_taken_for_ours(tmp_path: Path):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    save_file(layer.state_dict(), tmp_path / "n.safetensors")
    names = {info.name for info in open_checkpoint(tmp_path / "n.safetensors").tensors}
    assert names == {"bias", "parametrizations.weight.original0", "parametrizations.weight.original1"}


def test_a_name_that_two_tensors_stand_for(tmp_path: Path):
    save_file(
        {"a.weight": torch.ones(2), "a.parametrizations.weight.original": torch.ones(3)}, tmp_path / "t.safetensors"
    )
    with pytest.raises(ValueError, match=r"both stand for 'a.weight'"):
        open_checkpoint(tmp_path / "t.safetensors")


def test_a_packed_file_is_refused_with_the_way_out(tmp_path: Path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    wnq.save(quantize_(model, make_plan(model, get_method("wnq"))), tmp_path / "packed.safetensors")
    with pytest.raises(ValueError, match=r"packed wnq file.*wnq unpack"):
        open_checkpoint(tmp_path / "packed.safetensors")


@pytest.mark.parametrize(
    "name, shape, dtype, expected",
    [
        ("layer1.0.conv1.weight", (64, 3, 3, 3), torch.float32, True),
        ("model.layers.0.self_attn.q_proj.weight", (64, 64), torch.bfloat16, True),
        ("h.0.attn.c_attn.weight", (8, 24), torch.float16, True),
        ("experts.gate_up_proj", (4, 8, 16), torch.bfloat16, True),
        ("rnn.weight_ih_l0", (8, 4), torch.float32, True),
        ("norm1.linear.weight", (8, 4), torch.float32, True),
        ("wpe.weight", (8, 4), torch.float32, True),
        ("head.weight", (1, 8), torch.float8_e4m3fn, True),
        ("weight", (2, 2), torch.float32, True),
        ("blocks.0.norm1.weight", (8, 4, 4), torch.float32, False),
        ("model.final_layer_norm.weight", (1, 8), torch.float32, False),
        ("ln_f.weight", (1, 8), torch.float32, False),
        ("layer1.bn2.weight", (1, 8), torch.float32, False),
        ("h.0.attn.bias", (1, 1, 8, 8), torch.float32, False),
        ("relative_position_bias", (8, 8), torch.float32, False),
        ("cls_token", (1, 1, 8), torch.float32, False),
        ("pos_embed", (1, 9, 8), torch.float32, False),
        ("attn_mask", (9, 8), torch.float32, False),
        ("fc.weight", (8,), torch.float32, False),
        ("fc.weight", (8, 8), torch.int8, False),
        ("fc.weight", (0, 8), torch.float32, False),
    ],
)
def test_which_tensors_are_worth_quantizing(name: str, shape: tuple[int, ...], dtype: torch.dtype, expected: bool):
    assert is_weight(TensorInfo(name, shape, dtype, 0, Path("x"))) is expected


def test_weights_of_a_checkpoint(tmp_path: Path):
    model = nn.TransformerEncoderLayer(8, 2, 16)
    save_file(model.state_dict(), tmp_path / "t.safetensors")
    got = {info.name for info in open_checkpoint(tmp_path / "t.safetensors").weights}
    assert got == {"self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"}


def test_an_unknown_name_gets_a_hint(tmp_path: Path):
    save_file({"layer.weight": torch.ones(2)}, tmp_path / "t.safetensors")
    with pytest.raises(ValueError, match=r"no tensor 'layer.wieght'.*Did you mean 'layer.weight'"):
        open_checkpoint(tmp_path / "t.safetensors").read("layer.wieght")


# Damaged and hostile files: one clear sentence each, whatever is in them.


def write(file: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return file


def entry(start: int, end: int, shape: list[Any] | None = None, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


HOSTILE: dict[str, tuple[object, bytes, str]] = {
    "empty header": (b"", b"", "not a safetensors file"),
    "not JSON": (b"{nonsense}", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff\xfe": 1}', b"", "damaged"),
    "nested without end": (b'{"a":' + b"[" * 100_000, b"", "damaged"),
    "number of 5000 digits": (b'{"a":' + b"9" * 5000 + b"}", b"", "damaged"),
    "nothing in it": ({}, b"", "no tensors"),
    "entry is a list": ({"a": [1, 2]}, b"", "entry for tensor 'a'"),
    "shape is text": ({"a": entry(0, 4, ["1"])}, bytes(4), "entry for tensor 'a'"),
    "shape is negative": ({"a": entry(0, 4, [-1, -1])}, bytes(4), "entry for tensor 'a'"),
    "shape is true": ({"a": entry(0, 4, [True])}, bytes(4), "entry for tensor 'a'"),
    "shape of 70 dimensions": ({"a": entry(0, 4, [1] * 70)}, bytes(4), "entry for tensor 'a'"),
    "shape beyond all memory": ({"a": entry(0, 4, [2**40, 2**40])}, bytes(4), "needs .* bytes"),
    "offsets run backwards": ({"a": entry(4, 0)}, bytes(4), "entry for tensor 'a'"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, bytes(8), "entry for tensor"),
    "offsets too short": ({"a": entry(0, 4, [2])}, bytes(4), "needs 8 bytes, but the header gives it 4"),
    "unknown type": ({"a": entry(0, 4, [8], "F4")}, bytes(4), "type F4"),
    "type is a number": ({"a": entry(0, 4, [1], 32)}, bytes(4), "entry for tensor"),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "'b' overlaps tensor 'a'"),
    "the same place twice": ({"a": entry(0, 8), "b": entry(0, 8)}, bytes(8), "overlaps"),
    "gap": ({"a": entry(0, 4), "b": entry(8, 12)}, bytes(12), "'b' leaves a gap"),
    "data missing": ({"a": entry(0, 400)}, bytes(396), "truncated: its tensors need 400"),
    "data left over": ({"a": entry(0, 4)}, bytes(9), "5 bytes follow"),
    "a name twice": (
        b'{"a":' + json.dumps(entry(0, 4)).encode() + b',"a":' + json.dumps(entry(0, 4)).encode() + b"}",
        bytes(4),
        "twice",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors(tmp_path: Path, name: str):
    header, data, match = HOSTILE[name]
    file = write(tmp_path / "h.safetensors", header, data)
    with pytest.raises(ValueError, match=match) as raised:
        open_checkpoint(file)
    assert "h.safetensors" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("length", [2**63, 2**31, 10**6])
def test_header_that_lies_about_its_length(tmp_path: Path, length: int):
    file = write(tmp_path / "h.safetensors", {"a": entry(0, 4)}, bytes(4), length=length)
    with pytest.raises(ValueError, match=r"damaged|truncated"):
        open_checkpoint(file)


def test_a_file_cut_anywhere_is_refused(tmp_path: Path):
    save_file({"a": torch.ones(3, 3), "b": torch.ones(5)}, tmp_path / "w.safetensors")
    torch.save({"a": torch.ones(3, 3), "b": torch.ones(5)}, tmp_path / "w.pt")
    for whole in (tmp_path / "w.safetensors", tmp_path / "w.pt"):
        data = whole.read_bytes()
        for length in sorted({0, 1, 7, 8, 9, 20, len(data) // 2, len(data) - 4, len(data) - 1}):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(data[:length])
            with pytest.raises(ValueError, match="cut"):
                open_checkpoint(cut)


def test_a_file_that_shrinks_after_it_was_opened(tmp_path: Path):
    file = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(300, 300)}, file)
    checkpoint = open_checkpoint(file)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ValueError, match="shorter"):
        checkpoint.read("a")
    file.unlink()
    with pytest.raises(ValueError, match="there is no file"):
        checkpoint.read("a")


@pytest.mark.parametrize(
    "shard",
    [
        "../../x.safetensors",
        "/etc/x.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "C:x.safetensors",
        "..",
        "",
        "x.py",
    ],
)
def test_an_index_may_only_name_files_beside_it(tmp_path: Path, shard: str):
    (tmp_path / "a").mkdir()
    for file in (tmp_path / "x.safetensors", tmp_path / "a" / "b.safetensors"):
        save_file({"w": torch.ones(2)}, file)
    index = tmp_path / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": shard}}))
    for path in (index, index.parent):
        with pytest.raises(ValueError, match="without a path"):
            open_checkpoint(path)


@pytest.mark.parametrize(
    "content, match",
    [
        ("[]", "weight_map"),
        ("{}", "weight_map"),
        ('{"weight_map": ["a"]}', "weight_map"),
        ('{"weight_map": {"a": 3}}', "weight_map"),
        ('{"weight_map": {}}', "no tensors"),
        ("{", "not valid JSON"),
        ('{"weight_map": {"w": "gone.safetensors"}}', "'gone.safetensors', which is missing"),
        ('{"weight_map": {"other": "here.safetensors"}}', "'other', but it does not"),
    ],
)
def test_damaged_index(tmp_path: Path, content: str, match: str):
    save_file({"w": torch.ones(2)}, tmp_path / "here.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ValueError, match=match):
        open_checkpoint(tmp_path)


def test_folders_that_leave_it_open_what_is_meant(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    save_file({"w": torch.ones(2)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b.safetensors and a.safetensors in .* both hold 'w'"):
        open_checkpoint(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"w": f"{name}.safetensors"}})
        )
    with pytest.raises(ValueError, match="holds 2 indices"):
        open_checkpoint(tmp_path)
    save_file({"v": torch.ones(2)}, tmp_path / "model.safetensors")
    assert [info.name for info in open_checkpoint(tmp_path).tensors] == ["v"]


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('the code in the file was run')",)


def test_torch_files_with_code_are_never_run(tmp_path: Path):
    for name, content in {"bomb": {"w": torch.ones(2), "x": Bomb()}, "model": nn.Linear(2, 2)}.items():
        for zipped in (True, False):
            torch.save(content, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
            with pytest.raises(ValueError, match=r"could run code.*state_dict"):
                open_checkpoint(tmp_path / f"{name}.pt")


def test_torch_files_without_weights(tmp_path: Path):
    cases: list[tuple[object, str]] = [
        (torch.ones(3), "holds a Tensor"),
        ([1, 2], "holds a list"),
        ({"epoch": 3}, "no tensors by name"),
        ({"state_dict": {}}, "no tensors by name"),
        ({"w": torch.ones(1).expand(10**9, 100)}, "larger than what the file holds"),
    ]
    for content, match in cases:
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(ValueError, match=match):
            open_checkpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04 not a zip, nor a pickle")
    with pytest.raises(ValueError, match="cannot read"):
        open_checkpoint(tmp_path / "x.pt")


@pytest.mark.parametrize("name", ["none.safetensors", "none.pt", "none", "none.safetensors.index.json"])
def test_missing_files(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=r"no file|missing file"):
        open_checkpoint(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"ending in '\.txt'"):
        open_checkpoint(tmp_path / "notes.txt")


MEASURE = """
import sys
from wnq.checkpoints import open_checkpoint
from wnq.clipping import clip_errors
from wnq.tails import channel_stats, describe

def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))

start = resident()
checkpoint = open_checkpoint(sys.argv[1])
for info in checkpoint.tensors:
    tensor = checkpoint.read(info.name)
    describe(tensor)
    channel_stats(tensor)
    clip_errors(tensor, bits=(2, 8))
    del tensor
print(resident() - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory as Linux counts it")
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_file(tmp_path: Path, suffix: str):
    largest = 32 * 2**20
    weight = torch.randn(2048, largest // 8192, generator=torch.Generator().manual_seed(0))
    tensors = {f"{i}.weight": weight.clone() for i in range(6)}
    file = tmp_path / f"large{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    run = subprocess.run([sys.executable, "-c", MEASURE, str(file)], capture_output=True, text=True, check=True)
    # Three tensors, what a torch file may keep, and some room; the file is 192 MiB, and twice that in float64.
    allowed = 3 * largest + 32 * 2**20 + (pickled.KEPT if suffix == ".pt" else 0)
    assert int(run.stdout) < allowed, int(run.stdout) / 2**20
