"""Linear layers with float inputs: weights as packed integers, which engines multiply without unpacking them."""

from typing import Any

import numpy as np

from wnq.export.onnx.graph import array_of, drop_unread_, initializers, replace_initializers_, require, tensor_of

BLOCK = 128
"""Weights that share a scale; the scales repeat within a channel. Blocks of this size are the fastest."""

PACKED = {2: (-2, 1), 4: (-8, 7)}
"""Widths of packed integers, and what they hold."""


def block_(model: Any, *, engine: str) -> dict[str, int]:
    """Pack the weights of products with float inputs, in place.

    For ``onnxruntime`` their scales repeat by blocks, and integers that fit 2 bits take 2, for which the file asks for opset 25;
    but only where columns are a multiple of four, because version 1.32 reads other 2-bit weights wrongly, without a word.
    ``openvino`` has neither 2-bit integers nor blocks that do not divide the rows, and gets 4 bits and one scale a column.

    Args:
        model: a fast model, whose linear weights are ``(in, out)`` with one scale a column.
        engine: ``onnxruntime`` or ``openvino``.

    Returns:
        Layer -> bits of a stored weight.
    """
    from onnx import helper

    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    found: dict[str, int] = {}
    new: dict[str, list[Any]] = {}
    for product in [node for node in model.graph.node if node.op_type == "MatMul"]:
        scaled = made.get(product.input[1])
        source = made.get(product.input[0])
        if scaled is None or scaled.op_type != "DequantizeLinear" or scaled.input[0] not in values:
            continue
        if source is not None and source.op_type == "DequantizeLinear":
            continue
        weight, scale = array_of(values[scaled.input[0]]), array_of(values[scaled.input[1]])
        two_bits = engine == "onnxruntime" and weight.shape[1] % 4 == 0
        low, high = (int(weight.min()), int(weight.max())) if weight.size else (0, 0)
        bits = next((b for b, (a, z) in PACKED.items() if a <= low and high <= z and (b > 2 or two_bits)), 8)
        name, blocks = scaled.input[0], f"{scaled.input[0]}:scales"
        new[name] = [tensor_of(name, weight) if bits == 8 else packed(name, weight, bits)]
        if engine == "onnxruntime":
            rows = -(-weight.shape[0] // BLOCK)
            new[blocks] = [tensor_of(blocks, np.broadcast_to(scale, (rows, len(scale))))]
            del scaled.input[:], scaled.attribute[:]
            scaled.input.extend([name, blocks])
            scaled.attribute.extend([helper.make_attribute("axis", 0), helper.make_attribute("block_size", BLOCK)])
        else:
            del scaled.input[2:]  # the zero point, whose type would have to be that of the integers
        if bits == 2:
            require(25, 13, model)
        found[name.rpartition(".")[0]] = bits
    replace_initializers_(model, new)
    drop_unread_(model)
    return found


def packed(name: str, integers: Any, bits: int) -> Any:
    """Return integers as a tensor of 2 or 4 bits each, the first in the lowest bits of a byte."""
    from onnx import TensorProto, helper

    per_byte = 8 // bits
    flat = integers.ravel().astype(np.int16) & (2**bits - 1)
    flat = np.concatenate([flat, np.zeros(-flat.size % per_byte, np.int16)]).reshape(-1, per_byte)
    joined = (flat << (bits * np.arange(per_byte))).sum(1).astype(np.uint8)
    kind = {2: TensorProto.INT2, 4: TensorProto.INT4}[bits]
    return helper.make_tensor(name, kind, integers.shape, joined.tobytes(), raw=True)
