"""What has to be run for a comparison: cell by cell, each with its recipe and the cells that it needs."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from wnq.compare.definition import Comparison, Contender, Width, width_name
from wnq.compare.jobs import Job, Outcome, read_outcome
from wnq.methods import MethodInfo
from wnq.quantizer import FLOAT_BITS
from wnq.recipe import Recipe
from wnq.train import Progress, TrainConfig

ANCHOR = "float"
"""Label of the float networks that every method starts from and is compared with."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Attributes:
        name: of its folder.
        kind: ``float``; ``sweep-float``, the start of the sweep; ``sweep``, one value tried; ``method``.
        label: of the contender; ``float`` for the starts.
        width: bits of weights and inputs.
        seed: of everything random in it.
        values: keys of ``[train]`` that a sweep tries here.
        needs: names of the cells that come first.
        undefined: why the method does not exist at this width; empty if it does.
    """

    name: str
    kind: str
    label: str
    width: Width
    seed: int
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    needs: tuple[str, ...] = ()
    undefined: str = ""


@dataclasses.dataclass(frozen=True)
class CellState:
    """Where a cell stands, while the comparison runs.

    Attributes:
        cell: which one.
        state: ``waiting``, ``running``, or the state of its outcome.
        outcome: what it came to.
        progress: of its training.
    """

    cell: Cell
    state: str
    outcome: Outcome | None = None
    progress: Progress | None = None


def cells_of(comparison: Comparison) -> list[Cell]:
    """Return every cell of a comparison: starts, then the sweep, then seed by seed the methods."""
    floats = (FLOAT_BITS, FLOAT_BITS)
    cells = [Cell(f"{ANCHOR}-s{seed}", "float", ANCHOR, floats, seed) for seed in comparison.seeds]
    pairs = list(_pairs(comparison))
    first = comparison.seeds[0]
    if comparison.sweep and comparison.recipe.model.start is None:
        cells.append(Cell(f"sweep-{ANCHOR}-s{first}", "sweep-float", ANCHOR, floats, first))
    for contender, width, undefined in pairs:
        if not undefined:
            cells += sweep_cells(comparison, contender.label, width)
    for seed in comparison.seeds:
        for contender, width, undefined in pairs:
            tried = () if undefined else tuple(cell.name for cell in sweep_cells(comparison, contender.label, width))
            name = f"{contender.slug}-{width_name(width).lower()}-s{seed}"
            needs = (f"{ANCHOR}-s{seed}", *tried)
            cells.append(Cell(name, "method", contender.label, width, seed, {}, needs, undefined))
    return cells


def _pairs(comparison: Comparison) -> Iterator[tuple[Contender, Width, str]]:
    """Yield every method with every width once, and why it is not defined."""
    seen: set[tuple[str, Width]] = set()
    for asked in comparison.widths:
        for contender in comparison.contenders:
            width = contender.width(asked)
            if (contender.label, width) not in seen:
                seen.add((contender.label, width))
                yield contender, width, contender.undefined(width)


def sweep_cells(comparison: Comparison, label: str, width: Width) -> list[Cell]:
    """Return the cells in which the sweep's values are tried for one method at one width."""
    seed = comparison.seeds[0]
    slug = comparison.contender(label).slug
    needs = (f"sweep-{ANCHOR}-s{seed}",) if comparison.recipe.model.start is None else ()
    grid: list[dict[str, Any]] = [{}] if comparison.sweep else []
    for key, values in comparison.sweep.items():
        grid = [{**chosen, key: value} for chosen in grid for value in values]
    return [
        Cell(
            f"sweep-{slug}-{width_name(width).lower()}-{values_name(values)}-s{seed}",
            "sweep",
            label,
            width,
            seed,
            values,
            needs,
        )
        for values in grid
    ]


def outcome_of(cell: Cell, out: Path) -> Outcome:
    """Return what has become of a cell."""
    return Outcome("not defined", cell.undefined) if cell.undefined else read_outcome(out / cell.name)


