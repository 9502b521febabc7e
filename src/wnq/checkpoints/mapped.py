"""A safetensors file: its header checked, each tensor mapped into memory by itself.

What was touched of a mapping counts as memory in use until the mapping goes. One mapping a tensor goes with the tensor; one of the
whole file, as other readers make, keeps every page that was ever read.
"""

import contextlib
import json
import math
import mmap
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, cast

import torch
from torch import Tensor

from wnq.checkpoints.source import TensorInfo

MAX_HEADER = 32 * 2**20
"""Enough for a hundred thousand tensors; a larger length is damage, or a file made to exhaust memory."""

MAX_DIMENSIONS = 64
"""As many as torch can view."""

PACKED = "wnq"
"""The entry in the metadata of a packed file."""

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "I64": "int64",
    "U64": "uint64",
    "F64": "float64",
    "C64": "complex64",
}


class MappedFile:
    """Tensors of a safetensors file.

    Raises:
        ValueError: it is not one, is damaged, or is a packed wnq file.
    """

    def __init__(self, path: Path) -> None:
        with at(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 10 or length > MAX_HEADER or file.read(1) != b"{":
                raise ValueError(
                    f"{path} is not a safetensors file, or its header is damaged; download or copy it again."
                )
            if length > size - 8:
                raise ValueError(
                    f"{path} is truncated: its header needs {8 + length:,} bytes, the file has {size:,}; download or copy it again."
                )
            file.seek(8)
            header = parsed(path, file.read(length))
        if not isinstance(header, dict):
            raise ValueError(f"{path} is not a safetensors file; expected a table of tensors in its header.")
        table = cast(dict[str, Any], header)
        metadata = table.pop("__metadata__", None)
        if isinstance(metadata, dict) and PACKED in metadata:
            raise ValueError(
                f"{path} is a packed wnq file, which holds codes instead of weights; write its weights out with `wnq unpack` "
                "and open that."
            )
        self._path = path
        self._start = 8 + length
        self._offsets: dict[str, int] = {}
        stored: dict[str, TensorInfo] = {}
        for name, entry in table.items():
            stored[name], self._offsets[name] = _checked(path, name, entry)
        self.stored: Mapping[str, TensorInfo] = stored
        self._check_layout(size - self._start)

    def _check_layout(self, size: int) -> None:
        """Raise ``ValueError`` unless the tensors fill the file: one behind the other, nothing shared, nothing left over."""
        end, last = 0, "the header"
        for name in sorted(self.stored, key=lambda name: (self._offsets[name], self.stored[name].bytes)):
            start = self._offsets[name]
            if start != end:
                fault = "overlaps" if start < end else "leaves a gap after"
                raise ValueError(f"{self._path}: tensor {name!r} {fault} {last}; the header is damaged.")
            end, last = start + self.stored[name].bytes, f"tensor {name!r}"
        if end > size:
            raise ValueError(
                f"{self._path} is truncated: its tensors need {end:,} bytes, the file has {max(0, size):,} for them; "
                "download or copy it again."
            )
        if end < size:
            raise ValueError(f"{self._path}: {size - end:,} bytes follow the last tensor; the header is damaged.")

    def read(self, name: str) -> Tensor:
        """Return a tensor whose memory is the file's until it is written to, and leaves with it."""
        info = self.stored[name]
        if not info.bytes:
            return torch.empty(info.shape, dtype=info.dtype)
        offset = self._start + self._offsets[name]
        before = offset % mmap.ALLOCATIONGRANULARITY
        with at(self._path) as file:
            if file.seek(0, 2) < offset + info.bytes:
                raise ValueError(f"{self._path} became shorter since it was opened; open it again once it is complete.")
            memory = mmap.mmap(file.fileno(), before + info.bytes, access=mmap.ACCESS_COPY, offset=offset - before)
        raw = torch.frombuffer(memory, dtype=torch.uint8, count=info.bytes, offset=before)
        if offset % info.dtype.itemsize:
            raw = raw.clone()
        return raw.view(info.dtype).reshape(info.shape)


@contextlib.contextmanager
def at(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a file to read; ``ValueError`` if it is missing, ``OSError`` for anything else, each in one sentence."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}.") from None


def parsed(path: Path, text: bytes) -> object:
    """Return what the JSON says; ``ValueError`` if it is none, or names something twice."""

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        table = dict(pairs)
        if len(table) < len(pairs):
            raise ValueError("a name stands twice")
        return table

    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise ValueError(f"{path} is damaged: its header or index is not valid JSON ({reason}).") from None


def _checked(path: Path, name: str, entry: object) -> tuple[TensorInfo, int]:
    table = cast(dict[str, Any], entry) if isinstance(entry, dict) else {}
    kind, shape, offsets = table.get("dtype"), table.get("shape"), table.get("data_offsets")
    if (
        not (isinstance(kind, str) and _naturals(shape) and _naturals(offsets))
        or len(shape) > MAX_DIMENSIONS
        or len(offsets) != 2
        or offsets[0] > offsets[1]
    ):
        raise ValueError(f"{path}: the header's entry for tensor {name!r} is damaged.")
    dtype = getattr(torch, DTYPES.get(kind, ""), None)
    if dtype is None:
        raise ValueError(f"{path}: tensor {name!r} has the type {kind}, which this torch cannot read.")
    size = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != size:
        raise ValueError(
            f"{path}: tensor {name!r} of shape {tuple(shape)} and type {kind} needs {size:,} bytes, but the header gives it "
            f"{offsets[1] - offsets[0]:,}; the header is damaged."
        )
    return TensorInfo(name, tuple(shape), dtype, size, path), offsets[0]


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in cast(list[object], value))
