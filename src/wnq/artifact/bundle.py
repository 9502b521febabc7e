"""Many small tensors as a few large ones.

An entry of a safetensors table takes about 90 bytes, more than the statistics of a small BatchNorm or a step. So
tensors under 4 KiB are laid end to end, one tensor a dtype, named ``small.<dtype>``. The table that tells them apart
groups them by module, and modules whose tensors have the same names, types and shapes share one entry.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PREFIX = "small."
LIMIT = 4096
"""Bytes from which a tensor keeps an entry of its own."""

MAX_TENSORS = 1 << 13
"""Small tensors that a file may have, and large ones: reading each takes time, and a table that repeats one kind is short."""

MAX_LENGTH, MAX_DIMS = 2**48, 64
"""Bounds of a shape that a file may give: products of more, or longer, dimensions are refused before they are computed."""


def bundle(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Lay tensors end to end.

    Args:
        tensors: CPU tensors by key.

    Returns:
        One 1-dimensional tensor a dtype, and the table for :func:`unbundle`, which is of JSON types:
        ``{"kinds": [{name: [dtype, shape]}], "modules": [[path, kind number]]}``.
    """
    modules: dict[str, dict[str, list[Any]]] = {}
    parts: dict[str, list[Tensor]] = {}
    for key in sorted(tensors, key=_split):
        path, name = _split(key)
        dtype = _name(tensors[key].dtype)
        modules.setdefault(path, {})[name] = [dtype, list(tensors[key].shape)]
        parts.setdefault(dtype, []).append(tensors[key].reshape(-1))
    kinds: list[dict[str, list[Any]]] = []
    for entries in modules.values():
        if entries not in kinds:
            kinds.append(entries)
    table = {"kinds": kinds, "modules": [[path, kinds.index(entries)] for path, entries in modules.items()]}
    return {PREFIX + dtype: torch.cat(flat) for dtype, flat in parts.items()}, table


def unbundle(tensors: Mapping[str, Tensor], table: Any) -> dict[str, Tensor]:
    """Undo :func:`bundle`. The table is not trusted.

    Args:
        tensors: the bundles by name.
        table: as :func:`bundle` returned it.

    Raises:
        ValueError: the table is malformed or does not account for every element, once.
    """
    kinds, modules = _lists(table)
    used = dict.fromkeys(tensors, 0)
    found: dict[str, Tensor] = {}
    for path, index in modules:
        for name, dtype, shape, size in kinds[index]:
            bundled = tensors.get(PREFIX + dtype)
            start = used.get(PREFIX + dtype, 0)
            key = f"{path}.{name}" if path else name
            if bundled is None or _name(bundled.dtype) != dtype or bundled.ndim != 1 or start + size > bundled.numel():
                raise ValueError(f"tensor {key!r} of {dtype[:20]} {str(shape)[:80]} is not in the file")
            if key in found:
                raise ValueError(f"tensor {key!r} stands twice in the table of small tensors")
            found[key] = bundled[start : start + size].reshape(shape).clone()
            used[PREFIX + dtype] = start + size
    for name, end in used.items():
        if end != tensors[name].numel():
            raise ValueError(f"the table of small tensors covers {end} of {tensors[name].numel()} elements of {name!r}")
    return found


def _lists(table: Any) -> tuple[list[list[tuple[str, str, list[int], int]]], list[tuple[str, int]]]:
    """Return the kinds, each a list of name, dtype, shape and number of elements, and the modules."""
    match table:
        case {"kinds": list(listed), "modules": list(rows)} if len(table) == 2:
            kinds = [_kind(entries) for entries in listed]
        case _:
            raise ValueError("the table of small tensors must have the lists 'kinds' and 'modules'")
    modules: list[tuple[str, int]] = []
    count = 0
    for row in rows:
        match row:
            case [str(path), int(index)] if type(index) is int and 0 <= index < len(kinds):
                modules.append((path, index))
                count += len(kinds[index])
            case _:
                raise ValueError(f"a module of the table of small tensors must be [path, kind number], got {row!r:.80}")
    if count > MAX_TENSORS:
        raise ValueError(f"the table of small tensors has {count:,} entries, more than {MAX_TENSORS:,}")
    return kinds, modules


def _kind(entries: Any) -> list[tuple[str, str, list[int], int]]:
    if not isinstance(entries, dict):
        raise ValueError(f"a kind of the table of small tensors must be an object, got {entries!r:.80}")
    found: list[tuple[str, str, list[int], int]] = []
    for name, entry in sorted(entries.items()):
        match entry:
            case [str(dtype), list(shape)] if is_shape(shape):
                found.append((name, dtype, shape, math.prod(shape)))
            case _:
                raise ValueError(f"small tensor {name!r} must have [dtype, shape], got {entry!r:.80}")
    return found


def is_shape(lengths: list[Any]) -> bool:
    """Return whether a list from a file is a shape whose elements torch can count, even where there are none."""
    if len(lengths) > MAX_DIMS or not all(type(length) is int and 0 <= length < MAX_LENGTH for length in lengths):
        return False
    return math.prod(max(1, length) for length in lengths) < MAX_LENGTH


def _split(key: str) -> tuple[str, str]:
    path, _, name = key.rpartition(".")
    return path, name


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
