"""The tail of a tensor in numbers and as a histogram."""

import math
from dataclasses import dataclass

from torch import Tensor

from wnq.tails.bins import Bins
from wnq.tails.flat import Flat
from wnq.tails.moments import Moments, Spread, ratio
from wnq.tails.pieces import readable

TAIL = 3.0
"""Where the tail begins, in units of rms. A Gaussian has 0.27 % of its samples beyond, a Laplace density 1.4 %."""


@dataclass(frozen=True)
class TensorStats:
    """Statistics of a float tensor, over its finite elements."""

    parameters: int
    """Number of elements, non-finite ones included."""
    nonfinite: int
    """Number of NaN and infinite elements."""
    nan: int
    """Number of NaN elements."""
    infinite: int
    """Number of infinite elements, of either sign."""
    peak: float
    """max|w|; 0 for a tensor without finite elements."""
    rms: float
    """Root of the mean square (about zero)."""
    crest: float
    """Crest factor max|w| / rms, at least 1: uniform 1.73, d Gaussian samples about sqrt(2 ln d). NaN if rms is 0."""
    kurtosis: float
    """Fourth over squared second central moment, at least 1: uniform 1.8, Gaussian 3, Laplace 6. NaN if constant."""
    tail_mass: float
    """Fraction of elements with |w| > 3 rms, 0 to 1/9. NaN if rms is 0."""
    outlier_energy: float
    """Share of the squared norm held by those elements, 0 to 1. NaN if rms is 0."""


@dataclass(frozen=True)
class Histogram:
    """Counts of w / rms, so that layers and models compare. The outermost bins also hold what lies beyond them."""

    edges: tuple[float, ...]
    """Ascending, evenly spaced, in units of rms; one more than there are counts."""
    counts: tuple[int, ...]
    """Finite elements a bin; they add up to all of them."""

    def density(self) -> list[float]:
        """Return counts / (n * bin width), which compares histograms of different ranges; zeros if all is empty."""
        total = max(1, sum(self.counts))
        return [c / total / (self.edges[1] - self.edges[0]) for c in self.counts]


def tensor_stats(weight: Tensor) -> TensorStats:
    """Return the statistics of a tensor of any shape and precision.

    Raises:
        ValueError: complex numbers, a sparse tensor, or one without data.
    """
    flat = Flat(readable(weight, where="tensor_stats"))
    moments = flat.moments()
    return _named(weight, flat, moments, flat.spread(_threshold(moments), None))


def histogram(weight: Tensor, bins: int | None = None, *, limit: float | None = None) -> Histogram:
    """Count w / rms in evenly spaced bins over [-limit, limit].

    Args:
        weight: any floating-point tensor; an all-zero one counts into the middle bin.
        bins: at least 1; an odd number puts a bin astride zero. By default the width follows Scott's rule,
            3.5 n^(-1/3) rms, with at most 401 bins: tensors of one size then share a bin width, whatever their tails.
        limit: half the range in units of rms; by default at least the crest factor, so that nothing lies beyond.

    Raises:
        ValueError: bins or limit out of range; complex numbers, a sparse tensor, or one without data.
    """
    return describe(weight, bins, limit=limit)[1]


def describe(weight: Tensor, bins: int | None = None, *, limit: float | None = None) -> tuple[TensorStats, Histogram]:
    """Return :func:`tensor_stats` and :func:`histogram` of a tensor, in two passes over it instead of four.

    Raises:
        ValueError: as they do.
    """
    if (bins is not None and bins < 1) or (limit is not None and not 1e-30 < limit < 1e30):
        raise ValueError(
            f"histogram needs bins >= 1 and a limit from 1e-30 to 1e30 rms, got bins={bins} and limit={limit}."
        )
    flat = Flat(readable(weight, where="histogram"))
    moments = flat.moments()
    half = limit if limit is not None else (moments.peak / moments.rms if moments.rms > 0 else 1.0)
    number = bins or 1
    if bins is None:
        width = max(3.5 * max(1, moments.finite) ** (-1 / 3), half / 200)
        number = 2 * math.ceil(half / width - 0.5) + 1
        half = half if limit is not None else number * width / 2
    spread = flat.spread(_threshold(moments), Bins(half * (moments.rms or 1.0), number))
    assert spread.counts is not None
    counted = Histogram(tuple(Bins(half, number).edges().tolist()), tuple(spread.counts))
    return _named(weight, flat, moments, spread), counted


def _threshold(moments: Moments) -> float:
    # One magnitude can be exactly 3 rms (a one-hot vector of nine); rounding must not put it beyond.
    return TAIL * moments.rms * (1 + 1e-14)


def _named(weight: Tensor, flat: Flat, moments: Moments, spread: Spread) -> TensorStats:
    count, peak, rms = moments.finite, moments.peak, moments.rms
    return TensorStats(
        parameters=weight.numel(),
        nonfinite=moments.nan + moments.infinite,
        nan=moments.nan,
        infinite=moments.infinite,
        peak=peak / flat.scale,
        rms=rms / flat.scale,
        crest=max(1.0, peak / rms) if rms > 0 else math.nan,
        kurtosis=ratio(moments.fourth * count, moments.second**2) if moments.low < moments.high else math.nan,
        tail_mass=ratio(spread.beyond, count) if rms > 0 else math.nan,
        outlier_energy=ratio(spread.energy, moments.square),
    )
