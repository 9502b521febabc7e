"""What rounding would make of a weight at each width under each clip rule, its tail, its channels: small, however large it is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from wnq.analysis.ranges import LISTED, OUTLIER, Channels, channel_errors, outlying_channels
from wnq.clipping import CLIP_RULES, clip_errors
from wnq.tails import Histogram, TensorStats, channel_stats, describe
from wnq.theory import Empirical
from wnq.theory.expected import thresholds

__all__ = ["LISTED", "OUTLIER", "RULES", "WIDTHS", "Channels", "Profile", "RuleError", "Tail", "profile"]

WIDTHS = (2, 3, 4, 8)
"""The widths of a report, where none are asked for."""

RULES = (*CLIP_RULES, "channel")
"""Rules of :data:`wnq.clipping.CLIP_RULES`, one range for the whole weight, and ``channel``: each output channel's own max|w|."""

POINTS = 96
"""Of a tail's curve."""

NEAREST = 0.1
"""Where the curve begins, in units of rms."""


@dataclass(frozen=True)
class RuleError:
    """What one rule makes of one weight at one width."""

    bits: int
    rule: str
    """One of :data:`RULES`."""
    measured: float
    """|w - w_q|^2 / |w|^2 over the finite elements; NaN for a weight of zeros."""
    predicted: float | None
    """What the law says, step^2 / 12 over the mean square, whatever is clipped; None for a weight of zeros."""
    clip: float | None
    """The outermost level, in units of rms; None where each channel has its own."""
    entropy: float | None
    """Zero-order entropy of the codes in bits a weight, 0 to bits; None where each channel has its own range."""


@dataclass(frozen=True)
class Tail:
    """How much of a weight lies how far out."""

    reach: tuple[float, ...]
    """Ascending, in units of rms; the last is the crest factor."""
    share: tuple[float, ...]
    """The share of the finite elements with |w| / rms beyond it."""


@dataclass(frozen=True)
class Profile:
    """What a report knows of one weight besides its row and its histogram."""

    grid: str
    """Of :attr:`errors`: ``"full"`` or ``"symmetric"``."""
    errors: tuple[RuleError, ...]
    """Widths first, then rules; a rule that is not defined at a width is missing there. Empty for a weight that holds
    quantized values only, whose rounding is done."""
    tail: Tail
    channels: Channels

    def error(self, bits: int, rule: str) -> RuleError | None:
        """Return the entry of a width and a rule, None if there is none."""
        return next((found for found in self.errors if (found.bits, found.rule) == (bits, rule)), None)

    def measured(self, bits: int, rule: str) -> float | None:
        """Return its error, None if there is no such entry or it is not defined."""
        found = self.error(bits, rule)
        return None if found is None or math.isnan(found.measured) else found.measured


def profile(
    weight: Tensor,
    *,
    axis: int = 0,
    bits: Sequence[int] = WIDTHS,
    grid: str = "full",
    bins: int | None = None,
    values_only: bool = False,
) -> tuple[TensorStats, Histogram, Profile]:
    """Return the statistics, the histogram and the profile of a weight, in a handful of passes over it.

    Besides the weight it needs some 50 MB. NaN and infinity are left out of all but their count.

    Args:
        weight: floating point, any precision, at least one dimension.
        axis: the dimension of the output channels.
        bits: widths of the errors, 1 to 8; at least 2 on the symmetric grid.
        grid: of the errors, ``"full"`` or ``"symmetric"``, see :class:`wnq.quantizer.Uniform`.
        bins: of the histogram, see :func:`wnq.tails.histogram`.
        values_only: whether the weight holds quantized values, of which no errors are to be computed.

    Raises:
        ValueError: a width, the grid or the number of bins out of range.
    """
    stats, counted = describe(weight, bins)
    density = Empirical.from_tensor(weight, unit=stats.rms or 1.0)
    channels = channel_stats(weight, axis)
    errors: list[RuleError] = []
    if not values_only:
        own = channel_errors(weight, channels, bits, axis=axis, grid=grid)
        for width, found in zip(bits, own, strict=True):
            for row in clip_errors(density, bits=(width,), grid=grid):
                entropy = _entropy(density, width, row.clip, grid) if row.clip > 0 else None
                errors.append(RuleError(width, row.rule, row.measured, row.predicted, _finite(row.clip_rms), entropy))
            errors.append(RuleError(width, "channel", found.measured, found.predicted, None, None))
    return stats, counted, Profile(grid, tuple(errors), _tail(density), outlying_channels(channels, stats.rms))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _entropy(density: Empirical, bits: int, clip: float, grid: str) -> float:
    """Return the entropy of the codes in bits; a weight of exactly zero, half-way on the full grid, is rounded up."""
    borders = clip * thresholds(bits, grid)
    borders[borders == 0] = -np.finfo(np.float64).smallest_subnormal
    below = np.concatenate([[0.0], density.moments(borders)[0], [1.0]])
    share = np.diff(below)
    share = share[share > 0]
    return max(0.0, -float((share * np.log2(share)).sum()))


def _tail(density: Empirical) -> Tail:
    if not density.second > 0:
        return Tail((), ())
    rms = math.sqrt(density.second)
    crest = density.peak / rms
    reach = np.geomspace(min(NEAREST, crest / 2), crest, POINTS)
    at = reach * rms
    share = 1 - density.moments(at)[0] + density.moments(np.nextafter(-at, -np.inf))[0]
    share[-1] = 0.0
    return Tail(tuple(reach.tolist()), tuple(np.maximum(0.0, share).tolist()))
