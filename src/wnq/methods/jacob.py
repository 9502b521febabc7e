"""Integer-arithmetic-only inference: affine ranges, of weights by their minimum and maximum, of inputs by running averages."""

import torch
from torch import Tensor

from wnq.activations import input_builder, register_input
from wnq.methods.minmax import AffineRange
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes


class RunningRange(StartsFromData):
    r"""Inputs on an affine grid over running averages of their minimum and maximum; zero is exact.

    :math:`S = (b - a)/(2^k - 1)`, :math:`Z = \mathrm{round}(-a/S)` and
    :math:`y = S(\mathrm{clip}(\mathrm{round}(x/S) + Z, 0, 2^k-1) - Z)` with :math:`a \le 0 \le b`.
    dy/dx = 1 between the smallest and the largest level, 0 outside.

    Args:
        bits: 1 to 8.
        momentum: weight of a new batch in the average; the paper's "close to 1" smoothing over thousands of steps is 0.001 to 0.01.
        delay: training steps before rounding starts; until then inputs pass unchanged while training, and ranges are averaged.

    References:
        B. Jacob et al., arXiv:1712.05877, CVPR 2018, Sec. 3.1.
    """

    low: Tensor
    high: Tensor
    steps: Tensor

    def __init__(self, bits: int, momentum: float = 0.01, delay: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, got {momentum!r}.")
        self.momentum, self.delay = momentum, delay
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.ones(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Average minimum and maximum; the first batch sets them. All processes see the widest of their ranges."""
        exact = x.detach().to(torch.float32)
        low = across_processes(exact.amin().clamp(max=0), "min")
        high = across_processes(exact.amax().clamp(min=0), "max")
        share = torch.where(self.steps == 0, 1.0, self.momentum)
        self.low.lerp_(low, share)
        self.high.lerp_(high, share)
        self.steps += 1
        self.mark_ready_()

    def _grid(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return step and zero point."""
        top = 2**self.bits - 1
        self.check_ready()
        step = (self.high.to(dtype) - self.low.to(dtype)) / top
        step = torch.where(step > 0, step, 1.0)
        return step, torch.round(-self.low.to(dtype) / step).clamp(0, top)

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        exact = x.to(compute_dtype(x))
        step, zero = self._grid(exact.dtype)
        top = 2**self.bits - 1
        codes = (torch.round(exact / step) + zero).clamp(0, top)
        inside = torch.clamp(exact, -zero * step, (top - zero) * step)
        value = self.pass_through((codes - zero) * step, inside, top * step)
        if self.delay and self.training:
            value = torch.where(self.steps > self.delay, value, exact)
        return value.to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes; the integer levels are shifted by the zero point."""
        step, zero = self._grid(x.dtype)
        top = 2**self.bits - 1
        codes = (torch.round(x / step) + zero).clamp(0, top)
        return Quantized(codes.to(torch.uint8), torch.arange(top + 1, device=x.device, dtype=x.dtype) - zero, step)

    def extra_repr(self) -> str:
        """Show the settings in ``print(model)``."""
        return f"bits={self.bits}, momentum={self.momentum}, delay={self.delay}"


register_input("range", RunningRange, paper="arXiv:1712.05877")


@register(paper="arXiv:1712.05877", widths=range(2, 9))
def jacob(w_bits: int = 8, a_bits: int = 8, *, granularity: str = "tensor", activation: str = "range") -> Method:
    r"""Affine integer grids for weights and inputs, whose ranges are the extremes seen, as integer-only engines want them.

    Forward: weights :math:`w_q = S(\mathrm{clip}(\mathrm{round}(w/S) + Z, 0, 2^k-1) - Z)` over the range of the weights
    (:func:`wnq.methods.minmax.minmax`); inputs likewise, over running averages of the range of the batches.
    Gradient: dw_q/dw = 1; inputs 1 inside the range, 0 outside; S and Z are constants.

    The third part of the paper, BatchNorm folded into the weights before they are rounded, changes the model and is a
    function of its own: :func:`wnq.folding.fold_batchnorm_`.

    Args:
        w_bits: width of the weights, 2 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        granularity: one range a ``"tensor"`` (the paper) or one an output ``"channel"``.
        activation: ``"range"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        arXiv:1712.05877, CVPR 2018, Sec. 3.

    Differences from the paper: the weights' range is the plain minimum and maximum, without the tweak that keeps 8-bit
    weights off -128 for one ARM instruction; rounding starts at once (``RunningRange(delay=...)`` delays it); biases stay float.
    The equations are the standard affine ones, re-derived, not checked against the paper's numbering.
    """
    AffineRange(w_bits, granularity)
    return Method(
        weight=lambda _, axis: AffineRange(w_bits, granularity, axis), input=input_builder(activation, a_bits)
    )
