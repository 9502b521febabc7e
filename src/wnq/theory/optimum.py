r"""The clip of least error: a scan for the right valley, then its bottom.

The error of a sample, as a function of the clip, is the least of many parabolas, one for each way to sort the numbers into
cells, so it may have many local minima. Where they can be counted (few numbers or few levels) all are compared, and the clip
is the best there is; otherwise a fine scan finds the valley, and alternating between cells and clip, which never increases
the error, its bottom.
"""

import math

import numpy as np

from wnq.theory.beta import Floats
from wnq.theory.densities import Density
from wnq.theory.empirical import Empirical
from wnq.theory.expected import divisor, error_curve, expected_error, grid_sums, step_width

COUNTABLE = 1 << 16
"""The most crossings of a number and a threshold for which every minimum is compared."""

FARTHEST = 1e4
"""Where the scan for an unbounded density ends, in units of rms."""

_SCAN_STEP = 0.03
_ZOOM = 17
_ROUNDS = 4
_POLISH = 50


def optimal_clip(density: Density, bits: int, *, grid: str = "full") -> tuple[float, float]:
    """Return the clip of least expected error and that error, relative.

    The clip is at most the density's peak: a range that nothing needs is not a clip. It is at least E|t|: the best clip for
    given cells is sum(a |t|) / sum(a^2), where the level of t is a times the clip, 0 <= a <= 1.

    Args:
        density: what is quantized.
        bits: 1 to 8; at least 2 on the symmetric grid.
        grid: ``"full"`` or ``"symmetric"``.

    Returns:
        The clip in the density's units (the outermost level, not the outermost threshold or the end of its cell) and the
        relative error; NaN twice for a density that is all zero.

    Raises:
        ValueError: bits or grid out of range.
    """
    divisor(bits, grid)
    if not density.second > 0:
        return math.nan, math.nan
    clip = _counted(density, bits, grid) if isinstance(density, Empirical) else None
    if clip is None:
        clip = _scanned(density, bits, grid)
    clip = _polished(density, bits, grid, clip)
    return clip, expected_error(density, bits, clip, grid=grid)


def _counted(density: Empirical, bits: int, grid: str) -> float | None:
    """Compare all minima of an empirical density, taking each bin as a point; None if there are too many.

    As the clip grows from zero, numbers cross thresholds one by one. Between crossings the error is a parabola in the clip
    with its minimum m2 - S1^2 / S2 at S1 / S2, so the best of all parabolas is the largest S1^2 / S2 of two running sums.
    """
    points, share = density.points()
    magnitude = np.abs(points)
    levels = divisor(bits, grid) // 2 + 1 if grid == "full" else divisor(bits, grid) + 1
    if magnitude.size * (levels - 1) > COUNTABLE:
        return None
    step = step_width(bits, grid)
    level = 1 - step * np.arange(levels)  # descending from 1
    border = (level[:-1] + level[1:]) / 2
    crossing = (magnitude[:, None] / border).ravel()
    lost = (share * magnitude)[:, None] * np.full(levels - 1, step)
    lost_square = share[:, None] * (level[:-1] ** 2 - level[1:] ** 2)
    order = np.argsort(crossing, kind="stable")
    order = order[crossing[order] <= density.peak]
    first = float((share * magnitude).sum()) - np.concatenate([[0.0], lost.ravel()[order].cumsum()])
    square = 1 - np.concatenate([[0.0], lost_square.ravel()[order].cumsum()])
    with np.errstate(divide="ignore", invalid="ignore"):
        clips = np.where(square > 1e-12, first / square, 0.0)
    gain = np.where((clips > 0) & (clips <= density.peak), first * clips, -1.0)
    best = float(clips[int(np.argmax(gain))])
    ends = np.array([best if best > 0 else density.peak, density.peak])
    return float(ends[int(np.argmin(error_curve(density, bits, ends, grid=grid)))])


def _scanned(density: Density, bits: int, grid: str) -> float:
    low = _mean_magnitude(density)
    high = max(low * (1 + 1e-9), min(density.peak, FARTHEST * math.sqrt(density.second)))
    clips: Floats = np.geomspace(low, high, min(400, max(_ZOOM, math.ceil(math.log(high / low) / _SCAN_STEP))))
    for _ in range(_ROUNDS):
        best = int(np.argmin(error_curve(density, bits, clips, grid=grid)))
        low, high = float(clips[max(0, best - 1)]), float(clips[min(clips.size - 1, best + 1)])
        centre = float(clips[best])
        clips = np.unique(np.concatenate([np.linspace(low, high, _ZOOM), [centre]]))
    return float(clips[int(np.argmin(error_curve(density, bits, clips, grid=grid)))])


def _polished(density: Density, bits: int, grid: str, clip: float) -> float:
    """Move the clip to the best one for its cells, then the cells to the clip, as long as the error falls."""
    error = float(error_curve(density, bits, clip, grid=grid))
    for _ in range(_POLISH):
        first, square = (float(a) for a in grid_sums(density, bits, clip, grid))
        if not (first > 0 and square > 0):
            break
        proposal = min(first / square, density.peak)
        new = float(error_curve(density, bits, proposal, grid=grid))
        if error - new <= 1e-13 * error:
            break
        clip, error = proposal, new
    return clip


def _mean_magnitude(density: Density) -> float:
    whole, half = density.moments(np.inf), density.moments(0.0)
    return float(whole[1] - 2 * half[1])
