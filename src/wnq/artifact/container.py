"""The file format under an artifact: safetensors, one JSON document in its header, checksums over both.

A file is plain data. Reading one parses numbers and text; it never imports, unpickles or calls anything that the file
names. All it says is checked before it is used: lengths against the size of the file, contents against SHA-256.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from wnq.artifact.bundle import LIMIT, MAX_TENSORS, PREFIX, bundle, unbundle
from wnq.artifact.layout import PACKED
from wnq.files import replacing

FORMAT = "wnq"
FORMAT_VERSION = 2
"""What is written; files of all earlier versions are read. Endings PACKED of tensors' names have a checksum of their own."""

# Enough for thousands of layers; more is damage, or a file made to exhaust memory or time.
_MAX_HEADER = 2**20
_LONGEST = 1000


class ArtifactError(ValueError):
    """A file cannot be read as an artifact, or does not fit the model it is loaded into."""

    def __init__(self, message: str) -> None:
        super().__init__(message if len(message) <= _LONGEST else f"{message[:_LONGEST]} …")  # names come from the file


def write_artifact(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, apart: Collection[str] = ()
) -> None:
    """Write tensors and metadata to a safetensors file, whole or not at all. The same content gives the same bytes.

    Args:
        path: where to; an existing file is replaced only once the new one is complete.
        tensors: dense tensors by name, on any device; those ending in :data:`PACKED` get a checksum each, all others
            share one with the metadata.
        metadata: JSON types; ``format``, ``format_version``, ``sha256`` and ``small`` are added.
        apart: names of tensors that get an entry of their own however small they are.

    Raises:
        ValueError: a name is reserved for the bundles of small tensors, ``small.<dtype>``; or there are too many tensors.
        OSError: the file cannot be written (a full disk, no permission); nothing is left behind.
    """
    stored = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}
    small = {
        name: tensor
        for name, tensor in stored.items()
        if tensor.nbytes < LIMIT and not name.endswith(PACKED) and name not in apart
    }
    bundles, table = bundle(small)
    stored = {name: tensor for name, tensor in stored.items() if name not in small}
    if taken := sorted(stored.keys() & bundles.keys()):
        raise ValueError(f"the tensor name {taken[0]!r} is reserved; rename it.")
    stored |= bundles
    document = {**metadata, "format": FORMAT, "format_version": FORMAT_VERSION, "small": table}
    document["sha256"] = _checksums(stored, document)
    # One entry, because safetensors writes several in random order.
    data = safetensors_torch.save(stored, metadata={FORMAT: _dump(document)})
    if max(len(small), len(stored)) > MAX_TENSORS or int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise ValueError(
            f"a packed file has at most {MAX_TENSORS:,} tensors, {MAX_TENSORS:,} of less than {LIMIT} bytes, and a header of "
            f"{_MAX_HEADER:,} bytes, but the model needs {len(stored):,}, {len(small):,} and "
            f"{int.from_bytes(data[:8], 'little'):,}."
        )
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def read_artifact(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file that :func:`write_artifact` wrote.

    Returns:
        The tensors on the CPU, and the metadata with ``format``, ``format_version`` and ``sha256``. Of the metadata
        only these three are validated: the rest is whatever JSON the file holds.

    Raises:
        ArtifactError: the file is missing, truncated, not safetensors, not an artifact, of a newer version, or damaged.
    """
    path = Path(path)
    data, header = _read(path)
    document = _document(path, header)
    try:
        tensors = safetensors_torch.load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        text = str(error).splitlines()[0]
        raise ArtifactError(f"{path}: not a valid safetensors file, or a truncated one ({text}).") from None
    _verify(path, tensors, document)
    bundles = {name: tensor for name, tensor in tensors.items() if name.startswith(PREFIX)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in bundles}
    try:
        small = unbundle(bundles, document.pop("small", None))
    except ValueError as error:
        raise ArtifactError(f"{path}: {error}; the file is damaged.") from None
    if twice := sorted(small.keys() & tensors.keys()):
        raise ArtifactError(f"{path}: tensor {twice[0]!r} stands in the file twice; the file is damaged.")
    return tensors | small, document


def header_size(path: str | Path) -> int:
    """Return the bytes before the first tensor: length field, tensor table and metadata."""
    with Path(path).open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _read(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return a file and its header; a file whose lengths do not fit its size is not read whole."""
    try:
        size = path.stat().st_size
        if not path.is_file():  # a pipe or a device could be read forever
            raise ArtifactError(f"{path}: not a file; expected one that wnq.save wrote.")
        with path.open("rb") as file:
            begin = file.read(9)
            length = int.from_bytes(begin[:8], "little")
            if len(begin) < 9 or not 2 <= length <= _MAX_HEADER or begin[8:] != b"{":
                raise ArtifactError(f"{path}: not a safetensors file; expected one that wnq.save wrote.")
            if length > size - 8:
                raise _truncated(path, "header", 8 + length, size)
            begin += file.read(length - 1)
            header = _parse(path, begin[8:])
            end = 8 + length + _announced(path, header)
            if end > size:
                raise _truncated(path, "tensors", end, size)
            if end < size:
                raise ArtifactError(f"{path}: {size - end:,} bytes follow its last tensor; the file is damaged.")
            return begin + file.read(), header
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}.") from None


