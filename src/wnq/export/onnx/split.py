"""Sums that cannot saturate on processors without VNNI: a weight as the sum of two of half its size.

Such processors add two products of 8-bit numbers in 16 bits, and saturate where 2 * (largest input) * (largest weight) exceeds
32767, as it does with 8 bits on both sides. With ``W = A + B``, ``A = floor(W / 2)``, the layer that reads its input twice and
has the weights A, then B, computes the same sums of integers, exactly, and no pair of its products exceeds 2 * 255 * 64 = 32640.
"""

from typing import Any

import numpy as np

from wnq.export.onnx.graph import (
    array_of,
    constant_of,
    drop_unread_,
    initializers,
    readers_of,
    replace_initializers_,
    tensor_of,
)
from wnq.integer.biases import PAIR_LIMIT

TWICE = ":twice"
"""End of the name of an input that is read twice."""

SPLIT_PRODUCTS = ("Conv", "ConvTranspose", "MatMul")


def input_bounds(product: Any, made: dict[str, Any], values: dict[str, Any]) -> tuple[int, int] | None:
    """Return the smallest and largest stored integer of a product's input; None unless both sides are integers."""
    source, weight = (made.get(name) for name in product.input[:2])
    if source is None or weight is None or {source.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    if weight.input[0] not in values:
        return None
    before = made.get(source.input[0])
    if before is not None and before.op_type == "Clip":
        low, high = (int(array_of(constant_of(name, values, made))) for name in before.input[1:3])
        return low, high
    kind = np.iinfo(array_of(constant_of(source.input[2], values, made)).dtype)
    return int(kind.min), int(kind.max)


def saturating(model: Any) -> list[str]:
    """Return the layers whose sums can saturate on processors without VNNI."""
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    return [node.name for node in model.graph.node if _saturates(node, made, values)]


def _saturates(node: Any, made: dict[str, Any], values: dict[str, Any]) -> bool:
    bounds = input_bounds(node, made, values) if node.op_type in SPLIT_PRODUCTS else None
    if bounds is None:
        return False
    weight = array_of(values[made[node.input[1]].input[0]]).astype(np.int32)
    return bool(weight.size) and 2 * bounds[1] * int(np.abs(weight).max()) > PAIR_LIMIT


def halves(weight: Any) -> tuple[Any, Any]:
    """Return integers A and B of at most 64 in magnitude with A + B the int8 weight."""
    first = weight.astype(np.int32) // 2
    return first.astype(np.int8), (weight - first).astype(np.int8)


def split_(model: Any) -> dict[str, int]:
    """Split every weight whose sums could saturate, in place.

    Returns:
        Name of the weight's initializer -> the dimension along which its two halves follow each other, for those that can be
        rebuilt from the whole weight by one concatenation.
    """
    found: dict[str, int] = {}
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    for product in [node for node in model.graph.node if _saturates(node, made, values)]:
        dequantize = made[product.input[1]]
        name = dequantize.input[0]
        if len(readers_of(model, name)) > 1 or len(readers_of(model, dequantize.output[0])) > 1:
            continue
        weight = array_of(values[name])
        groups = next((attribute.i for attribute in product.attribute if attribute.name == "group"), 1)
        transposed = product.op_type == "ConvTranspose"
        axis = 1 if product.op_type == "Conv" else 0
        by_group = transposed and groups > 1
        parts = [part.reshape(groups, -1, *part.shape[1:]) if by_group else part for part in halves(weight)]
        joined = np.concatenate(parts, axis=1 if by_group else axis).reshape(*_doubled(weight.shape, axis))
        replace_initializers_(model, {name: [tensor_of(name, joined)]})
        if not by_group:
            found[name] = axis
        channels = weight.shape[1] * groups if product.op_type == "Conv" else weight.shape[0]
        nodes = _twice(model, product, made, channels, groups)
        place = next(i for i, node in enumerate(model.graph.node) if node is product or node.output == product.output)
        for node in reversed(nodes):
            model.graph.node.insert(place, node)
    drop_unread_(model)
    return found


def _doubled(shape: tuple[int, ...], axis: int) -> list[int]:
    return [2 * length if d == axis else length for d, length in enumerate(shape)]


def _twice(model: Any, product: Any, made: dict[str, Any], channels: int, groups: int) -> list[Any]:
    """Return the nodes that give a product its input twice, by groups, quantized as before; the product reads them then."""
    from onnx import helper

    back = made[product.input[0]]
    chain = [back]
    while chain[0].op_type != "QuantizeLinear":
        chain.insert(0, made[chain[0].input[0]])
    source, name = chain[0].input[0], product.name
    order = np.arange(channels).reshape(groups, -1)
    index = np.concatenate([order, order], axis=1).ravel()
    if groups == 1:
        axis = -1 if product.op_type == "MatMul" else 1
        nodes = [helper.make_node("Concat", [source, source], [name + TWICE], axis=axis)]
    else:
        model.graph.initializer.append(tensor_of(f"{name}:order", index))
        nodes = [helper.make_node("Gather", [source, f"{name}:order"], [name + TWICE], axis=1)]
    last = name + TWICE
    for number, node in enumerate(chain):
        copied = helper.make_node(node.op_type, [last, *node.input[1:]], [f"{name}{TWICE}{number}"])
        nodes.append(copied)
        last = copied.output[0]
    product.input[0] = last
    return nodes


def join_codes_(model: Any) -> None:
    """Let products that read their input twice join its codes instead of its values, in place.

    What made the input is then followed by its quantization alone, as ONNX Runtime wants it.
    """
    for joined in [node for node in model.graph.node if node.output[0].endswith(TWICE)]:
        chain = [joined]
        while chain[-1].op_type != "DequantizeLinear":
            (following,) = readers_of(model, chain[-1].output[0])
            chain.append(following)
        quantize, last, back = chain[1], chain[-2], chain[-1]
        source, values = joined.input[0], joined.output[0]
        quantize.input[0] = source
        joined.input[:] = [last.output[0] if name == source else name for name in joined.input]
        back.input[0] = values
        model.graph.node.remove(joined)
        place = next(i for i, node in enumerate(model.graph.node) if node.output[0] == last.output[0])
        model.graph.node.insert(place + 1, joined)
