"""What a command is pointed at: a run's folder, a packed file, or float weights."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wnq.cli.command import FailureError, existing
from wnq.cli.options import build

if TYPE_CHECKING:
    from torch import nn

    from wnq.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """A model that was read from disk, in eval mode.

    Attributes:
        path: where from.
        kind: ``run``, ``packed`` or ``float``.
        model: the network.
        recipe: what it was trained by; only a run's folder knows.
        accuracy: on the validation images, in percent, where the run's folder tells.
    """

    path: Path
    kind: str
    model: "nn.Module"
    recipe: "Recipe | None" = None
    accuracy: float | None = None

    @property
    def name(self) -> str:
        """How tables and reports call it."""
        return self.path.name.removesuffix(".safetensors") or str(self.path)


def open_target(
    path: Path,
    name: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    options: Sequence[str] | None = None,
) -> Target:
    """Read a run's folder, a packed file or, with a network's name, float weights.

    Raises:
        FailureError: it is missing, damaged or does not fit the network.
        ValueError: the network's name or options are wrong.
    """
    existing(path)
    if path.is_dir():
        return open_run(path)
    network = None if name is None else build(name, num_classes, in_channels, options)
    if network is None or is_packed(path):
        from wnq.artifact import load

        return Target(path, "packed", load(path, network))
    from wnq.recipe import load_weights_

    try:
        load_weights_(network, path)
    except ValueError as error:
        raise FailureError(str(error)) from error
    return Target(path, "float", network.eval())


def open_run(path: Path) -> Target:
    """Read a run's folder.

    Raises:
        FailureError: it holds no finished run, or its files are damaged.
    """
    from wnq.recipe import load_run

    existing(path)
    try:
        recipe, model = load_run(path)
        result = path / "result.json"
        accuracy = json.loads(result.read_text(encoding="utf-8"))["val_accuracy"] if result.exists() else None
    except (ValueError, KeyError, TypeError) as error:
        raise FailureError(f"{path}: {error}" if str(path) not in str(error) else str(error)) from error
    return Target(path, "run", model, recipe, accuracy)


def is_packed(path: Path) -> bool:
    """Return whether a file says of itself that ``wnq pack`` wrote it."""
    from safetensors import SafetensorError, safe_open

    from wnq.artifact.container import FORMAT

    try:
        with safe_open(path, framework="pt") as file:
            return FORMAT in (file.metadata() or {})
    except (SafetensorError, OSError, ValueError):
        return False
