"""Integer biases that round no threshold wrongly.

At few bits one unit of a sum is a visible part of a step, so a rounded bias moves decisions of the next quantization.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

INT32 = 2**31 - 1

STRETCH = 0.02
"""The most that a unit may be changed by, as a share of it."""

ROUNDINGS = 4 * 2.0**-24
"""A bias and a unit of float32 numbers are known to this share: bias, scale and input step are rounded, and so is their product."""

FINE = 4096
"""Units between two thresholds where nothing but a bias is added."""

MARGIN = 1e-5
"""The narrowest interval of units, as a share of the unit, whose middle float32 arithmetic keeps inside."""


@dataclass(frozen=True)
class Biases:
    """What :func:`integer_biases` found, an array of ``(channels,)`` each.

    Attributes:
        bias: int32.
        unit: what one of a sum is worth now.
        gain: that the channel's weights are multiplied by; ``unit`` is for the multiplied ones. 0: nothing is added but the bias.
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

    A channel whose sums are nothing beside its bias, or always zero, gets the gain 0 and a unit that suits the thresholds.

    Args:
        bias: as :func:`integer_biases`.
        unit: ``(channels,)``, of weights without gain.
        thresholds: as there.
        room: the largest gain, at which the weights still fit.
        largest: as there.
    """
    constant = (largest == 0) | (np.abs(bias) > INT32 // 2 * unit)
    most = np.where(constant, 0, np.where(np.abs(bias) * room > INT32 // 2 * unit, 1, room))
    found = Biases(*(np.zeros(len(unit), kind) for kind in (np.int32, np.float64, np.int64, np.int64, np.int64)))

    def search(channels: Any, gain: int) -> None:
        """Take a gain where it decides better than what was found, or where there is nothing yet."""
        own = unit[channels] / gain if gain else np.full(len(channels), _spacing(thresholds) / FINE)
        new = integer_biases(bias[channels], own, thresholds, max(1, gain), largest[channels] * bool(gain))
        better = (found.unit[channels] == 0) | (new.missed < found.missed[channels])
        for name, numbers in vars(found).items():
            numbers[channels[better]] = vars(new)[name][better] if name != "gain" else gain

    for top in np.unique(most):
        channels = np.flatnonzero(most == top)
        for gain in range(int(top), max(1, int(top) // 2) - 1, -1) if top else (0,):
            search(channels, gain)
            channels = channels[found.missed[channels] > 0]
            if not len(channels):
                break
    return found


def _spacing(thresholds: Any) -> float:
    return float(np.diff(thresholds).min()) if len(thresholds) > 1 else float(np.abs(thresholds).max())


def integer_biases(bias: Any, unit: Any, thresholds: Any, gain: int, largest: Any) -> Biases:
    """Return integer biases and units with which sums of integers pass the same thresholds as with the exact biases.

    Sums are multiples of the gain, so each threshold lies between two of them and may move between these. A unit that is changed
    by a little moves the thresholds apart, an integer bias moves them all. Of the biases that leave the unit an interval, the one
    nearest to the exact bias is taken, and the middle of the interval. A channel where there is none keeps its unit, and takes the
    bias with the fewest thresholds on the wrong side of a sum.

    Args:
        bias: ``(channels,)``, exact, in the units of the thresholds.
        unit: ``(channels,)``: what one of a sum is worth.
        thresholds: ``(n,)``, of the quantization behind.
        gain: that all weights are multiples of.
        largest: ``(channels,)``: no sum over the gain is larger in magnitude; thresholds beyond do not matter.
    """
    exact = bias / unit
    whole = np.abs(exact - np.rint(exact)) <= ROUNDINGS * np.abs(exact)
    exact = np.where(whole, np.rint(exact), exact)
    rounded = np.clip(np.rint(exact), -INT32, INT32)
    wanted = np.ceil((thresholds / unit[:, None] - exact[:, None]) / gain)
    reachable = np.abs(wanted) <= largest[:, None] + 1
    best, units, missed = rounded.copy(), unit.copy(), np.full(len(unit), np.inf)
    left, at_zero = np.arange(len(unit)), thresholds == 0
    # The more thresholds, the less room there is for a bias that is off.
    span = max(1, min(2 * gain, 8 * gain // len(thresholds)))
    shifts = np.arange(-span, span + 1)
    for shift in shifts[np.argsort(np.abs(shifts), kind="stable")]:
        offset, steep = rounded[left] + shift, 1 / unit[left]
        # Steepness 1 / unit: each threshold t must end in (wanted - 1, wanted] times the gain, at t / unit - offset.
        ends = gain * wanted[left] + offset[:, None]
        sides = np.stack([ends - gain, ends]) / np.where(at_zero, 1, thresholds)
        # A threshold at zero stays there whatever the unit: all units serve it, or none.
        never = np.where((ends - gain < 0) & (ends >= 0), -np.inf, np.inf)
        low = np.where(reachable[left], np.where(at_zero, never, sides.min(0)), -np.inf).max(1, initial=-np.inf)
        high = np.where(reachable[left], np.where(at_zero, -never, sides.max(0)), np.inf).min(1, initial=np.inf)
        low, high = np.maximum(low, (1 - STRETCH) * steep), np.minimum(high, (1 + STRETCH) * steep)
        fits = (high - low) > MARGIN * steep
        best[left[fits]], units[left[fits]], missed[left[fits]] = offset[fits], 2 / (low[fits] + high[fits]), 0
        left, offset = left[~fits], offset[~fits]
        if not len(left):
            break
        got = np.ceil((thresholds / unit[left, None] - offset[:, None]) / gain)
        count = ((got != wanted[left]) & reachable[left]).sum(1)
        fewer = count < missed[left]
        best[left[fewer]], missed[left[fewer]] = offset[fewer], count[fewer]
    best = np.clip(best, -INT32, INT32).astype(np.int32)
    return Biases(best, units, np.full(len(unit), gain), missed.astype(int), reachable.sum(1))
