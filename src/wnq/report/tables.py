"""The tables of a report: cells for the page, rows for CSV, everything for JSON."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from wnq.analysis import RULES, LayerStats, ModelEvidence, cause_of, plain
from wnq.analysis.causes import gaussian_crest
from wnq.drawing import median, percent
from wnq.files import write_text
from wnq.report.charts import median_error, own_errors
from wnq.report.subject import RULE_KEYS, RULE_NAMES, Subject
from wnq.report.wording import answer, weighted

COLUMNS: dict[str, str] = {
    "parameters": "number of weights",
    "method": "how the weight is quantized",
    "bits": "width of a code",
    "crest": "max|w| / rms(w): Gaussian about sqrt(2 ln parameters)",
    "kurtosis": "fourth over squared second central moment: Gaussian 3",
    "tail_mass": "fraction of weights beyond 3 rms: Gaussian 0.0027",
    "outlier_energy": "their share of the squared norm",
    "relative_error": "|w - w_q|² / |w|² of the layer's own quantizer",
    "rescaled_error": "the same after the best single rescale, 1 - cos²(w, w_q)",
    "law_error": "step² / 12 / mean(w²)",
    "rescale": "that best factor; 1 where magnitudes are kept",
    "zeros": "fraction of weights that are exactly 0",
    "entropy": "zero-order entropy of the codes, bits a weight",
    "levels_used": "distinct codes that occur",
    "nonfinite": "NaN and infinite weights, left out of all else",
}
"""Columns of :class:`wnq.analysis.LayerStats`, with what each means."""


PERCENT = {"tail_mass", "outlier_energy", "relative_error", "rescaled_error", "law_error", "zeros"}
"""Columns that the page shows in percent."""


class Column(NamedTuple):
    """One column of the page's table of layers."""

    key: str
    """As in :func:`layer_cells`."""
    heading: str
    meaning: str
    is_share: bool
    """Whether it is shown in percent."""
    is_text: bool


class Share(float):
    """A number that the page shows in percent."""


def cell(value: object) -> dict[str, Any]:
    """Return the text of a table cell and, for a number, the value to sort by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"text": "–" if value is None else str(value), "value": None, "numeric": value is None}
    if not math.isfinite(value):
        return {"text": "–", "value": None, "numeric": True}
    whole = isinstance(value, int) or not value or abs(value) >= 1e4
    text = f"{value:,.0f}" if whole else f"{value:.2g}" if abs(value) < 1e-4 else f"{value:#.4g}".rstrip(".")
    return {"text": percent(value) if isinstance(value, Share) else text, "value": value, "numeric": True}


def layer_columns(subject: Subject) -> list[Column]:
    """Return the columns of the page's table of layers; those that no layer fills are left out."""
    focus = subject.focus
    at = f"at {focus} bits"
    compared = [
        Column("cause", "cause", f"what the error {at} comes from", False, True),
        *(Column(f"{r}_{focus}", RULE_NAMES[r], f"error {at}: what sets the range", True, False) for r in RULE_KEYS),
        Column(f"predicted_{focus}", "law", f"error {at} that the law predicts for the largest weight", True, False),
        Column(f"entropy_max_{focus}", "entropy, largest weight", f"of the codes {at}, bits a weight", False, False),
        Column(f"entropy_mse_{focus}", "entropy, best clip", f"of the codes {at}, bits a weight", False, False),
        Column("outlying", "outlying channels", "those that peak beyond 3 times the median peak", False, False),
        Column("gaussian", "Gaussian crest", "crest factor of as many Gaussian weights", False, False),
    ]
    own = [
        Column(key, key.replace("_", " "), meaning, key in PERCENT, key == "method") for key, meaning in COLUMNS.items()
    ]
    filled = {
        key
        for model in subject.models
        for row in model.stats
        for key, value in layer_cells(subject, model, row).items()
        if value is not None
    }
    # What answers the question stands first.
    return [column for column in [*(compared if focus else ()), *own] if column.key in filled]


def layer_cells(
    subject: Subject, model: ModelEvidence, row: LayerStats, widths: Sequence[int] | None = None
) -> dict[str, Any]:
    """Return all that is known of one layer of one model; by default the errors at the width in question only."""
    cells: dict[str, Any] = {key: getattr(row, key) for key in COLUMNS}
    cells["method"] = row.method or "float"
    found = model.profiles.get(row.name)
    if found is None:
        return cells
    cells |= {"outlying": found.channels.outlying, "gaussian": gaussian_crest(row.parameters)}
    if not found.errors:
        return cells
    cells["cause"] = cause_of(row, found, subject.focus).cause
    for bits in [subject.focus] if widths is None else widths:
        for rule in RULES:
            error = found.error(bits, rule)
            cells[f"{rule}_{bits}"] = None if error is None else error.measured
            if error is not None and rule in ("max", "mse"):
                cells[f"entropy_{rule}_{bits}"] = error.entropy
            if error is not None and rule == "max":
                cells[f"predicted_{bits}"] = error.predicted
    return cells


