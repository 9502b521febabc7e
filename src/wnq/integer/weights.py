"""The integers of a weight: from a quantizer's codes to int8, where its grid is one that int8 holds."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.quantizer import Quantized, along_axis

INT8 = (-128, 127)


@dataclass(frozen=True)
class WeightForm:
    """A weight as small numbers and one factor a channel: ``value = scale * table[codes]`` or ``scale * integers``.

    Attributes:
        integers: int8, the shape of the weight; None where the grid is not one of small integers.
        codes: uint8, the same shape; positions in ``levels``.
        levels: float32, ``(n_levels,)`` or ``(channels, n_levels)``.
        scale: float32, ``()`` or ``(channels,)``.
        axis: the dimension that channels run along.
        why: in one line, why there are no integers; empty if there are.
    """

    integers: Tensor | None
    codes: Tensor
    levels: Tensor
    scale: Tensor
    axis: int
    why: str = ""


def weight_form(quantized: Quantized) -> WeightForm:
    """Read the grid off a quantized weight.

    The levels of every uniform quantizer are integers (:class:`wnq.quantizer.Quantized`). Those of the full grid at 8 bits are the
    odd ones up to 255 and would need 9 bits.
    """
    levels = quantized.levels.detach().to("cpu", torch.float32)
    codes, scale = quantized.codes.cpu(), quantized.scale.detach().to("cpu", torch.float32)
    integers, why = None, ""
    if not torch.equal(levels, levels.round()):
        why = f"its {levels.shape[-1]} levels are no multiples of one step"
    else:
        used = level_values(codes, levels, quantized.axis)
        low, high = (int(used.min()), int(used.max())) if used.numel() else (0, 0)
        if low < INT8[0] or high > INT8[1]:
            why = f"its integers run from {low} to {high}, which int8 does not hold"
        else:
            integers = used.to(torch.int8)
    return WeightForm(integers, codes, levels, scale, quantized.axis, why)


def level_values(codes: Tensor, levels: Tensor, axis: int) -> Tensor:
    """Return ``levels[codes]``, by channel where there is a row of levels for each."""
    index = codes.long()
    if levels.ndim == 1:
        return levels[index]
    channel = along_axis(torch.arange(levels.shape[0]), index.ndim, axis)
    return levels[channel, index]
