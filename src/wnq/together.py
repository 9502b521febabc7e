"""The weights of all layers rounded together: a few operations a step, where each layer would take some 25 of its own.

They lie one after another in a matrix. Each begins with a row of its own, so what differs between weights differs between rows,
and an operation on all weights is one on a matrix and a column. What each of them becomes is what ``MaxRounding`` says.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, groupby
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList

from wnq import kernels
from wnq.normalized import Normalized, Taken
from wnq.quantizer import Quantizer, Uniform

WIDTH = 512
"""Weights in a row."""
LARGEST = {"cpu": 2**16, "cuda": 2**18}
"""A weight of more elements, or on another device, is rounded by itself: it keeps the device busy, and a copy costs more. On CUDA
each program reads what was found in all rows of its weight; up to here that is one reading."""
FEWEST = 3
"""Fewer weights gain nothing; many methods have two such, those of the first and last layer."""


class Layout(NamedTuple):
    """What the matrix must know of a weight: float32, dense."""

    size: torch.Size
    stride: tuple[int, ...]
    device: torch.device
    bits: int
    grid: str
    gain: float


class Rows:
    """Where each weight lies in the matrix, and its constants, on its device.

    Args:
        layouts: of the weights, on one device; those of one grid are neighbours.
    """

    def __init__(self, layouts: Sequence[Layout]) -> None:
        device = layouts[0].device
        counts = [-(-layout.size.numel() // WIDTH) for layout in layouts]
        firsts = [0, *accumulate(counts)]
        grids = [Uniform(layout.bits, layout.grid) for layout in layouts]
        self.layouts, self.firsts = layouts, firsts
        self.first = _constant(firsts, device)
        self.owner = _constant([i for i, n in enumerate(counts) for _ in range(n)], device)
        self.divisor = _constant([float(grid.divisor) for grid in grids], device)
        self.inverse = _constant([1 / grid.divisor for grid in grids], device)
        self.gain = _constant([layout.gain for layout in layouts], device)
        kinds = {"sign": 0, "full": 1, "symmetric": 2}
        self.kind = _constant([kinds[g.grid if g.bits > 1 else "sign"] for g in grids], device)
        runs = [list(run) for _, run in groupby(range(len(grids)), lambda i: (grids[i].bits, grids[i].grid))]
        self.runs = [(grids[run[0]], slice(firsts[run[0]], firsts[run[-1] + 1])) for run in runs]
        longest = range(max(counts))
        rows = [[first + min(i, n - 1) for i in longest] for first, n in zip(firsts[:-1], counts, strict=True)]
        self._rows = _constant(rows, device)
        self._there = _constant([[float(i < n) for i in longest] for n in counts], device)
        self._zeros = torch.zeros(WIDTH, device=device)

    def join(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the matrix, ``(rows, WIDTH)``, of tensors that lie in memory as the weights do; None: zeros."""
        pieces: list[Tensor] = []
        for tensor, layout in zip(tensors, self.layouts, strict=True):
            n = layout.size.numel()
            pieces.append(self._zeros.new_zeros(n) if tensor is None else tensor.as_strided((n,), (1,)))
            if n % WIDTH:
                pieces.append(self._zeros[: -n % WIDTH])
        return torch.cat(pieces).view(-1, WIDTH)

    def part(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """Return each weight's share of a matrix, in its shape."""
        places = zip(self.layouts, self.firsts[:-1], strict=True)
        return tuple(matrix.as_strided(layout.size, layout.stride, first * WIDTH) for layout, first in places)

    def maximum(self, of_row: Tensor) -> Tensor:
        """Return the largest of the numbers of each weight's rows."""
        return of_row[self._rows].amax(1)

    def sum(self, of_row: Tensor) -> Tensor:
        """Return the sum of the numbers of each weight's rows, always in one order."""
        return (of_row[self._rows] * self._there).sum(1)

    def spread(self, of_weight: Tensor) -> Tensor:
        """Return a column: the number of the weight that a row belongs to."""
        return of_weight[self.owner].unsqueeze(1)


def _constant(values: list[Any], device: torch.device) -> Tensor:
    """Copy numbers to a device without waiting for it."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class RoundedTogether(torch.autograd.Function):
    """``MaxRounding`` of many weights. Args of ``apply``: where they lie, and all of them."""

    @staticmethod
    def forward(ctx: Any, rows: Rows, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        w = rows.join(weights)
        ctx.rows, ctx.fused = rows, kernels.usable(w)
        if ctx.fused:
            from wnq.kernels import together as kernel

            y, maximum = kernel.forward(
                w, owner=rows.owner, first=rows.first, divisor=rows.divisor, inverse=rows.inverse, kind=rows.kind
            )
            ctx.save_for_backward(w, y, maximum)
            return rows.part(y)
        u = w.abs()
        maximum = rows.maximum(u.amax(1))
        alive = maximum.sign()
        divisor = maximum + (1 - alive)
        # By a number torch divides on the CPU, and on CUDA multiplies by its inverse.
        step = rows.spread(maximum * rows.inverse if w.is_cuda else maximum / rows.divisor)
        torch.div(w, rows.spread(divisor), out=u)
        y = torch.empty_like(w)
        for grid, run in rows.runs:
            torch.mul(grid.rounded(u[run]), step[run], out=y[run])
        ctx.save_for_backward(w, y, alive, divisor)
        return rows.part(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows: Rows = ctx.rows
        places = zip(grads, rows.layouts, strict=True)
        grad = rows.join([None if g is None else _as_in(layout, g) for g, layout in places])
        if ctx.fused:
            from wnq.kernels import together as kernel

            w, y, maximum = ctx.saved_tensors
            return None, *rows.part(
                kernel.backward(grad, w, y, maximum, owner=rows.owner, first=rows.first, gain=rows.gain)
            )
        w, y, alive, divisor = ctx.saved_tensors
        sign = torch.div(w, rows.spread(divisor), rounding_mode="trunc")
        ties = rows.sum(sign.abs().sum(1)).clamp_(min=1)
        through = rows.sum((y - w).mul_(grad).sum(1)) * (rows.gain / (divisor * ties))
        through.masked_fill_(rows.gain == 0, 0)
        return None, *rows.part(grad.mul_(rows.spread(alive)).addcmul_(sign, rows.spread(through)))


def _as_in(layout: Layout, grad: Tensor) -> Tensor:
    if grad.stride() == layout.stride:
        return grad
    return grad.new_empty_strided(layout.size, layout.stride).copy_(grad)


class Layer(NamedTuple):
    """A weight that can be rounded with others."""

    quantizer: Normalized
    weight: Tensor
    layout: Layout


def _parametrizations(model: nn.Module) -> Iterator[ParametrizationList]:
    """As ``model.modules()`` finds them, in a fifth of the time: this is done in every step."""
    left = [model]
    while left:
        module = left.pop()
        if type(module) is ParametrizationList:
            yield module
        left += [m for m in module._modules.values() if m is not None]  # pyright: ignore[reportPrivateUsage]


def _candidate(chain: ParametrizationList) -> Layer | None:
    quantizer, weight = chain[0], chain.original
    if len(chain) != 1:
        return None
    if not isinstance(quantizer, Normalized) or quantizer.granularity != "tensor" or not _plain(quantizer):
        return None
    gain = quantizer.gain_of_rounding()
    if gain is None or not weight.requires_grad or weight.dtype != torch.float32 or type(weight) is not nn.Parameter:
        return None
    if not 0 < weight.numel() <= LARGEST.get(weight.device.type, 0):
        return None
    if not (weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)):
        return None
    grid = quantizer.quantizer
    return Layer(quantizer, weight, Layout(weight.size(), weight.stride(), weight.device, grid.bits, grid.grid, gain))


def _plain(quantizer: Normalized) -> bool:
    """Whether a subclass leaves the rounding, and the weight before it, alone."""
    kind = type(quantizer)
    return kind.forward is Normalized.forward and kind.observe_ is Quantizer.observe_


def layers_together(model: nn.Module) -> list[list[Layer]]:
    """Return the layers that :func:`rounded_together` takes in one pass each, one list a device, equal grids in a row."""
    found = {id(layer.quantizer): layer for layer in map(_candidate, _parametrizations(model)) if layer is not None}
    layers = sorted(found.values(), key=lambda a: (str(a.layout.device), a.layout.grid, a.layout.bits))
    groups = [list(group) for _, group in groupby(layers, lambda a: a.layout.device)]
    return [group for group in groups if len(group) >= FEWEST]


_rows: WeakKeyDictionary[nn.Module, dict[tuple[Layout, ...], Rows]] = WeakKeyDictionary()


def _rows_of(model: nn.Module, layouts: tuple[Layout, ...]) -> Rows:
    known = _rows.setdefault(model, {})
    if layouts not in known:
        with torch.inference_mode(False):  # its constants must do in training as well
            known[layouts] = Rows(layouts)
    return known[layouts]


@contextmanager
def rounded_together(model: nn.Module) -> Generator[None]:
    """Round the weights of all layers in one pass, for the forward pass within the block: the same values, sooner.

    Takes trained float32 weights that are divided by their largest and rounded to a uniform grid, one scale a tensor and equal
    to that maximum (as ``wnq`` does), if they are small and at least three; others are rounded by their layers, as always. Reading
    ``layer.weight`` in the block gives the common result; after a change of the weight in place, the layer rounds again.
    Values are equal bit for bit, gradients but for the order of their sums.

    One forward and one backward pass a block; the backward pass may come after it, unless activations are checkpointed. What a
    compiled model does is decided by its compiler: it gains nothing here. Second derivatives are not to be had.

    Args:
        model: from :func:`wnq.quantize_`, whole or in part.
    """
    given: list[tuple[Normalized, Taken]] = []
    try:
        for layers in [] if torch.compiler.is_compiling() else layers_together(model):
            rows = _rows_of(model, tuple(layer.layout for layer in layers))
            values = cast("tuple[Tensor, ...]", RoundedTogether.apply(rows, *(layer.weight for layer in layers)))
            for (quantizer, weight, _), value in zip(layers, values, strict=True):
                quantizer.taken = Taken(weight, weight._version, value)  # pyright: ignore[reportPrivateUsage]
                given.append((quantizer, quantizer.taken))
        yield
    finally:
        for quantizer, taken in given:
            if quantizer.taken is taken:  # and not a block's within or beside this one
                quantizer.taken = None
