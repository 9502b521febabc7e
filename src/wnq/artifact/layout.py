"""How the codes of all quantized weights lie in a file, and how they are taken out of it again.

Codes are seen as a matrix with one row a channel. Coder ``none``: an int32 matrix a layer, under the names and in the bits of
compressed-tensors' ``pack-quantized`` files. Other coders: all layers' streams (:mod:`wnq.artifact.coders`) end to end in one
tensor. Files of version 1 have one dense stream a layer, in the weight's own order.
"""

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wnq.artifact.coders import PACKAGES, decode, encode, plain, versions
from wnq.artifact.coding import Coding, Stored, Stream
from wnq.packing import pack_rows, packed_size, row_words, unpack_codes, unpack_rows

PACKED, SHAPE, SCALE = "weight_packed", "weight_shape", "weight_scale"
CODED = "weights.coded"
"""The tensor that holds the streams of a coded file."""

# What a reader allocates is bounded by what it was given: a stream of no entropy would otherwise stand for any number of codes.
FREE_CODES, CODES_PER_BYTE = 1 << 20, 128


def key_of(layer: str, name: str) -> str:
    """Return the state_dict key of a layer's tensor; the model itself has the empty name."""
    return f"{layer}.{name}" if layer else name


def shift_of(levels: Tensor, bits: int) -> int:
    """Return what to add to codes so that the stored code, minus ``2**(bits-1)``, is the level itself.

    This is how compressed-tensors reads codes, so its own ``decompress`` then returns the weight. It is possible for
    consecutive integers of ``bits`` signed bits, the symmetric grids; for all others the shift is 0.
    """
    first, count = levels[..., :1], levels.shape[-1]
    consecutive = torch.equal(levels, first + torch.arange(count, dtype=levels.dtype, device=levels.device))
    if not levels.numel() or not consecutive or not bool((first == first.reshape(-1)[0]).all()):
        return 0
    shift = float(first.reshape(-1)[0]) + 2 ** (bits - 1)
    return int(shift) if 0 <= shift <= 2**bits - count and shift == int(shift) else 0


