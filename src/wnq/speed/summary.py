"""Ratios of paired times."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple


class Ratio(NamedTuple):
    """How many times faster one thing is than another.

    Attributes:
        median: of the ratios of the rounds.
        low: lower end of its 95 % interval; NaN below 6 rounds, which cannot have one.
        high: upper end.
    """

    median: float
    low: float
    high: float


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> Ratio:
    """Return the median of ``slow / fast`` over rounds, with the interval of the sign test: order statistics, no distribution.

    Args:
        slow: seconds of the reference, one for each round.
        fast: seconds of the other in the same rounds.
    """
    ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
    n = len(ratios)
    # The k-th from either end: the largest k with P(Binomial(n, 1/2) < k) <= 2.5 %.
    k, tail = 0, 0.5**n if n < 1000 else 0.0
    if n < 1000:
        while tail <= 0.025:
            k += 1
            tail += math.comb(n, k) * 0.5**n
    else:  # the normal limit, on the safe side
        k = max(0, math.floor(n / 2 - 0.98 * math.sqrt(n) - 1))
    low, high = (ratios[k - 1], ratios[n - k]) if k else (math.nan, math.nan)
    return Ratio(statistics.median(ratios), low, high)
