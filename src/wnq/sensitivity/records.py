"""The numbers of a measurement, as plain data."""

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from wnq.methods import get_method
from wnq.names import check_choice, did_you_mean
from wnq.normalizers import check_granularity
from wnq.plan import make_plan
from wnq.quantizer import Uniform

VARIANTS = ("max", "clip")
"""Max scaling, tail included; the range with the least squared error of the weights."""

SCOPES = ("alone", "all", "others")
"""Only that layer is quantized; all layers are; all but that one. The last is compared with ``all``, the others with float."""

NOISE = 2.0
"""Standard errors that a difference must exceed to count."""

MATERIAL = 1e-3
"""Share of the reference's loss that it must exceed too, so that what is certain but next to nothing decides nothing."""

SMALL_LOSS = 0.1
"""What a smaller loss counts as there: training images are often fitted to next to nothing."""


@dataclass(frozen=True)
class Settings:
    """What is measured.

    Attributes:
        bits: widths, 1 to 8, without repetition; kept in ascending order.
        grid: ``full`` or ``symmetric``, see :class:`wnq.quantizer.Uniform`.
        granularity: one range a ``tensor`` or a ``channel``.
        inputs: quantize the inputs of the same layers too, at the same width, by learned steps that start from the first batch, as
            training starts them.
        leave_out: measure also all layers together, and all but one.
        layers: shell wildcards of the layers to measure; empty: all that a plan could quantize.

    Raises:
        ValueError: a width, grid or granularity out of range.
    """

    bits: tuple[int, ...] = (2, 3, 4, 8)
    grid: str = "full"
    granularity: str = "tensor"
    inputs: bool = False
    leave_out: bool = False
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.bits or len(set(self.bits)) < len(self.bits):
            raise ValueError(
                f"bits must be one or more different widths, got {', '.join(map(str, self.bits)) or 'none'}."
            )
        check_granularity(self.granularity)
        for width in self.bits:
            Uniform(width, self.grid)
        object.__setattr__(self, "bits", tuple(sorted(self.bits)))


@dataclass(frozen=True)
class Layer:
    """A layer that can be quantized.

    Attributes:
        name: in ``model.named_modules()``.
        kind: its class.
        shape: of its weight.
        tied: later layers with the same weight, which are quantized with it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    tied: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


def quantizable_layers(model: nn.Module, patterns: Sequence[str] = ()) -> tuple[Layer, ...]:
    """Return the layers that a plan could quantize, in order; a weight that several share stands with the first of them.

    Args:
        model: a float model.
        patterns: shell wildcards of names; empty: all.

    Raises:
        ValueError: there is nothing to quantize, the model is quantized already, or a pattern matches no layer.
    """
    planned = make_plan(model, get_method("wnq"), first_last_bits=None).layers
    tied = {entry.name: tuple(e.name for e in planned if e.tied_to == entry.name) for entry in planned}
    owners = [entry for entry in planned if entry.tied_to is None]
    names = [entry.name for entry in owners]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(
                f"layers pattern {pattern!r} matches no layer that can be quantized.{did_you_mean(pattern, names)} "
                f"{len(names)} layers: {', '.join(names[:4])}{', …' if len(names) > 4 else ''}"
            )
    return tuple(
        Layer(entry.name, entry.kind, entry.shape, tied[entry.name])
        for entry in owners
        if not patterns or any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in patterns)
    )


@dataclass(frozen=True)
class Change:
    """The model with some layers quantized, against what its scope compares it with. NaN where a loss is not finite."""

    loss: float
    """Mean loss."""
    loss_change: float
    loss_error: float
    """Standard error of ``loss_change``: of the mean of the paired differences. NaN for a single sample."""
    nonfinite: int
    """Number of samples (or batches) whose loss is NaN or infinite."""
    accuracy: float | None = None
    """In percent; None without a function that says what is correct."""
    accuracy_change: float | None = None
    """In percentage points."""
    accuracy_error: float | None = None
    """Standard error of ``accuracy_change``."""


@dataclass(frozen=True)
class Row:
    """One layer at one width, measured with both variants."""

    scope: str
    """One of :data:`SCOPES`."""
    layer: str
    """Empty where the scope is ``all``."""
    bits: int
    max: Change
    clip: Change
    gap: float
    """Mean loss with max scaling minus mean loss with the best clip. NaN where either is not finite."""
    gap_error: float
    """Standard error of the gap, paired."""
    weight_error: float | None = None
    """|w - w_q|^2 / |w|^2 of the layer with max scaling; None where the scope is not ``alone``, NaN for a weight of zeros."""
    clip_weight_error: float | None = None
    """The same with the best clip."""

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from all other rows: scope, layer, bits."""
        return self.scope, self.layer, self.bits

    @property
    def hurts(self) -> bool:
        """Whether max scaling raises the loss, or breaks it, beyond :data:`NOISE` standard errors and :data:`MATERIAL`."""
        change = self.max.loss_change
        return not math.isfinite(change) or (change > 0 and self._counts(change, self.max.loss_error))

    @property
    def tail(self) -> str:
        """What removing the tail does to the loss here.

        ``pays``: the loss falls, or only max scaling breaks it. ``costs``: it rises, or only the clip breaks it. ``unclear``: less
        than :data:`NOISE` standard errors or :data:`MATERIAL`, or a single sample.
        """
        if math.isfinite(self.gap):
            if self._counts(self.gap, self.gap_error):
                return "pays" if self.gap > 0 else "costs"
            return "unclear"
        broken = not math.isfinite(self.max.loss_change), not math.isfinite(self.clip.loss_change)
        return {(True, False): "pays", (False, True): "costs"}.get(broken, "unclear")

    def _counts(self, change: float, error: float) -> bool:
        reference = max(abs(self.max.loss - self.max.loss_change), SMALL_LOSS)
        return abs(change) > NOISE * error and abs(change) > MATERIAL * reference


@dataclass(frozen=True)
class Sensitivity:
    """The measurements of one model. :mod:`wnq.sensitivity.storing` saves and reads them."""

    settings: Settings
    layers: tuple[Layer, ...]
    samples: int
    """Number of losses that a mean runs over: samples, or batches if the loss function gives one a batch."""
    loss: float
    """Of the float model."""
    accuracy: float | None
    rows: tuple[Row, ...]
    fingerprint: Mapping[str, str]
    """Digests of the ``weights`` and the ``data``, and the name of the ``loss``."""
    about: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Where model and data came from; plain JSON types."""

    def row(self, scope: str, layer: str, bits: int) -> Row | None:
        """Return one measurement, or None if it was not made."""
        check_choice(scope, SCOPES, where="scope")
        return next((row for row in self.rows if row.key == (scope, layer, bits)), None)

    @property
    def wanted(self) -> list[tuple[str, str, int]]:
        """Keys of all rows that the settings ask for, in order."""
        names, widths = [layer.name for layer in self.layers], self.settings.bits
        keys = [("alone", name, bits) for name in names for bits in widths]
        if self.settings.leave_out:
            for bits in widths:
                keys += [("all", "", bits), *(("others", name, bits) for name in names)]
        return keys

    @property
    def complete(self) -> bool:
        """Whether every row that the settings ask for was measured."""
        return len(self.rows) == len(self.wanted)
