"""The last good state of a run: its checkpoint, or, where there is none yet, a copy in memory."""

import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wnq.files import write_text
from wnq.train.checkpoint import TrainState, load_checkpoint, remove_leftovers, save_checkpoint


def sentence(out: Path | None) -> str:
    """Say where the last good checkpoint of a run's folder is."""
    path = None if out is None else out / "checkpoint.pt"
    return "No checkpoint was written." if path is None or not path.exists() else f"The last good checkpoint is {path}."


class Kept:
    """Saves a run's state and goes back to it.

    Args:
        out: the run's folder; None keeps everything in memory.
        settings: what a checkpoint must have been written with.
        optimizer: of the run.
        models: by name; None for one that the run does not have.
    """

    def __init__(
        self,
        out: Path | None,
        settings: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        models: dict[str, nn.Module | None],
    ) -> None:
        self.out, self.settings, self.optimizer, self.models = out, settings, optimizer, models
        self.path = None if out is None else out / "checkpoint.pt"
        self._copy: io.BytesIO | None = None

    def resume(self) -> TrainState | None:
        """Load the checkpoint, if there is one, and return where the run stands.

        Raises:
            ValueError: it does not fit.
        """
        if self.path is None or not self.path.exists():
            return None
        remove_leftovers(self.path, self.path.with_name("metrics.jsonl"))
        return load_checkpoint(self.path, self.settings, optimizer=self.optimizer, **self.models)

    def copy(self, state: TrainState) -> None:
        """Keep a copy in memory."""
        self._copy = io.BytesIO()
        save_checkpoint(self._copy, state, self.settings, optimizer=self.optimizer, **self.models)

    def save(self, state: TrainState, *, write: bool) -> None:
        """Write metrics and checkpoint, or keep a copy where there is no folder.

        Args:
            state: where the run stands.
            write: whether this process is the one that writes.
        """
        if self.out is None or self.path is None:
            self.copy(state)
            return
        self._copy = None
        if write:
            # Metrics first: were they second, a run killed in between would end without its last row.
            write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in state.history))
            save_checkpoint(self.path, state, self.settings, optimizer=self.optimizer, **self.models)

    @property
    def at_hand(self) -> bool:
        """Whether this process can go back: a checkpoint may lie on another machine."""
        return self._copy is not None or (self.path is not None and self.path.exists())

    def go_back(self) -> TrainState:
        """Restore the last good state in place, and return it."""
        if self._copy is not None:
            self._copy.seek(0)
        source = self.path if self._copy is None else self._copy
        assert source is not None
        return load_checkpoint(source, self.settings, optimizer=self.optimizer, **self.models)