def matrix_shape(shape: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return (channels, weights a channel)."""
    return shape[axis], math.prod(shape[:axis] + shape[axis + 1 :])


def to_matrix(codes: Tensor, axis: int) -> Tensor:
    """Return codes as a matrix of one row a channel."""
    return codes.movedim(axis, 0).reshape(matrix_shape(tuple(codes.shape), axis))


def from_matrix(matrix: Tensor, shape: tuple[int, ...], axis: int) -> Tensor:
    """Undo :func:`to_matrix`, from a matrix of any form."""
    moved = (shape[axis], *shape[:axis], *shape[axis + 1 :])
    return matrix.reshape(moved).movedim(0, axis).contiguous()


def store_rows(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """Return the tensors of a layer in rows; where filling each up to whole words adds more than a sixteenth, all is one row."""
    padded, dense = 4 * matrix.shape[0] * row_words(matrix.shape[1], bits), packed_size(matrix.numel(), bits)
    if 16 * (padded - dense) > dense:
        matrix = matrix.reshape(1, -1)
    return {
        key_of(name, PACKED): pack_rows(matrix, bits),
        key_of(name, SHAPE): torch.tensor(matrix.shape, dtype=torch.int64),
    }


def store_coded(matrices: Mapping[str, Tensor], bits: Mapping[str, int], coder: str) -> tuple[Tensor, Coding]:
    """Return the streams of all layers in one uint8 tensor, and how they were made.

    Raises:
        ModuleNotFoundError: a package of the coder is not installed.
    """
    used = versions(coder)
    flat = {name: matrix.reshape(-1).numpy() for name, matrix in matrices.items()}
    streams = {name: encode(array, bits[name], coder) for name, array in flat.items()}
    codes, size = sum(matrix.numel() for matrix in matrices.values()), sum(len(data) for _, data in streams.values())
    for name in sorted(streams, key=lambda name: -flat[name].size):
        if codes <= FREE_CODES + CODES_PER_BYTE * size:
            break
        size -= len(streams[name][1])
        streams[name] = plain(flat[name], bits[name])
        size += len(streams[name][1])
    joined = np.frombuffer(b"".join(data for _, data in streams.values()), np.uint8).copy()
    rows = (Stream(method, len(data), _digest(flat[name])) for name, (method, data) in streams.items())
    return torch.from_numpy(joined), Coding(coder, used, tuple(rows))


class Codes:
    """The stored codes of a file, layer by layer. Nothing that the file says is trusted.

    Args:
        version: of the format.
        coding: what it says of its coder.
        tensors: of the file; those that hold codes are removed.
        layers: shape and :class:`Stored` of each stored weight, in the plan's order.

    Raises:
        ValueError: tensors are missing or have lengths that do not fit the shapes. Nothing has been decoded then.
    """

    def __init__(
        self,
        version: int,
        coding: Coding,
        tensors: dict[str, Tensor],
        layers: Mapping[str, tuple[tuple[int, ...], Stored]],
    ) -> None:
        self.version = version
        self.coding = coding
        self.layers = dict(layers)
        self.bytes: dict[str, int] = {}
        self.methods: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        self.bookkeeping = 0
        self._packed: dict[str, Tensor] = {}
        self._columns: dict[str, int] = {}
        if coding.name != "none":
            self._split(_pop(tensors, CODED))
            return
        for name, (shape, stored) in self.layers.items():
            packed = self._packed[name] = _pop(tensors, key_of(name, PACKED))
            self.bytes[name], self.methods[name] = packed.nbytes, "bits" if version == 1 else "rows"
            if version > 1:
                try:
                    self._check_rows(name, shape, stored, _pop(tensors, key_of(name, SHAPE)))
                except ValueError as error:
                    raise ValueError(f"layer {name!r}: {error}") from None

    def _check_rows(self, name: str, shape: tuple[int, ...], stored: Stored, form: Tensor) -> None:
        allowed = (matrix_shape(shape, stored.axis), (1, math.prod(shape)))
        found = tuple(form.tolist()) if form.dtype == torch.int64 and form.shape == (2,) else None
        if found not in allowed:
            raise ValueError(f"its weight_shape must be {allowed[0]} or {allowed[1]}, got {found}")
        packed, (rows, columns) = self._packed[name], found
        if packed.dtype != torch.int32 or tuple(packed.shape) != (rows, row_words(columns, stored.bits)):
            raise ValueError(
                f"{rows} rows of {columns} codes at {stored.bits} bits take int32 of shape "
                f"{(rows, row_words(columns, stored.bits))}, got {packed.dtype} of shape {tuple(packed.shape)}"
            )
        self._columns[name] = columns
        self.bookkeeping += form.nbytes

    def _split(self, coded: Tensor) -> None:
        """Cut the tensor of all streams."""
        lengths = [stream.length for stream in self.coding.streams]
        if len(lengths) != len(self.layers) or coded.dtype != torch.uint8 or coded.shape != (sum(lengths),):
            raise ValueError(
                f"{len(lengths)} streams of {sum(lengths)} bytes are announced for {len(self.layers)} layers, but "
                f"{CODED!r} is {coded.dtype} of shape {tuple(coded.shape)}"
            )
        count = sum(math.prod(shape) for shape, _ in self.layers.values())
        if count > FREE_CODES + CODES_PER_BYTE * coded.numel():
            raise ValueError(
                f"{count:,} codes cannot come from {coded.numel():,} bytes, at most {CODES_PER_BYTE} a byte"
            )
        start = 0
        for name, (method, length, digest) in zip(self.layers, self.coding.streams, strict=True):
            self._packed[name] = coded[start : start + length]
            self.bytes[name], self.methods[name], self._digests[name] = length, method, digest
            start += length

    def decode(self, name: str) -> Tensor:
        """Return the codes of a layer as they were quantized: uint8, in the shape of the weight.

        Raises:
            ValueError: they are damaged.
            ModuleNotFoundError: the package that decodes them is not installed.
        """
        (shape, stored), packed = self.layers[name], self._packed[name]
        if self.version == 1:
            return unpack_codes(packed, stored.bits, shape)
        if self.coding.name == "none":
            codes = unpack_rows(packed, stored.bits, self._columns[name])
        else:
            method, count = self.methods[name], math.prod(shape)
            try:
                found = decode(method, packed.numpy().tobytes(), stored.bits, count)
            except ValueError as error:
                raise ValueError(f"its stream, coded by {method}, is damaged: {error}") from None
            if _digest(found) != self._digests[name]:
                raise ValueError(
                    f"its codes do not match their checksum after decoding by {method}{self._advice(method)}"
                )
            codes = torch.from_numpy(found)
        if stored.shift:
            if codes.numel() and int(codes.min()) < stored.shift:
                raise ValueError(f"its stored codes must be {stored.shift} or more, got {int(codes.min())}")
            codes = codes - stored.shift
        return from_matrix(codes, shape, stored.axis)

    def _advice(self, method: str) -> str:
        package = PACKAGES.get(method, "")
        used = (self.coding.versions or {}).get(package)
        return f"; the file was written with {package} {used:.40}, try that version" if used else ""


def _digest(codes: npt.NDArray[np.uint8]) -> str:
    return hashlib.sha256(codes.tobytes()).hexdigest()[:16]


def _pop(tensors: dict[str, Tensor], key: str) -> Tensor:
    if key not in tensors:
        raise ValueError(f"tensor {key!r} is missing")
    return tensors.pop(key)
