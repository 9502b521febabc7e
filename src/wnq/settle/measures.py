"""What one run says: its layers at the start, on the way and at the end, in a few numbers."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wnq.analysis import LayerStats, layer_stats
from wnq.recipe import load_run
from wnq.recorder import TailRecord, read_records
from wnq.train import TAILS


@dataclass(frozen=True)
class LayerMeasure:
    """One layer of one run, before the first step and after the last."""

    layer: str
    records: int
    toward: float
    """Share of the records in which descent would move the largest weight toward zero; chance is 1/2."""
    pull: float
    """Median of that gradient's size, signed (positive: toward zero), in units of the layer's gradient rms."""
    peak_start: float
    peak_end: float
    crest_start: float
    crest_end: float
    kurtosis_start: float
    kurtosis_end: float
    tail_mass_start: float
    tail_mass_end: float
    error_start: float
    error_end: float
    law_start: float
    law_end: float


@dataclass(frozen=True)
class RunMeasure:
    """One run, over the layers that have the width that is asked about.

    Attributes:
        label: the arm.
        width: bits of weights and inputs.
        seed: of the run.
        accuracy: after the last epoch, in percent.
        layers: their measures.
        track: step -> median over the layers of crest, kurtosis, tail_mass, relative_error, law_error and pull in units of
            the gradient's rms.
    """

    label: str
    width: tuple[int, int]
    seed: int
    accuracy: float
    layers: tuple[LayerMeasure, ...]
    track: tuple[dict[str, float], ...]

    def mean(self, value: Callable[[LayerMeasure], float]) -> float:
        """Return the mean of a number over the layers where it is finite; NaN if it is nowhere."""
        found = [number for layer in self.layers if math.isfinite(number := value(layer))]
        return statistics.fmean(found) if found else math.nan

    def log_ratio(self, end: str, start: str) -> float:
        """Return the mean over the layers of log(end / start), of two columns."""
        return self.mean(lambda layer: _log(getattr(layer, end)) - _log(getattr(layer, start)))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; NaN and infinity become None."""
        return _plain(asdict(self))


def measure_run(
    folder: Path, label: str, width: tuple[int, int], seed: int, accuracy: float, inner: bool
) -> RunMeasure:
    """Read what a finished run recorded, and its trained weights.

    Args:
        folder: of the run.
        label: of the arm.
        width: of the run.
        seed: of the run.
        accuracy: of the run.
        inner: leave the first and the last layer out, which have a width of their own.

    Raises:
        ValueError: the run's files are damaged, or belong to another run.
    """
    _, model = load_run(folder)
    end = {row.name: row for row in layer_stats(model)}
    records = read_records(folder / TAILS)
    names = list(dict.fromkeys(record.layer for record in records))
    if names != list(end) or not records or records[0].step != 1:
        raise ValueError(f"{folder / TAILS} does not belong to the run beside it. Remove {folder} and run it again.")
    names = names[1:-1] if inner and len(names) > 2 else names
    own = {name: [record for record in records if record.layer == name] for name in names}
    return RunMeasure(
        label,
        width,
        seed,
        accuracy,
        tuple(_layer(own[name], end[name]) for name in names),
        tuple(_track([record for record in records if record.layer in own])),
    )


def _layer(records: Sequence[TailRecord], end: LayerStats) -> LayerMeasure:
    start = records[0]
    pulls = [record.pull for record in records if math.isfinite(record.pull)]
    sizes = [_relative(record) for record in records]
    return LayerMeasure(
        layer=start.layer,
        records=len(pulls),
        toward=sum(pull > 0 for pull in pulls) / len(pulls) if pulls else math.nan,
        pull=_median(sizes),
        peak_start=start.peak,
        peak_end=end.crest * end.rms,
        crest_start=start.crest,
        crest_end=end.crest,
        kurtosis_start=start.kurtosis,
        kurtosis_end=end.kurtosis,
        tail_mass_start=start.tail_mass,
        tail_mass_end=end.tail_mass,
        error_start=start.relative_error,
        error_end=math.nan if end.relative_error is None else end.relative_error,
        law_start=start.law_error,
        law_end=math.nan if end.law_error is None else end.law_error,
    )


def _track(records: Sequence[TailRecord]) -> Iterable[dict[str, float]]:
    for step in dict.fromkeys(record.step for record in records):
        now = [record for record in records if record.step == step]
        columns = ("crest", "kurtosis", "tail_mass", "relative_error", "law_error")
        row = {column: _median([getattr(record, column) for record in now]) for column in columns}
        yield {"step": step, **row, "pull": _median([_relative(record) for record in now])}


def _relative(record: TailRecord) -> float:
    return record.pull / record.gradient_rms if record.gradient_rms > 0 else math.nan


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return statistics.median(finite) if finite else math.nan


def _log(value: float) -> float:
    return math.log(value) if value > 0 else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return None if isinstance(value, float) and not math.isfinite(value) else value
