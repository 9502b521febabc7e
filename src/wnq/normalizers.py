"""Normalizers: what comes before rounding.

A normalizer is a pure function ``(w, axis) -> (u, scale)`` with ``u = w / scale`` or another map of the weights. Its
gradient is the whole point: :func:`max_abs` differentiates through the maximum.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnq.names import check_choice, did_you_mean
from wnq.quantizer import compute_dtype
from wnq.ste import grad_scale

Normalizer = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``(w, axis) -> (u, scale)``; ``scale`` broadcasts against ``w``. ``axis`` counts only for per-channel ones."""

GRANULARITIES = ("tensor", "channel")


def check_granularity(granularity: str) -> str:
    """Return ``granularity`` if it is one of :data:`GRANULARITIES`, else raise ``ValueError``."""
    return check_choice(granularity, GRANULARITIES, where="granularity")


def reduced_dims(w: Tensor, granularity: str, axis: int) -> list[int]:
    """Return the dimensions that a statistic runs over: all, or all but ``axis``.

    Raises:
        ValueError: per channel of a tensor with fewer than two dimensions, where a channel would be a single number.
    """
    if granularity == "channel" and w.ndim < 2:
        raise ValueError(f"granularity='channel' needs a weight of at least 2 dimensions, got shape {tuple(w.shape)}.")
    return [d for d in range(w.ndim) if granularity == "tensor" or d != axis]


def _reduce_max(magnitude: Tensor, granularity: str, axis: int) -> Tensor:
    if granularity == "tensor":
        return magnitude.amax()
    return magnitude.amax(reduced_dims(magnitude, granularity, axis), keepdim=True)


def _divide(w: Tensor, scale: Tensor) -> Tensor:
    """Divide, reading an all-zero group as zeros instead of NaN."""
    return w / torch.where(scale > 0, scale, 1.0)


def max_abs(w: Tensor, axis: int = 0, *, granularity: str = "tensor", max_gain: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Divide by the largest absolute value, differentiating through it.

    With :math:`m = \max|w|`, attained at :math:`i^*`, :math:`s^* = \mathrm{sign}(w_{i^*})` and :math:`u = w/m`, for a
    gradient :math:`g` of ``u``:

    .. math:: dL/dw_j = g_j / m \; (j \ne i^*), \qquad dL/dw_{i^*} = -(s^*/m) \sum_{j \ne i^*} g_j u_j.

    Ties: elements that share the maximum share its gradient evenly, whatever their order in memory.

    Args:
        w: weights, any shape. An all-zero tensor (or channel) gives u = 0 and scale 0.
        axis: output-channel dimension, used per channel.
        granularity: ``"tensor"`` for one maximum a layer, ``"channel"`` for one an output channel.
        max_gain: share of the gradient through the maximum that is kept: 1 exact, 0 detached.

    Returns:
        ``u`` in [-1, 1], and the maximum, broadcastable against ``w``.
    """
    scale = grad_scale(_reduce_max(w.abs(), granularity, axis), max_gain)
    return _divide(w, scale), scale


def tanh_max(w: Tensor, axis: int = 0, *, granularity: str = "tensor", max_gain: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Squash, then divide by the maximum: :math:`u = \tanh w / \max|\tanh w|` (DoReFa-Net). Scale: that maximum."""
    return max_abs(torch.tanh(w), axis, granularity=granularity, max_gain=max_gain)


def l1_mean(w: Tensor, axis: int = 0, *, granularity: str = "channel") -> tuple[Tensor, Tensor]:
    """Divide by the mean absolute value, under stop-gradient: the least-squares scale of sign(w) (XNOR-Net)."""
    dims = reduced_dims(w, granularity, axis)
    magnitude = w.detach().abs()
    scale = magnitude.mean(dims, keepdim=granularity == "channel")
    return _divide(w, scale), scale


def standardize(w: Tensor, axis: int = 0, *, granularity: str = "tensor") -> tuple[Tensor, Tensor]:
    """Subtract the mean and divide by the standard deviation, differentiating through both; scale: that deviation.

    An affine map: it cannot change the kurtosis, so it cannot remove a tail. A constant tensor gives zeros.
    """
    dims = reduced_dims(w, granularity, axis)
    centred = w - w.mean(dims, keepdim=True)
    variance = centred.square().mean(dims, keepdim=True)
    scale = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0)
    return _divide(centred, scale), scale


