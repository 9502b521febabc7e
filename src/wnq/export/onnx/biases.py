"""Integer biases that round no threshold wrongly.

At few bits one unit of a sum is a visible part of a step, so a rounded bias moves decisions of the next quantization.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

INT32 = 2**31 - 1

STRETCH = 0.02
"""The most that a unit may be changed by, as a share of it."""

MARGIN = 1e-5
"""The narrowest interval of units, as a share of the unit, whose middle float32 arithmetic keeps inside."""


@dataclass(frozen=True)
class Biases:
    """What :func:`integer_biases` found, an array of ``(channels,)`` each.

    Attributes:
        bias: int32.
        unit: what one of a sum is worth now.
        gain: that the channel's weights are multiplied by; ``unit`` is for the multiplied ones.
        missed: thresholds on the wrong side of a sum.
        asked: thresholds that a sum can reach.
    """

    bias: Any
    unit: Any
    gain: Any
    missed: Any
    asked: Any


def best_biases(bias: Any, unit: Any, thresholds: Any, room: int, largest: Any) -> Biases:
    """Return integer biases with the gain, of those up to ``room``, that serves each channel best.

    Args:
        bias: as :func:`integer_biases`.
        unit: ``(channels,)``, of weights without gain.
        thresholds: as there.
        room: the largest gain, at which the weights still fit.
        largest: as there.
    """
    found: Biases | None = None
    for gain in range(room, max(1, room // 2) - 1, -1):
        new = integer_biases(bias, unit / gain, thresholds, gain, largest)
        if found is None:
            found = new
            continue
        if not found.missed.any():
            break
        better = new.missed < found.missed
        found = Biases(*(np.where(better, vars(new)[name], vars(found)[name]) for name in vars(found)))
    assert found is not None
    return found


def integer_biases(bias: Any, unit: Any, thresholds: Any, gain: int, largest: Any) -> Biases:
    """Return integer biases and units with which sums of integers pass the same thresholds as with the exact biases.

    Sums are multiples of the gain, so each threshold lies between two of them and may move between these. A unit that is changed
    by a little moves the thresholds apart, an integer bias moves them all. Of the biases near the exact one, that is taken which
    leaves the unit the widest interval, and the middle of it. A channel where there is none keeps its unit, and takes the bias
    with the fewest thresholds on the wrong side of a sum.

    Args:
        bias: ``(channels,)``, exact, in the units of the thresholds.
        unit: ``(channels,)``: what one of a sum is worth.
        thresholds: ``(n,)``, of the quantization behind.
        gain: that all weights are multiples of.
        largest: ``(channels,)``: no sum over the gain is larger in magnitude; thresholds beyond do not matter.
    """
    exact = bias / unit
    wanted = np.ceil((thresholds / unit[:, None] - exact[:, None]) / gain)
    reachable = np.abs(wanted) <= largest[:, None] + 1
    rounded = np.clip(np.rint(exact), -INT32, INT32)
    shifts = np.arange(-2 * gain, 2 * gain + 1)
    best, units = rounded.copy(), unit.copy()
    widest, missed = np.full(len(unit), MARGIN), np.full(len(unit), np.inf)
    for shift in shifts[np.argsort(np.abs(shifts), kind="stable")]:
        offset = rounded + shift
        # Steepness 1 / unit: each threshold t must end in (wanted - 1, wanted] times the gain, at t / unit - offset.
        ends = np.stack([gain * (wanted - 1) + offset[:, None], gain * wanted + offset[:, None]]) / thresholds
        low = np.where(reachable, ends.min(0), -np.inf).max(1, initial=-np.inf)
        high = np.where(reachable, ends.max(0), np.inf).min(1, initial=np.inf)
        low, high = np.maximum(low, (1 - STRETCH) / unit), np.minimum(high, (1 + STRETCH) / unit)
        width = (high - low) * unit
        better = width > widest
        best[better], units[better], widest[better] = offset[better], (2 / (low + high))[better], width[better]
        missed[better] = 0
        got = np.ceil((thresholds / unit[:, None] - offset[:, None]) / gain)
        count = ((got != wanted) & reachable).sum(1)
        fewer = (count < missed) & (widest <= MARGIN)
        best[fewer], missed[fewer] = offset[fewer], count[fewer]
    best = np.clip(best, -INT32, INT32).astype(np.int32)
    return Biases(best, units, np.full(len(unit), gain), missed.astype(int), reachable.sum(1))
