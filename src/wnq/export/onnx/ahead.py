"""Quantization moved ahead of what stands between it and a convolution, where that changes no result.

Rounding never decreases, so it does not matter whether a value is clipped, or the largest picked, before or after:
``Q(clip(x, a, b)) == clip(Q(x), Q(a), Q(b))`` and ``Q(max(x, y)) == max(Q(x), Q(y))``, exactly. Nor does it matter where a value
stands.
"""

from typing import Any

import numpy as np

from wnq.export.onnx.graph import array_of, constant_of, initializers, readers_of, tensor_of

BOUNDING = ("Relu", "Clip")
PICKING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")


def quantize_ahead_(model: Any, convolutions: list[Any]) -> None:
    """Let the quantization behind a convolution follow it, or the ReLU behind it, in place.

    Clips and further ReLUs become bounds of the codes. Values that are pooled or moved are quantized before that too.

    Args:
        model: a fast model.
        convolutions: its convolutions of integers.
    """
    ends, values = {value.name for value in model.graph.output}, initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}

    def is_constant(name: str) -> bool:
        return not name or name in values or (name in made and made[name].op_type == "Constant")

    for conv in convolutions:
        path = _path(model, conv, ends)
        if path is None:
            continue
        *between, quantize = path
        if any(node.op_type == "Clip" and not all(map(is_constant, node.input[1:3])) for node in between):
            continue
        if between and between[0].op_type == "Relu":
            conv = between.pop(0)  # the engine's convolution has a ReLU
        if between:
            _rewire_(model, conv.output[0], between, quantize)


def _path(model: Any, conv: Any, ends: set[str]) -> list[Any] | None:
    """Return the operators behind a convolution up to the quantization, each alone reading the one before; None without one."""
    path: list[Any] = [conv]
    while path[-1].op_type != "QuantizeLinear":
        name = path[-1].output[0]
        readers = readers_of(model, name)
        if name in ends or len(readers) != 1 or readers[0].op_type not in (*BOUNDING, *PICKING, "QuantizeLinear"):
            return None
        if len(readers[0].output) > 1 or readers[0].input[0] != name:
            return None  # a pooling that tells positions too; a shape
        path.append(readers[0])
    return path[1:]


def _rewire_(model: Any, source: str, between: list[Any], quantize: Any) -> None:
    """Quantize ``source``, and take out what became bounds of its codes."""
    from onnx import helper

    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    scale, zero = (array_of(constant_of(name, values, made)) for name in quantize.input[1:3])
    kind = np.iinfo(zero.dtype)
    low, high = int(kind.min), int(kind.max)
    (clip,) = readers_of(model, quantize.output[0])[:1] or (None,)
    clip = clip if clip is not None and clip.op_type == "Clip" else None
    if clip is not None:
        low, high = (int(array_of(constant_of(name, values, made))) for name in clip.input[1:3])
    for node in between:
        if node.op_type in PICKING:
            continue
        a, b = (0.0, np.inf) if node.op_type == "Relu" else _bounds(node, values, made)
        low, high = max(low, _code(a, scale, zero, kind)), min(high, _code(b, scale, zero, kind))
    name = f"{source}:ahead"
    codes, bounded, back = f"{name}:codes", f"{name}:bounded", f"{name}:values"
    nodes = [helper.make_node("QuantizeLinear", [source, *quantize.input[1:3]], [codes])]
    if (low, high) != (kind.min, kind.max):
        ends = {f"{name}:low": low, f"{name}:high": high}
        model.graph.initializer.extend(tensor_of(key, np.array(end, zero.dtype)) for key, end in ends.items())
        nodes.append(helper.make_node("Clip", [codes, *ends], [bounded]))
    nodes.append(helper.make_node("DequantizeLinear", [nodes[-1].output[0], *quantize.input[1:3]], [back]))
    last = back
    for node in between:
        if node.op_type in PICKING:
            node.input[0] = last
            last = node.output[0]
        else:
            model.graph.node.remove(node)
    if last == back:
        for reader in readers_of(model, quantize.output[0] if clip is None else clip.output[0]):
            reader.input[0] = nodes[-1].input[0]
        for node in (quantize, clip):
            if node is not None:
                model.graph.node.remove(node)
        nodes.pop()
    else:
        quantize.input[0] = last
    place = next(i for i, node in enumerate(model.graph.node) if source in node.output)
    for node in reversed(nodes):
        model.graph.node.insert(place + 1, node)


def _bounds(clip: Any, values: dict[str, Any], made: dict[str, Any]) -> tuple[float, float]:
    found = [-np.inf, np.inf]
    for position, name in enumerate(clip.input[1:3]):
        if name:
            found[position] = float(array_of(constant_of(name, values, made)))
    return found[0], found[1]


def _code(value: float, scale: Any, zero: Any, kind: Any) -> int:
    """Return what a value is quantized to."""
    with np.errstate(over="ignore"):
        return int(np.clip(np.rint(np.float32(value) / np.float32(scale)) + int(zero), kind.min, kind.max))
