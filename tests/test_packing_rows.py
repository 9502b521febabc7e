"""Rows of codes: agreement with a slow reference and with the package compressed-tensors, and every error.

The package is optional here: its function that packs needs only torch, and is loaded from its file, without the rest.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import wnq
from helpers_artifact import content_of, net
from wnq.packing import pack_rows, row_words, unpack_rows

WIDTHS = range(1, 9)
SHAPES = [(1, 1), (3, 27), (5, 31), (4, 32), (7, 33), (16, 144), (2, 600), (3, 0), (0, 5)]


def random_codes(shape: tuple[int, int], bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))


def helpers() -> ModuleType:
    found = importlib.util.find_spec("compressed_tensors")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("compressed-tensors is not installed")
    path = Path(found.submodule_search_locations[0]) / "compressors" / "pack_quantized" / "helpers.py"
    if not path.exists():
        pytest.skip("compressed-tensors has moved its packing functions")
    spec = importlib.util.spec_from_file_location("pack_quantized_helpers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_the_streams_of_the_definition(shape: tuple[int, int], bits: int) -> None:
    codes = random_codes(shape, bits)
    words = pack_rows(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (shape[0], row_words(shape[1], bits))
    for row, packed in zip(codes.tolist(), words.numpy(), strict=True):
        stream = sum(code << (j * bits) for j, code in enumerate(row))
        assert packed.astype("<i4").tobytes() == stream.to_bytes(4 * packed.size, "little")
    assert torch.equal(unpack_rows(words, bits, shape[1]), codes)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("shape", SHAPES[:-2])
def test_compressed_tensors_packs_and_unpacks_the_same(shape: tuple[int, int], bits: int) -> None:
    theirs, codes = helpers(), random_codes(shape, bits)
    signed = (codes.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_rows(codes, bits), theirs.pack_to_int32(signed, bits))
    assert torch.equal(theirs.unpack_from_int32(pack_rows(codes, bits), bits, torch.Size(shape)), signed)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("grid", ["full", "symmetric"])
def test_compressed_tensors_unpacks_every_layer_of_a_file(grid: str, bits: int, tmp_path: Path) -> None:
    if grid == "symmetric" and bits == 1:
        pytest.skip("no symmetric grid at 1 bit")
    theirs, path = helpers(), tmp_path / "m.safetensors"
    wnq.save(net(w_bits=bits, grid=grid, granularity="channel"), path)
    tensors, content, direct = load_file(path), content_of(path), 0
    for name, quantized in content.quantized.items():
        stored = content.manifest.stored[name]
        shape = tensors[f"{name}.weight_shape"]
        codes = theirs.unpack_from_int32(tensors[f"{name}.weight_packed"], stored.bits, shape).int()
        ours = quantized.codes.movedim(quantized.axis, 0).reshape(tuple(shape)).int()
        assert torch.equal(codes + 2 ** (stored.bits - 1) - stored.shift, ours)
        if stored.shift:  # the code is the level: what their dequantize multiplies is the weight
            expected = quantized.dequantize().movedim(quantized.axis, 0)
            values = codes.reshape(expected.shape[0], -1).to(torch.float32) * tensors[f"{name}.weight_scale"]
            assert torch.equal(values.reshape(expected.shape), expected)
            direct += 1
    # On the full grid, the first and last layers, of 8 bits, are symmetric all the same.
    assert direct == (4 if grid == "symmetric" else 2)


@pytest.mark.slow
def test_compressed_tensors_decompress_returns_the_weights(tmp_path: Path) -> None:
    """The package's own class, in a process of its own: importing it takes seconds and changes logging."""
    path = tmp_path / "m.safetensors"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 32, 2), nn.Conv2d(32, 32, 1), nn.Conv2d(32, 10, 1))
    method = wnq.get_method("wnq", w_bits=3, a_bits=32, grid="symmetric", granularity="channel")
    wnq.quantize_(model, wnq.make_plan(model, method))
    wnq.save(model.eval(), path)
    torch.save({key: value for key, value in wnq.unpack_file(path).items() if value.ndim > 1}, tmp_path / "weights.pt")
    code = """
import sys, torch
from safetensors.torch import load_file
try:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
except ImportError as error:
    print("skip:", error)
    sys.exit()
tensors, weights = load_file(sys.argv[1]), torch.load(sys.argv[2])
for layer, bits, axis in (("0", 8, 0), ("1", 3, 1), ("2", 3, 0), ("3", 8, 0)):
    own = {key.removeprefix(layer + "."): tensor for key, tensor in tensors.items() if key.startswith(layer + ".")}
    own["weight_shape"] = torch.Size(own["weight_shape"].tolist())
    strategy = "channel" if own["weight_scale"].ndim == 2 else "tensor"
    args = QuantizationArgs(num_bits=bits, symmetric=True, strategy=strategy)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    got = PackedQuantizationCompressor.decompress(own, scheme)["weight"]
    expected = weights[layer + ".weight"].movedim(axis, 0)
    assert torch.equal(got.reshape(expected.shape), expected), layer
print("equal")
"""
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "weights.pt")]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip"):
        pytest.skip(done.stdout)
    assert done.stdout.strip() == "equal"


def test_rows_longer_than_their_padding_allows_become_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.Conv2d(32, 8, 3, bias=False))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=32), first_last_bits=None))
    report = wnq.save(model, tmp_path / "m.safetensors")
    tensors = load_file(tmp_path / "m.safetensors")
    assert tensors["0.weight_shape"].tolist() == [1, 288]  # 9 codes of 2 bits would fill little more than half a word
    assert tensors["1.weight_shape"].tolist() == [8, 288]
    assert [layer.packed_bytes for layer in report.layers] == [72, 576]
    fresh = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32, bias=False), nn.Conv2d(32, 8, 3, bias=False))
    x = torch.randn(1, 32, 8, 8)
    assert torch.equal(wnq.load(tmp_path / "m.safetensors", fresh)(x), model(x))


@pytest.mark.parametrize("bits", range(1, 8))
def test_bits_after_a_row_must_be_zero(bits: int) -> None:
    words = pack_rows(random_codes((3, 33), bits), bits)
    for bit in range(33 * bits % 32, 32):
        damaged = words.clone()
        damaged[1, -1] ^= int(np.array(1 << bit, np.uint32).view(np.int32))
        with pytest.raises(ValueError, match="the bits after the last code of a row must be zero"):
            unpack_rows(damaged, bits, 33)


def test_what_is_no_matrix_of_rows_is_refused() -> None:
    codes = random_codes((3, 33), 3)
    with pytest.raises(ValueError, match=r"pack_rows: codes must have 2 dimensions, got shape \(99,\)"):
        pack_rows(codes.flatten(), 3)
    with pytest.raises(ValueError, match="codes of 2 bits must be below 4, got 7"):
        pack_rows(codes, 2)
    with pytest.raises(ValueError, match="bits must be an integer from 1 to 8, got 9"):
        pack_rows(codes, 9)
    words = pack_rows(codes, 3)
    for wrong, columns in ((words, 65), (words.long(), 33), (words.flatten(), 33), (words, 32)):
        with pytest.raises(
            ValueError, match=rf"rows of {columns} codes at 3 bits take int32 of shape \(rows, \d\), got"
        ):
            unpack_rows(wrong, 3, columns)
