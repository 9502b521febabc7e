"""Where to clip a weight before it is rounded: the usual rules, and what each one's error is.

The weight is sorted once (:meth:`wnq.theory.Empirical.from_tensor`); all errors, at any width and clip, are then sums over the
cells of a grid. For up to 262,144 different numbers, and so for float16 and bfloat16, they are exact; for more they are within
1e-6 of the error itself in every case we know, and :func:`wnq.theory.error_bound` is a strict bound.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.learned_step import LearnedStep
from wnq.methods.sawb import COEFFICIENTS
from wnq.names import did_you_mean
from wnq.theory import Empirical, expected_error, law_error, optimal_clip
from wnq.theory.expected import divisor, step_width

CLIP_RULES = ("max", "percentile", "mse", "sawb", "lsq")
"""The rules, one clip for the whole tensor:

- ``max``: the largest magnitude.
- ``percentile``: what :data:`PERCENTILE` % of the magnitudes do not exceed; the largest magnitude if that is zero.
- ``mse``: the clip of the least squared error, :func:`wnq.theory.optimal_clip`.
- ``sawb``: SAWB's linear fit of two moments (:mod:`wnq.methods.sawb`), at the widths it was published for.
- ``lsq``: the clip that gives the grid the step LSQ starts from, 2 E|w| / sqrt(Qp); from 2 bits.
"""

PERCENTILE = 99.9


@dataclass(frozen=True)
class ClipError:
    """What one rule makes of one weight at one width."""

    bits: int
    """Width of a code."""
    rule: str
    """One of :data:`CLIP_RULES`."""
    clip: float
    """The outermost level, in units of the weights; 0 for a weight of zeros, NaN for one without finite elements."""
    clip_rms: float
    """The same in units of the root mean square; NaN if that is zero."""
    measured: float
    """|w - w_q|^2 / |w|^2 over the finite elements; NaN for a weight of zeros."""
    predicted: float | None
    """What the law says: step^2 / 12 over the mean square, whatever is clipped. None for a weight of zeros."""


def clip_errors(
    weight: Tensor | Empirical,
    *,
    bits: Iterable[int] | None = None,
    rules: Sequence[str] = CLIP_RULES,
    grid: str = "full",
) -> list[ClipError]:
    """Return the error of a weight at each width under each clip rule, widths first; one scale for the whole tensor.

    NaN and infinity are left out. A rule that is not defined at a width has no row there.

    Args:
        weight: floating point, any shape, type and device; or its density, where that is known already.
        bits: widths, 1 to 8; by default all that the grid has.
        rules: names out of :data:`CLIP_RULES`.
        grid: ``"full"`` or ``"symmetric"``, see :class:`wnq.quantizer.Uniform`.

    Raises:
        ValueError: an unknown rule, or a width or grid out of range.
    """
    for rule in rules:
        if rule not in CLIP_RULES:
            raise ValueError(f"clip rule {rule!r} is unknown.{did_you_mean(rule, CLIP_RULES)}")
    widths = list(bits) if bits is not None else list(range(2 if grid == "symmetric" else 1, 9))
    for width in widths:
        divisor(width, grid)
    unit = 1.0 if isinstance(weight, Empirical) else _unit(weight)
    density = weight if isinstance(weight, Empirical) else Empirical.from_tensor(weight, unit=unit)
    rows: list[ClipError] = []
    for width in widths:
        for rule in rules:
            clip = _clip(density, width, rule, grid)
            if clip is not None:
                rows.append(_row(density, width, rule, clip, grid, unit))
    return rows


def _unit(weight: Tensor) -> float:
    """Keep squares of float64 numbers in range; those of shorter types are."""
    if weight.dtype != torch.float64:
        return 1.0
    peak = 0.0
    for part in weight.detach().reshape(-1).split(1 << 20):
        finite = part[torch.isfinite(part)]
        peak = max(peak, finite.abs().max().item() if finite.numel() else 0.0)
    return peak or 1.0


def _row(density: Empirical, bits: int, rule: str, clip: float, grid: str, unit: float) -> ClipError:
    if not density.second > 0:
        return ClipError(bits, rule, 0.0 if density.count else math.nan, math.nan, math.nan, None)
    return ClipError(
        bits=bits,
        rule=rule,
        clip=clip * unit,
        clip_rms=clip / math.sqrt(density.second),
        measured=expected_error(density, bits, clip, grid=grid),
        predicted=law_error(density, bits, clip, grid=grid),
    )


def _clip(density: Empirical, bits: int, rule: str, grid: str) -> float | None:
    """Return the clip of a rule; None where it is not defined."""
    if rule == "max":
        return density.peak
    if rule == "percentile":
        return density.quantile(PERCENTILE / 100) or density.peak
    if rule == "mse":
        return optimal_clip(density, bits, grid=grid)[0]
    if rule == "sawb":
        return _sawb_clip(density, bits, grid)
    return None if bits < 2 else _lsq_step(density.mean_magnitude, bits) / step_width(bits, grid)


def _sawb_clip(density: Empirical, bits: int, grid: str) -> float | None:
    if (grid, bits) not in COEFFICIENTS:
        return None
    square, mean = COEFFICIENTS[grid, bits]
    alpha = square * math.sqrt(density.second) + mean * density.mean_magnitude
    return alpha if alpha > 0 else density.peak


def _lsq_step(mean_magnitude: float, bits: int) -> float:
    """LSQ's first step depends on the weights by their mean magnitude only, so one element stands for all."""
    start = LearnedStep(bits, is_weight=True).double()
    start.reset_(torch.tensor([mean_magnitude], dtype=torch.float64))
    return start.step.item()
