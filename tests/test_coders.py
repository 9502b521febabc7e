"""Coders: exact, near the entropy, defined by integers alone, bounded, and each layer by the smallest."""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor, nn

import wnq
from helpers_artifact import CODERS, Net, content_of, net, rewritten
from wnq.artifact import coders
from wnq.artifact.ans import decode_ans, encode_ans
from wnq.artifact.coders import decode, encode
from wnq.artifact.container import ArtifactError
from wnq.artifact.layout import CODED

WIDTHS = range(1, 9)


def codes_like(kind: str, bits: int, n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    if kind == "uniform":
        return random.integers(0, 2**bits, n, dtype=np.uint8)
    if kind == "constant":
        return np.full(n, 2**bits - 1, np.uint8)
    if kind == "repeating":
        return np.resize(random.integers(0, 2**bits, 97, dtype=np.uint8), n)
    middle = (2**bits - 1) / 2
    return np.clip(np.round(random.normal(middle, max(0.4, middle / 3), n)), 0, 2**bits - 1).astype(np.uint8)


def entropy_bytes(codes: np.ndarray) -> float:
    shares = np.bincount(codes) / codes.size
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum()) * codes.size / 8


def reference_ans(stream: bytes, bits: int, count: int) -> list[int]:
    """The format's definition on Python integers alone, one bit and one interval at a time."""
    width, m, total = stream[0], 2**bits, 2**24
    start = 1 + -(-m * width // 8)
    table = [0] * m
    for i in range(m * width):
        table[i // width] |= (stream[1 + i // 8] >> (i % 8) & 1) << (i % width)
    left, seen = [], 0
    for i in range(m + 1):
        left.append(total * seen // sum(table) * (total - m) // total + i)
        seen += table[i] if i < m else 0
    assert left[0] == 0 and left[m] == total and all(a < b for a, b in itertools.pairwise(left))
    words = [int.from_bytes(stream[i : i + 4], "little") for i in range(start, len(stream), 4)]
    state, codes = 0, []
    while words and state < 2**32:
        state = (state << 32) + words.pop()
    for _ in range(count):
        code = next(i for i in range(m) if left[i] <= state % total < left[i + 1])
        codes.append(code)
        state = state // total * (left[code + 1] - left[code]) + state % total - left[code]
        if words and state < 2**32:
            state = (state << 32) + words.pop()
    assert state == 0 and not words
    return codes


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["uniform", "normal", "constant", "repeating"])
def test_every_method_gives_back_the_codes(kind: str, bits: int) -> None:
    for n in (1, 2, 7, 8, 1000, 70_001):
        codes = codes_like(kind, bits, n, seed=n)
        streams = {
            "ans": encode_ans(codes, bits),
            "zstd": coders._zstd(coders._dense(codes, coders._aligned(bits)), beat=n),
        }
        streams |= dict([coders.plain(codes, bits), encode(codes, bits, "zstd"), encode(codes, bits, "ans")])
        for method, stream in streams.items():
            back = decode(method, stream, bits, n)
            assert back.dtype == np.uint8 and np.array_equal(back, codes), (method, n)
    empty = np.empty(0, np.uint8)
    for coder in ("zstd", "ans"):
        assert encode(empty, bits, coder) == ("bits", b"")
    assert decode("bits", b"", bits, 0).shape == (0,)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("kind", ["uniform", "normal", "constant", "repeating"])
def test_ans_is_what_its_integer_definition_says(kind: str, bits: int) -> None:
    for n in (1, 3, 700):
        codes = codes_like(kind, bits, n, seed=bits)
        assert reference_ans(encode_ans(codes, bits), bits, n) == codes.tolist()


@pytest.mark.parametrize("width", [1, 5, 16])
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_any_table_of_counts_is_read_as_the_definition_says(bits: int, width: int) -> None:
    """Streams that no encoder wrote: random tables, with the extremes, and random words."""
    random = np.random.default_rng(bits * width)
    most = 2**width - 1
    for table in ([most] * 2**bits, [most] + [0] * (2**bits - 1), random.integers(0, most + 1, 2**bits).tolist()):
        table[random.integers(2**bits)] |= 1
        packed = sum(count << (i * width) for i, count in enumerate(table)).to_bytes(
            -(-(2**bits) * width // 8), "little"
        )
        words = random.integers(1, 2**32, 50, dtype=np.uint64).astype("<u4").tobytes()
        stream = bytes([width]) + packed + words
        try:
            expected: Any = reference_ans(stream, bits, 40)
        except AssertionError:  # random words rarely end where the codes end
            with pytest.raises(ValueError, match="its words do not end where the codes end"):
                decode_ans(stream, bits, 40)
        else:
            assert decode_ans(stream, bits, 40).tolist() == expected


@pytest.mark.parametrize("bits", WIDTHS)
def test_ans_is_within_a_thousandth_of_the_entropy_beside_its_table(bits: int) -> None:
    codes = codes_like("normal", bits, 200_000)
    stream = encode_ans(codes, bits)
    table = 1 + -(-(2**bits) * stream[0] // 8)
    assert len(stream) - table <= 1.001 * entropy_bytes(codes) + 8


def test_the_smallest_method_is_taken() -> None:
    assert encode(codes_like("uniform", 2, 5000), 2, "ans")[0] == "bits"
    assert encode(codes_like("normal", 3, 5000), 3, "ans")[0] == "ans"
    assert encode(codes_like("normal", 3, 5000), 3, "zstd")[0] == "zstd"
    assert encode(codes_like("repeating", 3, 5000), 3, "ans")[0] == "zstd"
    for kind in ("uniform", "normal", "repeating"):
        codes = codes_like(kind, 5, 100_000)
        sizes = [
            len(stream) for _, stream in (coders.plain(codes, 5), encode(codes, 5, "zstd"), encode(codes, 5, "ans"))
        ]
        assert sizes == sorted(sizes, reverse=True)


def frame(data: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def test_zstd_frames_that_would_give_anything_else_are_refused() -> None:
    data = coders._dense(codes_like("normal", 4, 1000), 4)
    dictionary = zstandard.ZstdCompressionDict(bytes(range(256)) * 8, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    plain = frame(data)
    for stream, message in (
        (frame(bytes(2**30)), "announces 1,073,741,824 bytes of 500"),
        (frame(data + b"\0"), "announces 501 bytes of 500"),
        (frame(data, write_content_size=False), "announces"),
        (frame(data, dict_data=dictionary)[:-1] + b"?", "zstd: "),
        (plain + b"\0", "zstd: compressed input contains 1 bytes of unused data"),
        (plain + plain, "unused data"),
        (plain[:-1], "zstd: "),
        (b"", "zstd: "),
        (b"\0" * 20, "zstd: "),
    ):
        begin = time.process_time()
        with pytest.raises(ValueError, match=message):
            decode("zstd", stream, 4, 1000)
        assert time.process_time() - begin < 0.5


def test_ans_streams_that_are_malformed_are_refused() -> None:
    codes = codes_like("normal", 2, 1000)
    stream = encode_ans(codes, 2)
    start = 1 + -(-4 * stream[0] // 8)
    for broken in (
        b"",
        b"\0" * 5,
        b"\x11" + bytes(8),
        stream[: start - 1],
        stream[:-1],
        stream + bytes(4),
        stream[:1] + bytes(start - 1) + stream[start:],
    ):
        with pytest.raises(ValueError, match="its table of counts is malformed"):
            decode_ans(broken, 2, 1000)
    with pytest.raises(ValueError, match="its words do not end where the codes end"):
        decode_ans(stream, 2, 999)
    with pytest.raises(ValueError, match="its words do not end where the codes end"):
        decode_ans(stream[:-4], 2, 1000)
    wide = bytes([3]) + (1 << 15 | 1).to_bytes(2, "little") + b"\1\0\0\0"  # bits after the last count
    with pytest.raises(ValueError, match="its table of counts is malformed"):
        decode_ans(wide, 2, 1)


def large(value: float) -> nn.Module:
    model = nn.Sequential(nn.Linear(2048, 2048, bias=False), nn.Linear(2048, 8, bias=False))
    nn.init.constant_(model[0].weight, value)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=32), first_last_bits=None))
    return model.eval()


@pytest.mark.parametrize("coder", ["zstd", "ans"])
def test_what_would_compress_beyond_the_bound_is_stored_plainly(coder: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = large(1.0)
    report = wnq.save(model, tmp_path / "m.safetensors", coder=coder)
    assert report.layers[0].method == "bits"
    assert torch.equal(wnq.unpack_file(tmp_path / "m.safetensors")["0.weight"], model[0].weight)


@pytest.mark.parametrize("coder", ["zstd", "ans"])
def test_more_codes_than_the_bytes_allow_are_refused_before_decoding(coder: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wnq.save(net(), path, coder=coder)

    def claim(_: dict[str, Tensor], document: dict[str, Any]) -> None:
        document["plan"]["kinds"][0]["shape"] = [8, 2**27, 1, 1]

    rewritten(path, claim)
    for read in (wnq.inspect_file, wnq.unpack_file, lambda path: wnq.load(path, Net())):
        begin = time.process_time()
        with pytest.raises(
            ArtifactError, match=r"1,073,742,\d+ codes cannot come from [\d,]+ bytes, at most 128 a byte"
        ):
            read(path)
        assert time.process_time() - begin < 0.5


def test_a_model_of_other_shapes_is_met_before_anything_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    wnq.save(net(), path, coder="ans")
    rewritten(path, lambda tensors, document: tensors[CODED].fill_(0))
    with pytest.raises(ArtifactError, match=r"layer 'stem' has shape \(8, 3, 3, 3\) in the file but \(16, 3, 3, 3\)"):
        wnq.load(path, Net(16))
    with pytest.raises(ArtifactError, match=r"layer 'stem': its (stream, coded by \w+, is damaged|codes do not match)"):
        wnq.load(path, Net())


def test_codes_that_another_version_of_a_package_would_decode_differently_are_noticed(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=32)))
    methods = [layer.method for layer in wnq.save(model, path, coder="ans").layers]

    def change(_: dict[str, Tensor], document: dict[str, Any]) -> None:
        document["coder"]["streams"][methods.index("ans")][2] = "0" * 16
        document["coder"]["versions"]["constriction"] = "9.9"

    rewritten(path, change)
    message = "its codes do not match their checksum after decoding by ans; the file was written with constriction 9.9"
    with pytest.raises(ArtifactError, match=message):
        wnq.load(path)


@pytest.mark.parametrize(("coder", "package"), [("zstd", "zstandard"), ("ans", "constriction")])
def test_a_missing_package_is_named_with_its_extra(
    coder: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=32)))
    wnq.save(model, path, coder=coder)
    monkeypatch.setitem(sys.modules, package, None)  # Python's own way to make an import fail
    with pytest.raises(ModuleNotFoundError, match=rf'coder \'{coder}\' needs {package}: pip install "wnq\[pack\]"'):
        wnq.save(model, tmp_path / "other.safetensors", coder=coder)
    assert not (tmp_path / "other.safetensors").exists()
    with pytest.raises(
        ModuleNotFoundError, match=rf'm.safetensors: layer .* needs {package}: pip install "wnq\[pack\]"'
    ):
        wnq.load(path)
    wnq.save(model, path)
    assert content_of(path).quantized.keys() == {"0", "3", "6", "11"}


def test_an_unknown_coder_names_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"coder must be one of {', '.join(map(repr, CODERS))}, got 'gzip'"):
        wnq.save(net(), tmp_path / "m.safetensors", coder="gzip")
