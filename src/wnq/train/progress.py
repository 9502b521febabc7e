"""What a training run reports: after every step, and at its end."""

from dataclasses import dataclass
from typing import Any

from wnq.metrics import Metrics
from wnq.train.checkpoint import TrainState


@dataclass(frozen=True)
class Progress:
    """What a progress bar shows, after every step."""

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    """Mean over the steps of this epoch that were read."""
    accuracy: float
    """Of the training images of those steps, in percent."""
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


@dataclass(frozen=True)
class Pace:
    """How much there is to do in a run, and how much of it a step does.

    Attributes:
        epochs: of the run.
        steps: of an epoch.
        images: of a step.
    """

    epochs: int
    steps: int
    images: int

    def progress(
        self, state: TrainState, seconds: float, *, resumed_at: int, pending: int, val: Metrics | None
    ) -> Progress:
        """Return what a progress bar shows.

        Args:
            state: where the run stands.
            seconds: since this epoch began or was resumed.
            resumed_at: steps of this epoch that were done before.
            pending: steps that ``state`` counts but knows no loss of yet.
            val: at the end of an epoch that was evaluated.
        """
        each = seconds / max(1, state.step - resumed_at)
        left = (self.epochs - state.epoch) * self.steps - state.step
        return Progress(
            state.epoch + 1,
            self.epochs,
            state.step,
            self.steps,
            state.loss_sum / max(1, state.step - pending),
            100 * state.correct / max(1, state.seen),
            self.images / max(each, 1e-9),
            left * each,
            val,
        )

    def row(
        self, state: TrainState, lr: float, seconds: float, *, resumed_at: int, val: Metrics | None
    ) -> dict[str, Any]:
        """Return the line of an epoch's metrics; the arguments are those of :meth:`progress`."""
        return {
            "epoch": state.epoch + 1,
            "lr": lr,
            "loss": state.loss_sum / max(1, state.step),
            "accuracy": 100 * state.correct / max(1, state.seen),
            "val_loss": None if val is None else val.loss,
            "val_accuracy": None if val is None else val.accuracy,
            "seconds": round(seconds, 3),
            "images_per_second": round((state.step - resumed_at) * self.images / max(seconds, 1e-9), 1),
        }
