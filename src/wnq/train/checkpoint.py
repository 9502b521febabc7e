"""The state of an unfinished training run: written beside and renamed, read without running any code."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from wnq.files import replacing
from wnq.train.config import TrainConfig

FORMAT = 1


@dataclasses.dataclass
class TrainState:
    """Where a run stands.

    Attributes:
        epoch: the current epoch.
        step: steps done in it.
        history: one row an epoch, as written to the metrics file.
        loss_sum: sum of the losses of the steps done in this epoch.
        correct: training images predicted right in this epoch.
        seen: training images seen in this epoch.
        seconds: training time so far.
    """

    epoch: int = 0
    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list[dict[str, Any]])
    loss_sum: float = 0.0
    correct: int = 0
    seen: int = 0
    seconds: float = 0.0


def save_checkpoint(
    path: Path | BinaryIO,
    state: TrainState,
    config: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer,
    **models: nn.Module | None,
) -> None:
    """Write everything that a resumed run needs to continue bit for bit, to a path or an open file."""
    content = {
        "format": FORMAT,
        "config": json.dumps(config, sort_keys=True),
        "state": json.dumps(dataclasses.asdict(state)),
        "optimizer": optimizer.state_dict(),
        "models": {name: model.state_dict() for name, model in models.items() if model is not None},
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }
    with replacing(path) if isinstance(path, Path) else contextlib.nullcontext(path) as target:
        torch.save(content, target)


def remove_leftovers(*paths: Path) -> None:
    """Remove what a process killed while it wrote these files has left beside them."""
    for path in paths:
        for leftover in path.parent.glob(f".{path.name}.*.tmp"):
            leftover.unlink(missing_ok=True)


def load_checkpoint(
    path: Path | BinaryIO, config: dict[str, Any], *, optimizer: torch.optim.Optimizer, **models: nn.Module | None
) -> TrainState:
    """Restore what :func:`save_checkpoint` wrote, in place, and return where the run stands.

    Settings that the checkpoint does not know yet count as written with their defaults.

    Raises:
        ValueError: the file is damaged, of another version, or belongs to a run with other settings (which ones) or
            another model.
    """
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        version = content["format"]
        written: dict[str, Any] = json.loads(content["config"]) if version == FORMAT else {}
    except Exception as error:
        raise ValueError(
            f"cannot resume from {path}: not a readable checkpoint ({type(error).__name__}). "
            "Remove it to start the run anew."
        ) from None
    if version != FORMAT:
        raise ValueError(
            f"cannot resume from {path}: checkpoint format {version!r}, this version of wnq reads {FORMAT}. "
            "Resume it with the version that wrote it, or remove it to start the run anew."
        )
    defaults = dataclasses.asdict(TrainConfig())
    written, config = defaults | written, defaults | config
    differing = sorted(key for key in written.keys() | config.keys() if written.get(key) != config.get(key))
    if differing:
        changes = ", ".join(f"{key}: {written.get(key)!r} then, {config.get(key)!r} now" for key in differing)
        raise ValueError(f"cannot resume from {path}: the settings changed ({changes}). Use another output folder.")
    try:
        for name, model in models.items():
            if model is not None:
                model.load_state_dict(content["models"][name])
        optimizer.load_state_dict(content["optimizer"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot resume from {path}: it holds another model or quantization than the one given: {error}. "
            "Use another output folder."
        ) from None
    torch.set_rng_state(content["rng"])
    if content.get("cuda_rng") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(content["cuda_rng"])
    return TrainState(**json.loads(content["state"]))
