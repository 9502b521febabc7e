r"""The exact error of a uniform quantizer on a density: a sum over its cells, nothing assumed.

With levels l and thresholds half-way between them, the expected squared error is the sum over cells of
:math:`m_2 - 2 l m_1 + l^2 m_0`, where :math:`m_k` is the k-th moment of the density inside the cell. The outermost cells
reach to infinity, so clipping is part of it. The grids are those of :class:`wnq.quantizer.Uniform` times the clip c: the
outermost levels are at plus and minus c. Writing a level as c a, the sum is

.. math:: E(c) = m_2 - 2 c A_1 + c^2 A_2, \qquad A_1 = \sum a\,m_1, \quad A_2 = \sum a^2 m_0,

and because a threshold is as far from one level as from the other, :math:`dE/dc = 2 (c A_2 - A_1)`, although both sums depend
on c.
"""

import math

import numpy as np
import numpy.typing as npt

from wnq.quantizer import GRIDS, check_bits
from wnq.theory.beta import Floats
from wnq.theory.densities import Density
from wnq.theory.empirical import Empirical


def divisor(bits: int, grid: str = "full") -> int:
    """Return the largest integer level of a grid: 2^k - 1 (full, odd integers) or 2^(k-1) - 1 (symmetric).

    Raises:
        ValueError: bits or grid out of range.
    """
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(map(repr, GRIDS))}, got {grid!r}.")
    symmetric = grid == "symmetric"
    check_bits(bits, where="bits of the symmetric grid" if symmetric else "bits", low=2 if symmetric else 1)
    return 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1


def step_width(bits: int, grid: str = "full") -> float:
    """Return the distance between levels of the grid over [-1, 1]: 1/N (symmetric) or 2/M (full)."""
    return (2 if grid == "full" else 1) / divisor(bits, grid)


def thresholds(bits: int, grid: str = "full") -> Floats:
    """Return the borders between the cells of the grid over [-1, 1], ascending: one less than there are levels."""
    count = 2**bits - 1 if grid == "full" else 2**bits - 2
    return (np.arange(count) - (count - 1) / 2) * step_width(bits, grid)


def grid_sums(density: Density, bits: int, clips: npt.ArrayLike, grid: str = "full") -> tuple[Floats, Floats]:
    """Return A_1 and A_2 of the module's formula for each clip."""
    c = np.asarray(clips, dtype=np.float64)
    borders = thresholds(bits, grid)
    levels = np.linspace(-1, 1, borders.size + 1)
    below = density.moments(c[..., None] * borders)
    whole = np.broadcast_to(density.moments(np.inf).reshape(3, *[1] * below[0].ndim), (*below.shape[:-1], 1))
    mass, first, _ = np.diff(below, axis=-1, prepend=0.0, append=whole)
    return first @ levels, mass @ levels**2


def error_curve(density: Density, bits: int, clips: npt.ArrayLike, *, grid: str = "full") -> Floats:
    """Return :func:`expected_error` for an array of clips, in its shape."""
    c = _checked(clips, bits, grid)
    if not density.second > 0:
        return np.full(c.shape, math.nan)
    first, second = grid_sums(density, bits, c, grid)
    return np.maximum(0.0, density.second - 2 * c * first + c**2 * second) / density.second


def expected_error(density: Density, bits: int, clip: float, *, grid: str = "full") -> float:
    """Return E (t - Q_clip(t))^2 / E t^2, exactly.

    Args:
        density: what t is drawn from.
        bits: 1 to 8; at least 2 on the symmetric grid.
        clip: the outermost level, in the density's units; positive.
        grid: ``"full"`` or ``"symmetric"``.

    Returns:
        The relative error; NaN for a density that is all zero.

    Raises:
        ValueError: bits, grid or clip out of range.
    """
    return float(error_curve(density, bits, clip, grid=grid))


def error_parts(density: Density, bits: int, clip: float, *, grid: str = "full") -> tuple[float, float]:
    """Return :func:`expected_error` as two summands: what rounding costs within the clip, and what clipping costs beyond it."""
    total = expected_error(density, bits, clip, grid=grid)
    if not density.second > 0:
        return math.nan, math.nan
    below, inside, whole = (density.moments(x) for x in (-clip, clip, np.inf))
    left = below[2] + 2 * clip * below[1] + clip**2 * below[0]
    mass, first, second = whole - inside
    beyond = max(0.0, float(left + second - 2 * clip * first + clip**2 * mass)) / density.second
    return max(0.0, total - beyond), beyond


def law_error(density: Density, bits: int, clip: float, *, grid: str = "full") -> float:
    r"""Return the law's value for :func:`expected_error`: step^2 / 12, as if errors were uniform and nothing clipped.

    In units of the root mean square that is :math:`C^2/(12 N^2)` on the symmetric grid and :math:`C^2/(3 M^2)` on the full
    one, with C = clip / rms. Where the clip is the largest magnitude, C is the crest factor and this is
    :func:`wnq.tails.predicted_error`, the form to use for a tensor. It is exact in the limit of many bits for a clip beyond
    the tail.
    """
    _checked(clip, bits, grid)
    if not density.second > 0:
        return math.nan
    return (step_width(bits, grid) * clip) ** 2 / 12 / density.second


def error_bound(density: Density, bits: int, clip: float, *, grid: str = "full") -> float:
    """Return a bound on how far :func:`expected_error` is from the error on the numbers that a binned density stands for.

    It is zero for a density known exactly. Only bins that a threshold cuts are uncertain, see
    :meth:`wnq.theory.Empirical.uncertainty`, and their errors differ in sign: the truth is far closer.
    """
    c = float(_checked(clip, bits, grid))
    if not isinstance(density, Empirical) or not density.second > 0:
        return 0.0
    return float(density.uncertainty(c * thresholds(bits, grid)).sum()) * c * step_width(bits, grid) / density.second


def _checked(clips: npt.ArrayLike, bits: int, grid: str) -> Floats:
    divisor(bits, grid)
    c = np.asarray(clips, dtype=np.float64)
    if not bool(np.all((c > 0) & (c < math.inf))):
        raise ValueError(f"clip must be positive and finite, got {clips!r}; it is the outermost level of the grid.")
    return c
