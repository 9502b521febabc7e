"""What ``wnq stats`` and ``wnq report`` are pointed at: what a command opens, or any checkpoint, of which no network is known."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from wnq.cli.command import FailureError, existing
from wnq.cli.screen import Screen
from wnq.cli.targets import Target, is_packed, open_target

if TYPE_CHECKING:
    from wnq.checkpoints import Checkpoint

USUAL = ("model", "pytorch_model", "checkpoint", "weights", "state", "last", "best")
"""Names of files that say nothing: the folder's name is put before them."""


def open_any(
    path: Path,
    name: str | None = None,
    num_classes: int | None = None,
    in_channels: int | None = None,
    options: Sequence[str] | None = None,
) -> "Target | Checkpoint":
    """Open what a path is: a run's folder, a packed file, float weights of a named network, or else any checkpoint.

    Raises:
        FailureError: it is missing, damaged, or none of these.
        ValueError: the network's name or options are wrong.
    """
    existing(path)
    if path.is_dir() and (path / "recipe.json").exists():
        return open_target(path, name, num_classes, in_channels, options)
    if path.is_file() and (name is not None or is_packed(path)):
        return open_target(path, name, num_classes, in_channels, options)
    from wnq.checkpoints import open_checkpoint

    try:
        return open_checkpoint(path)
    except ValueError as error:
        raise FailureError(str(error)) from error


def layers_of(opened: "Target | Checkpoint") -> list[str]:
    """Return the names of the layers; ``FailureError`` if there are none."""
    from wnq.analysis import layer_names

    try:
        return layer_names(opened.model if isinstance(opened, Target) else opened)
    except ValueError as error:
        raise FailureError(str(error)) from error


def left_out(opened: "Target | Checkpoint") -> str:
    """Return how much of a checkpoint the report is about."""
    if isinstance(opened, Target):
        return ""
    weights, every = opened.weights, opened.tensors
    return (
        f"{len(weights)} of {len(every)} tensors are weights, {sum(info.bytes for info in weights):,} of "
        f"{sum(info.bytes for info in every):,} bytes; biases, normalizations and the like are left out"
    )


def start_of(screen: Screen, target: Target) -> list[Target]:
    """Return the float model that a run started from, if it did."""
    import dataclasses

    import torch

    from wnq.recipe import build

    recipe = target.recipe
    if recipe is None or recipe.model.start is None:
        return []
    path = Path(recipe.model.start)
    if not path.exists():
        screen.note(f"{path}, where {target.path} started from, does not exist here: the report shows the run alone.")
        return []
    with torch.random.fork_rng(devices=[]):
        train = dataclasses.replace(recipe.train, distill_weight=0.0)
        model, _ = build(dataclasses.replace(recipe, quantize=None, train=train))
    return [Target(path, "float", model.eval())]


def names_of(opened: "Sequence[Target | Checkpoint]") -> list[str]:
    """Return a name for each target: its own, or its path where two have the same."""
    own = [_name(one) for one in opened]
    count = Counter(own)
    return [name if count[name] == 1 else str(one.path) for name, one in zip(own, opened, strict=True)]


def _name(opened: "Target | Checkpoint") -> str:
    if isinstance(opened, Target):
        return opened.name
    path = opened.path
    if path.is_dir():
        return path.name or str(path)
    stem = path.name.removesuffix(".index.json").removesuffix(path.suffix).removesuffix(".safetensors")
    return f"{path.parent.name}/{stem}" if stem in USUAL and path.parent.name else stem
