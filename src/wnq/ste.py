"""Straight-through estimators: one value going forward, another one's gradient coming back.

Every rounding in the library passes through :func:`straight_through`, because the usual spelling
``x + (q - x).detach()`` is not exact in floating point: the sum rounds, so a quantizer with four levels would emit a
dozen distinct numbers. Adding a difference that is exactly zero keeps the value untouched.
"""

from typing import Any

import torch
from torch import Tensor


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """Return ``value`` bit for bit, with the gradient of ``surrogate``.

    Args:
        value: what the forward pass sees; its own gradient is ignored.
        surrogate: tensor of the same shape that receives the gradient. A non-finite element turns the result to NaN.
    """
    return value.detach() + (surrogate - surrogate.detach())


def round_ste(x: Tensor) -> Tensor:
    """Round half to even; the gradient is 1 everywhere."""
    return straight_through(x.round(), x)


def sign_ste(x: Tensor) -> Tensor:
    """Return +1 where ``x >= 0`` and -1 elsewhere (so zero has a sign); the gradient is 1 everywhere."""
    return straight_through(torch.where(x >= 0, 1.0, -1.0).to(x.dtype), x)


def clamp_ste(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp to ``[low, high]``; the gradient is 1 everywhere, also outside the interval."""
    return straight_through(x.clamp(low, high), x)


def grad_scale(x: Tensor, factor: float) -> Tensor:
    """Return ``x`` bit for bit with its gradient multiplied by ``factor`` (1 leaves it, 0 detaches it)."""
    if factor == 1:
        return x
    if factor == 0:
        return x.detach()
    return straight_through(x, x * factor)


class _ScaleBySign(torch.autograd.Function):
    """The identity; backward, ``g * (1 + sign(g) * error)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Tensor) -> Tensor:
        ctx.save_for_backward(error)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (error,) = ctx.saved_tensors
        return grad + grad.abs() * error, None


def elementwise_scaled(value: Tensor, surrogate: Tensor, delta: float, span: float | Tensor) -> Tensor:
    r"""Return ``value`` with the gradient of ``surrogate`` scaled element by element: EWGS.

    :math:`g_x = g\,(1 + \delta\,\mathrm{sign}(g)\,(x - Q(x)))`, the distance measured as a share of the grid's whole span and
    limited to half of it. ``delta=0`` is the straight-through estimator.

    Args:
        value: Q(x).
        surrogate: x, in the units of ``value``.
        delta: >= 0; the authors use 1e-3 to 1e-2 or an estimate from the Hessian's trace.
        span: largest minus smallest level, in the same units.

    References:
        J. Lee et al., Network Quantization with Element-wise Gradient Scaling, arXiv:2104.00903, CVPR 2021, Eq. 6.
    """
    error = ((surrogate - value) / span).detach().nan_to_num(0.0).clamp(-0.5, 0.5) * delta
    return straight_through(value, _ScaleBySign.apply(surrogate, error))  # pyright: ignore[reportArgumentType]
