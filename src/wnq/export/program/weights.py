"""Weights of a program: int8, or planes of bits that operations rebuild."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wnq.export.onnx.small import affine_codes, planes_of

POSITIONS = torch.arange(8, dtype=torch.uint8)
"""Of the bits of a byte; one tensor for all weights, so that a file holds it once."""


class StoredWeight(nn.Module):
    """An int8 weight, stored as it is or as planes of bits, from which operations rebuild it that a compiler folds.

    A weight of k bits is k planes: byte i of a plane holds bit j of codes 8i to 8i + 7, the first in the lowest bit, and
    ``integer = stride * code + start``.

    Args:
        integers: int8.
        axis: of the output channels.
        planes: whether to store planes, where they are smaller.
    """

    weight: Tensor
    planes: Tensor
    start: Tensor | int
    stride: Tensor | int
    positions: Tensor

    def __init__(self, integers: Tensor, axis: int, *, planes: bool) -> None:
        super().__init__()
        self.shape = tuple(integers.shape)
        self.bits = 8
        if planes and integers.numel():
            codes, stride, start, self.bits = affine_codes(integers.numpy(), axis)
            if self.bits < 8:
                self.planes = nn.Buffer(torch.from_numpy(planes_of(codes, self.bits)))
                self.start, self.stride = _number(start), _number(stride)
                # Stored, because compilers fold what is computed from stored numbers, not what they would make themselves.
                self.positions = nn.Buffer(POSITIONS)
        if self.bits == 8:
            self.weight = nn.Buffer(integers)

    def forward(self) -> Tensor:
        """Return the weight, int8."""
        if self.bits == 8:
            return self.weight
        ones = torch.bitwise_and(torch.bitwise_right_shift(self.planes, self.positions), 1).int()
        places = torch.bitwise_left_shift(ones, self.positions[: self.bits].reshape(-1, 1, 1).int())
        codes = places.sum(0, dtype=torch.int32).flatten()[: math.prod(self.shape)].reshape(self.shape)
        return (codes * self.stride + self.start).to(torch.int8)


def _number(value: Any) -> Tensor | int:
    """Return one number as such, several as a tensor that is stored."""
    return int(value) if np.ndim(value) == 0 else nn.Buffer(torch.from_numpy(np.asarray(value, np.int32)))
