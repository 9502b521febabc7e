"""All a report needs to know about one model, from memory or from a checkpoint that need not fit there."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from wnq.analysis.profile import WIDTHS, Profile, profile
from wnq.analysis.rows import Layer, LayerStats, float_weights, quantized_weights
from wnq.checkpoints import Checkpoint
from wnq.quantizer import Quantized
from wnq.tails import Histogram, tensor_stats

OnStep = Callable[[int, int], None]
"""Called with what is done and what there is in all, in bytes of weights."""


@dataclass(frozen=True)
class ModelEvidence:
    """What is known of one model; see :func:`collect_evidence`."""

    name: str
    stats: Sequence[LayerStats]
    histograms: Mapping[str, Histogram] = field(default_factory=dict[str, Histogram])
    levels: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])
    """Levels of each layer in units of rms, after the least-squares rescale; the mean grid if per channel."""
    summary: Mapping[str, object] = field(default_factory=dict[str, object])
    """Columns of the results table: accuracy, bytes, …"""
    profiles: Mapping[str, Profile] = field(default_factory=dict[str, Profile])
    """What each clip rule would make of each layer."""
    values_only: bool = False
    """Whether the weights hold quantized values only (a packed or a frozen model), so that no error can be told."""

    def row(self, layer: str) -> LayerStats | None:
        """Return the row of a layer, None if it has no such layer."""
        return next((row for row in self.stats if row.name == layer), None)

    def own_error(self, row: LayerStats) -> float | None:
        """Return the error of the quantizer that a layer was trained with, None if it has none.

        |w - w_q|^2 / |w|^2; after the best single rescale where it is beyond 1, as where a BatchNorm absorbs the scale.
        """
        if self.values_only or row.relative_error is None or row.rescaled_error is None:
            return None
        error = row.relative_error if row.relative_error <= 1 else row.rescaled_error
        return error if math.isfinite(error) else None


def collect_evidence(
    model: nn.Module,
    name: str,
    *,
    bins: int | None = None,
    summary: Mapping[str, object] | None = None,
    bits: Sequence[int] = WIDTHS,
    grid: str = "full",
    on_step: OnStep | None = None,
) -> ModelEvidence:
    """Gather rows, histograms, levels and profiles of a model, quantized or float, for :func:`wnq.report.write_report`.

    Args:
        model: a quantized model, or a float one (the start that the others are compared with).
        name: how the report calls it.
        bins: of each histogram; by default as :func:`wnq.tails.histogram` chooses.
        summary: further columns of the results table.
        bits: widths at which the clip rules are compared, 1 to 8.
        grid: of that comparison, ``"full"`` or ``"symmetric"``.
        on_step: called after each layer.

    Raises:
        ValueError: the model has no layer to quantize, or an argument is out of range.
    """
    layers = _layers_of(model)
    steps = _Steps(sum(layer.weight.nbytes for layer in layers), on_step)
    gathered = _gather(name, layers, bits=bits, grid=grid, bins=bins, steps=steps)
    return replace(gathered, summary=dict(summary or {}), values_only=all(layer.frozen for layer in layers))


def _gather(
    name: str, layers: Iterable[Layer], *, bits: Sequence[int], grid: str, bins: int | None, steps: "_Steps"
) -> ModelEvidence:
    stats: list[LayerStats] = []
    histograms: dict[str, Histogram] = {}
    levels: dict[str, Sequence[float]] = {}
    profiles: dict[str, Profile] = {}
    for layer in layers:
        codes = layer.codes()
        found, histograms[layer.name], profiles[layer.name] = profile(
            layer.weight, axis=layer.axis, bits=bits, grid=grid, bins=bins, values_only=layer.frozen
        )
        row = layer.row(found, codes)
        stats.append(row)
        if codes is not None and row.rms > 0:
            levels[row.name] = _levels(codes, row)
        steps.add(layer.weight.nbytes)
        del layer, codes  # before the next one is read
    return ModelEvidence(name, stats, histograms, levels, profiles=profiles)


class _Steps:
    """Counts bytes of weights for a progress bar."""

    def __init__(self, total: int, on_step: OnStep | None) -> None:
        self.total, self.done, self.on_step = total, 0, on_step

    def add(self, size: int) -> None:
        self.done += size
        if self.on_step is not None:
            self.on_step(self.done, self.total)


def _levels(codes: Quantized, row: LayerStats) -> Sequence[float]:
    book = codes.codebook.double()
    factor = row.rescale if row.rescale is not None and math.isfinite(row.rescale) else 1.0
    return ((book if book.ndim == 1 else book.mean(0)) * factor / row.rms).tolist()


def checkpoint_evidence(
    checkpoint: Checkpoint,
    name: str,
    *,
    bins: int | None = None,
    bits: Sequence[int] = WIDTHS,
    grid: str = "full",
    on_step: OnStep | None = None,
) -> ModelEvidence:
    """Gather the same of the weights in a checkpoint, one tensor at a time; no network is needed.

    Layers are called by their tensors, without the ending ``.weight``, so that they match those of a model. Their output
    channels are taken to run along the first dimension. Besides the largest weight some 100 MB are needed.

    Args:
        checkpoint: what :func:`wnq.checkpoints.open_checkpoint` returned.
        name: how the report calls it.
        bins: as for :func:`collect_evidence`.
        bits: as for :func:`collect_evidence`.
        grid: as for :func:`collect_evidence`.
        on_step: called after each tensor.

    Raises:
        ValueError: the checkpoint has no weight of two dimensions or more, or an argument is out of range.
        OSError: it cannot be read.
    """
    weights = checkpoint.weights
    summary = {
        "layers": len(weights),
        "weights": sum(math.prod(info.shape) for info in weights),
        "bytes": sum(info.bytes for info in weights),
    }
    steps = _Steps(summary["bytes"], on_step)
    layers = _layers_in(checkpoint)
    return replace(_gather(name, layers, bits=bits, grid=grid, bins=bins, steps=steps), summary=summary)


def checkpoint_stats(checkpoint: Checkpoint, *, on_step: OnStep | None = None) -> list[LayerStats]:
    """Return one row for each weight in a checkpoint, see :func:`checkpoint_evidence`; the quantization columns are None."""
    steps = _Steps(sum(info.bytes for info in checkpoint.weights), on_step)
    rows: list[LayerStats] = []
    for layer in _layers_in(checkpoint):
        rows.append(layer.row(tensor_stats(layer.weight), None))
        steps.add(layer.weight.nbytes)
        del layer  # before the next one is read
    return rows


def layer_names(source: nn.Module | Checkpoint) -> list[str]:
    """Return what evidence calls the layers of a model or a checkpoint, without reading a weight.

    Raises:
        ValueError: there is none.
    """
    if isinstance(source, nn.Module):
        return [layer.name for layer in _layers_of(source)]
    return list(_tensor_names(source).values())


def _layers_of(model: nn.Module) -> list[Layer]:
    return quantized_weights(model) or float_weights(model)


def _layers_in(checkpoint: Checkpoint) -> Iterator[Layer]:
    names = _tensor_names(checkpoint)
    for info in checkpoint.weights:
        yield Layer(names[info.name], str(info.dtype).removeprefix("torch."), 0, checkpoint.read(info.name))


def _tensor_names(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what the layer of each weight is called: as the tensor, without ``.weight`` as long as that stays unique."""
    names = [info.name for info in checkpoint.weights]
    if not names:
        raise ValueError(
            f"{checkpoint.path} holds no weights to round: none of its {len(checkpoint.tensors)} tensors is floating point "
            "with two dimensions or more, biases and the like aside. Give a float checkpoint."
        )
    short = Counter(name.removesuffix(".weight") for name in names)
    return {name: cut if short[cut := name.removesuffix(".weight")] == 1 else name for name in names}