def values_name(values: Mapping[str, Any]) -> str:
    """Return ``lr=0.05,momentum=0.9``."""
    return ",".join(f"{key}={value}" for key, value in values.items())


def chosen_cell(
    comparison: Comparison, label: str, width: Width, outcomes: Mapping[str, Outcome]
) -> tuple[Cell, Outcome] | None:
    """Return the sweep's best finished cell of a method at a width, the first of equals; None if none has finished."""
    tried = [(cell, outcomes.get(cell.name)) for cell in sweep_cells(comparison, label, width)]
    finished = [(cell, outcome) for cell, outcome in tried if outcome is not None and outcome.state == "done"]
    return max(finished, key=lambda entry: entry[1].accuracy or 0.0, default=None)


def job_of(cell: Cell, comparison: Comparison, out: Path, outcomes: Mapping[str, Outcome]) -> Job:
    """Return what is to be run for a cell whose needs are among the outcomes."""
    held_out = comparison.held_out if cell.kind.startswith("sweep") else 0.0
    trained = cell.label != ANCHOR or comparison.recipe.model.start is None
    return Job(out / cell.name, recipe_of(cell, comparison, out, outcomes), held_out=held_out, trained=trained)


def recipe_of(cell: Cell, comparison: Comparison, out: Path, outcomes: Mapping[str, Outcome]) -> Recipe:
    """Return the recipe of a cell whose needs are among the outcomes.

    Raises:
        ValueError: the sweep has chosen nothing.
    """
    recipe, given = comparison.recipe, comparison.recipe.model.start
    start = None if given is None else given.replace("{seed}", str(cell.seed))
    if cell.label == ANCHOR:
        train = dataclasses.replace(comparison.float_train or recipe.train, seed=cell.seed, distill_weight=0.0)
        model = dataclasses.replace(recipe.model, start=start)
        return Recipe(model=model, data=recipe.data, train=train)
    contender = comparison.contender(cell.label)
    values = dict(cell.values)
    if comparison.sweep and cell.kind == "method":
        best = chosen_cell(comparison, cell.label, cell.width, outcomes)
        if best is None:
            raise ValueError(f"no value of the sweep finished for {cell.label} at {width_name(cell.width)}.")
        values = dict(best[0].values)
    if start is None:
        start = str(out / f"{'sweep-' if cell.kind == 'sweep' else ''}{ANCHOR}-s{cell.seed}")
    train = dataclasses.replace(recipe.train, seed=cell.seed, **values)
    if comparison.recommended:
        train = dataclasses.replace(
            train, **{change["setting"]: change["to"] for change in recommended_changes(contender, cell.width, train)}
        )
    options = {**contender.options, "w_bits": cell.width[0], "a_bits": cell.width[1]}
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, start=start),
        quantize=dataclasses.replace(comparison.section, method=contender.method, options=options),
        train=train,
    )


def recommended_changes(contender: Contender, width: Width, train: TrainConfig) -> list[dict[str, Any]]:
    """Return what a method's recommended settings change in a recipe's: setting, from, to, factor, source."""
    advice = MethodInfo.of(contender.method).recommended
    decay = advice.weight_decay_at.get(width[0], advice.weight_decay)
    factors = {"lr": advice.lr, "weight_decay": decay, "quantizer_lr": advice.quantizer_lr}
    changes = {name: (getattr(train, name), getattr(train, name) * factor) for name, factor in factors.items()}
    if advice.quantizer_weight_decay:
        share = advice.quantizer_weight_decay
        factors["quantizer_weight_decay"] = share
        changes["quantizer_weight_decay"] = (train.quantizer_weight_decay, changes["weight_decay"][1] * share)
    return [
        {"setting": name, "from": then, "to": now, "factor": factors[name], "source": advice.source}
        for name, (then, now) in changes.items()
        if then != now
    ]
