"""The files of a comparison's results, written anew and whole after every cell."""

import csv
import dataclasses
import datetime
import importlib.util
import io
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wnq.compare.cells import ANCHOR, Cell, cells_of, chosen_cell, outcome_of, recommended_changes
from wnq.compare.definition import Comparison, width_name
from wnq.compare.jobs import Outcome, part_of
from wnq.compare.notes import notes
from wnq.compare.outcome import (
    Outcomes,
    accuracies,
    accuracy_text,
    interval_text,
    rank_text,
    summary,
    table_rows,
)
from wnq.data import Dataset
from wnq.environment import environment
from wnq.files import write_text

logger = logging.getLogger(__name__)

PLOT_SECONDS = 10.0
"""Between two drawings at least, while the comparison runs."""

COLUMNS: tuple[str, ...] = (
    "name",
    "kind",
    "label",
    "method",
    "options",
    "w_bits",
    "a_bits",
    "seed",
    "state",
    "reason",
    "accuracy",
    "best_accuracy",
    "best_epoch",
    "epochs",
    "images",
    "seconds",
    "values",
    "lr",
    "weight_decay",
    "quantizer_lr",
    "quantizer_weight_decay",
)
"""Of the CSV file; ``values`` is what a sweep tried or chose, the last four are the settings that were used."""


