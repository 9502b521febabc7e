"""Values of the network's input that lie on a threshold of its first rounding, and how to tell them apart for every engine.

Images have few values: 256 a channel. By chance one can lie so near to a threshold of the first layer's input that the order
of two float operations decides its integer: torch divides by the step, engines multiply by its inverse and add a zero point. Every
pixel of that value then differs. A step that is a little longer or shorter moves the thresholds off; the layer's scale takes the
change back, so that nothing else moves.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wnq.integer.inputs import InputGrid
from wnq.integer.layer import DeployedLayer

MOST_VALUES = 2**16
"""More different values than this are taken for continuous, where no single one matters."""

CLEARANCE = 1e-4
"""Least distance between a value and a threshold, in steps. Engines are off by up to about 1e-5, an ulp at a zero point of 128."""

STRETCHES = tuple(sign * 1e-7 * 2**n for n in range(14) for sign in (1, -1))
"""Relative changes of a step that are tried, up to 8e-4, the smallest first."""


@torch.no_grad()
def clear_ties_(model: nn.Module, samples: Sequence[tuple[Tensor, ...]]) -> dict[str, float]:
    """Move the steps of layers that read the network's input off its values, in place.

    Integers of all values in ``samples`` stay what they were, and so does step times scale, but for a rounding.

    Args:
        model: of a :class:`wnq.integer.Conversion`.
        samples: batches of what its forward takes.

    Returns:
        The layers whose step changed, with the relative change.
    """
    reading, changed = _readers_of_input(model, samples), dict[str, float]()
    if not reading:
        return changed
    values = torch.cat([x.flatten() for batch in samples for x in batch if x.is_floating_point()]).unique()
    for name in reading if values.numel() <= MOST_VALUES else ():
        layer = model.get_submodule(name)
        assert isinstance(layer, DeployedLayer) and layer.grid is not None
        stretch = _stretch(values, layer.grid)
        if stretch:
            step = layer.grid.step
            layer.grid = dataclasses.replace(layer.grid, step=_stretched(step, stretch))
            layer.scale = (layer.scale.double() * (step / layer.grid.step)).float()
            changed[name] = stretch
    return changed


def _readers_of_input(model: nn.Module, samples: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """Return the layers with a grid that read an input of the model."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, DeployedLayer) and m.grid is not None}
    reading: set[str] = set()
    storages: set[int] = set()

    def note(name: str) -> Any:
        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].untyped_storage().data_ptr() in storages:
                reading.add(name)

        return before

    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        for batch in samples[:1]:
            first = tuple(x[:1] for x in batch)
            storages |= {x.untyped_storage().data_ptr() for x in first}
            model(*first)
    finally:
        for handle in handles:
            handle.remove()
    return sorted(reading)


def _stretch(values: Tensor, grid: InputGrid) -> float:
    """Return the smallest change of the step that leaves every integer as it is and clears all values; 0 if none is better."""
    exact, integers = values.double(), grid.integers(values).double()
    best, widest = 0.0, _clearance(exact, integers, grid.step, grid)
    for stretch in STRETCHES if widest < CLEARANCE else ():
        clearance = _clearance(exact, integers, _stretched(grid.step, stretch), grid)
        if clearance > widest:
            best, widest = stretch, clearance
        if widest >= CLEARANCE:
            break
    return best


def _stretched(step: float, stretch: float) -> float:
    """Return a changed step as engines store it, a float32."""
    return torch.tensor(step * (1 + stretch), dtype=torch.float32).item()


def _clearance(values: Tensor, integers: Tensor, step: float, grid: InputGrid) -> float:
    """Return how far the nearest value is from leaving its integer, in steps; negative if one has left it."""
    ratio = values / step
    # Beyond its ends the grid decides nothing.
    up = torch.where(integers < grid.high, integers + 0.5 - ratio, torch.inf)
    down = torch.where(integers > grid.low, ratio - (integers - 0.5), torch.inf)
    return float(torch.minimum(up, down).min()) if values.numel() else float("inf")
