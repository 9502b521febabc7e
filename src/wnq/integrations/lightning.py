"""Tails in Lightning: a callback, for ``lightning`` and ``pytorch_lightning`` alike."""

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wnq.integrations.naming import LOGS, scalars
from wnq.names import check_choice
from wnq.recorder import Sink, TailRecord, TailRecorder

PACKAGES = ("lightning.pytorch", "pytorch_lightning")


def lightning_callback(
    *, every: int | None = None, path: str | Path | None = None, sinks: Iterable[Sink] = (), log: str = "layers"
) -> Any:
    """Return a ``lightning.pytorch.Callback`` that records tails between the backward pass and the optimizer's step.

    Gradients are those of the whole accumulated batch, after mixed precision has unscaled them and before they are clipped.
    Steps are the trainer's ``global_step``, the optimizers' steps; with several optimizers each has steps of its own, and every
    record holds all layers. A run resumed from a checkpoint goes on with its file. Of several processes the first one records.

    Args:
        every: as in :class:`wnq.recorder.TailRecorder`.
        path: as there.
        sinks: as there; called besides the trainer's loggers.
        log: what the trainer's loggers get: ``"layers"``, ``"medians"`` or ``"none"``, see :func:`wnq.integrations.scalars`.

    Raises:
        ValueError: another ``log``; from ``trainer.fit``, what :class:`wnq.recorder.TailRecorder` raises.
        ModuleNotFoundError: Lightning is not installed.
    """
    check_choice(log, LOGS, where="log")
    return _callback_class()(every, path, list(sinks), log)


class _Hooks:
    """The callback but for its base classes, of which there are two worlds."""

    def __init__(self, every: int | None, path: str | Path | None, sinks: list[Sink], log: str) -> None:
        self.options = every, path, sinks, log  # one name: Lightning gives callbacks its own ``log``
        self.recorder: TailRecorder | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _remade, self.options

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        every, path, sinks, log = self.options

        def to_loggers(step: int, records: list[TailRecord]) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(scalars(records, log), step=step)

        sinks = sinks if log == "none" else [*sinks, to_loggers]
        self.recorder = TailRecorder(pl_module, every=every, path=path, sinks=sinks)
        self.recorder.resume_after(trainer.global_step)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if self.recorder is not None:
            self.recorder.after_backward(trainer.global_step + 1)


def _callback_class() -> type:
    """Derive from the ``Callback`` of whichever package the user has imported, or of both: each refuses the other's."""
    modules = [module for name in PACKAGES if (module := sys.modules.get(name)) is not None]
    for name in () if modules else PACKAGES:
        try:
            modules = [importlib.import_module(name)]
        except ModuleNotFoundError:
            continue
        break
    if not modules:
        raise ModuleNotFoundError("the Lightning callback needs lightning: pip install lightning")
    return type("TailMonitor", (_Hooks, *(module.Callback for module in modules)), {})


def _remade(*options: Any) -> Any:
    return _callback_class()(*options)