class Writer:
    """Writes the results of a comparison's folder.

    Args:
        out: the folder.
        data: the images, to say how many they are.
    """

    def __init__(self, out: Path, data: Dataset) -> None:
        self.out, self.data = out, data
        self.drawn = time.monotonic()
        self.told = False
        self.known: dict[str, Outcome] = {}

    def write(self, comparison: Comparison, *, plots: bool = False) -> dict[str, Any]:
        """Write the files and return what ``results.json`` holds; the plots are drawn if they must be or it is time."""
        cells = cells_of(comparison)
        for cell in cells:
            if cell.name not in self.known or not self.known[cell.name].final:
                self.known[cell.name] = outcome_of(cell, self.out)
        outcomes = {cell.name: (cell, self.known[cell.name]) for cell in cells}
        rows = table_rows(comparison, outcomes)
        content: dict[str, Any] = {
            "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "comparison": comparison.to_json(),
            "environment": environment(),
            "images": self._images(comparison),
            "float": _anchor(outcomes),
            "table": rows,
            "notes": notes(comparison, outcomes, rows, len(self.data.val)),
            "cells": [self._cell(comparison, cell, outcome) for cell, outcome in outcomes.values()],
        }
        write_text(self.out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
        write_text(self.out / "results.csv", _csv(content["cells"]))
        write_text(self.out / "results.md", markdown(content))
        if plots or time.monotonic() - self.drawn >= PLOT_SECONDS:
            self._draw(content)
            self.drawn = time.monotonic()
        return content

    def _images(self, comparison: Comparison) -> dict[str, int]:
        counts = {"training": len(self.data.train), "evaluation": len(self.data.val)}
        if comparison.sweep:
            part = part_of(self.data, comparison.held_out)
            counts |= {"sweep_training": len(part.train), "sweep_held_out": len(part.val)}
        return counts

    def _draw(self, content: dict[str, Any]) -> None:
        if importlib.util.find_spec("matplotlib") is None:
            if not self.told:
                self.told = True
                logger.info('accuracy.png and .svg need matplotlib: pip install "wnq[report]"')
            return
        from wnq.compare.chart import draw

        draw(content, self.out)

    def _cell(self, comparison: Comparison, cell: Cell, outcome: Outcome) -> dict[str, Any]:
        contender = None if cell.label == ANCHOR else comparison.contender(cell.label)
        values, changes = dict(cell.values), []
        if contender is not None and not cell.undefined:
            best = chosen_cell(comparison, cell.label, cell.width, self.known) if cell.kind == "method" else None
            values = values if best is None else dict(best[0].values)
            train = dataclasses.replace(comparison.recipe.train, **values)
            changes = recommended_changes(contender, cell.width, train) if comparison.recommended else []
        return {
            "name": cell.name,
            "kind": cell.kind,
            "label": cell.label,
            "method": ANCHOR if contender is None else contender.method,
            "options": {} if contender is None else dict(contender.options),
            "w_bits": cell.width[0],
            "a_bits": cell.width[1],
            "seed": cell.seed,
            "values": values,
            "recommended": changes,
            **dataclasses.asdict(outcome),
        }


def _anchor(outcomes: Outcomes) -> dict[str, Any]:
    found = accuracies(outcomes, ANCHOR)
    mean, std = summary(list(found.values()))
    return {"accuracies": found, "mean": mean, "std": std}


def _csv(cells: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for cell in cells:
        train = {} if cell["recipe"] is None else cell["recipe"]["train"]
        row = {column: cell.get(column, train.get(column)) for column in COLUMNS}
        writer.writerow(row | {key: json.dumps(row[key]) if row[key] else "" for key in ("options", "values")})
    return text.getvalue()


def markdown(content: dict[str, Any]) -> str:
    """Return the results as a page: methods by widths, then width by width the ranks, then what stands behind them."""
    comparison = content["comparison"]
    widths = list(dict.fromkeys(row["bits"] for row in content["table"]))
    labels = [contender["label"] for contender in comparison["contenders"]]
    by_place = {(row["label"], row["bits"]): row for row in content["table"]}
    anchor = _anchor_text(content["float"])
    recipe = comparison["recipe"]
    lines = [
        f"# Comparison: {recipe['model']['name']} on {recipe['data']['name']}",
        "",
        f"Accuracy in percent on {content['images']['evaluation']:,} evaluation images after the last epoch; mean ± sample "
        f"standard deviation over the seeds {', '.join(map(str, comparison['seeds']))}. Float: {anchor}.",
        "",
        *_table(
            ["method", *widths],
            [[_code(label), *(_overview(by_place[label, bits]) for bits in widths)] for label in labels],
        ),
    ]
    for bits in widths:
        lines += ["", f"## {bits}", ""]
        rows = [shown_row(row) for row in content["table"] if row["bits"] == bits]
        lines += _table(list(rows[0]), [list(row.values()) for row in rows])
    lines += ["", "## Notes", "", *(f"- {note}" for note in content["notes"]), ""]
    facts = ", ".join(f"{key} {value}" for key, value in content["environment"].items())
    lines += [f"Written {content['written']}; {facts}.", ""]
    return "\n".join(lines)


def shown_row(row: dict[str, Any]) -> dict[str, str]:
    """Return a row of the table as text, by column."""
    natural = {"bits": width_name((row["w_bits"], row["a_bits"]))} if row["bits"] == width_name(None) else {}
    return {
        "rank": rank_text(row),
        "method": row["label"],
        **natural,
        "accuracy": accuracy_text(row),
        "drop": "–" if row["drop"] is None else f"{row['drop']:+.2f}",
        "behind the best [95 %]": interval_text(row),
        "best epoch": "–" if row["best_epoch_mean"] is None else f"{row['best_epoch_mean']:.2f}",
    }


def _overview(row: dict[str, Any]) -> str:
    drop = "" if row["drop"] is None else f"; drop {row['drop']:+.2f}"
    rank = "" if row["rank"] is None else f"; rank {rank_text(row)}"
    return accuracy_text(row) + drop + rank


def _anchor_text(anchor: dict[str, Any]) -> str:
    if anchor["mean"] is None:
        return "not run"
    return f"{anchor['mean']:.2f}" + ("" if anchor["std"] is None else f" ± {anchor['std']:.2f}")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    escaped = [[text.replace("|", "\\|") for text in row] for row in (columns, ["---"] * len(columns), *rows)]
    return [f"| {' | '.join(row)} |" for row in escaped]


def _code(text: str) -> str:
    return f"`{text}`"
