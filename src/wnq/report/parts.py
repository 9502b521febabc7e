"""What the template of a report is filled with, part by part."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from wnq.analysis import LayerStats, ModelEvidence
from wnq.drawing import Key, median, number, percent
from wnq.report.subject import OWN_KEY, RULE_KEYS, RULE_NAMES, Subject
from wnq.report.tables import Column, Share, cell, layer_cells, own_table, rule_table
from wnq.report.wording import WORST, layer_text, shared


def worst(subject: Subject) -> list[dict[str, Any]]:
    return [
        {
            "name": cause.layer,
            "cause": cause.cause,
            "error": percent(cause.error),
            "text": layer_text(cause, row, found.channels),
            "href": f"#layer{subject.layers.index(cause.layer)}" if cause.layer in subject.drawn else None,
        }
        for cause, row, found in subject.causes[:WORST]
        if cause.error
    ]


def rules(subject: Subject, model: ModelEvidence) -> list[dict[str, Any]]:
    """Return rows of a table: rule, and text of median and weighted mean at each width; the least of a column is marked."""
    table = rule_table(subject, model)
    columns = [[pairs[k][0] for _, pairs in table] for k in range(len(subject.bits))]
    least = [min((e for e in column if e is not None), default=None) for column in columns]
    rows: list[tuple[Key, Sequence[tuple[float | None, float]]]] = [(RULE_KEYS[rule], pairs) for rule, pairs in table]
    if own := own_table(model):
        rows.append((OWN_KEY, [own.get(bits, (None, math.nan)) for bits in subject.bits]))
    return [
        {
            "key": key,
            "cells": [
                {
                    "text": percent(middle),
                    "beneath": "" if middle is None else percent(mean),
                    "best": key != OWN_KEY and middle == best,
                }
                for (middle, mean), best in zip(pairs, least, strict=True)
            ],
        }
        for key, pairs in rows
        if any(middle is not None for middle, _ in pairs)
    ]


def layers(subject: Subject, charts: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Return what the page shows of each layer that is drawn."""
    judged = {cause.layer: (cause, found) for cause, _, found in subject.causes}
    shown: list[dict[str, Any]] = []
    for layer, shown_charts in charts.items():
        rows = [(model, row) for model in subject.models if (row := model.row(layer)) is not None]
        cause, found = judged.get(layer, (None, None))
        shown.append(
            {
                "id": f"layer{subject.layers.index(layer)}",
                "name": layer,
                "about": f"{rows[0][1].kind} · {'×'.join(map(str, rows[0][1].shape))}",
                "cause": None if cause is None else cause.cause,
                "error": "" if cause is None or cause.error is None else percent(cause.error),
                "text": layer_text(cause, rows[0][1], found.channels)
                if cause is not None and found is not None
                else "",
                "charts": shown_charts,
                "rows": [_compared(subject, model, row) for model, row in rows],
                "errors": [_errors(subject, model, row) for model, row in rows if _has_errors(model, row)],
            }
        )
    return shown


def _has_errors(model: ModelEvidence, row: LayerStats) -> bool:
    return row.name in model.profiles and bool(model.profiles[row.name].errors)


def _compared(subject: Subject, model: ModelEvidence, row: LayerStats) -> dict[str, Any]:
    own = model.own_error(row)
    return {
        "key": subject.keys[model.name],
        "crest": number(row.crest),
        "tail": percent(row.tail_mass),
        "own": "–" if own is None else percent(own),
        "bits": number(row.bits),
    }


def _errors(subject: Subject, model: ModelEvidence, row: LayerStats) -> dict[str, Any]:
    """Return one layer's errors, a row a rule, and what the law and the codes say beside them."""
    found = model.profiles[row.name]
    bits = subject.bits

    def each(rule: str, column: str) -> list[str]:
        entries = [found.error(width, rule) for width in bits]
        show = number if column == "entropy" else percent
        return [show(None if entry is None else getattr(entry, column)) for entry in entries]

    rows: list[tuple[str, list[str], Key | None]] = [
        (RULE_NAMES[rule], each(rule, "measured"), key) for rule, key in RULE_KEYS.items()
    ]
    own = model.own_error(row)
    if own is not None:
        rows.append((f"its own, {row.method}", [percent(own) if width == row.bits else "–" for width in bits], None))
    return {
        "key": subject.keys[model.name],
        "rows": [entry for entry in rows if set(entry[1]) != {"–"}],
        "beside": [
            ("law, largest", each("max", "predicted")),
            ("entropy, largest", each("max", "entropy")),
            ("entropy, best clip", each("mse", "entropy")),
        ],
        "own_bits": row.bits if own is not None and row.bits not in bits else None,
        "own": percent(own),
    }


def stat_rows(subject: Subject, columns: Sequence[Column]) -> list[dict[str, Any]]:
    shown: list[dict[str, Any]] = []
    for layer in subject.layers:
        for model in subject.models:
            row = model.row(layer)
            if row is not None:
                cells = layer_cells(subject, model, row)
                texts = [cell(_value(cells.get(column.key), column)) for column in columns]
                shown.append({"row": row, "key": subject.keys[model.name], "cells": texts})
    return shown


def _value(value: Any, column: Column) -> Any:
    return Share(value) if column.is_share and value is not None else value


def finding(start: ModelEvidence, model: ModelEvidence) -> dict[str, Any]:
    """Return the comparison of one model with the start, over the layers that both have."""
    pairs = list(zip(*shared(start, model), strict=True))
    finite = [(a, b) for a, b in pairs if math.isfinite(a.crest) and math.isfinite(b.crest)]

    def change(column: str, shown: Callable[[float | None], str] = number) -> tuple[str, ...]:
        return tuple(shown(median(getattr(pair[side], column) for pair in pairs)) for side in (0, 1))

    return {
        "name": model.name,
        "shared": len(pairs),
        "crest": change("crest"),
        "kurtosis": change("kurtosis"),
        "tail_mass": change("tail_mass", percent),
        "lower": sum(b.crest < a.crest for a, b in finite),
        "layers": len(finite),
        "error": percent(median(row.rescaled_error for row in model.stats)),
    }
