"""Sorting a tensor's elements into bins: single numbers as long as they are few, else neighbours together, equally many a bin."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wnq.theory.beta import Floats

CHUNK = 1 << 17
"""Elements looked at together: in float64 about a second-level cache."""

_TAIL = 8
"""The share of the bins, 1 / this at each end, that hold single numbers: what lies far out is far apart."""


@dataclass(frozen=True)
class Bins:
    """Numbers by bin, ascending, empty bins left out."""

    low: Floats
    """Where each bin begins."""
    high: Floats
    """Where it ends, at most where the next begins."""
    count: npt.NDArray[np.int64]
    """How many numbers it holds, at least 1."""
    mean: Floats
    """Their mean."""
    deviation: Floats
    """The root of their variance about it."""

    @classmethod
    def at_points(cls, points: Floats, count: npt.NDArray[np.int64]) -> "Bins":
        """Return one bin without width for each of some ascending numbers."""
        return cls(points, points, count, points, np.zeros_like(points))

    def narrowed(self) -> "Bins":
        """Return them with each bin that holds one number only, however often, shrunk to it."""
        point = self.deviation == 0
        if bool(np.all(self.low[point] == self.mean[point])):
            return self
        low, high = np.where(point, self.mean, self.low), np.where(point, self.mean, self.high)
        return Bins(low, high, self.count, self.mean, self.deviation)


def sorted_bins(flat: Tensor, most: int, unit: float) -> tuple[Bins, int]:
    """Sort the elements of a flat tensor, divided by ``unit``, into about ``most`` bins; return them and the number of non-finite.

    Each different number has a bin of its own if there are no more than ``most`` of them, and in any case if the type has 8 or
    16 bits.
    """
    if flat.element_size() <= 2:
        return _count_patterns(flat, unit)
    single = flat.dtype == torch.float32
    numbers: npt.NDArray[Any] = np.empty(flat.numel(), np.float32 if single else np.float64)
    torch.from_numpy(numbers).copy_(flat)
    numbers.sort()
    # Infinities are at the ends now, NaN behind them. Of another type, they would make a copy of all numbers in that type.
    far = numbers.dtype.type(np.inf)
    finite = numbers[np.searchsorted(numbers, -far, side="right") : np.searchsorted(numbers, far)]
    starts = _starts(finite, most)
    return _blocks(finite, most, unit) if starts is None else _points(finite, starts, unit), flat.numel() - finite.size


def _starts(ascending: npt.NDArray[Any], most: int) -> npt.NDArray[np.int64] | None:
    """Return where each different number begins; None if there are more than ``most`` of them."""
    size = ascending.size
    found, number = [np.arange(min(1, size))], 1
    for i in range(0, size - 1, CHUNK):
        here, behind = ascending[i : min(i + CHUNK, size - 1)], ascending[i + 1 : i + 1 + CHUNK]
        found.append(np.flatnonzero(here != behind) + (i + 1))
        number += found[-1].size
        if number > most:
            return None
    return np.concatenate(found)


def _points(ascending: npt.NDArray[Any], starts: npt.NDArray[np.int64], unit: float) -> Bins:
    return Bins.at_points(ascending[starts].astype(np.float64) / unit, np.diff(starts, append=ascending.size))


def _blocks(ascending: npt.NDArray[Any], most: int, unit: float) -> Bins:
    """Return bins of single numbers at both ends, and of equally many between."""
    tail = most // _TAIL
    size = math.ceil((ascending.size - 2 * tail) / (most - 2 * tail))
    number = (ascending.size - 2 * tail) // size
    middle = ascending[tail : tail + number * size].reshape(number, size)
    below, above = (a.astype(np.float64) / unit for a in (ascending[:tail], ascending[tail + number * size :]))
    mean, deviation = np.empty(number), np.empty(number)
    rows = max(1, CHUNK // size)
    for i in range(0, number, rows):
        block = middle[i : i + rows].astype(np.float64)
        block /= unit
        # A bin of one number, however often, must have no width at all: the mean of many 0.1 is not 0.1.
        centre = np.where(block[:, 0] == block[:, -1], block[:, 0], np.einsum("ij->i", block) / size)
        block -= centre[:, None]
        mean[i : i + rows] = centre
        deviation[i : i + rows] = np.sqrt(np.einsum("ij,ij->i", block, block) / size)
    between = Bins(
        middle[:, 0].astype(np.float64) / unit,
        middle[:, -1].astype(np.float64) / unit,
        np.full(number, size),
        mean,
        deviation,
    )
    ends = (Bins.at_points(points, np.ones(points.size, np.int64)) for points in (below, above))
    return _joined(next(ends), between, next(ends))


def _joined(*parts: Bins) -> Bins:
    fields = ("low", "high", "count", "mean", "deviation")
    return Bins(*(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def _count_patterns(flat: Tensor, unit: float) -> tuple[Bins, int]:
    """Count each bit pattern of an 8- or 16-bit type."""
    kind = torch.int16 if flat.element_size() == 2 else torch.uint8
    size = 1 << (8 * flat.element_size())
    counts = torch.zeros(size, dtype=torch.int64)
    for chunk in flat.split(8 * CHUNK):
        pattern = chunk.cpu().contiguous().view(kind).to(torch.int32).bitwise_and_(size - 1)
        counts += torch.bincount(pattern, minlength=size)
    patterns = torch.arange(size, dtype=torch.int32)
    values = patterns.to(kind).view(flat.dtype).to(torch.float64).numpy()
    number = counts.numpy()
    used = (number > 0) & np.isfinite(values)
    points, place = np.unique(values[used], return_inverse=True)
    total = np.bincount(place, number[used], points.size).astype(np.int64)
    return Bins.at_points(points / unit, total), int(number[~np.isfinite(values)].sum())
