"""The layers of a model in numbers: rows of evidence for tables, and all that a report draws.

Everything is measured on the float weight behind a layer and on the integers its quantizer makes of it, by
:mod:`wnq.tails`. What is undefined (the crest factor of an all-zero weight) is NaN in the dataclasses and ``None`` in
:func:`stats_rows`; what does not apply (the error of a float layer) is ``None`` in both.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from wnq.attach import get_plan, quantized_layers
from wnq.methods import get_method
from wnq.plan import make_plan
from wnq.prepared import float_weight
from wnq.quantizer import Quantized
from wnq.tails import (
    ErrorStats,
    Histogram,
    TensorStats,
    error_stats,
    histogram,
    predicted_error,
    tensor_stats,
)

__all__ = [
    "ErrorStats",
    "Histogram",
    "LayerStats",
    "ModelEvidence",
    "TensorStats",
    "collect_evidence",
    "error_stats",
    "histogram",
    "layer_stats",
    "predicted_error",
    "stats_rows",
    "tensor_stats",
    "weight_stats",
]


@dataclass(frozen=True)
class LayerStats:
    """One row of evidence. The statistics are defined in :class:`TensorStats` and :class:`ErrorStats`."""

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nonfinite: int
    rms: float
    crest: float
    kurtosis: float
    tail_mass: float
    outlier_energy: float
    method: str | None = None
    bits: int | None = None
    relative_error: float | None = None
    rescale: float | None = None
    rescaled_error: float | None = None
    law_error: float | None = None
    zeros: float | None = None
    entropy: float | None = None
    levels_used: int | None = None


@dataclass(frozen=True)
class ModelEvidence:
    """All a report needs to know about one model; see :func:`collect_evidence`."""

    name: str
    stats: Sequence[LayerStats]
    histograms: Mapping[str, Histogram] = field(default_factory=dict[str, Histogram])
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """Levels of each layer in units of rms, after the least-squares rescale; the mean grid if per channel."""
    summary: Mapping[str, object] = field(default_factory=dict[str, object])
    """Columns of the results table: accuracy, bytes, …"""


def _row(name: str, layer: nn.Module, weight: Tensor, **columns: Any) -> LayerStats:
    # torch gives a parametrized layer a class of its own, made at run time.
    kind = next(cls.__name__ for cls in type(layer).__mro__ if not cls.__name__.startswith("Parametrized"))
    stats = asdict(tensor_stats(weight))
    del stats["peak"]
    return LayerStats(name, kind, tuple(weight.shape), **stats, **columns)


def _method_names(model: nn.Module) -> dict[str, str]:
    try:
        return {entry.name: entry.method.name for entry in get_plan(model).layers}
    except ValueError:
        return {}


def _quantized_rows(model: nn.Module) -> Iterator[tuple[LayerStats, Tensor, Quantized | None]]:
    methods = _method_names(model)
    for name, layer, quantizer in quantized_layers(model):
        weight = float_weight(layer).detach()
        columns: dict[str, Any] = {"method": methods.get(name, type(quantizer).__name__), "bits": quantizer.bits}
        codes = quantizer.quantize(weight) if bool(torch.isfinite(weight).all()) else None
        if codes is not None:
            columns |= asdict(error_stats(weight, codes))
        yield _row(name, layer, weight, **columns), weight, codes


def _float_rows(model: nn.Module) -> Iterator[tuple[LayerStats, Tensor, None]]:
    for planned in make_plan(model, get_method("wnq")).layers:
        if planned.tied_to is None:
            layer = model.get_submodule(planned.name)
            weight = float_weight(layer).detach()
            yield _row(planned.name, layer, weight), weight, None


def layer_stats(model: nn.Module) -> list[LayerStats]:
    """Return one row for each quantized layer, tied weights once, in model order.

    A weight with NaN or infinity has no codes: its row counts them and leaves the quantization columns None. The method
    is the one in the model's plan, or the quantizer's class if the model carries none. A frozen layer has only its
    quantized values left: analyse before :func:`wnq.attach.freeze_`.
    """
    return [row for row, _, _ in _quantized_rows(model)]


def weight_stats(model: nn.Module) -> list[LayerStats]:
    """Return the same rows for a float model: every layer that a plan would quantize, quantization columns None.

    Raises:
        ValueError: the model is quantized already, or has no such layer.
    """
    return [row for row, _, _ in _float_rows(model)]


def stats_rows(stats: Iterable[LayerStats]) -> list[dict[str, object]]:
    """Return rows that ``json.dumps(..., allow_nan=False)`` accepts: NaN and infinity become None, the shape a list."""
    return [{key: _plain(value) for key, value in asdict(row).items()} for row in stats]


def _plain(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return list(value) if isinstance(value, tuple) else value


def collect_evidence(
    model: nn.Module, name: str, *, bins: int | None = None, summary: Mapping[str, object] | None = None
) -> ModelEvidence:
    """Gather rows, histograms and levels of a model, quantized or float, for :func:`wnq.report.write_report`.

    Args:
        model: a quantized model, or a float one (the start that the others are compared with).
        name: how the report calls it.
        bins: of each histogram; by default as :func:`wnq.tails.histogram` chooses.
        summary: further columns of the results table.
    """
    quantized = next(iter(quantized_layers(model)), None) is not None
    stats: list[LayerStats] = []
    histograms: dict[str, Histogram] = {}
    levels: dict[str, Sequence[float]] = {}
    for row, weight, codes in _quantized_rows(model) if quantized else _float_rows(model):
        stats.append(row)
        histograms[row.name] = histogram(weight, bins)
        if codes is not None and row.rms > 0:
            book = codes.codebook.double()
            factor = row.rescale if row.rescale is not None and math.isfinite(row.rescale) else 1.0
            levels[row.name] = ((book if book.ndim == 1 else book.mean(0)) * factor / row.rms).tolist()
    return ModelEvidence(name, stats, histograms, levels, dict(summary or {}))
