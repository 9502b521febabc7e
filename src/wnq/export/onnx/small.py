"""The small flavour: weights at their true width, rebuilt by standard operators that an engine folds when it loads the file.

A weight of k bits is k planes of one bit: byte i of a plane holds bit j of the codes 8i to 8i + 7, the first in the lowest bit.

    code = sum over j of 2^j * (plane_j[i] & (1 << position) != 0),     integer = stride * code + start

so that BitwiseAnd, two Casts, Mul, ReduceSum, Reshape, Mul, Add, and a Cast to int8 give the integers of the fast flavour back.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from wnq.export.onnx.graph import (
    array_of,
    drop_unread_,
    initializers,
    prepend_nodes_,
    readers_of,
    replace_initializers_,
    tensor_of,
)

PLAIN_TYPES = (1, 2, 3, 6, 7)
"""ONNX's numbers of the types that rebuild weights: float32, uint8, int8, int32, int64."""

MASK = "bits"
"""Name of the initializer 1, 2, 4, …, 128, which all weights share."""


def affine_codes(integers: Any, axis: int) -> tuple[Any, Any, Any, int]:
    """Return ``(codes, stride, start, bits)`` with ``integers == stride * codes + start``, in the fewest bits.

    Args:
        integers: int8 or uint8, any shape.
        axis: of the channels. ``start`` and ``stride`` are one number each, or one a channel where that takes fewer bits: a start
            for grids that are not symmetric behind a BatchNorm with factors of either sign, a stride for channels whose integers
            are multiplied by different numbers.
    """
    wide = integers.astype(np.int32)
    if wide.size == 0:
        return wide.astype(np.uint8), np.int32(1), np.int32(0), 1
    others = tuple(d for d in range(wide.ndim) if d != axis)
    best: tuple[Any, Any, Any, int] | None = None
    for channels in ((), ("start",), ("start", "stride")):
        start = wide.min(axis=others if "start" in channels else None, keepdims="start" in channels)
        above = wide - start
        stride = np.gcd.reduce(above, axis=others if "stride" in channels else None, keepdims="stride" in channels)
        stride = np.maximum(stride, 1)
        codes = above // stride
        bits = max(1, int(codes.max()).bit_length())
        if best is None or bits < best[3]:
            best = codes.astype(np.uint8), stride.astype(np.int32), start.astype(np.int32), bits
    assert best is not None
    return best


def planes_of(codes: Any, bits: int) -> Any:
    """Return ``(bits, ceil(n / 8), 1)`` bytes."""
    flat = np.concatenate([codes.ravel(), np.zeros(-codes.size % 8, np.uint8)])
    return np.stack([np.packbits(flat >> j & 1, bitorder="little") for j in range(bits)])[..., None]


class _Rebuilt:
    """The operators that rebuild one weight, each reading the one before."""

    def __init__(self, name: str, shared: dict[str, Any]) -> None:
        self.name = name
        self.shared = shared
        self.tensors: list[Any] = []
        self.nodes: list[Any] = []
        self.last = ""

    def own(self, part: str, numbers: Any) -> str:
        """Store numbers of this weight alone, and return their name."""
        self.tensors.append(tensor_of(f"{self.name}:{part}", numbers))
        return f"{self.name}:{part}"

    def common(self, name: str, numbers: Any) -> str:
        """Store numbers that weights share, and return their name."""
        self.shared.setdefault(name, tensor_of(name, numbers))
        return name

    def apply(self, kind: str, *sources: str, output: str = "", **attributes: Any) -> str:
        """Add an operator, and return the name of its output."""
        from onnx import helper

        self.last = output or f"{self.name}:{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(sources), [self.last], **attributes))
        return self.last


