"""Tails in the Trainer of transformers: a callback."""

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wnq.integrations.naming import LOGS, scalars
from wnq.names import check_choice
from wnq.recorder import Sink, TailRecord, TailRecorder


def transformers_callback(
    trainer: Any,
    *,
    every: int | None = None,
    path: str | Path | None = None,
    sinks: Iterable[Sink] = (),
    log: str = "medians",
) -> Any:
    """Return a ``transformers.TrainerCallback`` for ``trainer.add_callback``.

    It records between the backward pass and the optimizer's step. Gradients are those of the whole accumulated batch; the
    Trainer has clipped them by then (``max_grad_norm``, 1.0 by default), which scales the pull and the gradient's rms alike.
    Steps are the Trainer's ``global_step``. A run resumed from a checkpoint goes on with its file. Of several processes the
    first one records.

    Args:
        trainer: the ``transformers.Trainer``, or a class derived from it, whose ``log`` reports the numbers.
        every: as in :class:`wnq.recorder.TailRecorder`.
        path: as there.
        sinks: as there; called besides the trainer's reporting.
        log: what ``trainer.log`` gets: ``"medians"``, since it also prints and keeps every number in ``trainer_state.json``;
            ``"layers"`` or ``"none"``; see :func:`wnq.integrations.scalars`.

    Raises:
        ValueError: another ``log``; from ``trainer.train``, what :class:`wnq.recorder.TailRecorder` raises.
        ModuleNotFoundError: transformers is not installed, or too old.
    """
    check_choice(log, LOGS, where="log")
    try:
        base: type = importlib.import_module("transformers").TrainerCallback
    except ImportError:
        base = object
    if not hasattr(base, "on_pre_optimizer_step"):
        raise ModuleNotFoundError(
            "the Trainer's callback needs transformers, with the event on_pre_optimizer_step: pip install -U transformers"
        )
    return type("TailCallback", (_Hooks, base), {})(trainer, every, path, list(sinks), log)


class _Hooks:
    """The callback but for its base class."""

    def __init__(self, trainer: Any, every: int | None, path: str | Path | None, sinks: list[Sink], log: str) -> None:
        self.trainer, self.options, self.log = trainer, (every, path, sinks), log
        self.recorder: TailRecorder | None = None
        self.records: list[TailRecord] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        every, path, sinks = self.options
        self.recorder = TailRecorder(model, every=every, path=path, sinks=sinks)
        self.recorder.resume_after(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.records = self.recorder.after_backward(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # Here the trainer counts the step as taken, so that its log shows the number that the record has.
        if self.records and self.log != "none":
            due = control.should_log  # a log of ours, which clears it, must not take the place of the trainer's own
            self.trainer.log(scalars(self.records, self.log))
            control.should_log = due
        self.records = []
