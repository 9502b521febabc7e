"""Peak and rms of every output channel."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wnq.tails import pieces
from wnq.tails.moments import safe_scale
from wnq.tails.pieces import Array, Room, blocks, in_threads, plain, readable, rows_of


class ChannelStats(NamedTuple):
    """Statistics of each output channel over its finite elements, on the CPU."""

    peak: Tensor
    """float64, ``(channels,)``: max|w|; 0 for a channel without finite elements."""
    rms: Tensor
    """float64, ``(channels,)``: root of the mean square; 0 for such a channel."""
    nonfinite: Tensor
    """int64, ``(channels,)``: NaN and infinite elements."""


def channel_stats(weight: Tensor, axis: int = 0) -> ChannelStats:
    """Return max|w| and rms of every channel, to find those that stand out.

    Args:
        weight: any precision, at least one dimension.
        axis: the dimension of the output channels: 0, but 1 for transposed convolutions.

    Raises:
        ValueError: the tensor has no such dimension; complex numbers, a sparse tensor, or one without data.
    """
    weight = readable(weight, where="channel_stats")
    if not -weight.ndim <= axis < weight.ndim:
        raise ValueError(
            f"channel_stats needs a dimension {axis} to run along, but the weight has shape {tuple(weight.shape)}; "
            "pass the dimension of its output channels."
        )
    matrix = rows_of(weight, axis)
    gather = _gather if matrix.device.type == "cpu" else _gather_on_device
    peak, square, bad = gather(matrix, None)
    scale = np.ones_like(peak)
    if weight.dtype == torch.float64:  # a channel of very small or very large numbers has a unit of its own
        scale = np.array([safe_scale(value) for value in peak.tolist()])
        if bool(np.any(scale != 1)):
            peak, square, bad = gather(matrix, scale)
    # By NumPy: torch may wake its threads for a root, and they cost more than all else for a while.
    rms = np.sqrt(square / np.maximum(matrix.shape[1] - bad, 1))
    return ChannelStats(torch.from_numpy(peak / scale), torch.from_numpy(rms / scale), torch.from_numpy(bad))


def _gather(matrix: Tensor, scale: Array | None) -> tuple[Array, Array, Array]:
    """Return max|w|, sum of squares and number of non-finite elements of every row, the first two in units of 1 / its scale."""
    parts = blocks(matrix, pieces.CHUNK)

    def of_block(i: int, room: Room) -> tuple[Array, Array, Array]:
        part = matrix[parts[i]]
        x = plain(part.reshape(-1), room).reshape(part.shape)
        exact = room.array(0, x.size, np.float64).reshape(x.shape)
        np.copyto(exact, x)
        if scale is not None:
            np.multiply(exact, scale[parts[i][0], None], out=exact)
        finite = np.isfinite(x, out=room.array(1, x.size, np.bool_).reshape(x.shape))
        bad = x.shape[1] - np.count_nonzero(finite, axis=1)
        if bad.any():
            exact[~finite] = 0.0
        with np.errstate(over="ignore"):
            return np.maximum(exact.max(1), -exact.min(1)), np.einsum("ij,ij->i", exact, exact), bad

    peak, square, bad = np.zeros(len(matrix)), np.zeros(len(matrix)), np.zeros(len(matrix), np.int64)
    for (rows, _), (high, energy, lost) in zip(parts, in_threads(of_block, len(parts)), strict=True):
        peak[rows] = np.maximum(peak[rows], high)
        square[rows] += energy
        bad[rows] += lost
    return np.abs(peak), square, bad  # 0, not -0


def _gather_on_device(matrix: Tensor, scale: Array | None) -> tuple[Array, Array, Array]:
    parts: list[Tensor] = []
    step = max(1, pieces.DEVICE_CHUNK // max(1, matrix.shape[1]))
    units = torch.ones(len(matrix), dtype=torch.float64) if scale is None else torch.from_numpy(scale)
    for start in range(0, len(matrix) if matrix.numel() else 0, step):
        x = matrix[start : start + step].double() * units[start : start + step, None].to(matrix.device)
        finite = torch.isfinite(x)
        x = torch.where(finite, x, 0.0)
        parts.append(torch.stack([x.abs().amax(1), x.square().sum(1), (~finite).sum(1).double()]))
    peak, square, bad = torch.cat(parts, 1).cpu().numpy() if parts else np.zeros((3, len(matrix)))
    return peak, square, bad.astype(np.int64)