def shrink_(model: Any, split: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """Turn a fast model into the small flavour, in place, and return weight -> bits that its integers take now.

    Args:
        model: the fast model.
        split: what :func:`wnq.export.onnx.split.split_` returned: weights that are stored whole and split when they are rebuilt.

    Weights that would not become smaller stay.
    """
    from onnx import TensorProto

    new: dict[str, list[Any]] = {}
    nodes: list[Any] = []
    widths: dict[str, int] = {}
    shared: dict[str, Any] = {}
    for name, value in initializers(model).items():
        if value.data_type not in (TensorProto.INT8, TensorProto.UINT8) or not name.endswith(".weight"):
            continue
        readers = readers_of(model, name)
        if any(node.op_type == "DequantizeLinear" and _attribute(node, "block_size") for node in readers):
            continue
        array = array_of(value)
        if name in split:
            first, second = np.split(array, 2, axis=split[name])
            array = (first.astype(np.int32) + second).astype(np.int8)
        axis = next((_attribute(node, "axis") for node in readers if node.op_type == "DequantizeLinear"), 0)
        codes, stride, start, bits = affine_codes(array, axis if array.ndim > axis else 0)
        widths[name] = bits
        rebuilt = _Rebuilt(name, shared)
        if planes_of(codes, bits).nbytes + 64 < array.nbytes:
            _from_planes(rebuilt, codes, stride, start, bits)
        elif name in split:
            rebuilt.apply("Cast", rebuilt.own("whole", array), to=TensorProto.INT32)
        else:
            continue
        if name in split:
            _into_halves(rebuilt, split[name])
        rebuilt.apply("Cast", rebuilt.last, output=name, to=value.data_type)
        nodes += rebuilt.nodes
        new[name] = rebuilt.tensors
    replace_initializers_(model, {**new, "": list(shared.values())})
    prepend_nodes_(model, nodes)
    return widths


def _from_planes(rebuilt: _Rebuilt, codes: Any, stride: Any, start: Any, bits: int) -> None:
    """Rebuild int32 integers from planes."""
    from onnx import TensorProto

    def sizes(numbers: Any) -> str:
        return rebuilt.common(f"s{list(map(int, numbers))}", np.array(numbers, np.int64))

    powers = (np.int32(1) << np.arange(bits, dtype=np.int32))[:, None, None]
    mask = rebuilt.common(MASK, (1 << np.arange(8)).astype(np.uint8))
    rebuilt.apply("BitwiseAnd", rebuilt.own("planes", planes_of(codes, bits)), mask)
    rebuilt.apply("Cast", rebuilt.last, to=TensorProto.BOOL)
    rebuilt.apply("Cast", rebuilt.last, to=TensorProto.INT32)
    rebuilt.apply("Mul", rebuilt.last, rebuilt.common(f"powers{bits}", powers))
    rebuilt.apply("ReduceSum", rebuilt.last, sizes([0]), keepdims=0)
    if codes.size % 8:
        rebuilt.apply("Reshape", rebuilt.last, sizes([-1]))
        rebuilt.apply("Slice", rebuilt.last, sizes([0]), sizes([codes.size]))
    rebuilt.apply("Reshape", rebuilt.last, sizes(codes.shape))
    if np.any(stride != 1):
        rebuilt.apply("Mul", rebuilt.last, rebuilt.own("stride", stride))
    rebuilt.apply("Add", rebuilt.last, rebuilt.own("start", start))


def _into_halves(rebuilt: _Rebuilt, axis: int) -> None:
    """Split int32 integers w into floor(w / 2) and the rest; 128 keeps the dividend positive, whatever a division rounds to."""
    whole = rebuilt.last
    rebuilt.apply("Add", whole, rebuilt.common("i128", np.int32(128)))
    rebuilt.apply("Div", rebuilt.last, rebuilt.common("i2", np.int32(2)))
    half = rebuilt.apply("Sub", rebuilt.last, rebuilt.common("i64", np.int32(64)))
    rest = rebuilt.apply("Sub", whole, half)
    rebuilt.apply("Concat", half, rest, axis=axis)


def _attribute(node: Any, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def unpack_(model: Any) -> Any:
    """Turn a small model back into the fast flavour, in place, for engines that do not fold what rebuilds the weights.

    Every operator whose inputs are all stored is computed, but for dequantizations.
    """
    from onnx.reference import ReferenceEvaluator

    known = {name: array_of(value) for name, value in initializers(model).items() if value.data_type in PLAIN_TYPES}
    for node in list(model.graph.node):
        if node.op_type == "DequantizeLinear" or not node.input or any(name not in known for name in node.input):
            continue
        evaluate: Any = ReferenceEvaluator(node)
        (known[node.output[0]],) = evaluate.run(None, {name: known[name] for name in node.input})
        model.graph.node.remove(node)
        model.graph.initializer.append(tensor_of(node.output[0], known[node.output[0]]))
    drop_unread_(model)
    return model
