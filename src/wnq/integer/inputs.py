"""The integers of an input: whether a quantizer is clamp(round(x / step)), found out by asking it, not by its class."""

from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.quantizer import Quantized, Quantizer

NEIGHBOURS = 64
"""Floats next to each threshold that are asked on either side."""

AGREE_WITHIN = 4
"""Units in the last place around a threshold in which a quantizer may decide otherwise: ``x * (1 / step)`` for ``x / step``."""


@dataclass(frozen=True)
class InputGrid:
    """Rounding to the nearest of consecutive integers: ``step * clamp(round(x / step), low, high)``, ties to even.

    Attributes:
        step: > 0.
        low: smallest integer, <= 0 in every grid that has a zero.
        high: largest integer.
        bits: width that the method gave.
    """

    step: float
    low: int
    high: int
    bits: int

    @property
    def zero_point(self) -> int:
        """What zero is stored as in uint8, so that the smallest integer is stored as 0.

        Signed grids too: OpenVINO (2026.4) computes wrong sums behind a clip of int8 codes.
        """
        return -self.low

    @property
    def largest(self) -> int:
        """Largest magnitude of an integer."""
        return max(abs(self.low), abs(self.high))

    def integers(self, x: Tensor) -> Tensor:
        """Return the integers as float32, with the operations of the engines: a division, a rounding, a clamp."""
        return torch.clamp(torch.round(x / self.step), self.low, self.high)

    def __str__(self) -> str:
        return f"integers {self.low}..{self.high}, step {self.step:.6g}"


def input_grid(quantizer: Quantizer) -> tuple[InputGrid | None, str]:
    """Return the grid of an input quantizer, or None and why there is none, in one line.

    Its codes are asked for densely: at each threshold, on :data:`NEIGHBOURS` floats of either side, between thresholds, far outside
    and in a second company of values, so that a grid which depends on the batch shows itself.
    """
    kind = type(quantizer).__name__
    mode = quantizer.training
    try:
        quantizer.eval()
        return _probe(quantizer, kind)
    except (ValueError, RuntimeError) as error:
        return None, f"{kind} cannot be asked: {error}"
    finally:
        quantizer.train(mode)


def _probe(quantizer: Quantizer, kind: str) -> tuple[InputGrid | None, str]:
    first = quantizer.quantize(_like(quantizer, torch.tensor([0.0])))
    levels, scale = first.levels.float().cpu(), first.scale.float().cpu()
    if levels.ndim != 1 or scale.numel() != 1:
        return None, f"{kind} has a grid for each channel"
    order = levels.sort().values
    if not torch.equal(order, order.round()) or not bool((order.diff() == 1).all()):
        return None, f"{kind}'s levels are no consecutive integers"
    step, low, high = float(scale), int(order[0]), int(order[-1])
    if not 0 < step < float("inf"):
        return None, f"{kind}'s step is {step}"
    if high - low > 255 or low > 0 or high < 0:
        return None, f"{kind}'s integers run from {low} to {high}, which 8 bits with a zero do not hold"
    grid = InputGrid(step, low, high, quantizer.bits)
    values = probes(grid)
    for asked in (values, torch.cat([values, values.new_tensor([1e4 * step, -1e4 * step])])):
        quantized = quantizer.quantize(_like(quantizer, asked))
        if not torch.equal(quantized.scale.float().cpu().reshape(()), scale.reshape(())):
            return None, f"{kind}'s step depends on the batch"
        got, expected = _integers(quantized), grid.integers(asked)
        wrong = got != expected
        if not bool(wrong.any()):
            continue
        x = asked[wrong].double()
        threshold = (torch.minimum(got, expected)[wrong].double() + 0.5) * step
        near = (x - threshold).abs() <= AGREE_WITHIN * torch.finfo(torch.float32).eps * threshold.abs()
        if bool((~near).any()) or bool(((got - expected).abs()[wrong] > 1).any()):
            at = float(x[(~near).nonzero()[0, 0]]) if bool((~near).any()) else float(x[0])
            return (
                None,
                f"{kind} does not round to nearest: at {at:.6g} it has {at_value(got, asked, at)} steps of {step:.6g}",
            )
    return grid, ""


def at_value(got: Tensor, asked: Tensor, value: float) -> int:
    """Return the integer that was given for ``value``."""
    return int(got[(asked.double() == value).nonzero()[0, 0]])


def probes(grid: InputGrid) -> Tensor:
    """Return float32 values around every threshold of a grid, between them, at both ends and far outside."""
    step = torch.tensor(grid.step, dtype=torch.float32)
    thresholds = (torch.arange(grid.low - 1, grid.high + 1, dtype=torch.float32) + 0.5) * step
    offsets = torch.arange(-NEIGHBOURS, NEIGHBOURS + 1, dtype=torch.int32)
    # Neighbouring floats are neighbouring integers, when their bits are read as such.
    beside = (thresholds.view(torch.int32).unsqueeze(1) + offsets).view(torch.float32).reshape(-1)
    count = 16 * (grid.high - grid.low + 3)
    between = torch.linspace(grid.low - 1.5, grid.high + 1.5, count, dtype=torch.float32) * step
    tiny = torch.finfo(torch.float32).tiny
    rest = torch.tensor([0.0, -0.0, tiny, -tiny, 1e30, -1e30], dtype=torch.float32)
    return torch.cat([beside, between, rest])


def _integers(quantized: Quantized) -> Tensor:
    return quantized.levels.float().cpu()[quantized.codes.cpu().long()]


def _like(quantizer: Quantizer, x: Tensor) -> Tensor:
    tensors = [*quantizer.parameters(), *quantizer.buffers()]
    return x.to(tensors[0].device) if tensors else x
