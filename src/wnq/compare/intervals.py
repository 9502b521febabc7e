"""95 % intervals of a difference of means over seeds: paired where the seeds are common, Welch's where they are not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(128)


@dataclass(frozen=True)
class Interval:
    """A difference of means and where it may lie.

    Attributes:
        difference: as measured.
        low: lower end of the 95 % interval.
        high: upper end.
        kind: how it was computed, in words.
    """

    difference: float
    low: float
    high: float
    kind: str

    @property
    def holds_zero(self) -> bool:
        """Whether no difference at all is among the values that the interval allows."""
        return self.low <= 0 <= self.high


def paired_interval(first: Sequence[float], second: Sequence[float], *, resolution: float = 0.0) -> Interval:
    """Return the paired t interval of mean(first) - mean(second); the values of one seed stand at one place.

    Args:
        first: one value a seed.
        second: one value a seed.
        resolution: the distance between neighbouring values, which are rounded to it: a variance below that of this rounding,
            resolution^2 / 12 a value, cannot be seen, and is taken for it. A few seeds that happen to agree prove nothing.

    Raises:
        ValueError: not as many of one as of the other, or fewer than two.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"a paired interval needs two pairs or more, got {len(first)} and {len(second)} values.")
    differences = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    count = len(differences)
    variance = max(float(differences.var(ddof=1)), resolution**2 / 6)
    return _around(float(differences.mean()), math.sqrt(variance / count), count - 1, f"paired t, {count} seeds")


def welch_interval(first: Sequence[float], second: Sequence[float], *, resolution: float = 0.0) -> Interval:
    """Return Welch's interval of mean(first) - mean(second), for independent values of unequal spread.

    Args:
        first: one value a seed.
        second: one value a seed.
        resolution: as for :func:`paired_interval`.

    Raises:
        ValueError: fewer than two values of either.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"Welch's interval needs two values of each, got {len(first)} and {len(second)}.")
    x, y = (np.asarray(values, dtype=np.float64) for values in (first, second))
    u, v = (max(float(values.var(ddof=1)), resolution**2 / 12) / len(values) for values in (x, y))
    # Two constants: any number of degrees of freedom gives the interval without width.
    freedom = (u + v) ** 2 / (u**2 / (len(x) - 1) + v**2 / (len(y) - 1)) if u + v > 0 else 1.0
    return _around(float(x.mean() - y.mean()), math.sqrt(u + v), freedom, f"Welch, {len(x)} and {len(y)} seeds")


def _around(difference: float, error: float, freedom: float, kind: str) -> Interval:
    reach = t_quantile((1 + CONFIDENCE) / 2, freedom) * error
    return Interval(difference, difference - reach, difference + reach, kind)


def t_quantile(probability: float, freedom: float) -> float:
    r"""Return the quantile of Student's t, by bisection of its distribution function.

    With :math:`t = \sqrt\nu\tan\theta` the density becomes :math:`\cos^{\nu-1}\theta` times a constant, so that the
    distribution function is a smooth integral over a finite range (here Gauss-Legendre with 128 nodes). Right to 8 digits
    up to 10,000 degrees of freedom, far more than there are seeds.

    Args:
        probability: in (0, 1).
        freedom: degrees of freedom, at least 1; need not be an integer.

    Raises:
        ValueError: a value out of range.
    """
    if not 0 < probability < 1 or not 1 <= freedom < math.inf:
        raise ValueError(f"t_quantile needs 0 < probability < 1 and freedom >= 1, got {probability} and {freedom}.")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)

    def above_half(t: float) -> float:
        half = math.atan(t / math.sqrt(freedom)) / 2
        return constant * half * float(_WEIGHTS @ np.cos(half * (_NODES + 1)) ** (freedom - 1))

    low, high = 0.0, 1.0
    while above_half(high) < probability - 0.5:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (middle, high) if above_half(middle) < probability - 0.5 else (low, middle)
    return (low + high) / 2
