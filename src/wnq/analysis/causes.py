"""What the rounding error of a layer comes from, by what would remove it."""

import math
from dataclasses import dataclass
from functools import lru_cache

from wnq.analysis.profile import Profile
from wnq.analysis.rows import LayerStats
from wnq.theory import Gaussian, expected_crest, optimal_clip
from wnq.theory.expected import step_width

HALF = 0.5
"""A remedy counts if it leaves at most this share of the error, and counts more than another if it leaves at most this share of
what that one leaves."""

CAUSES = {
    "tail": "a tighter clip helps most: a few large weights stretch the range for all",
    "channels": "a range for each output channel helps most: some channels are far larger than others",
    "tail and channels": "a tighter clip and a range for each output channel help about alike",
    "width": "neither a tighter clip nor a range for each output channel halves the error: what is left is the number of levels",
    "none": "there is no error: zeros, or values that the levels hit",
}
"""Cause -> what it means: at one width, against a range set by the largest weight."""


@dataclass(frozen=True)
class Cause:
    """What the error of one layer comes from at one width; errors are |w - w_q|^2 / |w|^2."""

    layer: str
    bits: int
    cause: str
    """One of :data:`CAUSES`."""
    error: float | None
    """With the range set by the largest weight."""
    clip_error: float | None
    """With the best clip."""
    clip: float | None
    """Where that is, in units of rms."""
    channel_error: float | None
    """With a range for each output channel."""
    crest: float
    gaussian_crest: float
    """What as many Gaussian weights would have."""
    needed_crest: float | None
    """From which crest factor down, by the law, max scaling errs no more than the best clip does now."""

    @property
    def remedy(self) -> str | None:
        """The better of the two, ``"mse"`` or ``"channel"``; None where neither lowers the error."""
        found = {"mse": self.clip_error, "channel": self.channel_error}
        known = {rule: error for rule, error in found.items() if error is not None and error < (self.error or 0.0)}
        return min(known, key=lambda rule: known[rule]) if known else None

    @property
    def remedied(self) -> float | None:
        """The error with the better of the two."""
        return {"mse": self.clip_error, "channel": self.channel_error, None: self.error}[self.remedy]


def cause_of(row: LayerStats, profile: Profile, bits: int) -> Cause:
    """Return what the error of a layer comes from at a width that its profile has."""
    error, clip_error, channel_error = (profile.measured(bits, rule) for rule in ("max", "mse", "channel"))
    clip = profile.error(bits, "mse")
    crest = row.crest if math.isfinite(row.crest) else math.nan
    # The law, C^2 step^2 / 12, solved for C.
    needed = None if clip_error is None else math.sqrt(12 * clip_error) / step_width(bits, profile.grid)
    return Cause(
        layer=row.name,
        bits=bits,
        cause=_name(error, clip_error, channel_error),
        error=error,
        clip_error=clip_error,
        clip=None if clip is None else clip.clip,
        channel_error=channel_error,
        crest=crest,
        gaussian_crest=gaussian_crest(row.parameters),
        needed_crest=needed,
    )


def _name(error: float | None, clip_error: float | None, channel_error: float | None) -> str:
    if not error:
        return "none"
    clip, channel = (math.inf if remedied is None else remedied for remedied in (clip_error, channel_error))
    if min(clip, channel) > HALF * error:
        return "width"
    if max(clip, channel) <= HALF * error and min(clip, channel) > HALF * max(clip, channel):
        return "tail and channels"
    return "tail" if clip < channel else "channels"


@lru_cache(maxsize=4096)
def gaussian_crest(count: int) -> float:
    """Return the expected crest factor of so many Gaussian weights; 1 for none."""
    return max(1.0, expected_crest(Gaussian(), max(1, count)))


@lru_cache(maxsize=64)
def gaussian_error(bits: int, grid: str = "full") -> float:
    """Return the error of Gaussian weights at their best clip: what a width costs where no tail adds to it."""
    return optimal_clip(Gaussian(), bits, grid=grid)[1]
