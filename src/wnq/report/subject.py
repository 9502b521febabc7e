"""What a report is about: models, the width in question, the layers that are drawn."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from wnq.analysis import RULES, Cause, LayerStats, ModelEvidence, Profile, cause_of
from wnq.drawing import Key, arm_name
from wnq.names import did_you_mean

USUAL = 4
"""The width in question where nothing else says one."""

DRAWN = 24
"""Layers with plots of their own, where none are asked for: the page stays small, and what matters is in it."""

RULE_NAMES = {
    "max": "largest weight",
    "percentile": "99.9\N{NO-BREAK SPACE}%",
    "mse": "best clip",
    "sawb": "SAWB",
    "lsq": "LSQ's start",
    "channel": "per channel",
}
"""Rule -> what the page calls it: what the range is set by (per channel: the largest weight of each)."""

_COLORS = {"max": "arm1", "mse": "arm0", "channel": "arm2", "percentile": "arm3", "sawb": "arm4", "lsq": "arm5"}

RULE_KEYS = {rule: Key(RULE_NAMES[rule], color, place) for place, (rule, color) in enumerate(_COLORS.items())}
"""Rule -> how charts and legends show it; the ones that matter most first."""

OWN_KEY = Key("its own quantizer", "ink", len(_COLORS))
"""How they show the quantizer that a model was trained with."""

assert set(RULE_KEYS) == set(RULES)


@dataclass(frozen=True)
class Subject:
    """What a report is about; made by :func:`subject_of`."""

    models: Sequence[ModelEvidence]
    """The first is the reference."""
    focus: int
    """The width that the answer is given for; 0 if no model has errors to compare."""
    bits: tuple[int, ...]
    """All widths that were compared."""
    layers: tuple[str, ...]
    """All layers, in the order of the models."""
    drawn: tuple[str, ...]
    """Those with plots of their own, worst first."""
    causes: tuple[tuple[Cause, LayerStats, Profile], ...]
    """Of the layers of :attr:`judged`, worst first."""
    judged: ModelEvidence | None
    """The model that the answer is about: the first that has errors to compare."""

    @property
    def keys(self) -> dict[str, Key]:
        """Name of a model -> how charts and legends show it."""
        colors = ["start" if len(self.models) > 1 else arm_name(0), *map(arm_name, range(len(self.models)))]
        return {model.name: Key(model.name, colors[place], place) for place, model in enumerate(self.models)}

    @property
    def grid(self) -> str:
        """Of the comparison of widths and rules."""
        return self.causes[0][2].grid if self.causes else "full"


def subject_of(
    models: Sequence[ModelEvidence], *, focus: int | None = None, drawn: Sequence[str] | None = None
) -> Subject:
    """Return what a report on these models is about.

    Args:
        models: with at least one, each with a name of its own.
        focus: the width in question; by default the least that a model was trained with, the first that was; or else 4; or the
            one nearest to that among those that were compared.
        drawn: layers to draw; by default the :data:`DRAWN` with the largest error.

    Raises:
        ValueError: no model, or two of one name, or a width that was not compared.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs at least one model, each with a name of its own, got {names}.")
    bits = tuple(sorted({e.bits for model in models for found in model.profiles.values() for e in found.errors}))
    if focus is not None and bits and focus not in bits:
        raise ValueError(f"focus must be one of the widths compared, {', '.join(map(str, bits))}, got {focus}.")
    trained = (min((row.bits for row in m.stats if row.bits and m.own_error(row)), default=None) for m in models)
    aim = next((own for own in trained if own is not None), USUAL)
    width = focus if focus is not None else min(bits, key=lambda k: (abs(k - aim), k), default=0)
    judged = next((model for model in models if any(found.errors for found in model.profiles.values())), None)
    causes: list[tuple[Cause, LayerStats, Profile]] = []
    if judged is not None:
        known = [(row, judged.profiles[row.name]) for row in judged.stats if row.name in judged.profiles]
        causes = [(cause_of(row, found, width), row, found) for row, found in known if found.errors]
        causes.sort(key=lambda item: -(item[0].error or 0.0))
    layers = tuple(dict.fromkeys(row.name for model in models for row in model.stats))
    order = [cause.layer for cause, _, _ in causes]
    ranked = [*order, *(layer for layer in layers if layer not in set(order))]
    wanted = ranked[:DRAWN] if drawn is None else [layer for layer in ranked if layer in set(drawn)]
    return Subject(models, width if bits else 0, bits, layers, tuple(wanted), tuple(causes), judged)


def matching(layers: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the layers that any of the shell wildcards matches, in order.

    Raises:
        ValueError: a pattern matches none; with the closest names.
    """
    for pattern in patterns:
        if not fnmatch.filter(layers, pattern):
            raise ValueError(
                f"--layers {pattern!r} matches no layer.{did_you_mean(pattern, layers)} "
                f"{len(layers)} layers: {', '.join(layers[:3])}{', …' if len(layers) > 3 else ''}"
            )
    return [layer for layer in layers if any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)]
