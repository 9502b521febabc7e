"""The same passes by torch, on the device of a tensor that is not on the CPU: larger pieces, one transfer a pass."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from wnq.tails.bins import Bins
from wnq.tails.moments import Moments, Spread


def moments_on_device(pieces: Iterable[Tensor], scale: float) -> list[Moments]:
    """Return the moments of each piece, computed where the pieces are; one transfer for all."""
    rows: list[Tensor] = []
    for piece in pieces:
        x = piece.double() * scale
        finite = torch.isfinite(x)
        count, zero = finite.sum().double(), x.new_zeros(())
        mean = torch.where(finite, x, zero).sum() / count.clamp(min=1)
        centred = torch.where(finite, x - mean, zero)
        square = centred.square()
        low, high = torch.where(finite, x, math.inf).min(), torch.where(finite, x, -math.inf).max()
        sums = square.sum(), (square * centred).sum(), square.square().sum()
        rows.append(torch.stack([count, x.isnan().sum().double(), x.isinf().sum().double(), low, high, mean, *sums]))
    table = torch.stack(rows).tolist() if rows else []
    return [Moments(int(row[0]), int(row[1]), int(row[2]), *row[3:]) for row in table]


def spread_on_device(pieces: Iterable[Tensor], scale: float, threshold: float, bins: Bins | None) -> Spread:
    """Return the same as :meth:`wnq.tails.flat.Flat.spread`, computed where the pieces are."""
    sums: list[Tensor] = []
    counts: Tensor | None = None
    for piece in pieces:
        x = piece.double() * scale
        finite = torch.isfinite(x)
        tail = (x.abs() > threshold) & finite
        sums.append(torch.stack([tail.sum().double(), torch.where(tail, x, x.new_zeros(())).square().sum()]))
        if bins is not None:
            edges = torch.from_numpy(bins.edges()[1:-1]).to(x.device)
            # Non-finite elements go to one bin more, which is dropped.
            place = torch.where(finite, torch.bucketize(x, edges, right=True), bins.number)
            found = torch.bincount(place, minlength=bins.number + 1)[:-1]
            counts = found if counts is None else counts + found
    beyond, energy = torch.stack(sums).sum(0).tolist() if sums else (0.0, 0.0)
    table = None if bins is None else [0] * bins.number if counts is None else counts.tolist()
    return Spread(int(beyond), energy, table)
