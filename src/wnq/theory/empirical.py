r"""The density of given numbers: exact, or in bins fine enough that nobody sees the difference.

:meth:`Empirical.from_tensor` sorts a tensor's elements. Up to 262,144 different numbers, and all that 8 and 16 bits can say, are
kept as they are, whatever type they are stored in, and every error of them is exact. Of more numbers neighbours share a bin,
equally many each, but for the outermost, which stay alone; each bin keeps count, mean and variance. A cell between two thresholds
is then exact except in the bins that a threshold cuts, and there both levels are about equally far, so that little depends on how
the bin is divided: see :meth:`Empirical.uncertainty`.
"""

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from wnq.theory.beta import Floats
from wnq.theory.sorting import Bins, sorted_bins


class Empirical:
    """Equal mass on each of some numbers: :meth:`from_values`, :meth:`from_bins`, :meth:`from_tensor`.

    Attributes:
        name: what a plot calls it.
        count: how many finite numbers it stands for.
        nonfinite: how many NaN and infinite ones were left out.
        second: their mean square; NaN if there are none.
        mean: their mean.
        mean_magnitude: the mean of their magnitudes; a little too small if a bin holds both signs.
        peak: their largest magnitude; 0 if there are none.
        exact: no bin holds two different numbers, so that every moment is exact.
    """

    def __init__(self, bins: Bins, *, nonfinite: int = 0, name: str = "empirical") -> None:
        self.name = name
        self.nonfinite = nonfinite
        self._bins = bins = bins.narrowed()
        self.count = int(bins.count.sum())
        # Of a uniform density with the mean and the variance of the bin.
        self._half = math.sqrt(3) * bins.deviation
        self.exact = not bool(self._half.any())
        self._share = share = bins.count / max(1, self.count)
        # Counts add up exactly; the other sums in the longest float there is, since cells are differences of them.
        terms = (bins.count, bins.count * bins.mean, bins.count * (bins.mean**2 + bins.deviation**2))
        self._below = np.zeros((3, share.size + 1))
        for row, term in zip(self._below, terms, strict=True):
            exact = np.int64 if term.dtype == np.int64 else np.longdouble
            row[1:] = term.cumsum(dtype=exact) / max(1, self.count)
        self.second = float(self._below[2, -1]) if self.count else math.nan
        self.mean = float(self._below[1, -1]) if self.count else math.nan
        self.mean_magnitude = float((share * np.abs(bins.mean)).sum()) if self.count else math.nan
        self.peak = float(max(-bins.low[0], bins.high[-1])) if self.count else 0.0

    @classmethod
    def from_values(cls, values: npt.ArrayLike, *, name: str = "empirical") -> "Empirical":
        """Return the exact density of numbers of any shape; non-finite ones are left out and counted."""
        flat = np.asarray(values, dtype=np.float64).ravel()
        finite = flat[np.isfinite(flat)]
        points, count = np.unique(finite, return_counts=True)
        return cls(Bins.at_points(points, count), nonfinite=flat.size - finite.size, name=name)

    @classmethod
    def from_bins(
        cls,
        edges: npt.ArrayLike,
        count: npt.ArrayLike,
        total: npt.ArrayLike,
        squares: npt.ArrayLike,
        *,
        name: str = "empirical",
    ) -> "Empirical":
        """Return the density of numbers known by bin.

        Args:
            edges: ascending, one more than there are bins.
            count: numbers in each bin.
            total: their sum in each bin.
            squares: the sum of their squares in each bin.
            name: what a plot calls it.

        Raises:
            ValueError: the four do not fit together.
        """
        border = np.asarray(edges, dtype=np.float64)
        number, first, second = (np.asarray(a, dtype=np.float64) for a in (count, total, squares))
        if border.ndim != 1 or not number.shape == first.shape == second.shape == (border.size - 1,):
            raise ValueError(
                f"from_bins needs one more edge than bins, got shapes edges {border.shape}, count {number.shape}, "
                f"total {first.shape}, squares {second.shape}."
            )
        if bool(np.any(np.diff(border) <= 0)) or bool(np.any(number < 0)):
            raise ValueError("from_bins needs ascending edges and counts of at least 0.")
        used = number > 0
        low, high, number, first, second = border[:-1][used], border[1:][used], number[used], first[used], second[used]
        mean = first / number
        slack = 1e-9 * np.maximum(np.abs(low), np.abs(high))
        if bool(np.any((mean < low - slack) | (mean > high + slack))):
            raise ValueError("from_bins needs each bin's mean, total / count, within its edges.")
        deviation = np.sqrt(np.maximum(0.0, second / number - mean**2))
        return cls(Bins(low, high, number.astype(np.int64), mean, deviation), name=name)

    @classmethod
    def from_tensor(
        cls, weight: Tensor, *, precision: int = 18, unit: float = 1.0, name: str = "empirical"
    ) -> "Empirical":
        """Return the density of a tensor's elements; it sorts a copy of them, or counts those of 16 bits and less.

        Args:
            weight: floating point, any shape, type and device.
            precision: exact up to 2^precision different numbers, and about as many bins for more; 10 to 22.
            unit: what to divide by, exactly; the density's units are then this.
            name: what a plot calls it.

        Raises:
            ValueError: the tensor is not a dense one of floating-point numbers, or precision or unit are out of range.
        """
        if not weight.is_floating_point() or weight.layout != torch.strided or weight.device.type == "meta":
            raise ValueError(
                f"Empirical.from_tensor needs a dense floating-point tensor with data, got {weight.dtype}, {weight.layout}, "
                f"on {weight.device}."
            )
        if not 10 <= precision <= 22:
            raise ValueError(f"precision must be an integer from 10 to 22, got {precision!r}.")
        if not 0 < unit < math.inf:
            raise ValueError(f"unit must be positive and finite, got {unit!r}.")
        bins, nonfinite = sorted_bins(weight.detach().resolve_neg().reshape(-1), 1 << precision, unit)
        return cls(bins, nonfinite=nonfinite, name=name)

    def moments(self, x: npt.ArrayLike) -> Floats:
        """Return the integrals of t^k p(t) from minus infinity to ``x``, k = 0, 1, 2: shape ``(3, *x.shape)``."""
        at = np.asarray(x, dtype=np.float64)
        if not self.count:
            return np.zeros((3, *at.shape))
        bins, index = self._bins, self._place(at)
        result = self._below[:, index + 1]
        if self.exact:
            return result
        inside = (index >= 0) & (at < bins.high[index])
        i, half = index[inside], self._half[index[inside]]
        low = bins.mean[i] - half
        with np.errstate(invalid="ignore", divide="ignore"):
            part = np.where(half > 0, np.clip((at[inside] - low) / (2 * half), 0, 1), at[inside] >= low)
        top = low + 2 * half * part
        mass = self._share[i] * part
        partial = np.stack([mass, mass * (low + top) / 2, mass * (low**2 + low * top + top**2) / 3])
        result[:, inside] = self._below[:, i] + partial
        return result

    def uncertainty(self, x: npt.ArrayLike) -> Floats:
        r"""Return how much of the squared error is uncertain at each threshold; 0 unless it cuts a bin.

        Of a bin with share p, mean m and deviation s that a threshold x cuts, :math:`E(t-x)_+` lies between :math:`(m-x)_+`
        (Jensen) and :math:`((m-x) + \sqrt{s^2+(m-x)^2})/2` (Scarf), and so does the estimate, from a uniform density with m
        and s. The squared error contains it times twice the distance between the levels. Returned is the difference of the
        two, doubled: :math:`p\,(\sqrt{s^2+(m-x)^2}-|m-x|)`.
        """
        at = np.asarray(x, dtype=np.float64)
        if not self.count:
            return np.zeros(at.shape)
        bins, index = self._bins, self._place(at)
        inside = (index >= 0) & (at < bins.high[index])
        away = np.abs(bins.mean[index] - at)
        gap = self._share[index] * (np.hypot(bins.deviation[index], away) - away)
        return np.where(inside, gap, 0.0)

    def _place(self, at: Floats) -> npt.NDArray[np.intp]:
        return np.searchsorted(self._bins.low, at, side="right") - 1

    @functools.cached_property
    def _by_magnitude(self) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        order = np.argsort(np.abs(self._bins.mean), kind="stable")
        return order, self._bins.count[order].cumsum()

    def quantile(self, share: float) -> float:
        """Return the magnitude that ``share`` of the numbers do not exceed, interpolated; from bins, within a bin's width.

        Raises:
            ValueError: share is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {share!r}.")
        if not self.count:
            return math.nan
        magnitude = np.abs(self._bins.mean)
        order, number = self._by_magnitude
        place = share * (self.count - 1)
        ranks = np.minimum([math.floor(place), math.floor(place) + 1], self.count - 1)
        index = np.searchsorted(number, ranks, side="right")
        bins = order[index]
        # Evenly spaced within a bin, about its mean.
        along = (ranks - number[index] + 0.5) * 2 / self._bins.count[bins] + 1
        below, above = magnitude[bins] + self._half[bins] * along
        return float(min(below + (above - below) * (place - math.floor(place)), self.peak))

    def points(self) -> tuple[Floats, Floats]:
        """Return ascending numbers and their shares; of a binned density, the means of the bins."""
        return self._bins.mean, self._share

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values, with replacement; uniformly about its mean within a bin."""
        index = generator.choice(self._share.size, size=count, p=self._share / self._share.sum())
        return self._bins.mean[index] + self._half[index] * generator.uniform(-1, 1, count)
