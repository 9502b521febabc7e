r"""How large the largest of n samples is: the crest factor that max scaling meets."""

import math
from itertools import pairwise

import numpy as np

from wnq.theory.beta import Floats, gauss_legendre
from wnq.theory.densities import Density
from wnq.theory.empirical import Empirical

_NODES = 16
_TARGETS = (40.0, 20.0, 10.0, 5.0, 2.0, 1.0, 0.5, 0.2, 0.1, 1e-2)
_BISECTIONS = 30
"""Of magnitudes 39 decades apart: to 1e-7 of each, more than enough for where a panel ends."""
_REMAINDER = 1e-13


def expected_crest(density: Density, count: int) -> float:
    r"""Return E max|t| of ``count`` independent samples, over the density's root mean square.

    With T(x) = P(|t| > x) it is :math:`\int_0^\infty 1 - (1 - T(x))^n\,dx`, by Gauss-Legendre panels about the quantiles of
    the maximum and on into the tail. A Gaussian gives about sqrt(2 ln n), a Laplace density about ln(n) / sqrt 2, a uniform
    one sqrt 3 n / (n + 1). The crest factor of a sample divides by the sample's own rms instead, which for very heavy tails
    grows with its maximum and keeps that one below sqrt(n).

    Args:
        density: symmetric about zero, or empirical (drawn from with replacement).
        count: number of samples, at least 1.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"count of expected_crest must be at least 1, got {count!r}.")
    if not density.second > 0:
        return math.nan
    rms = math.sqrt(density.second)
    if isinstance(density, Empirical):
        return _of_points(density, count) / rms
    # Below the first edge, the maximum of n samples is larger with certainty, to double precision.
    edges = [0.0, *_quantiles(density, np.array([target / count for target in _TARGETS if target < count]))]
    total = sum(_panel(density, count, a, b) for a, b in pairwise(edges))
    low = edges[-1]
    while low < density.peak:
        high = min(2 * low, density.peak)
        part = _panel(density, count, low, high)
        total += part
        low = high
        if part <= _REMAINDER * total:
            break
    return total / rms


def _beyond(density: Density, x: Floats) -> Floats:
    """P(|t| > x) of a symmetric density, from its lower tail, which keeps its relative precision."""
    return 2 * density.moments(-x)[0]


def _exceeds(density: Density, count: int, x: Floats) -> Floats:
    with np.errstate(divide="ignore"):
        return -np.expm1(count * np.log1p(-np.minimum(1.0, _beyond(density, x))))


def _quantiles(density: Density, share: Floats) -> list[float]:
    """The magnitudes that shares of the samples exceed, by bisection of their logarithms."""
    rms = math.sqrt(density.second)
    low, high = np.full(share.shape, 1e-9 * rms), np.full(share.shape, min(density.peak, 1e30 * rms))
    for _ in range(_BISECTIONS):
        middle = np.sqrt(low) * np.sqrt(high)
        above = _beyond(density, middle) > share
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    return high.tolist()


def _panel(density: Density, count: int, low: float, high: float) -> float:
    if not high > low:
        return 0.0
    node, weight = gauss_legendre(_NODES)
    x = low + (high - low) * (node + 1) / 2
    return float((weight * _exceeds(density, count, x)).sum()) * (high - low) / 2


def _of_points(density: Empirical, count: int) -> float:
    points, share = density.points()
    order = np.argsort(np.abs(points))
    below = np.minimum(1.0, share[order].cumsum())
    reached = np.exp(count * np.log(below))
    reached[-1] = 1.0
    return float((np.abs(points)[order] * np.diff(reached, prepend=0.0)).sum())
