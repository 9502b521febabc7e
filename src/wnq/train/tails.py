"""The record of the tails that a run keeps, if its settings ask for one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from wnq.attach import quantized_layers
from wnq.integrations import to_tensorboard, to_trackers
from wnq.recorder import Sink, TailRecorder

if TYPE_CHECKING:
    from accelerate import Accelerator

TAILS = "tails.jsonl"
"""File of a run's folder that ``record_every`` writes."""


def make_recorder(model: nn.Module, every: int, out: Path | None, accelerator: "Accelerator") -> TailRecorder | None:
    """Return a recorder into the run's folder and its trackers; None where nothing is to be recorded.

    Args:
        model: before it is compiled or shared out.
        every: steps between two records; 0: nothing is recorded.
        out: the run's folder; None keeps no file.
        accelerator: whose trackers are told; TensorBoard also gets histograms.
    """
    if not every or next(iter(quantized_layers(model)), None) is None:
        return None
    trackers = accelerator.trackers if accelerator.is_main_process else []  # elsewhere they are hollow
    sinks = [_sink(tracker, model) for tracker in trackers]
    return TailRecorder(model, every=every, path=None if out is None else out / TAILS, sinks=sinks)


def _sink(tracker: Any, model: nn.Module) -> Sink:
    return to_tensorboard(tracker.tracker, model) if tracker.name == "tensorboard" else to_trackers(tracker)
