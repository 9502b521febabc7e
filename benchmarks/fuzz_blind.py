"""Files taken apart and put together from the format's page alone, without the library, and damage done blindly.

A mutation takes a random generator, the bytes of a valid file and those of another one, and returns bytes. Most of what those
here return must be refused; nothing of it may load as anything but the original. ``fuzz_sealed`` has those that mend checksums.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Mutation = Callable[[np.random.Generator, bytes, bytes], bytes]
Tensors = dict[str, tuple[str, list[int], bytes]]

TORCH = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"},
    **{"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"},
}
WIDTHS = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


def take_apart(data: bytes) -> tuple[Tensors, dict[str, Any]]:
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    document = json.loads(table.pop("__metadata__")["wnq"])
    tensors = {
        name: (
            entry["dtype"],
            entry["shape"],
            data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in table.items()
    }
    return tensors, document


def dump(document: Any) -> str:
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def put_together(tensors: Tensors, document: dict[str, Any], *, seal: bool = True) -> bytes:
    if seal:
        packed = sorted(name for name in tensors if name.endswith("weight_packed"))
        rest = hashlib.sha256(dump({key: value for key, value in document.items() if key != "sha256"}).encode())
        for name in sorted(tensors.keys() - set(packed)):
            dtype, shape, raw = tensors[name]
            rest.update(f"\n{name} torch.{TORCH.get(dtype, dtype)} {shape} ".encode() + raw)
        digests = [hashlib.sha256(tensors[name][2]).hexdigest()[:16] for name in packed]
        document = {**document, "sha256": {"packed": digests, "rest": rest.hexdigest()}}
    table: dict[str, Any] = {"__metadata__": {"wnq": dump(document)}}
    body = b""
    for name, (dtype, shape, raw) in tensors.items():
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return framed(dump(table), body)


def framed(header: str, body: bytes) -> bytes:
    text = header.encode(errors="surrogatepass")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


# --- blindly -----------------------------------------------------------------------------------------------------------------


def flipped_bits(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def random_bytes(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    start, length = rng.integers(len(data)), int(2 ** rng.uniform(0, 12))
    return data[:start] + rng.bytes(length) + data[start + length :]


def noise(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    body = rng.bytes(int(2 ** rng.uniform(0, 14)))
    begin = (b"", struct.pack("<Q", min(2, len(body))), struct.pack("<Q", len(body)) + b"{", data[:9])[rng.integers(4)]
    return begin + body


def cut(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    start, length = rng.integers(len(data)), int(2 ** rng.uniform(0, 13))
    return (data[:start], data[:start] + data[start + length :], data + rng.bytes(length), data + data)[rng.integers(4)]


def spliced(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    source = (data, other)[rng.integers(2)]
    start, begin, length = rng.integers(len(data)), rng.integers(len(source)), int(2 ** rng.uniform(0, 13))
    piece = source[begin : begin + length]
    return data[:start] + piece + data[start + (len(piece) if rng.random() < 0.5 else 0) :]


def header_length(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    true = int.from_bytes(data[:8], "little")
    lengths = [
        0,
        1,
        2,
        2**31,
        2**32,
        2**53,
        2**62,
        2**63,
        2**63 - 1,
        2**64 - 1,
        len(data),
        len(data) - 8,
        len(data) - 7,
    ]
    lengths += [true + int(rng.integers(-40, 41)), int(rng.integers(2**20)), 2**20, 2**20 + 1]
    return struct.pack("<Q", max(0, lengths[rng.integers(len(lengths))])) + data[8:]


# --- in the table of tensors ------------------------------------------------------------------------------------------------


def offsets(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Overlapping, cyclic, negative, reversed, huge and swapped places of tensors."""
    start = 8 + int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8:start]), data[start:]
    names = [name for name in table if name != "__metadata__"]
    places = {name: table[name]["data_offsets"] for name in names}
    for _ in range(rng.integers(1, 4)):
        one, two = (names[rng.integers(len(names))] for _ in range(2))
        begin, end = places[one]
        choices = [places[two], [end, begin], [begin - 1, end - 1], [begin + 1, end + 1], [-1, end], [begin, 2**63]]
        choices += [
            [2**64 - 1, 2**64],
            [0, len(body)],
            [begin, begin],
            [begin],
            [begin, end, end],
            [0.5, 1.5],
            [True, 8],
        ]
        table[one] = {**table[one], "data_offsets": [*choices, None][rng.integers(len(choices) + 1)]}
    return framed(dump(table), body)


def table_entries(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Wrong types and shapes, tensors renamed, dropped, doubled, and keys that stand twice."""
    start = 8 + int.from_bytes(data[:8], "little")
    table, body = json.loads(data[8:start]), data[start:]
    names = [name for name in table if name != "__metadata__"]
    name = names[rng.integers(len(names))]
    entry, kind = table[name], rng.integers(7)
    if kind == 0:
        entry["dtype"] = [*TORCH, "F4", "X", "", 3, None][rng.integers(len(TORCH) + 5)]
    elif kind == 1:
        shapes = [
            entry["shape"][::-1],
            [*entry["shape"], 1],
            [1, *entry["shape"]],
            [2**64 - 1] * 2,
            [0, 2**63],
            [-1],
            [],
            None,
        ]
        entry["shape"] = shapes[rng.integers(len(shapes))]
    elif kind == 2:
        table[[name + "x", "", "small.float32", "weights.coded", "a.weight_packed"][rng.integers(5)]] = table.pop(name)
    elif kind == 3:
        del table[name]
    elif kind == 4:
        table["extra.weight_packed"] = {"dtype": "U8", "shape": [0], "data_offsets": [len(body), len(body)]}
    elif kind == 5:
        doubled = f"{json.dumps(name)}:{dump(entry)},"
        return framed("{" + doubled * int(rng.integers(1, 4)) + dump(table)[1:], body)
    else:
        table["__metadata__"] = [None, {}, {"wnq": 3}, {"wnq": ""}, {"wnq": "[" * 5000}, {"wnq": "{}"}, []][
            rng.integers(7)
        ]
    return framed(dump(table), body)


_EMPTY = ",".join(f'"{i}.x":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}' for i in range(8_000))
_LARGE = (
    "{" + _EMPTY + "}",
    "{" + _EMPTY.replace(".x", ".y") + "," + _EMPTY.replace(".x", ".z") + "}",
    '{"a":' + "[" * 400_000,
    '{"a":[' + "{}," * 340_000 + "{}]}",
    '{"a":[' + "[]," * 340_000 + "[]]}",
    '{"__metadata__":{"wnq":"' + "x" * 1_000_000 + '"}}',
    '{"__metadata__":{"wnq":"' + "x" * 2_000_000 + '"}}',
    '{"a":' + "9" * 4000 + "}",
)


def large_header(rng: np.random.Generator, data: bytes, _: bytes) -> bytes:
    """Megabytes of tensors of no elements, of brackets, of objects, of text, of digits."""
    return framed(_LARGE[rng.integers(len(_LARGE))], b"")


BLIND: dict[str, Mutation] = {
    **{"bits flipped": flipped_bits, "random bytes": random_bytes, "noise": noise, "cut": cut, "spliced": spliced},
    **{"header length": header_length, "offsets": offsets, "table entries": table_entries},
}
RARE: dict[str, Mutation] = {"large header": large_header}
