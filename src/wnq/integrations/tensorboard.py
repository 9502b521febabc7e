"""Tails to TensorBoard: a scalar a statistic and layer, and histograms of the weights in units of their rms."""

from typing import Any

import torch
from torch import Tensor, nn

from wnq.attach import quantized_layers
from wnq.integrations.naming import scalars
from wnq.prepared import float_weight
from wnq.recorder import Sink, TailRecord
from wnq.tails import describe


def to_tensorboard(writer: Any, model: nn.Module | None = None, *, histogram_every: int = 1000) -> Sink:
    """Return a sink for :class:`wnq.recorder.TailRecorder` that writes events.

    Scalars are named ``statistic/layer``, so that TensorBoard shows a statistic of all layers side by side; histograms of
    w / rms(w) are named ``weights_per_rms/layer`` and keep their shape while weights grow or shrink.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``; of a Lightning ``TensorBoardLogger`` its ``experiment``.
        model: whose float weights the histograms show; None draws none.
        histogram_every: least steps between two histograms of a layer; they are drawn at steps that are recorded. At most 401
            bins a layer, so an event of a few KB.

    Raises:
        ValueError: ``histogram_every`` is below 1.
    """
    if histogram_every < 1:
        raise ValueError(f"histogram_every must be at least 1 step, got {histogram_every}. Leave model out for none.")
    last: int | None = None

    def sink(step: int, records: list[TailRecord]) -> None:
        nonlocal last
        for name, value in scalars(records).items():
            writer.add_scalar(name, value, step)
        if model is not None and (last is None or step - last >= histogram_every):
            for record, (_, layer, _) in zip(records, quantized_layers(model), strict=True):
                _add_histogram(writer, f"weights_per_rms/{record.layer}", float_weight(layer).detach(), step)
            last = step

    return sink


def _add_histogram(writer: Any, name: str, weight: Tensor, step: int) -> None:
    stats, counted = describe(weight)
    finite = weight[torch.isfinite(weight)] if stats.nonfinite else weight
    if not finite.numel():
        return
    unit = stats.rms or 1.0
    low, high = torch.aminmax(finite)
    number = sum(counted.counts)
    writer.add_histogram_raw(
        name,
        min=low.item() / unit,
        max=high.item() / unit,
        num=number,
        sum=finite.sum(dtype=torch.float64).item() / unit,
        sum_squares=number * (stats.rms / unit) ** 2,
        bucket_limits=counted.edges[1:],
        bucket_counts=counted.counts,
        global_step=step,
    )