def _truncated(path: Path, part: str, needed: int, size: int) -> ArtifactError:
    needs = "needs" if part == "header" else "need"
    return ArtifactError(
        f"{path}: truncated, its {part} {needs} {needed:,} bytes but the file has {size:,}; copy it again."
    )


def _announced(path: Path, header: Any) -> int:
    """Return where the last tensor ends, by the header."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"] if isinstance(header, dict) else None
    if entries is None or len(entries) > MAX_TENSORS:
        raise ArtifactError(f"{path}: not a file of at most {MAX_TENSORS:,} tensors; expected one that wnq.save wrote.")
    end = 0
    for entry in entries:
        match entry:
            case {"data_offsets": [int(_), int(stop)]} if 0 <= stop < 2**63:
                end = max(end, stop)
            case _:
                raise ArtifactError(f"{path}: not a safetensors file; expected one that wnq.save wrote.")
    return end


def _document(path: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata, checked for format and version."""
    entries = header.get("__metadata__")
    text = entries.get(FORMAT) if isinstance(entries, dict) else None
    document = _parse(path, text) if isinstance(text, str) else None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ArtifactError(
            f"{path}: a safetensors file, but not one of wnq: its header has no {FORMAT!r} entry; "
            "expected one that wnq.save wrote."
        )
    version = document.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path}: format_version must be a positive integer, got {version!r}; the file is damaged.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path}: written in format version {version}, but this wnq reads versions up to {FORMAT_VERSION}; "
            "upgrade wnq."
        )
    try:
        canonical = _dump(document) == text
    except (ValueError, RecursionError):  # NaN, lone surrogates
        canonical = False
    if not canonical:
        raise ArtifactError(f"{path}: the metadata is not written as wnq.save writes it; the file is damaged.")
    return document


def _verify(path: Path, tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> None:
    """Compare the checksums of what is stored, before anything of it is decoded."""
    recorded = document.get("sha256")
    expected = _checksums(tensors, document)
    if (
        not isinstance(recorded, dict)
        or recorded.keys() != expected.keys()
        or not isinstance(recorded["packed"], list)
        or len(recorded["packed"]) != len(expected["packed"])
    ):
        raise ArtifactError(
            f"{path}: the checksums do not cover the {len(expected['packed'])} packed tensors; the file is damaged."
        )
    for name, recorded_one, expected_one in zip(_packed(tensors), recorded["packed"], expected["packed"], strict=True):
        if recorded_one != expected_one:
            raise ArtifactError(
                f"{path}: tensor {name!r} does not match its checksum; the file is damaged, copy it again."
            )
    if recorded["rest"] != expected["rest"]:
        raise ArtifactError(
            f"{path}: the metadata or a tensor that is not packed does not match the checksum; "
            "the file is damaged, copy it again."
        )


def _checksums(tensors: Mapping[str, Tensor], document: Mapping[str, Any]) -> dict[str, Any]:
    """Return SHA-256 of each packed tensor in order of name, and one over all other tensors and the metadata."""
    packed = _packed(tensors)
    rest = hashlib.sha256(_dump({k: v for k, v in document.items() if k != "sha256"}).encode())
    for name in sorted(tensors.keys() - set(packed)):
        tensor = tensors[name]
        rest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        rest.update(_raw(tensor))
    # 64 bits name a damaged tensor well enough, and a file of many small layers has room for no more.
    return {
        "packed": [hashlib.sha256(_raw(tensors[name])).hexdigest()[:16] for name in packed],
        "rest": rest.hexdigest(),
    }


def _packed(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(name for name in tensors if name.endswith(PACKED))


def _raw(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _dump(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text.encode()  # raises for a lone surrogate
    return text


def _parse(path: Path, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ArtifactError(f"{path}: the header is not valid JSON; the file is damaged or not safetensors.") from None
