"""The footer of a comparison's table: how its numbers were made, and what they leave out."""

from collections.abc import Mapping, Sequence
from typing import Any

from wnq.compare.cells import ANCHOR, chosen_cell, recommended_changes, values_name
from wnq.compare.definition import Comparison, width_name
from wnq.compare.outcome import Outcomes

RANKS = (
    "Ranks: within one width, by mean accuracy. “Behind the best” is the best mean minus this one's, with its 95 % interval: "
    "paired t over the common seeds from three on, else Welch's, with at least the variance of accuracies rounded to one image. "
    "Where the interval holds 0 the spread over seeds cannot tell the two apart, and both are marked with the rank 1=. The "
    "intervals are about other seeds, not about other images, and are not corrected for the number of methods."
)
ONE_SEED = "No ranks: with one seed there is no interval, and the order within a width may be chance."


def notes(comparison: Comparison, outcomes: Outcomes, rows: Sequence[Mapping[str, Any]], images: int) -> list[str]:
    """Return the sentences of the footer.

    Args:
        comparison: what is compared.
        outcomes: what has become of its cells.
        rows: of the table.
        images: that were evaluated on.
    """
    ranked = any(row["rank"] is not None for row in rows)
    return [
        "Every method starts from the float network of the same seed, sees the same images in the same order, and trains "
        f"{comparison.recipe.train.epochs} epochs by the same recipe, but for what is named below.",
        _start(comparison),
        "“drop” is the float network's accuracy minus the method's, over the seeds that both have; it is negative where the "
        "further training gained more than the quantization cost. “best epoch” is the mean of each seed's best evaluated epoch, "
        f"chosen on the same {images:,} images and so too high. Ranks use the last epoch.",
        *_stages(comparison),
        _boundary(comparison),
        RANKS if ranked else ONE_SEED,
        *_recommended(comparison, rows),
        *_sweep(comparison, rows, outcomes),
        *_troubles(outcomes, rows),
    ]


def _start(comparison: Comparison) -> str:
    start = comparison.recipe.model.start
    if start is None:
        train = comparison.float_train or comparison.recipe.train
        own = "settings of their own" if comparison.float_train else "the same settings"
        return f"The float networks were trained {train.epochs} epochs, by {own}."
    if "{seed}" in start:
        return f"The float networks were given: {start}."
    return f"One float network was given for all seeds ({start}), so the spread is that of the training from it alone."


def _stages(comparison: Comparison) -> list[str]:
    recipe = comparison.recipe
    told = [] if recipe.procedure is None else [f"All methods are trained by the procedure {recipe.procedure.name}."]
    if recipe.stages:
        told.append(
            f"All methods are trained in the recipe's {len(recipe.stages)} stages. Recommended settings and the sweep change its "
            "[train], not what a stage sets itself."
        )
    return told


def _boundary(comparison: Comparison) -> str:
    section = comparison.section
    bits = section.first_last_bits
    same = "are treated like all others" if bits is None else "stay float" if bits == 32 else f"have {bits} bits"
    kept = f" Kept float: {', '.join(section.keep_float)}." if section.keep_float else ""
    exceptions = [entry.get("pattern", "") for entry in section.override]
    special = f" Exceptions of the recipe: {', '.join(exceptions)}." if exceptions else ""
    rounded = section.residual_bits
    ends = "" if rounded == 32 else f" The ends of residual branches are rounded to {rounded} bits."
    return f"The first and the last layer {same}, with every method.{kept}{special}{ends}"


def _recommended(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not comparison.recommended:
        return ["The methods' recommended settings were not applied: all have the recipe's."]
    found: dict[str, None] = {}
    for row in rows:
        contender, width = comparison.contender(row["label"]), (row["w_bits"], row["a_bits"])
        if row["undefined"]:
            continue
        for change in recommended_changes(contender, width, comparison.recipe.train):
            what = f"{change['setting']} x {change['factor']:g}"
            if change["setting"] == "quantizer_weight_decay":
                what = f"quantizer_weight_decay = {change['factor']:g} x weight_decay"
            source = change["source"] or "this library's choice"
            found[f"Recommended setting of {row['label']} at {width_name(width)}: {what} ({source})."] = None
    return [*found] or ["No method has recommended settings that differ from the recipe's."]


def _sweep(comparison: Comparison, rows: Sequence[Mapping[str, Any]], outcomes: Outcomes) -> list[str]:
    if not comparison.sweep:
        return []
    tried = ", ".join(f"{key} = {', '.join(map(str, values))}" for key, values in comparison.sweep.items())
    seed = comparison.seeds[0]
    if comparison.recipe.model.start is None:
        start = "from a float network trained without that part as well"
    else:
        start = "from the given float network, which may have been trained on that part"
    found = {name: outcome for name, (_, outcome) in outcomes.items()}
    chosen: dict[str, None] = {}
    for row in rows:
        width = (row["w_bits"], row["a_bits"])
        best = None if row["undefined"] else chosen_cell(comparison, row["label"], width, found)
        if best is not None:
            name = f"{row['label']} at {width_name(width)}"
            chosen[f"{name}: {values_name(best[0].values)} ({best[1].accuracy:.2f} %)"] = None
    return [
        f"Sweep: every method at every width tried {tried} on seed {seed}, {start}, with {100 * comparison.held_out:g} % of the "
        "training images held out; the value that is best on these is used for all seeds (recommended factors come on top). The "
        "evaluation images had no part in the choice.",
        f"Chosen: {'; '.join(chosen) or 'nothing yet'}.",
    ]


def _troubles(outcomes: Outcomes, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    told: dict[str, None] = {}
    for row in rows:
        if row["undefined"]:
            told[f"Not defined: {row['label']} at {width_name((row['w_bits'], row['a_bits']))}: {row['undefined']}"] = (
                None
            )
    for cell, outcome in outcomes.values():
        if outcome.state in ("diverged", "failed"):
            told[f"{outcome.state.capitalize()}: {cell.name}: {outcome.reason}"] = None
    if any(row["diverged"] for row in rows):
        told["A method of which a seed diverged has no rank; the mean beside it is of its other seeds."] = None
    missing = sum(
        o.state == "not run" for cell, o in outcomes.values() if cell.kind == "method" or cell.label == ANCHOR
    )
    if missing:
        told[f"Not run yet: {missing} of {len(outcomes)} cells."] = None
    return [*told]
