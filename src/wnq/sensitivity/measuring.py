"""Every layer at every width, one after the other, into a file that a stopped call goes on from."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wnq.sensitivity.prober import Outcome, Prober, paired
from wnq.sensitivity.records import VARIANTS, Row, Sensitivity
from wnq.sensitivity.rounding import relative_error
from wnq.sensitivity.storing import load_sensitivity, save_sensitivity

logger = logging.getLogger(__name__)

OnRow = Callable[[Row, int, int], None]
"""Called with each new row, the number of rows there are now, and of all."""


def measure_sensitivity(
    prober: Prober,
    out: str | Path | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    on_row: OnRow | None = None,
) -> Sensitivity:
    """Measure every layer at every width: two passes over the data a row.

    Args:
        prober: the model, its data and the settings.
        out: a JSON file that is written anew, whole, after every row. What stands there already is kept and not measured again,
            so a call that was stopped goes on, and other widths or ``leave_out`` can be added.
        about: where model and data came from, for the file; plain JSON types.
        on_row: for a progress bar.

    Raises:
        ValueError: ``out`` holds measurements of another model, other data or under other settings, or is no such file.
        OSError: the file cannot be written.
    """
    base = prober.change(prober.float_outcome)
    found = Sensitivity(
        settings=prober.settings,
        layers=prober.layers,
        samples=len(prober.float_outcome.losses),
        loss=base.loss,
        accuracy=base.accuracy,
        rows=(),
        fingerprint=prober.fingerprint(),
        about=dict(about or {}),
    )
    if out is not None and Path(out).exists():
        found = _continued(found, load_sensitivity(out), Path(out))
    rows = {row.key: row for row in found.rows}
    together: _Together | None = None
    for scope, name, bits in found.wanted:
        if (scope, name, bits) in rows:
            continue
        if scope == "alone":
            row = _alone(prober, name, bits)
        else:
            if together is None or together.bits != bits:
                together = None  # one width at a time: it holds all weights twice
                together = _Together(prober, bits)
            row = together.row(scope, name)
        rows[row.key] = row
        found = dataclasses.replace(found, rows=tuple(rows[key] for key in found.wanted if key in rows))
        if out is not None:
            save_sensitivity(found, out)
        _warn(row)
        if on_row is not None:
            on_row(row, len(found.rows), len(found.wanted))
    return found


def _continued(asked: Sensitivity, there: Sensitivity, path: Path) -> Sensitivity:
    """Return what stands in the file as the beginning of what is asked.

    Raises:
        ValueError: the two do not measure the same.
    """
    differing = [
        name for name in ("weights", "data", "loss") if asked.fingerprint.get(name) != there.fingerprint.get(name)
    ]
    differing += [
        name
        for name in ("grid", "granularity", "inputs")
        if getattr(asked.settings, name) != getattr(there.settings, name)
    ]
    differing += ["layers"] if asked.layers != there.layers else []
    if differing:
        raise ValueError(
            f"{path} holds measurements with other {', '.join(differing)}. Choose another file, or remove this one."
        )
    return dataclasses.replace(
        asked,
        settings=dataclasses.replace(
            asked.settings,
            bits=tuple({*asked.settings.bits, *there.settings.bits}),
            leave_out=asked.settings.leave_out or there.settings.leave_out,
        ),
        rows=there.rows,
    )


def _row(prober: Prober, scope: str, name: str, bits: int, outcomes: Mapping[str, Outcome], **columns: Any) -> Row:
    """Compare the outcomes of the two variants with the float model's and with each other."""
    references: Mapping[str, Outcome] = columns.pop("references", {})
    changes = {variant: prober.change(outcomes[variant], references.get(variant)) for variant in VARIANTS}
    gap, error = paired(outcomes["max"].losses, outcomes["clip"].losses)
    return Row(scope, name, bits, changes["max"], changes["clip"], gap, error, **columns)


def _alone(prober: Prober, name: str, bits: int) -> Row:
    values = {variant: prober.quantized(name, bits, variant) for variant in VARIANTS}
    outcomes = {variant: prober.run_with({name: (values[variant], bits)}) for variant in VARIANTS}
    errors = [relative_error(prober.weight(name), values[variant]) for variant in VARIANTS]
    return _row(prober, "alone", name, bits, outcomes, weight_error=errors[0], clip_weight_error=errors[1])


class _Together:
    """All layers at one width: their quantized weights, in both variants, and what the model does with all of them."""

    def __init__(self, prober: Prober, bits: int) -> None:
        self.prober, self.bits = prober, bits
        self._weights = {
            variant: {layer.name: (prober.quantized(layer.name, bits, variant), bits) for layer in prober.layers}
            for variant in VARIANTS
        }
        self._outcomes = {variant: prober.run_with(self._weights[variant]) for variant in VARIANTS}

    def row(self, scope: str, name: str) -> Row:
        """Return all layers, or all but one."""
        if scope == "all":
            return _row(self.prober, scope, name, self.bits, self._outcomes)
        outcomes = {
            variant: self.prober.run_with({n: w for n, w in self._weights[variant].items() if n != name})
            for variant in VARIANTS
        }
        return _row(self.prober, scope, name, self.bits, outcomes, references=self._outcomes)


def _warn(row: Row) -> None:
    for variant, change in zip(VARIANTS, (row.max, row.clip), strict=True):
        if change.nonfinite:
            where = {"alone": f"{row.layer} alone", "all": "all layers", "others": f"all layers but {row.layer}"}
            logger.warning(
                "%s at %d bits (%s): the loss is NaN or infinite on %d samples",
                where[row.scope], row.bits, variant, change.nonfinite,
            )  # fmt: skip
