"""Damage to the content of a packed file, with every checksum recomputed that can be, as a hostile author would.

What such a file says need not be refused, but it must be loaded as it says.
"""

import copy
import functools
import hashlib
import struct
from typing import Any

import numpy as np
from fuzz_blind import TORCH, WIDTHS, Mutation, put_together, take_apart

NASTY: list[Any] = [
    *(0, 1, -1, 2, 3, 8, 9, 255, 256, 300, 65_536, 2**31, 2**48, 2**62, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(
        0.5,
        -0.0,
        1e308,
        "",
        "x",
        "0",
        "stem",
        "../../etc/passwd",
        "os.system",
        "\0",
        "é" * 50,
        "none",
        "ans",
        "zstd",
        "bits",
    ),
    *(None, True, False, [], {}, [[]], [0], [1, 2, 3], {"a": 1}, [2**40, 2**40], [-1, 3], [0, 2**62, 2**62], [1] * 70),
]


def document_edited(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Any value of the document replaced, dropped, doubled or exchanged with a neighbour."""
    tensors, document = take_apart(data)
    for _ in range(rng.integers(1, 4)):
        nodes: list[Any] = [document]
        for node in nodes:
            inner = node.values() if isinstance(node, dict) else node
            nodes += [value for value in inner if isinstance(value, dict | list) and value]
        node = nodes[rng.integers(len(nodes))]
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key, other = keys[rng.integers(len(keys))], keys[rng.integers(len(keys))]
        kind = rng.integers(6)
        if kind < 3:
            node[key] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        elif kind == 3:
            node[key], node[other] = node[other], node[key]
        elif kind == 4:
            del node[key]
        elif isinstance(node, dict):
            node[("x", "shift", "")[rng.integers(3)]] = copy.deepcopy(NASTY[rng.integers(len(NASTY))])
        else:
            node += node[:2000] if rng.random() < 0.8 else [node[key]] * 3000
        if not document:
            break
    return put_together(tensors, document)


def storage_edited(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Shapes, widths, axes and shifts of the stored weights, huge and merely wrong."""
    tensors, document = take_apart(data)
    kinds = [kind for kind in document["plan"]["kinds"] if "bits" in kind]
    kind = kinds[rng.integers(len(kinds))]
    shape, what = kind["shape"], rng.integers(5)
    if what == 0:
        shapes = [
            [2**40, 2**40],
            [2**20, 2**20],
            [0, 2**62],
            [1],
            [],
            [2**24],
            shape[::-1],
            [*shape, 1],
            [2 * shape[0]],
        ]
        kind["shape"] = shapes[rng.integers(len(shapes))]
    elif what == 1:
        kind["bits"] = int(rng.integers(-1, 11))
    elif what == 2:
        kind["axis"] = int(rng.integers(-2, 6))
    elif what == 3:
        kind["shift"] = int(rng.integers(-2, 260))
    else:
        for name in list(tensors):
            if name.endswith("weight_shape"):
                tensors[name] = ("I64", [2], rng.choice([0, 1, 2**62, -1, 9, 216, 8, 27], 2).astype("<i8").tobytes())
    return put_together(tensors, document)


def values_edited(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """NaN, infinite, huge and random values in any tensor: scales, grids, levels, codes."""
    tensors, document = take_apart(data)
    names = [name for name in tensors if tensors[name][2]]
    dtype, shape, raw = tensors[name := names[rng.integers(len(names))]]
    changed = bytearray(raw)
    width = WIDTHS.get(dtype, 1)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(max(1, len(raw) // width))) * width
        words = [rng.bytes(width), b"\xff" * width, bytes(width)]
        if dtype == "F32":
            words += [
                struct.pack("<f", value)
                for value in (float("nan"), float("inf"), -float("inf"), 3e38, -1.0, 0.0, 1e-45)
            ]
        changed[at : at + width] = words[rng.integers(len(words))]
    tensors[name] = (dtype, shape, bytes(changed))
    return put_together(tensors, document)


def tensors_swapped(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Contents and names exchanged within a file, taken from another one, retyped, reshaped, dropped, cut."""
    tensors, document = take_apart(data)
    theirs, _ = take_apart(other)
    names = list(tensors)
    one, two, kind = names[rng.integers(len(names))], names[rng.integers(len(names))], rng.integers(6)
    dtype, shape, raw = tensors[one]
    if kind == 0:
        tensors[one], tensors[two] = tensors[two], tensors[one]
    elif kind == 1:
        tensors[one] = (dtype, shape, (tensors[two][2] * (len(raw) + 1))[: len(raw)])
    elif kind == 2:
        tensors[one] = theirs[one] if one in theirs else theirs[list(theirs)[rng.integers(len(theirs))]]
    elif kind == 3:
        new = list(TORCH)[rng.integers(len(TORCH))]
        if len(raw) % WIDTHS.get(new, 1) == 0:
            tensors[one] = (new, [len(raw) // WIDTHS.get(new, 1)], raw)
    elif kind == 4:
        del tensors[one]
    else:
        tensors["extra.weight" if rng.random() < 0.5 else one + "x"] = tensors[one]
    return put_together(tensors, document)


def streams_edited(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    """Lengths, methods, order, digests and bytes of the streams; of a file without any, the coder."""
    tensors, document = take_apart(data)
    coder = document.get("coder")
    if not coder or not coder["streams"]:
        theirs, donor = take_apart(other)
        document["coder"] = donor.get("coder", {"name": "ans", "versions": {}, "streams": [["ans", 5, "0" * 16]]})
        if "weights.coded" in theirs and rng.random() < 0.7:
            tensors["weights.coded"] = theirs["weights.coded"]
        return put_together(tensors, document)
    rows = coder["streams"]
    row, two, kind = rows[rng.integers(len(rows))], rows[rng.integers(len(rows))], rng.integers(6)
    raw = bytearray(tensors["weights.coded"][2])
    if kind == 0:
        row[1] = [0, 1, -1, row[1] + 1, row[1] - 1, 2**63, len(raw), 2**47][rng.integers(8)]
    elif kind == 1:
        row[0] = ["bits", "zstd", "ans", "none", "", 3][rng.integers(6)]
    elif kind == 2:
        row[:], two[:] = two[:], row[:]
    elif kind == 3:
        row[2] = ["", "0" * 16, two[2], 3, None][rng.integers(5)]
    elif kind == 4:
        for _ in range(rng.integers(1, 9)):
            raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
    else:
        length = int(2 ** rng.uniform(0, 8))
        delta = int(rng.integers(-length, length + 1))
        row[1], two[1] = row[1] + delta, two[1] - delta
    tensors["weights.coded"] = ("U8", [len(raw)], bytes(raw))
    return put_together(tensors, document)


@functools.cache
def _bomb(size: int, announced: int | None) -> bytes:
    """Return a Zstandard frame of many zeros, which may announce another size."""
    import zstandard

    compressor = zstandard.ZstdCompressor(level=1).compressobj(size=size)
    piece = bytes(min(size, 2**17))  # never the whole of it: the worker's memory is limited
    stream = bytearray(b"".join([*(compressor.compress(piece) for _ in range(size // len(piece))), compressor.flush()]))
    if announced is not None:  # a frame of one segment: magic, descriptor, size in 4 bytes
        descriptor = stream[4]
        if descriptor >> 6 == 2:
            at = 5 + (0 if descriptor & 0x20 else 1)
            stream[at : at + 4] = struct.pack("<I", announced)
    return bytes(stream)


def bombs(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Streams that stand for far more than the file: zeros in a frame, codes of no entropy, a repeated table."""
    tensors, document = take_apart(data)
    coder, kind = document.get("coder"), rng.integers(4)
    if not coder or not coder["streams"] or kind == 0:
        small = document["small"]
        entries = int(rng.choice([50, 500]))
        small["kinds"].append({str(i): ["bool", [0]] for i in range(entries)})
        small["modules"] += [[f"m{i}", len(small["kinds"]) - 1] for i in range(int(rng.choice([1, 10, 700])))]
        return put_together(tensors, document)
    rows = coder["streams"]
    number = int(rng.integers(len(rows)))
    start = sum(row[1] for row in rows[:number])
    raw = tensors["weights.coded"][2]
    stored = [document["plan"]["kinds"][row[1]] for row in document["plan"]["layers"]]
    layer = [kind for kind in stored if "bits" in kind][number]
    count = int(np.prod(layer["shape"]))
    if kind == 1:
        width = 1 << (layer["bits"] - 1).bit_length()
        announced = (None, (count * width + 7) // 8)[rng.integers(2)]
        method, stream = "zstd", _bomb(int(rng.choice([2**17, 2**22, 2**28])), announced)
    else:
        method, stream = "ans", b"\x01" + b"\x01".ljust(-(-(2 ** layer["bits"]) // 8), b"\0")
        if kind == 3:
            layer["shape"] = [int(2 ** rng.integers(10, 44)), 1]
    digest = hashlib.sha256(bytes(count)).hexdigest()[:16]
    tail = raw[start + rows[number][1] :]
    rows[number] = [method, len(stream), digest if rng.random() < 0.5 else rows[number][2]]
    joined = raw[:start] + stream + tail
    tensors["weights.coded"] = ("U8", [len(joined)], joined)
    return put_together(tensors, document)


def many_tensors(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """A valid file with thousands of tensors more, of no elements; near the limit, and beyond it."""
    tensors, document = take_apart(data)
    tensors |= {f"{i}.x": ("U8", [0], b"") for i in range(int(rng.choice([100, 8_000, 9_000])))}
    return put_together(tensors, document)


SEALED: dict[str, Mutation] = {
    **{"document, sealed": document_edited, "storage, sealed": storage_edited, "values, sealed": values_edited},
    **{"tensors, sealed": tensors_swapped, "streams, sealed": streams_edited, "bombs, sealed": bombs},
    "many tensors, sealed": many_tensors,
}
