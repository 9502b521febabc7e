"""Inputs whose levels are no consecutive integers: a table of thresholds and values, found out by asking the quantizer.

Such inputs stay floats in an engine, but a table has the operators for it, where the quantizer's own arithmetic (a sort, a search,
a sum of bases) may have none.
"""

from typing import cast

import torch
from torch import Tensor, nn

from wnq.integer.inputs import NEIGHBOURS
from wnq.quantizer import Quantizer

FAR = 3e38
"""Beyond every threshold that is looked for."""


class InputTable(nn.Module):
    """A step function: ``values[i]`` from the i-th threshold on.

    Engines read numbers below 1.2e-38 as zeros, so a threshold just above zero is asked as "above zero".

    Attributes:
        thresholds: float32, ascending.
        values: float32, one more than there are thresholds.
    """

    thresholds: Tensor
    values: Tensor

    def __init__(self, thresholds: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("thresholds", thresholds)
        self.register_buffer("values", values)
        self._positive = [0 < float(threshold) < torch.finfo(torch.float32).tiny for threshold in thresholds]

    def forward(self, x: Tensor) -> Tensor:
        """Return the values; NaN gives the smallest."""
        y = self.values[0].expand_as(x)
        for threshold, value, positive in zip(self.thresholds, self.values[1:], self._positive, strict=True):
            y = torch.where(x > 0 if positive else x >= threshold, value, y)
        return y

    def __str__(self) -> str:
        return f"a table of {len(self.values)} floats"


@torch.no_grad()
def input_table(quantizer: Quantizer) -> InputTable | None:
    """Return the table that gives what an input quantizer gives, or None if it is no ascending step function of one element.

    Every threshold is found to the last bit by bisection over the float32 numbers; then the quantizer is asked around and between
    all of them, and once more in another company, so that one which depends on the batch shows itself.
    """
    mode = quantizer.training
    try:
        quantizer.eval()
        return _table(quantizer)
    except (ValueError, RuntimeError):
        return None
    finally:
        quantizer.train(mode)


def _table(quantizer: Quantizer) -> InputTable | None:
    first = quantizer.quantize(torch.zeros(1))
    if first.levels.ndim != 1 or first.scale.numel() != 1:
        return None
    values = cast(Tensor, torch.unique((first.levels.float() * first.scale.float().reshape(())).reshape(-1)))

    def place(x: Tensor) -> Tensor:
        """Return which of ``values`` the quantizer gives for each x; fails where it gives another."""
        y = quantizer(x)
        found = torch.searchsorted(values, y).clamp(max=len(values) - 1)
        if not torch.equal(values[found], y):
            raise ValueError("other values than those of its levels")
        return found

    wanted = torch.arange(1, len(values))
    low, high = (
        _number(torch.full_like(wanted, -FAR, dtype=torch.float32)),
        _number(torch.full_like(wanted, FAR, dtype=torch.float32)),
    )
    reached = place(_float(high)) >= wanted
    already = place(_float(low)) >= wanted
    for _ in range(33):  # the smallest float that gives at least the value wanted
        middle = (low + high) // 2
        above = place(_float(middle)) >= wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    keep = reached & ~already
    start = int(already.sum())  # values that nothing is low enough for are those below it
    table = InputTable(_float(high)[keep], torch.cat([values[start : start + 1], values[1:][keep]]))
    asked = _probes(table.thresholds)
    for x in (asked, torch.cat([asked, torch.tensor([1e20, -1e20])])):
        if not torch.equal(table(x), quantizer(x)):
            return None
    return table


def _number(x: Tensor) -> Tensor:
    """Return float32 numbers' places in their order, int64."""
    bits = x.view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def _float(number: Tensor) -> Tensor:
    """Return the float32 numbers of places."""
    bits = torch.where(number < 0, -number - 2**31, number)
    return bits.to(torch.int32).view(torch.float32)


def _probes(thresholds: Tensor) -> Tensor:
    """Return floats around every threshold, between them and far outside."""
    beside = _float(_number(thresholds).unsqueeze(1) + torch.arange(-NEIGHBOURS, NEIGHBOURS + 1)).reshape(-1)
    ends = thresholds if len(thresholds) else torch.zeros(1)
    width = float(ends[-1] - ends[0]) or 1.0
    between = torch.linspace(float(ends[0]) - width, float(ends[-1]) + width, 4096)
    return torch.cat([beside, between, torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1e30, -1e30])])
