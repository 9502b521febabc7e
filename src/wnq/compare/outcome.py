"""What came of a comparison: means over seeds, drops against the float anchors, ranks with what they are worth."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from wnq.compare.cells import Cell
from wnq.compare.definition import Comparison, Width, width_name
from wnq.compare.intervals import Interval, paired_interval, welch_interval
from wnq.compare.jobs import Outcome

PAIRED_SEEDS = 3
"""Common seeds from which on the paired interval is used."""

Outcomes = Mapping[str, tuple[Cell, Outcome]]
"""Of every cell, by name."""


def accuracies(outcomes: Outcomes, label: str, width: Width | None = None) -> dict[int, float]:
    """Return seed -> accuracy of the finished cells of a contender, or of the float anchors."""
    return {
        cell.seed: outcome.accuracy
        for cell, outcome in outcomes.values()
        if cell.kind in ("float", "method")
        and (cell.label, outcome.state) == (label, "done")
        and (width is None or cell.width == width)
        and outcome.accuracy is not None
    }


def summary(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation, as far as there are values enough."""
    return (
        statistics.fmean(values) if values else None,
        statistics.stdev(values) if len(values) > 1 else None,
    )


def table_rows(comparison: Comparison, outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return one row a method and width: width by width, the best first.

    A method of which a seed diverged stands behind all that trained, whatever the mean of its other seeds, and has no rank;
    so has one of which nothing finished.
    """
    rows: list[dict[str, Any]] = []
    for asked in comparison.widths:
        group = [_row(comparison, outcomes, contender.label, asked) for contender in comparison.contenders]
        group.sort(key=lambda row: (row["mean"] is None, row["diverged"] > 0, -(row["mean"] or 0.0)))
        images = [outcome.images for _, outcome in outcomes.values() if outcome.images]
        _rank(group, 100 / min(images) if images else 0.0)
        rows += group
    return rows


def _row(comparison: Comparison, outcomes: Outcomes, label: str, asked: Width | None) -> dict[str, Any]:
    contender = comparison.contender(label)
    width = contender.width(asked)
    own = [
        (cell, outcome)
        for cell, outcome in outcomes.values()
        if cell.kind == "method" and (cell.label, cell.width) == (label, width)
    ]
    found = accuracies(outcomes, label, width)
    floats = accuracies(outcomes, "float")
    common = [seed for seed in found if seed in floats]
    mean, std = summary(list(found.values()))
    best, _ = summary([o.best_accuracy for _, o in own if o.state == "done" and o.best_accuracy is not None])
    states = [outcome.state for _, outcome in own]
    return {
        "bits": width_name(asked),
        "label": label,
        "method": contender.method,
        "options": dict(contender.options),
        "w_bits": width[0],
        "a_bits": width[1],
        "seeds": len(comparison.seeds),
        "accuracies": found,
        "mean": mean,
        "std": std,
        "best_epoch_mean": best,
        "drop": statistics.fmean(floats[seed] - found[seed] for seed in common) if common else None,
        "done": states.count("done"),
        "diverged": states.count("diverged"),
        "failed": states.count("failed"),
        "not_run": states.count("not run"),
        "undefined": next((cell.undefined for cell, _ in own), ""),
        "rank": None,
        "tied": False,
        "behind": None,
        "low": None,
        "high": None,
        "interval": None,
    }


def _rank(group: list[dict[str, Any]], resolution: float) -> None:
    """Rank the rows of one width, in place: place by mean, and the first place shared by all that the spread cannot tell apart.

    One seed says nothing of the spread: then there are no ranks. ``resolution`` is one evaluation image, in percent.
    """
    able = [row for row in group if row["mean"] is not None and not row["diverged"]]
    if not able or able[0]["std"] is None:
        return
    best, *others = able
    best.update(rank=1, behind=0.0)
    for row in others:
        interval = difference(best["accuracies"], row["accuracies"], resolution)
        row["behind"] = best["mean"] - row["mean"] if interval is None else interval.difference
        if interval is None:
            continue
        row.update(low=interval.low, high=interval.high, interval=interval.kind)
        if interval.holds_zero:
            row.update(rank=1, tied=True)
            best["tied"] = True
        else:
            row["rank"] = 1 + sum(other["mean"] > row["mean"] for other in able)


def difference(first: Mapping[int, float], second: Mapping[int, float], resolution: float = 0.0) -> Interval | None:
    """Return the interval of the difference of two methods' means over seeds: paired over three common seeds or more.

    None if one of them has fewer than two seeds.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) >= PAIRED_SEEDS:
        pairs = [first[seed] for seed in common], [second[seed] for seed in common]
        return paired_interval(*pairs, resolution=resolution)
    if min(len(first), len(second)) < 2:
        return None
    return welch_interval(list(first.values()), list(second.values()), resolution=resolution)


def rank_text(row: Mapping[str, Any]) -> str:
    """Return ``1``, ``1=`` for one of those within the spread of the best, or a dash."""
    return "–" if row["rank"] is None else f"{row['rank']}{'=' if row['tied'] else ''}"


def accuracy_text(row: Mapping[str, Any]) -> str:
    """Return ``91.23 ± 0.40`` and how many seeds it lacks and why, or why there is no number at all."""
    if row["undefined"]:
        return "not defined"
    states = ("done", "diverged", "failed", "not_run")
    counts = {state.replace("_", " "): row[state] for state in states if row[state]}
    lacking = [f"{count} {state}" for state, count in counts.items() if state != "done"]
    if row["mean"] is None:
        return ", ".join(state if count == row["seeds"] else f"{count} {state}" for state, count in counts.items())
    spread = "" if row["std"] is None else f" ± {row['std']:.2f}"
    missing = f" ({row['done']} of {row['seeds']}; {', '.join(lacking)})" if lacking else ""
    return f"{row['mean']:.2f}{spread}{missing}"


def interval_text(row: Mapping[str, Any]) -> str:
    """Return ``0.42 [0.10, 0.74]``: how far behind the best, and the 95 % interval; the best itself has a dash."""
    if row["behind"] is None or (row["rank"] == 1 and row["low"] is None):
        return "–"
    behind = 0.0 if math.isclose(row["behind"], 0, abs_tol=5e-7) else row["behind"]
    return (
        f"{behind:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
        if row["low"] is not None
        else f"{behind:.2f} [no interval]"
    )
