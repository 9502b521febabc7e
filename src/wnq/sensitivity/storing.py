"""Measurements as one JSON file. NaN stands there as null."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wnq.files import write_text
from wnq.sensitivity.records import SCOPES, Change, Layer, Row, Sensitivity, Settings

FORMAT, VERSION = "wnq-sensitivity", 1


def sensitivity_json(sensitivity: Sensitivity) -> dict[str, Any]:
    """Return plain JSON types without NaN; :func:`sensitivity_from_json` reverses it."""
    plain = _without_nan(dataclasses.asdict(sensitivity))
    return {"format": FORMAT, "version": VERSION, "complete": sensitivity.complete, **plain}


def sensitivity_from_json(data: Any) -> Sensitivity:
    """Rebuild measurements.

    Raises:
        ValueError: it is something else, of a later version, or a key is missing or of the wrong type.
    """
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:  # pyright: ignore[reportUnknownMemberType]
        raise ValueError("not measurements of wnq sensitivity")
    if data.get("version") != VERSION:  # pyright: ignore[reportUnknownMemberType]
        raise ValueError(
            f"version {data.get('version')!r}; this wnq reads version {VERSION}: install the one that wrote it"
        )  # pyright: ignore
    try:
        made = _rebuilt(data)  # pyright: ignore[reportUnknownArgumentType]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged: {type(error).__name__} {error}") from None
    known = set(made.wanted)
    if len({row.key for row in made.rows} & known) != len(made.rows):
        raise ValueError("damaged: a row is there twice, or belongs to no layer and width of the settings")
    return made


def save_sensitivity(sensitivity: Sensitivity, path: str | Path) -> None:
    """Write measurements as JSON, whole or not at all.

    Raises:
        OSError: the file cannot be written.
    """
    write_text(path, json.dumps(sensitivity_json(sensitivity), indent=1, allow_nan=False) + "\n")


def load_sensitivity(path: str | Path) -> Sensitivity:
    """Read what :func:`save_sensitivity` wrote; an unfinished file too.

    Raises:
        ValueError: the file cannot be read, or holds something else.
    """
    try:
        return sensitivity_from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read the measurements {path}: {reason}.") from None


def _rebuilt(data: Mapping[str, Any]) -> Sensitivity:
    settings = data["settings"]
    return Sensitivity(
        settings=Settings(
            bits=tuple(int(width) for width in settings["bits"]),
            grid=str(settings["grid"]),
            granularity=str(settings["granularity"]),
            inputs=bool(settings["inputs"]),
            leave_out=bool(settings["leave_out"]),
            layers=tuple(str(pattern) for pattern in settings["layers"]),
        ),
        layers=tuple(
            Layer(str(e["name"]), str(e["kind"]), tuple(int(n) for n in e["shape"]), tuple(str(t) for t in e["tied"]))
            for e in data["layers"]
        ),
        samples=int(data["samples"]),
        loss=_number(data["loss"]),
        accuracy=_known(data["accuracy"]),
        rows=tuple(_row(entry) for entry in data["rows"]),
        fingerprint={str(key): str(value) for key, value in data["fingerprint"].items()},
        about=dict(data["about"]),
    )


def _row(entry: Mapping[str, Any]) -> Row:
    if entry["scope"] not in SCOPES:
        raise TypeError(f"scope {entry['scope']!r}")
    read = _number if entry["scope"] == "alone" else _known  # a weight's error: NaN, or not measured
    return Row(
        scope=str(entry["scope"]),
        layer=str(entry["layer"]),
        bits=int(entry["bits"]),
        max=_change(entry["max"]),
        clip=_change(entry["clip"]),
        gap=_number(entry["gap"]),
        gap_error=_number(entry["gap_error"]),
        weight_error=read(entry["weight_error"]),
        clip_weight_error=read(entry["clip_weight_error"]),
    )


def _change(entry: Mapping[str, Any]) -> Change:
    read = _known if entry["accuracy"] is None else _number  # of a single sample the error is NaN
    return Change(
        loss=_number(entry["loss"]),
        loss_change=_number(entry["loss_change"]),
        loss_error=_number(entry["loss_error"]),
        nonfinite=int(entry["nonfinite"]),
        accuracy=_known(entry["accuracy"]),
        accuracy_change=read(entry["accuracy_change"]),
        accuracy_error=read(entry["accuracy_error"]),
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _known(value: Any) -> float | None:
    return None if value is None else float(value)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(entry) for key, entry in value.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_without_nan(entry) for entry in value]  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value
