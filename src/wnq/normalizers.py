"""Normalizers, and the quantizer made of one: normalize, round, scale back.

A normalizer is a pure function ``(w, axis) -> (u, scale)`` with ``u = w / scale`` or another map of the weights. Its
gradient is the whole point: :func:`max_abs` differentiates through the maximum.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from wnq.quantizer import FLOAT_BITS, Quantized, Quantizer, Uniform, check_finite, compute_dtype
from wnq.ste import grad_scale

Normalizer = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""``(w, axis) -> (u, scale)``; ``scale`` broadcasts against ``w``. ``axis`` counts only for per-channel ones."""

GRANULARITIES = ("tensor", "channel")
SCALES = ("max", "one", "learned", "optimal")


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


class Normalized(Quantizer):
    r"""A uniform quantizer behind a normalizer: :math:`w_q = s \cdot Q(u)` with ``(u, m) = normalize(w)``.

    Args:
        normalize: the normalizer.
        quantizer: the uniform grid.
        scale: what multiplies the rounded values.
            ``"max"``: s = m, the normalizer's own scale, so that magnitudes are kept and nets without BatchNorm work.
            ``"one"``: s = 1, for layers whose scale a BatchNorm absorbs.
            ``"learned"``: s = g, a parameter, one a layer or channel, starting at m.
            ``"optimal"``: s = <w,Q>/<Q,Q>, the least-squares scale, under stop-gradient.
        granularity: ``"tensor"`` or ``"channel"``: how many scales. Must be the normalizer's.
        axis: output-channel dimension.
    """

    def __init__(
        self,
        normalize: Normalizer,
        quantizer: Uniform,
        *,
        scale: str = "max",
        granularity: str = "tensor",
        axis: int = 0,
    ) -> None:
        super().__init__()
        if scale not in SCALES:
            raise ValueError(f"scale must be one of {', '.join(map(repr, SCALES))}, got {scale!r}.")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, got {granularity!r}.")
        self.normalize = normalize
        self.quantizer = quantizer
        self.scale = scale
        self.granularity = granularity
        self.axis = axis
        self.bits = quantizer.bits
        self.gain: nn.Parameter | None = None

    def reset_(self, x: Tensor) -> None:
        """Start the learned scale at the normalizer's."""
        if self.scale != "learned":
            return
        start = self.normalize(x.detach().to(compute_dtype(x)), self.axis)[1].detach().clone()
        if self.gain is None:
            self.gain = nn.Parameter(start)
        else:
            self.gain.data.copy_(start)

    def _step(self, w: Tensor, scale: Tensor, integers: Tensor) -> Tensor:
        """Return the distance between neighbouring integers, broadcastable against the weights."""
        if self.scale == "max":
            return scale / self.quantizer.divisor
        if self.scale == "one":
            return torch.full_like(scale.detach(), 1 / self.quantizer.divisor)
        if self.scale == "learned":
            if self.gain is None:
                raise RuntimeError("the learned scale has no value yet: call reset_(weight) first (quantize_ does).")
            return self.gain / self.quantizer.divisor
        w, integers = w.detach(), integers.detach()
        dims = reduced_dims(w, self.granularity, self.axis)
        keep = self.granularity == "channel"
        energy = integers.square().sum(dims, keepdim=keep)
        return (w * integers).sum(dims, keepdim=keep) / torch.where(energy > 0, energy, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """Return scale * Q(normalize(x))."""
        w = x.to(compute_dtype(x))
        u, scale = self.normalize(w, self.axis)
        integers = self.quantizer.integers(u)
        return (integers * self._step(w, scale, integers)).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Quantized:
        """Return codes, integer levels and one step a layer or channel."""
        check_finite(x, where="the weight to quantize")
        w = x.to(compute_dtype(x))
        u, scale = self.normalize(w, self.axis)
        step = self._step(w, scale, self.quantizer.integers(u))
        step = step.reshape(()) if self.granularity == "tensor" else step.reshape(-1)
        return Quantized(self.quantizer.codes(u), self.quantizer.levels(w), step.detach().clone(), self.axis)

    def extra_repr(self) -> str:
        """Show the parts in ``print(model)``."""
        normalize = self.normalize.func if isinstance(self.normalize, partial) else self.normalize
        return f"normalize={normalize.__name__}, scale={self.scale!r}, granularity={self.granularity!r}"


def normalized_weight(
    normalize: Normalizer, bits: int, *, grid: str, scale: str, granularity: str
) -> Callable[[Tensor, int], Normalized] | None:
    """Return a builder of ``scale * Q(normalize(w))``, or None at 32 bits. Bad options raise here."""
    if bits == FLOAT_BITS:
        return None
    Normalized(normalize, Uniform(bits, grid), scale=scale, granularity=granularity)

    def build(weight: Tensor, axis: int) -> Normalized:
        quantizer = Normalized(normalize, Uniform(bits, grid), scale=scale, granularity=granularity, axis=axis)
        quantizer.reset_(weight)
        return quantizer

    return build
