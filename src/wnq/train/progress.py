"""What a training run reports: after every step, and at its end."""

from dataclasses import dataclass
from typing import Any

from wnq.metrics import Metrics


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows, after every step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    accuracy: float
    """Of the training images seen in this epoch, in percent."""
    images_per_second: float
    seconds_left: float
    val: Metrics | None = None
    """At the end of an epoch that was evaluated."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        val: metrics on the validation images after the last epoch, of the model as returned.
        history: one row an epoch: epoch, lr, loss, accuracy, val_loss, val_accuracy, seconds, images_per_second.
        seconds: training time, evaluation included, over all resumptions.
        images_per_second: mean over the run.
    """

    val: Metrics
    history: list[dict[str, Any]]
    seconds: float
    images_per_second: float
