"""Plain min-max quantization-aware training, the baseline of every toolkit."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.normalizers import GRANULARITIES, reduced_dims
from wnq.quantizer import Quantized, Quantizer, check_bits, compute_dtype


class AffineRange(Quantizer):
    r"""Integers c in [0, 2^k - 1] for the range of the weights: :math:`w_q = S (c - Z)`, S and Z under stop-gradient."""

    def __init__(self, bits: int, granularity: str, axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="w_bits")
        if granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(map(repr, GRANULARITIES))}, got {granularity!r}.")
        self.granularity = granularity
        self.axis = axis

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes as floats, the zero point and the step, the latter two broadcastable."""
        w = w.detach()
        dims = reduced_dims(w, self.granularity, self.axis)
        keep = self.granularity == "channel"
        high = w.amax(dims, keepdim=keep).clamp(min=0)
        low = w.amin(dims, keepdim=keep).clamp(max=0)
        top = 2**self.bits - 1
        step = (high - low) / top
        safe = torch.where(step > 0, step, 1.0)
        zero = torch.round(-low / safe).clamp(0, top)
        return (torch.round(w / safe) + zero).clamp(0, top), zero, step

    def forward(self, x: Tensor) -> Tensor:
        """Return the values; gradient 1 everywhere."""
        w = x.to(compute_dtype(x))
        codes, zero, step = self._parts(w)
        return self.pass_through((codes - zero) * step, w, (2**self.bits - 1) * step).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes; the integer levels are shifted by the zero point, one row a channel where there is one a channel."""
        codes, zero, step = self._parts(x)
        grid = torch.arange(2**self.bits, device=x.device, dtype=step.dtype)
        if self.granularity == "tensor":
            return Quantized(codes.to(torch.uint8), grid - zero, step, self.axis)
        return Quantized(codes.to(torch.uint8), grid - zero.reshape(-1, 1), step.reshape(-1), self.axis)


@register(paper="arXiv:1712.05877")
def minmax(w_bits: int = 3, a_bits: int = 3, *, granularity: str = "tensor", activation: str = "lsq") -> Method:
    r"""Plain min-max: an affine grid over the range of the weights, recomputed each step, no gradient through the range.

    Forward: :math:`S = (\max(w, 0) - \min(w, 0))/(2^k - 1)`, :math:`Z = \mathrm{round}(-\min(w, 0)/S)`,
    :math:`w_q = S(\mathrm{clip}(\mathrm{round}(w/S) + Z, 0, 2^k-1) - Z)`; zero is exact.
    Gradient: dw_q/dw = 1; S and Z are constants.

    Its nearest relative among this library's own arms is ``wnq(max_gain=0)``: max scaling on the symmetric range, detached.

    Args:
        w_bits: width of the weights, 1 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        granularity: one range a ``"tensor"`` or one an output ``"channel"``.
        activation: input quantizer.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        arXiv:1712.05877, CVPR 2018, Eq. 12.

    Differences from the paper: the weight rule only. Activations use the common learned step instead of running ranges, and
    BatchNorm is not folded before the rounding.
    """
    AffineRange(w_bits, granularity)
    return Method(
        weight=lambda _, axis: AffineRange(w_bits, granularity, axis), input=input_builder(activation, a_bits)
    )
