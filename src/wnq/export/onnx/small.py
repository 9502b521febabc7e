"""The small flavour: weights at their true width, rebuilt by standard operators that an engine folds when it loads the file.

A weight of k bits is k planes of one bit: byte i of a plane holds bit j of the codes 8i to 8i + 7, the first in the lowest bit.

    code = sum over j of 2^j * (plane_j[i] & (1 << position) != 0),     integer = stride * code + start

so that BitwiseAnd, two Casts, Mul, ReduceSum, Reshape, Add, and a Cast to int8 give the integers of the fast flavour back.
"""

from typing import Any

import numpy as np

from wnq.export.onnx.graph import array_of, initializers, prepend_nodes_, readers_of, replace_initializers_, tensor_of

MASK = "bits"
"""Name of the initializer 1, 2, 4, …, 128, which all weights share."""


def affine_codes(integers: Any, axis: int) -> tuple[Any, int, Any, int]:
    """Return ``(codes, stride, start, bits)`` with ``integers == stride * codes + start``, in the fewest bits.

    Args:
        integers: int8 or uint8, any shape.
        axis: of the channels. ``start`` is one number, or ``(channels,)`` where that takes fewer bits, as for grids that are
            not symmetric behind a BatchNorm with factors of either sign.
    """
    wide = integers.astype(np.int32)
    if wide.size == 0:
        return wide.astype(np.uint8), 1, np.int32(0), 1
    others = tuple(d for d in range(wide.ndim) if d != axis)
    best: tuple[Any, int, Any, int] | None = None
    for start in (wide.min(), wide.min(axis=others, keepdims=True)):
        above = wide - start
        stride = max(1, int(np.gcd.reduce(above, axis=None)))
        codes = above // stride
        bits = max(1, int(codes.max()).bit_length())
        if best is None or bits < best[3]:
            best = codes.astype(np.uint8), stride, start, bits
    assert best is not None
    return best


def planes_of(codes: Any, bits: int) -> Any:
    """Return ``(bits, ceil(n / 8), 1)`` bytes."""
    flat = np.concatenate([codes.ravel(), np.zeros(-codes.size % 8, np.uint8)])
    return np.stack([np.packbits(flat >> j & 1, bitorder="little") for j in range(bits)])[..., None]


def shrink_(model: Any) -> dict[str, int]:
    """Turn a fast model into the small flavour, in place, and return weight -> bits that its integers take now.

    Weights that would not become smaller stay.
    """
    from onnx import TensorProto, helper

    values = initializers(model)
    new: dict[str, list[Any]] = {}
    nodes: list[Any] = []
    widths: dict[str, int] = {}
    shared: dict[str, Any] = {}
    for name, value in values.items():
        if value.data_type not in (TensorProto.INT8, TensorProto.UINT8) or not name.endswith((".weight", ".codes")):
            continue
        readers = readers_of(model, name)
        if any(node.op_type == "DequantizeLinear" and _attribute(node, "block_size") for node in readers):
            continue
        array = array_of(value)
        axis = next((_attribute(node, "axis") for node in readers if node.op_type == "DequantizeLinear"), 0)
        codes, stride, start, bits = affine_codes(array, axis if array.ndim > axis else 0)
        planes = planes_of(codes, bits)
        widths[name] = bits
        if planes.nbytes + 64 >= array.nbytes:
            continue
        weights = (np.int32(stride) << np.arange(bits, dtype=np.int32)).astype(np.int32)[:, None, None]
        parts = {"planes": planes, "powers": weights, "start": start.astype(np.int32)}
        own = {part: tensor_of(f"{name}:{part}", numbers) for part, numbers in parts.items()}
        shared.setdefault(MASK, tensor_of(MASK, (1 << np.arange(8)).astype(np.uint8)))
        for key, numbers in (
            ("all", [-1]),
            ("first", [0]),
            (f"{codes.size}", [codes.size]),
            (str(codes.shape), codes.shape),
        ):
            shared.setdefault(f"s{key}", tensor_of(f"s{key}", np.array(numbers, np.int64)))
        steps: list[tuple[str, list[str], dict[str, Any]]] = [
            ("BitwiseAnd", [own["planes"].name, MASK], {}),
            ("Cast", ["*"], {"to": TensorProto.BOOL}),
            ("Cast", ["*"], {"to": TensorProto.INT32}),
            ("Mul", ["*", own["powers"].name], {}),
            ("ReduceSum", ["*", "sfirst"], {"keepdims": 0}),
            ("Reshape", ["*", "sall"], {}),
            ("Slice", ["*", "sfirst", f"s{codes.size}"], {}),
            ("Reshape", ["*", f"s{codes.shape}"], {}),
            ("Add", ["*", own["start"].name], {}),
            ("Cast", ["*"], {"to": value.data_type}),
        ]  # fmt: skip
        if codes.size % 8 == 0:
            del steps[5:7]
        last = ""
        for place, (kind, sources, attributes) in enumerate(steps):
            output = name if place == len(steps) - 1 else f"{name}:{place}"
            nodes.append(helper.make_node(kind, [s if s != "*" else last for s in sources], [output], **attributes))
            last = output
        new[name] = list(own.values())
    used = {source for node in nodes for source in node.input}
    replace_initializers_(model, {**new, "": [tensor for key, tensor in shared.items() if key in used]})
    prepend_nodes_(model, nodes)
    return widths


def _attribute(node: Any, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)


def unpack_(model: Any) -> Any:
    """Turn a small model back into the fast flavour, in place, for engines that do not fold what rebuilds the weights."""
    from onnx.reference import ReferenceEvaluator

    values = initializers(model)
    rebuilt = {name for name in (node.output[0] for node in model.graph.node) if f"{name}:planes" in values}
    for name in rebuilt:
        chain = [node for node in model.graph.node if node.output[0] == name or node.output[0].startswith(f"{name}:")]
        feeds = {source: array_of(values[source]) for node in chain for source in node.input if source in values}
        for node in chain:
            evaluate: Any = ReferenceEvaluator(node)
            (feeds[node.output[0]],) = evaluate.run(None, {source: feeds[source] for source in node.input})
        for node in chain:
            model.graph.node.remove(node)
        replace_initializers_(model, {f"{name}:{part}": [] for part in ("planes", "powers", "start")})
        model.graph.initializer.append(tensor_of(name, feeds[name]))
    used = {source for node in model.graph.node for source in node.input}
    replace_initializers_(model, {value.name: [] for value in model.graph.initializer if value.name not in used})
    return model