def identity(w: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """Leave the weights as they are; scale 1."""
    return w, torch.ones((), dtype=w.dtype, device=w.device)


NORMALIZERS: dict[str, Callable[[float], Normalizer]] = {
    "none": lambda _: identity,
    "max_abs": lambda gain: partial(max_abs, max_gain=gain),
    "tanh": lambda gain: partial(tanh_max, max_gain=gain),
    "standardize": lambda _: standardize,
    "l1_mean": lambda _: partial(l1_mean, granularity="tensor"),
}
"""Normalizers by name, one statistic a tensor; the argument is the share of the gradient through a maximum that is kept."""


def named_normalizer(name: str, gain: float = 1.0) -> Normalizer:
    """Return a normalizer by name.

    Raises:
        ValueError: unknown name, with the closest one, or a gain out of range.
    """
    if name not in NORMALIZERS:
        raise ValueError(
            f"unknown normalizer {name!r}.{did_you_mean(name, NORMALIZERS)} Available: {', '.join(NORMALIZERS)}."
        )
    if not 0 <= gain < float("inf"):
        raise ValueError(f"gain must be a finite number >= 0, got {gain!r}.")
    return NORMALIZERS[name](gain)


class Normalization(nn.Module):
    r"""A normalizer alone, as a torch parametrization: :math:`w \mapsto g\,u`, with nothing rounded.

    Put in front of someone else's pruning or quantization it does to their weights what WNQ does to its own. ``g`` starts at the
    normalizer's scale, so that the layer computes what it did (but for what a normalizer takes away for good: the mean in
    standardization, the tails in tanh). Weights that are all zero start with ``g`` = 1, so that they can grow.

    Args:
        weight: the layer's weight, which ``g`` starts from.
        name: one of :data:`NORMALIZERS`.
        max_gain: share of the gradient through a maximum that is kept.
        learned: whether ``g`` is trained.
    """

    scale: Tensor

    def __init__(self, weight: Tensor, name: str = "max_abs", *, max_gain: float = 1.0, learned: bool = True) -> None:
        super().__init__()
        self.name = name
        self.normalize = named_normalizer(name, max_gain)
        start = self.normalize(weight.detach().to(compute_dtype(weight)), 0)[1].to(weight.dtype)
        start = torch.where(start > 0, start, 1.0).to(weight.dtype)
        if learned:
            self.scale = nn.Parameter(start)
        else:
            self.register_buffer("scale", start)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the normalized weight times ``g``."""
        return (self.normalize(weight.to(compute_dtype(weight)), 0)[0] * self.scale).to(weight.dtype)

    def extra_repr(self) -> str:
        """Show the normalizer in ``print(model)``."""
        return f"{self.name!r}, learned={isinstance(self.scale, nn.Parameter)}"


def normalize_(layer: nn.Module, name: str = "max_abs", *, max_gain: float = 1.0, learned: bool = True) -> nn.Module:
    """Put a normalizer in front of a layer's weight, in place, and return the layer; see :class:`Normalization`.

    Undo it with ``torch.nn.utils.parametrize.remove_parametrizations(layer, "weight")``.

    Raises:
        ValueError: unknown normalizer, a gain out of range, or the layer has no weight.
    """
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        raise ValueError(f"normalize_ needs a layer with a weight, got {type(layer).__name__}.")
    parametrize.register_parametrization(
        layer, "weight", Normalization(weight, name, max_gain=max_gain, learned=learned)
    )
    return layer
