r"""Densities with known partial moments: all that the exact error of a quantizer needs to know about its input.

A partial moment is :math:`\int_{-\infty}^x t^k p(t)\,dt`, k = 0, 1, 2. All are closed forms: of the error function
(Gaussian), of exponentials (Laplace), of the incomplete beta function (Student-t, :mod:`wnq.theory.beta`). Every density here
is symmetric about zero and scaled to its root mean square, 1 by default, so that a clip is in units of it, like a crest
factor.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from wnq.theory.beta import Floats, student_cdf, student_pdf


class Density(Protocol):
    """What :func:`wnq.theory.expected_error` and its relatives need."""

    @property
    def name(self) -> str:
        """What a plot calls it."""
        ...

    @property
    def second(self) -> float:
        """The mean square E t^2, finite."""
        ...

    @property
    def peak(self) -> float:
        """The largest magnitude; infinite for an unbounded density."""
        ...

    def moments(self, x: npt.ArrayLike) -> Floats:
        """Return the integrals of t^k p(t) from minus infinity to ``x``, k = 0, 1, 2: shape ``(3, *x.shape)``.

        ``x`` may be infinite. Mass exactly at ``x`` counts; it makes no difference to any error, as both levels next to a
        threshold are equally far from it.
        """
        ...

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values."""
        ...


@dataclass(frozen=True)
class _Scaled:
    """A density of unit mean square, stretched to another root mean square."""

    rms: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.rms < math.inf:
            raise ValueError(f"rms of a density must be positive and finite, got {self.rms!r}.")

    @property
    def second(self) -> float:
        """The mean square."""
        return self.rms**2

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return math.inf

    def moments(self, x: npt.ArrayLike) -> Floats:
        """Return the integrals of t^k p(t) from minus infinity to ``x``, k = 0, 1, 2."""
        u = np.asarray(x, dtype=np.float64) / self.rms
        # The closed forms are for the left of zero, where nothing cancels; the rest follows by symmetry.
        mass, first, second = self._left(-np.abs(u))
        right = u > 0
        mass, second = np.where(right, 1 - mass, mass), np.where(right, 1 - second, second)
        return np.stack([mass, self.rms * first, self.rms**2 * second])

    def _left(self, u: Floats) -> Floats:
        """Partial moments of the unit density at ``u`` <= 0."""
        raise NotImplementedError


@dataclass(frozen=True)
class Gaussian(_Scaled):
    """The normal density."""

    @property
    def name(self) -> str:
        """The density's name."""
        return "Gaussian"

    def _left(self, u: Floats) -> Floats:
        u = np.maximum(u, -40.0)
        below = np.array([math.erfc(v) for v in (-u / math.sqrt(2)).ravel()]).reshape(u.shape) / 2
        height = np.exp(-(u**2) / 2) / math.sqrt(2 * math.pi)
        return np.stack([below, -height, below - u * height])

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values."""
        return self.rms * generator.standard_normal(count)


@dataclass(frozen=True)
class Laplace(_Scaled):
    """The double exponential density, exp(-sqrt(2) |t|) / sqrt(2) at unit mean square; kurtosis 6."""

    @property
    def name(self) -> str:
        """The density's name."""
        return "Laplace"

    def _left(self, u: Floats) -> Floats:
        scale = 1 / math.sqrt(2)
        u = np.maximum(u, -1000.0)
        below = np.exp(u / scale) / 2
        return np.stack([below, below * (u - scale), below * (u**2 - 2 * scale * u + 2 * scale**2)])

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values."""
        return generator.laplace(scale=self.rms / math.sqrt(2), size=count)


@dataclass(frozen=True, init=False)
class StudentT(_Scaled):
    r"""Student's t with ``df`` > 2 degrees of freedom, scaled: tails that fall as a power, :math:`|t|^{-df-1}`.

    With the unscaled density f and cumulative distribution F, the partial moments up to x are F, :math:`-(\nu+x^2)f/(\nu-1)`
    and :math:`(\nu F - x(\nu+x^2)f)/(\nu-2)`, by parts. The last, scaled to a unit mean square, has no pole at 2.

    Args:
        df: degrees of freedom, above 2 so that the mean square is finite; 4 and less has no kurtosis.
        rms: the root mean square.
    """

    df: float = 5.0
    rms: float = 1.0

    def __init__(self, df: float, rms: float = 1.0) -> None:
        if not 2 < df < math.inf:
            raise ValueError(
                f"df of StudentT must be above 2 and finite, got {df!r}; its mean square is infinite at 2."
            )
        object.__setattr__(self, "df", float(df))
        object.__setattr__(self, "rms", rms)
        self.__post_init__()

    @property
    def name(self) -> str:
        """The density's name, with its degrees of freedom."""
        return f"Student-t, {self.df:g} degrees of freedom"

    def _left(self, u: Floats) -> Floats:
        df, scale = self.df, math.sqrt((self.df - 2) / self.df)
        x = np.maximum(u / scale, -1e100)
        below, height = student_cdf(x, df), student_pdf(x, df)
        first = -scale * (df + x**2) / (df - 1) * height
        moments = np.stack([below, first, below - x * (1 + x**2 / df) * height])
        # Close to 2 degrees of freedom the mean square is in the tail beyond any finite number.
        return np.where(u == -math.inf, 0.0, moments)

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values."""
        return self.rms * math.sqrt((self.df - 2) / self.df) * generator.standard_t(self.df, count)


@dataclass(frozen=True)
class UniformDensity(_Scaled):
    """The flat density from -sqrt(3) to sqrt(3) at unit mean square: the smallest crest of all that never rise away from zero."""

    @property
    def name(self) -> str:
        """The density's name."""
        return "uniform"

    @property
    def peak(self) -> float:
        """The largest magnitude, sqrt(3) rms."""
        return math.sqrt(3) * self.rms

    def _left(self, u: Floats) -> Floats:
        edge = math.sqrt(3)
        u = np.maximum(u, -edge)
        return np.stack([u + edge, (u**2 - edge**2) / 2, (u**3 + edge**3) / 3]) / (2 * edge)

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """Draw ``count`` independent values."""
        return generator.uniform(-self.peak, self.peak, count)
