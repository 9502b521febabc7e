"""Tails to the trackers of accelerate: TensorBoard, Weights & Biases, Trackio, MLflow and others."""

from typing import Any

from wnq.integrations.naming import LOGS, scalars
from wnq.names import check_choice
from wnq.recorder import Sink, TailRecord


def to_trackers(accelerator: Any, *, log: str = "layers") -> Sink:
    """Return a sink for :class:`wnq.recorder.TailRecorder` that calls ``accelerator.log``.

    Args:
        accelerator: an ``accelerate.Accelerator`` whose trackers are initialized, or one tracker: whatever has
            ``log(values, step=)``.
        log: ``"layers"`` or ``"medians"``, see :func:`wnq.integrations.scalars`.

    Raises:
        ValueError: another ``log``.
    """
    check_choice(log, LOGS, where="log")

    def sink(step: int, records: list[TailRecord]) -> None:
        accelerator.log(scalars(records, log), step=step)

    return sink
