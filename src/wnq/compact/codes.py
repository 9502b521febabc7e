"""Rounded inputs as packed codes: 1, 2, 4 or 8 bits a value."""

import torch
from torch import Tensor


def in_memory_order(x: Tensor) -> Tensor | None:
    """Return a view of ``x`` as one row, as it lies in memory; None if it is neither contiguous nor channels-last."""
    if x.is_contiguous():
        return x.view(-1)
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    if x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return x.permute(0, 2, 3, 4, 1).view(-1)
    return None


def code_width(n_levels: int) -> int:
    """Return how many bits a code takes: the width of the grid, or the next one that divides a byte."""
    return next(width for width in (1, 2, 4, 8) if n_levels <= 2**width)


class Codes:
    """Multiples of a step, from ``low`` to ``high``, kept as codes.

    A byte holds one code of each of 8 / width equal stretches of the memory, so that packing is a few shifts of whole stretches.

    Args:
        values: ``step * n`` with whole numbers n in [low, high], in the order that :func:`in_memory_order` accepts.
        step: ``()``, positive, in the type that the values were computed in.
        low: a whole number.
        high: a whole number, at most ``low + 255``.
    """

    def __init__(self, values: Tensor, step: Tensor, low: float, high: float) -> None:
        self.step, self.low = step, low
        self.width = code_width(int(high - low) + 1)
        self.size, self.stride, self.dtype = values.size(), values.stride(), values.dtype
        self.packed = self._pack(values)
        self._restored: Tensor | None = None

    def _stretches(self, row: Tensor) -> list[Tensor]:
        """Cut a row into as many equal stretches as a byte holds codes; the last ones may be shorter, or missing."""
        return list(row.split(max(1, -(-row.numel() * self.width // 8))))

    def _pack(self, values: Tensor) -> Tensor:
        row = in_memory_order(values)
        assert row is not None
        if row.dtype != self.step.dtype:
            row = row.to(self.step.dtype).div_(self.step).round_().mul_(self.step)
        first, *others = self._stretches(row)
        # A byte at once, step * sum of n_i 2^(i width): off by a few ulp of at most 255 steps, far less than half a step.
        total, lows = first.clone(), self.low
        for i, stretch in enumerate(others, 1):
            total[: len(stretch)].add_(stretch, alpha=2 ** (i * self.width))
            lows += self.low * 2 ** (i * self.width)
        return total.div_(self.step).round_().sub_(lows).to(torch.uint8)

    def restore(self, *, last: bool = False) -> Tensor:
        """Return the values, bit for bit (a negative zero comes back as zero), in their layout.

        Args:
            last: nobody will ask again in this backward pass; until then the values are kept.
        """
        values = self._unpack() if self._restored is None else self._restored
        self._restored = None if last else values
        return values

    def _unpack(self) -> Tensor:
        values = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.packed.device)
        row = in_memory_order(values)
        assert row is not None
        exact = row if self.dtype == self.step.dtype else torch.empty_like(row, dtype=self.step.dtype)
        for i, stretch in enumerate(self._stretches(exact)):
            codes = self.packed[: len(stretch)]
            if i > 0:
                codes = codes.bitwise_right_shift(i * self.width)
            if (i + 1) * self.width < 8:
                codes = codes.bitwise_and(2**self.width - 1)
            stretch.copy_(codes)
            if self.low:
                stretch.add_(self.low)
            stretch.mul_(self.step)
        if exact is not row:
            row.copy_(exact)
        return values
