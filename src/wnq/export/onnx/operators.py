"""Our own operators: what a deployed layer does in PyTorch, and the ONNX operators that say the same.

The stock translations of torch drop the bounds of grids below 8 bits, so that a 4-bit input would come out with 256 levels.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from wnq.quantizer import along_axis


@torch.library.custom_op("wnq::round_input", mutates_args=())
def round_input(x: Tensor, step: float, zero_point: int, low: int, high: int) -> Tensor:
    """Return the values of an input's integers: quantize, clip, dequantize."""
    return torch.clamp(torch.round(x / step), low, high) * step


@round_input.register_fake
def _(x: Tensor, step: float, zero_point: int, low: int, high: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("wnq::dequantize", mutates_args=())
def dequantize(integers: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    """Return ``integers * scale``, the scale running along ``axis``."""
    return integers.float() * along_axis(scale, integers.ndim, axis)


@dequantize.register_fake
def _(integers: Tensor, scale: Tensor, zero: Tensor, axis: int) -> Tensor:
    return torch.empty_like(integers, dtype=torch.float32)


@torch.library.custom_op("wnq::look_up", mutates_args=())
def look_up(codes: Tensor, levels: Tensor) -> Tensor:
    """Return ``levels[codes]``; with a row of levels for each channel, channels are the first dimension of both."""
    if levels.ndim == 1:
        return levels[codes.long()]
    return torch.gather(levels, 1, codes.long().flatten(1)).reshape(codes.shape)


@look_up.register_fake
def _(codes: Tensor, levels: Tensor) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return operator -> function that emits its ONNX operators, for ``torch.onnx.export(custom_translation_table=...)``."""
    import numpy as np
    import onnx_ir as ir
    from onnxscript import opset21

    op: Any = opset21  # its own annotations do not fit values of a graph

    def constant(value: Any) -> Any:
        return op.Constant(value=ir.tensor(np.asarray(value)))

    def emit_round(x: Any, step: float, zero_point: int, low: int, high: int) -> Any:
        scale, zero = constant(np.float32(step)), constant(np.uint8(zero_point))
        codes = op.QuantizeLinear(x, scale, zero)
        if high - low < 255:
            # On the codes, behind the quantization: a clip of floats before it keeps ONNX Runtime from fusing.
            codes = op.Clip(codes, constant(np.uint8(0)), constant(np.uint8(high - low)))
        return op.DequantizeLinear(codes, scale, zero)

    def emit_dequantize(integers: Any, scale: Any, zero: Any, axis: int) -> Any:
        return op.DequantizeLinear(integers, scale, zero, axis=axis)

    def emit_look_up(codes: Any, levels: Any) -> Any:
        if len(levels.shape) == 1:
            return op.Gather(levels, op.Cast(codes, to=ir.DataType.INT32))
        shape = [int(length) for length in codes.shape]
        flat = op.Reshape(codes, constant(np.array([shape[0], -1])))
        rows = op.GatherElements(levels, op.Cast(flat, to=ir.DataType.INT32), axis=1)
        return op.Reshape(rows, constant(np.array(shape)))

    return {
        torch.ops.wnq.round_input.default: emit_round,
        torch.ops.wnq.dequantize.default: emit_dequantize,
        torch.ops.wnq.look_up.default: emit_look_up,
    }
