"""What it brings to give every output channel a range of its own, and which channels ask for it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from wnq.tails import ChannelStats, pieces
from wnq.tails.pieces import Array, Room, blocks, in_threads, plain, rows_of
from wnq.theory.expected import divisor


class ChannelError(NamedTuple):
    """What one width makes of a weight whose channels have a range each."""

    measured: float
    """|w - w_q|^2 / |w|^2 over the finite elements; NaN for a weight of zeros."""
    predicted: float | None
    """What the law says, the mean over the elements of step^2 / 12, relative; None for a weight of zeros."""


def channel_errors(
    weight: Tensor, found: ChannelStats, bits: Sequence[int], *, axis: int = 0, grid: str = "full"
) -> list[ChannelError]:
    """Return the error at each width if each output channel is scaled by its own max|w|, in one pass over the weight.

    Args:
        weight: floating point, at least one dimension; on the CPU, or it is copied there.
        found: :func:`wnq.tails.channel_stats` of it, along ``axis``.
        bits: widths.
        axis: the dimension of the output channels.
        grid: ``"full"`` or ``"symmetric"``, see :class:`wnq.quantizer.Uniform`.
    """
    largest = [divisor(width, grid) for width in bits]
    matrix = rows_of(weight.detach().cpu(), axis)
    peak = found.peak.numpy()
    finite = (matrix.shape[1] - found.nonfinite.numpy()).astype(np.float64)
    # In units of the largest weight, whose square is in range.
    unit = float(peak.max()) if peak.size else 0.0
    if not unit > 0:
        return [ChannelError(math.nan, None) for _ in largest]
    part = peak / unit
    energy = float((finite * (found.rms.numpy() / unit) ** 2).sum())
    parts = blocks(matrix, pieces.CHUNK)

    def of_block(i: int, room: Room) -> list[Array]:
        piece = matrix[parts[i]]
        x = plain(piece.reshape(-1), room).reshape(piece.shape)
        own = peak[parts[i][0], None]
        u = np.divide(x, np.where(own > 0, own, 1.0), out=_room(room, 0, piece), dtype=np.float64)
        if not np.isfinite(u).all():
            u[~np.isfinite(u)] = math.nan
        return [_squares(u, top, grid, room) for top in largest]

    squares = np.zeros((len(largest), len(matrix)))
    for (rows, _), sums in zip(parts, in_threads(of_block, len(parts)), strict=True):
        for total, own in zip(squares, sums, strict=True):
            total[rows] += own
    step = 2.0 if grid == "full" else 1.0
    return [
        ChannelError(
            float((total * part**2).sum()) / top**2 / energy,
            float((finite * part**2).sum()) * (step / top) ** 2 / 12 / energy,
        )
        for total, top in zip(squares, largest, strict=True)
    ]


def _squares(u: Array, top: int, grid: str, room: Room) -> Array:
    """Return each row's sum of squared errors, in units of the smallest integer level; NaN counts as none."""
    scaled = np.multiply(u, top, out=_room(room, 1, u))
    level = _room(room, 2, u)
    if grid == "full":  # the odd integers from -top to top
        np.add(scaled, top, out=level)
        np.rint(np.multiply(level, 0.5, out=level), out=level)
        np.subtract(np.multiply(level, 2, out=level), top, out=level)
    else:
        np.rint(scaled, out=level)
    error = np.subtract(scaled, level, out=scaled)
    np.copyto(error, 0.0, where=np.isnan(error))
    return np.einsum("ij,ij->i", error, error)


def _room(room: Room, slot: int, like: Array | Tensor) -> Array:
    rows, columns = like.shape
    return room.array(slot, rows * columns, np.float64).reshape(rows, columns)


class Channels(NamedTuple):
    """Output channels whose largest weight stands out."""

    number: int
    """Channels in all."""
    median_peak: float
    """Median over the channels of max|w|, those of zeros aside, in units of the layer's rms; NaN if there are none."""
    outlying: int
    """Channels with a peak beyond :data:`OUTLIER` times that median."""
    listed: tuple[tuple[int, float], ...]
    """Those furthest out: number of the channel, its peak over the median; at most :data:`LISTED`."""


OUTLIER = 3.0
"""From how many times the median peak on a channel is an outlier."""

LISTED = 12


def outlying_channels(found: ChannelStats, rms: float) -> Channels:
    """Return the channels whose peak exceeds :data:`OUTLIER` times the median of the channels' peaks."""
    peak = found.peak
    used = peak[peak > 0]
    if not used.numel() or not rms > 0:
        return Channels(peak.numel(), math.nan, 0, ())
    middle = float(np.median(used.numpy()))
    times = peak / middle
    order = torch.argsort(times, descending=True, stable=True)[:LISTED]
    far = tuple((int(i), times[i].item()) for i in order if times[i] > OUTLIER)
    return Channels(peak.numel(), middle / rms, int((times > OUTLIER).sum()), far)
