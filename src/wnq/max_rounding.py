"""Rounding by the largest weight in few operations: what ``max_abs``, the uniform grid and the scale do one after another.

A layer's weight is small, and each operation on it costs more to start than to run.
"""

from typing import Any

import torch
from torch import Tensor

from wnq import kernels
from wnq.quantizer import Uniform


class MaxRounding(torch.autograd.Function):
    r"""``m * Q(w / m)`` with :math:`m = \max|w|`, the values of the chain bit for bit.

    With :math:`u = w/m`, :math:`y = m\,Q(u)`, a share ``gain`` of the gradient through the maximum, and :math:`i^*` one of n places
    where it is attained: :math:`dL/dw_j = g_j` for :math:`j \ne i^*`, and
    :math:`dL/dw_{i^*} = g_{i^*} + \mathrm{gain}\,\mathrm{sign}(w_{i^*})\,\langle g, y - w\rangle / (m n)`. Where all
    weights are zero the gradient is zero.

    Args of ``apply``: the weight; the grid; the dimensions that a maximum is taken over, all of them for one a tensor; the gain.
    """

    @staticmethod
    def forward(ctx: Any, w: Tensor, grid: Uniform, dims: list[int], gain: float) -> Tensor:
        ctx.dims, ctx.gain = dims, gain
        ctx.fused = len(dims) == w.ndim and kernels.usable(w)
        if ctx.fused:
            from wnq.kernels import maximum as kernel

            y, largest = kernel.forward(w, grid.divisor, grid.grid if grid.bits > 1 else "sign")
            ctx.save_for_backward(w, y, largest)
            return y
        maximum = w.abs().amax(dims, keepdim=True)
        alive = maximum.sign()
        divisor = maximum + (1 - alive)
        # Not in place: where torch 2.11 compiles it, a result that was changed in place has no gradient.
        y = grid.rounded(w / divisor) * (maximum / grid.divisor)
        ctx.save_for_backward(w, y, alive, divisor)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if ctx.fused:
            w, y, largest = ctx.saved_tensors
            if not torch.is_grad_enabled():
                from wnq.kernels import maximum as kernel

                return kernel.backward(kernels.ordered_as(grad, w), w, y, largest, ctx.gain), None, None, None
            alive = largest.sign()
            divisor = largest + (1 - alive)
        else:
            w, y, alive, divisor = ctx.saved_tensors
        direct = grad * alive
        if ctx.gain == 0:
            return direct, None, None, None
        # 1 at a positive maximum, -1 at a negative one, 0 elsewhere: the quotient of a smaller number rounds to less than 1.
        sign = (w / divisor).trunc_()
        ties = sign.abs().sum(ctx.dims, keepdim=True).clamp_(min=1)
        through = (y - w).mul_(grad).sum(ctx.dims, keepdim=True) * (ctx.gain / (divisor * ties))
        return torch.addcmul(direct, sign, through), None, None, None
