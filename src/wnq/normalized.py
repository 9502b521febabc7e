"""Quantizers made of a normalizer: in front of the uniform grid, and in front of any other quantizer."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from wnq.max_rounding import MaxRounding
from wnq.names import check_choice
from wnq.normalizers import Normalizer, check_granularity, max_abs, named_normalizer, reduced_dims
from wnq.quantizer import Quantized, Quantizer, Uniform, compute_dtype
from wnq.ste import straight_through

SCALES = ("max", "one", "learned", "optimal")


class Taken(NamedTuple):
    """What a weight was rounded to together with others, see :func:`wnq.rounded_together`.

    Attributes:
        weight: the float one.
        version: of it.
        values: the rounded ones.
    """

    weight: Tensor
    version: int
    values: Tensor


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

    taken: Taken | None = None
    """Values that are there already."""

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
        self.normalize = normalize
        self.quantizer = quantizer
        self.scale = check_choice(scale, SCALES, where="scale")
        self.granularity = check_granularity(granularity)
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

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to one forward pass."""
        return {key: value for key, value in vars(self).items() if key != "taken"}

    def gain_of_rounding(self) -> float | None:
        """Return the share of the gradient through the maximum, if :class:`MaxRounding` is all there is to do; else None."""
        return self._gain_of_maximum() if self.scale == "max" and not self.quantizer.ewgs else None

    def _gain_of_maximum(self) -> float | None:
        """Return the gain of a :func:`wnq.normalizers.max_abs`; None if the normalizer is another one."""
        if isinstance(self.normalize, partial):
            return self.normalize.keywords.get("max_gain", 1.0) if self.normalize.func is max_abs else None
        return 1.0 if self.normalize is max_abs else None

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
        taken = None if torch.compiler.is_compiling() else self.taken
        if taken is not None:
            weight, version, values = taken
            if x is weight and x._version == version and values.requires_grad >= torch.is_grad_enabled():  # pyright: ignore[reportPrivateUsage]
                return values
        w = x.to(compute_dtype(x))
        gain = self.gain_of_rounding()
        if gain is not None:
            dims = reduced_dims(w, self.granularity, self.axis)
            return MaxRounding.apply(w, self.quantizer, dims, gain).to(x.dtype)  # pyright: ignore[reportAttributeAccessIssue, reportOptionalMemberAccess, reportUnknownMemberType, reportUnknownVariableType]
        u, scale = self.normalize(w, self.axis)
        integers = self.quantizer.integers(u)
        return (integers * self._step(w, scale, integers)).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, integer levels and one step a layer or channel."""
        u, scale = self.normalize(x, self.axis)
        step = self._step(x, scale, self.quantizer.integers(u))
        step = step.reshape(()) if self.granularity == "tensor" else step.reshape(-1)
        return Quantized(self.quantizer.codes(u), self.quantizer.levels(x), step.detach().clone(), self.axis)

    def extra_repr(self) -> str:
        """Show the parts in ``print(model)``."""
        normalize = self.normalize.func if isinstance(self.normalize, partial) else self.normalize
        return f"normalize={normalize.__name__}, scale={self.scale!r}, granularity={self.granularity!r}"


def normalized_weight(
    normalize: Normalizer, bits: int, *, grid: str, scale: str, granularity: str
) -> Callable[[Tensor, int], Normalized]:
    """Return a builder of ``scale * Q(normalize(w))``. Bad options raise here."""
    Normalized(normalize, Uniform(bits, grid), scale=scale, granularity=granularity)

    def build(weight: Tensor, axis: int) -> Normalized:
        quantizer = Normalized(normalize, Uniform(bits, grid), scale=scale, granularity=granularity, axis=axis)
        quantizer.reset_(weight)
        return quantizer

    return build


class Preceded(Quantizer):
    r"""Any quantizer behind a normalizer: :math:`w_q = m\,Q(u)` with ``(u, m) = normalize(w)``.

    Gradients pass through ``Q`` as it defines them and through the normalizer, so that :func:`wnq.normalizers.max_abs` acts on
    the largest weight whatever rounds behind it. ``standardize`` takes the mean of the weights away for good, and ``tanh``
    squashes them: m is max|tanh w|.

    Args:
        name: one of :data:`wnq.normalizers.NORMALIZERS`.
        gain: share of the gradient through a maximum that is kept.
        build: builds the quantizer behind it, from the normalized weight.
        weight: the layer's weight.
        axis: output-channel dimension.
    """

    def __init__(
        self, name: str, gain: float, build: Callable[[Tensor, int], Quantizer], weight: Tensor, axis: int
    ) -> None:
        super().__init__()
        self.name, self.axis = name, axis
        self.normalize = named_normalizer(name, gain)
        self.quantizer = build(self._normalized(weight), axis)
        self.bits = self.quantizer.bits

    @torch.no_grad()
    def _normalized(self, x: Tensor) -> Tensor:
        return self.normalize(x.detach().to(compute_dtype(x)), self.axis)[0]

    def reset_(self, x: Tensor) -> None:
        """Start the quantizer's parameters from the normalized weight."""
        self.quantizer.reset_(self._normalized(x))

    def observe_(self, x: Tensor) -> None:
        """Show the quantizer the normalized weight."""
        self.quantizer.observe_(self._normalized(x))

    def forward(self, x: Tensor) -> Tensor:
        """Return m * Q(u)."""
        w = x.to(compute_dtype(x))
        u, scale = self.normalize(w, self.axis)
        surrogate = self.quantizer(u) * scale
        return straight_through(self.encode(w.detach()).dequantize(), surrogate).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return the quantizer's codes and levels, its scale times m."""
        u, scale = self.normalize(x, self.axis)
        behind = self.quantizer.encode(u)
        return behind._replace(scale=behind.scale * scale.reshape(()))

    def extra_repr(self) -> str:
        """Show the normalizer in ``print(model)``."""
        return f"normalize={self.name!r}"
