"""The passes over a whole tensor: its moments, then what depends on them."""

import math
from collections.abc import Iterable
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from wnq.tails import device, pieces
from wnq.tails.bins import Bins
from wnq.tails.moments import Moments, Spread, joined, safe_scale
from wnq.tails.pieces import Array, Room, dot, in_threads, plain


class Flat:
    """A tensor as a row of pieces, each of them float32 or float64 and multiplied by :attr:`scale`."""

    def __init__(self, weight: Tensor) -> None:
        self.on_cpu = weight.device.type == "cpu"
        self.scale = 1.0
        self.finite = True
        self.pieces = (
            weight.reshape(-1).split(pieces.CHUNK if self.on_cpu else pieces.DEVICE_CHUNK) if weight.numel() else ()
        )
        self.double = weight.dtype == torch.float64 or not weight.dtype.is_floating_point

    def moments(self) -> Moments:
        """Return the moments, in units of 1 / :attr:`scale`, which is set here."""
        found = self._moments()
        self.finite = not found.nan + found.infinite
        self.scale = safe_scale(found.peak)
        return found if self.scale == 1 else self._moments()

    def _moments(self) -> Moments:
        if self.on_cpu:
            parts: Iterable[Moments] = in_threads(self._moments_of, len(self.pieces))
        else:
            parts = device.moments_on_device(self.pieces, self.scale)
        return reduce(joined, parts, Moments())

    def spread(self, threshold: float, bins: Bins | None) -> Spread:
        """Return what lies beyond ``threshold`` and the counts in ``bins``, both in the units of :meth:`moments`."""
        if not self.on_cpu:
            return device.spread_on_device(self.pieces, self.scale, threshold, bins)
        kind = np.dtype(np.float64 if self.double or self.scale != 1 else np.float32)
        limit = kind.type(min(threshold, float(np.finfo(kind).max)))
        if (
            float(limit) > threshold
        ):  # |x| > threshold for a float32 x is |x| > the largest float32 that is not above it
            limit = np.nextafter(limit, kind.type(0))
        counter = None if bins is None else bins.counter(kind)

        def spread_of(i: int, room: Room) -> tuple[int, float, Array | None]:
            x = self._scaled(i, room)
            x = x if self.finite else x[np.isfinite(x)]
            size = np.abs(x, out=room.array(0, x.size, x.dtype))
            beyond = np.flatnonzero(np.greater(size, limit, out=room.array(1, x.size, np.bool_)))
            tail = x[beyond].astype(np.float64)
            return (tail.size, dot(tail, tail), None if counter is None else counter(x, room))

        parts = in_threads(spread_of, len(self.pieces))
        counts = None if bins is None else np.zeros(bins.number, np.intp)
        for _, _, found in parts:
            if counts is not None and found is not None:
                counts += found
        table = None if counts is None else counts.tolist()
        return Spread(sum(part[0] for part in parts), math.fsum(part[1] for part in parts), table)

    def _scaled(self, i: int, room: Room) -> Array:
        x = plain(self.pieces[i], room)
        return x if self.scale == 1 else x * self.scale

    def _moments_of(self, i: int, room: Room) -> Moments:
        x = self._scaled(i, room)
        with np.errstate(over="ignore", invalid="ignore"):
            exact = _exact(x, room)
            total = exact.sum()
            nan = infinite = 0
            if not math.isfinite(total):  # a sum of float32 is finite if and only if they are
                finite = np.isfinite(x)
                nan = int(np.count_nonzero(np.isnan(x)))
                infinite = x.size - nan - int(np.count_nonzero(finite))
                x = x[finite]
                exact = _exact(x, room)
                total = exact.sum()
            if not x.size:
                return Moments(0, nan, infinite)
            mean = float(total / x.size)
            np.subtract(exact, mean, out=exact)
            square = np.multiply(exact, exact, out=room.array(1, x.size, np.float64))
            sums = float(square.sum()), dot(square, exact), dot(square, square)
        return Moments(x.size, nan, infinite, float(x.min()), float(x.max()), mean, *sums)


def _exact(x: Array, room: Room) -> Array:
    exact = room.array(0, x.size, np.float64)
    np.copyto(exact, x)
    return exact
