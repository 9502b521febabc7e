"""Measurements as tables and sentences for people."""

import math
from collections.abc import Sequence
from typing import Any

from wnq.sensitivity.records import Row, Sensitivity

NAMED = 3
"""Layers that a sentence names at most."""

PLACES = 4
"""Decimals at most."""


def with_error(value: float | None, error: float | None) -> str:
    """Return ``+0.187 ± 0.013``: the error in two digits, the value in as many places."""
    if value is None or not math.isfinite(value):
        return "–"
    if error is None or not math.isfinite(error):
        return f"{value:+.{PLACES}f}"
    places = PLACES if error <= 0 else min(PLACES, max(0, 1 - math.floor(math.log10(error))))
    return f"{value:+.{places}f} ± {error:.{places}f}"


def by_harm(sensitivity: Sensitivity, bits: int) -> list[Row]:
    """Return the rows of single layers at a width, the most harmful first; a loss that is NaN is the worst."""
    rows = [row for row in sensitivity.rows if row.scope == "alone" and row.bits == bits]
    return sorted(rows, key=lambda row: -_worst(row.max.loss_change))


def _worst(change: float) -> float:
    return change if math.isfinite(change) else math.inf


def width_rows(sensitivity: Sensitivity, bits: int) -> list[dict[str, Any]]:
    """Return one row a layer at a width, the most harmful first: changes with it alone quantized by max scaling, and the gap.

    A star marks a gap beyond noise. The accuracy stands there if it was measured.
    """
    layers = {layer.name: layer for layer in sensitivity.layers}
    rows: list[dict[str, Any]] = []
    for row in by_harm(sensitivity, bits):
        accuracy = {"accuracy (points)": _accuracy(row)}
        rows.append(
            {
                "layer": row.layer,
                "weights": layers[row.layer].parameters,
                "loss": _loss(row),
                **(accuracy if sensitivity.accuracy is not None else {}),
                "removing the tail saves": with_error(row.gap, row.gap_error) + ("" if row.tail == "unclear" else " *"),
            }
        )
    return rows


def together_rows(sensitivity: Sensitivity, bits: int) -> list[dict[str, Any]]:
    """Return all layers quantized at a width, and what leaving one float changes then, the largest gain first.

    Empty if it was not measured.
    """
    whole = sensitivity.row("all", "", bits)
    if whole is None:
        return []
    others = [row for row in sensitivity.rows if row.scope == "others" and row.bits == bits]
    others.sort(key=lambda row: _worst(row.max.loss_change))
    return [
        {"layer left float": row.layer or "none", "loss": _loss(row), "accuracy (points)": _accuracy(row)}
        for row in (whole, *others)
    ]


def sentences(sensitivity: Sensitivity) -> list[str]:
    """Return for each width which layers hurt, and where removing the tail would pay."""
    return [
        _sentence(rows, bits, sensitivity.samples)
        for bits in sensitivity.settings.bits
        if (rows := by_harm(sensitivity, bits))
    ]


def _sentence(rows: Sequence[Row], bits: int, samples: int) -> str:
    harmful = [row for row in rows if row.hurts]
    if harmful:
        first, *others = harmful
        text = f"{first.layer!r} hurts most ({_loss(first)})"
        if others:
            named = [f"{row.layer!r} ({_loss(row)})" for row in others[: NAMED - 1]]
            text += f", then {', '.join(named)}"
        if len(harmful) < len(rows):
            text += f"; in {len(rows) - len(harmful)} of {len(rows)} layers {samples:,} samples show no harm"
    else:
        text = f"{samples:,} samples show no harm in any layer"
    pays = sorted((row for row in rows if row.tail == "pays"), key=lambda row: -_worst(row.gap))
    costs = sorted((row for row in rows if row.tail == "costs"), key=lambda row: -_worst(-row.gap))
    tail = f"Removing the tail would pay {_listed(pays)}{f' and cost {_listed(costs)}' if costs else ''}"
    return f"{bits} bit{'s' if bits > 1 else ''}: {text}. {tail}."


def _listed(rows: Sequence[Row]) -> str:
    """Return ``nowhere``, ``in '0', '6'`` or ``in 5 layers ('0', '6', '3', …)``."""
    names = ", ".join(repr(row.layer) for row in rows[:NAMED])
    if len(rows) > NAMED:
        return f"in {len(rows)} layers ({names}, …)"
    return f"in {names}" if rows else "nowhere"


def _loss(row: Row) -> str:
    return with_error(row.max.loss_change, row.max.loss_error)


def _accuracy(row: Row) -> str:
    return with_error(row.max.accuracy_change, row.max.accuracy_error)
