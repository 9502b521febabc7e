"""Moments of parts of a tensor, and of the parts together."""

import math
from typing import NamedTuple

_SAFE = 2.0**200
"""Fourth powers of anything between 1 / this and this stay far inside float64."""


def ratio(numerator: float, denominator: float) -> float:
    """Return the quotient, NaN where the denominator is not above zero."""
    return numerator / denominator if denominator > 0 else math.nan


class Moments(NamedTuple):
    """Count, extremes, mean and sums of powers about the mean of finite elements, and how many others there were."""

    finite: int = 0
    nan: int = 0
    infinite: int = 0
    low: float = math.inf
    high: float = -math.inf
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0

    @property
    def peak(self) -> float:
        """max|w|, 0 if there is no finite element."""
        return max(-self.low, self.high) if self.finite else 0.0

    @property
    def square(self) -> float:
        """Sum of squares about zero."""
        return self.second + self.finite * self.mean * self.mean

    @property
    def rms(self) -> float:
        """Root of the mean square about zero."""
        return math.sqrt(self.square / max(1, self.finite))


def joined(a: Moments, b: Moments) -> Moments:
    """Return the moments of two sets together, by Pébay's formulas, which lose no digits to a large mean.

    Products, not powers: float64 near its end makes infinities here, of which a power would raise OverflowError.
    """
    bad = a.nan + b.nan, a.infinite + b.infinite
    if not a.finite or not b.finite:
        full = a if a.finite else b
        return full._replace(nan=bad[0], infinite=bad[1])
    m, n = a.finite, b.finite
    total, gap = m + n, b.mean - a.mean
    step = gap / total
    return Moments(
        total,
        *bad,
        min(a.low, b.low),
        max(a.high, b.high),
        a.mean + step * n,
        a.second + b.second + gap * step * m * n,
        a.third + b.third + gap * step * step * m * n * (m - n) + 3 * step * (m * b.second - n * a.second),
        a.fourth
        + b.fourth
        + gap * step * step * step * m * n * (m * m - m * n + n * n)
        + 6 * step * step * (m * m * b.second + n * n * a.second)
        + 4 * step * (m * b.third - n * a.third),
    )


def safe_scale(peak: float) -> float:
    """Return the power of two to multiply by, so that fourth powers neither overflow nor vanish; nearly always 1."""
    if not peak > 0 or 1 / _SAFE <= peak <= _SAFE:
        return 1.0
    return math.ldexp(1.0, min(1000, -math.frexp(peak)[1]))


class Spread(NamedTuple):
    """What lies beyond a threshold, its sum of squares, and the counts of bins if asked for."""

    beyond: int
    energy: float
    counts: list[int] | None