def default_table(subject: Subject) -> list[Mapping[str, object]]:
    """Return the results table: a row for each model, the medians over its layers."""
    rows: list[dict[str, object]] = []
    for model in subject.models:
        own = own_errors(model)
        row: dict[str, object] = {
            "name": model.name,
            **model.summary,
            "median crest": median(row.crest for row in model.stats),
            "median kurtosis": median(row.kurtosis for row in model.stats),
        }
        if subject.focus:
            for rule in ("max", "mse", "channel"):
                error = median_error(model, subject.focus, rule)
                row[f"{RULE_NAMES[rule]}, {subject.focus} bits"] = None if error is None else Share(error)
        for bits, error in list(own.items())[:1]:
            row |= {"own quantizer": Share(error), "its bits": bits}
        rows.append(row)
    columns = dict.fromkeys(key for row in rows for key in row)
    filled = [key for key in columns if any(row.get(key) is not None for row in rows)]
    return [{key: row.get(key) for key in filled} for row in rows]


def rule_table(subject: Subject, model: ModelEvidence) -> list[tuple[str, list[tuple[float | None, float]]]]:
    """Return rule -> median over the layers and mean weighted by the number of weights, a pair for each width."""
    rows: list[tuple[str, list[tuple[float | None, float]]]] = []
    for rule in RULE_KEYS:
        pairs: list[tuple[float | None, float]] = []
        for bits in subject.bits:
            errors = [
                (model.profiles[row.name].measured(bits, rule), row.parameters - row.nonfinite)
                for row in model.stats
                if row.name in model.profiles
            ]
            pairs.append((median(error for error, _ in errors), weighted(errors)))
        rows.append((rule, pairs))
    return rows if any(value is not None for _, pairs in rows for value, _ in pairs) else []


def own_table(model: ModelEvidence) -> dict[int, tuple[float, float]]:
    """Return width -> the same two numbers of the layers whose own quantizer has that width."""
    return {
        bits: (middle, weighted([(model.own_error(row), row.parameters) for row in model.stats if row.bits == bits]))
        for bits, middle in own_errors(model).items()
    }


def write_csv(path: str | Path, subject: Subject) -> Path:
    """Write the table of layers: a row for each layer of each model, errors and entropies at all widths; return the path.

    What is undefined or does not apply is an empty cell.

    Raises:
        OSError: the file cannot be written.
    """
    rows = [
        {
            "model": model.name,
            "layer": row.name,
            "kind": row.kind,
            "shape": "x".join(map(str, row.shape)),
            "rms": row.rms,
        }
        | layer_cells(subject, model, row, subject.bits)
        for model in subject.models
        for row in model.stats
    ]
    write_text(path, csv_text(rows))
    return Path(path)


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as CSV, their keys as the heading, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if value is None else value for key, value in plain(row).items()} for row in rows)
    return text.getvalue()


def as_json(subject: Subject) -> dict[str, Any]:
    """Return everything as JSON types: the answer, and of each model each layer's row, errors, channels, tail and histogram."""
    return {
        "answer": [said._asdict() for said in answer(subject)],
        "focus": subject.focus or None,
        "bits": list(subject.bits),
        "grid": subject.grid,
        "causes": [plain({**asdict(cause), "remedy": cause.remedy}) for cause, _, _ in subject.causes],
        "evidence": [_model_json(subject, model) for model in subject.models],
    }


def _model_json(subject: Subject, model: ModelEvidence) -> dict[str, Any]:
    rules = [
        {"rule": rule, "bits": bits, "median": middle, "weighted": mean}
        for rule, pairs in rule_table(subject, model)
        for bits, (middle, mean) in zip(subject.bits, pairs, strict=True)
        if middle is not None
    ]
    rules += [
        {"rule": "own", "bits": bits, "median": middle, "weighted": mean}
        for bits, (middle, mean) in own_table(model).items()
    ]
    layers: list[dict[str, Any]] = []
    for row in model.stats:
        entry: dict[str, Any] = asdict(row)
        found = model.profiles.get(row.name)
        if found is not None:
            entry["errors"] = [asdict(error) for error in found.errors]
            entry["tail"] = asdict(found.tail)
            channels = found.channels
            entry["channels"] = {**channels._asdict(), "listed": [list(pair) for pair in channels.listed]}
        if (histogram := model.histograms.get(row.name)) is not None:
            entry["histogram"] = {"half": histogram.edges[-1], "counts": histogram.counts}
        entry["levels"] = model.levels.get(row.name)
        layers.append(entry)
    return plain(
        {
            "name": model.name,
            "values_only": model.values_only,
            "summary": dict(model.summary),
            "errors": rules,
            "layers": layers,
        }
    )
