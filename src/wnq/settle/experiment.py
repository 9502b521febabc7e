"""The experiment: three arms that differ in nothing but the normalization, from the same float starts."""

import dataclasses
from collections.abc import Sequence

from wnq.compare import Comparison, Contender, Width
from wnq.recipe import QuantizeSection, Recipe
from wnq.train import TrainConfig

ATTACHED, DETACHED, NONE = "attached", "detached", "none"

ARMS = {
    ATTACHED: "w / max|w|, with the gradient through the maximum: WNQ",
    DETACHED: "the same quantizer without that gradient",
    NONE: "no normalization: the grid of the float start, kept",
}
"""What each arm is. Their first forward pass is the same, bit for bit."""

BITS: tuple[Width, ...] = ((2, 2), (3, 3), (4, 4))
"""Widths that the claims are about."""

CONTROLS: tuple[Width, ...] = ((1, 1), (8, 8))
"""Widths at which the claims say little: one bit has no levels to waste, eight have enough."""

OPTIONS = ("grid", "granularity", "activation")
"""Options of the recipe's ``wnq`` that all arms share."""


def experiment(
    recipe: Recipe,
    *,
    bits: Sequence[Width] = BITS,
    controls: Sequence[Width] = CONTROLS,
    seeds: Sequence[int] = (0, 1, 2),
    every: int = 20,
    gains: Sequence[float] = (),
    float_train: TrainConfig | None = None,
) -> Comparison:
    """Return the comparison that the experiment consists of.

    Args:
        recipe: model, data and training; ``[quantize]`` may set what happens to the first and last layer, and ``grid``,
            ``granularity`` and ``activation`` for all arms.
        bits: widths of weights and inputs that the claims are held against.
        controls: further widths, reported beside.
        seeds: of start, data order and augmentation.
        every: steps between two records of the tails.
        gains: further arms that keep this share of the gradient through the maximum: dose and response.
        float_train: how the float starts are trained; by default as the recipe says.

    Raises:
        ValueError: the recipe quantizes by something else than ``wnq``, sets other options, or has stages; fewer than two
            seeds; a width or gain out of range or twice.
    """
    section = recipe.quantize or QuantizeSection()
    if section.method != "wnq" or section.plan is not None:
        raise ValueError(
            f"the experiment is about wnq, but the recipe's [quantize] says {section.plan or section.method!r}. Leave it out."
        )
    shared = {key: value for key, value in section.options.items() if key not in ("w_bits", "a_bits")}
    if other := [key for key in shared if key not in OPTIONS]:
        raise ValueError(
            f"[quantize] options {', '.join(other)} would not be the same in all arms: {', '.join(OPTIONS)} may be set."
        )
    if recipe.stages:
        raise ValueError("a recipe with stages changes the width on the way; the experiment needs one without.")
    if len(seeds) < 2:
        raise ValueError(
            f"a verdict needs the spread over seeds: two at least, three or more to mean much; got {len(seeds)}."
        )
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}.")
    for gain in gains:
        if not 0 < gain < float("inf") or gain == 1:
            raise ValueError(f"a gain between the arms must be positive, finite and not 1, got {gain}.")
    arms = (
        Contender(ATTACHED, "wnq", shared),
        *(Contender(f"gain-{gain:g}", "wnq", {**shared, "max_gain": gain}) for gain in gains),
        Contender(DETACHED, "wnq", {**shared, "max_gain": 0.0}),
        Contender(NONE, "fixed", shared),
    )
    return Comparison(
        recipe=dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, record_every=every)),
        contenders=arms,
        widths=(*bits, *(width for width in controls if width not in bits)),
        seeds=tuple(seeds),
        float_train=float_train,
        recommended=False,
    )
