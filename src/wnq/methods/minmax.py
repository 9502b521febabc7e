"""Plain min-max quantization-aware training, the baseline of every toolkit."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.normalizers import check_granularity, reduced_dims
from wnq.quantizer import Quantized, Quantizer, check_bits, compute_dtype


class AffineRange(Quantizer):
    r"""Integers c in [0, 2^k - 1] for the range of the weights: :math:`w_q = S (c - Z)`, S and Z under stop-gradient.

    Symmetric: c in [0, 2^k - 2] and Z in the middle, so that the integers c - Z run from -(2^{k-1} - 1) to 2^{k-1} - 1.
    """

    def __init__(self, bits: int, granularity: str, axis: int = 0, *, symmetric: bool = False) -> None:
        super().__init__()
        self.bits = check_bits(
            bits, where="w_bits of the symmetric range" if symmetric else "w_bits", low=1 + symmetric
        )
        self.symmetric = symmetric
        self.top = 2**bits - 1 - symmetric
        self.granularity = check_granularity(granularity)
        self.axis = axis

    def _parts(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return codes as floats, the zero point and the step, the latter two broadcastable."""
        w = w.detach()
        dims = reduced_dims(w, self.granularity, self.axis)
        keep = self.granularity == "channel"
        top = self.top
        if self.symmetric:
            high = w.abs().amax(dims, keepdim=keep)
            low = -high
        else:
            high = w.amax(dims, keepdim=keep).clamp(min=0)
            low = w.amin(dims, keepdim=keep).clamp(max=0)
        step = (high - low) / top
        safe = torch.where(step > 0, step, 1.0)
        zero = torch.round(-low / safe).clamp(0, top)
        return (torch.round(w / safe) + zero).clamp(0, top), zero, step

    def forward(self, x: Tensor) -> Tensor:
        """Return the values; gradient 1 everywhere."""
        w = x.to(compute_dtype(x))
        codes, zero, step = self._parts(w)
        return self.pass_through((codes - zero) * step, w, self.top * step).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes; the integer levels are shifted by the zero point, one row a channel where there is one a channel."""
        codes, zero, step = self._parts(x)
        grid = torch.arange(self.top + 1, device=x.device, dtype=step.dtype)
        if self.granularity == "tensor":
            return Quantized(codes.to(torch.uint8), grid - zero, step, self.axis)
        return Quantized(codes.to(torch.uint8), grid - zero.reshape(-1, 1), step.reshape(-1), self.axis)


@register(paper="arXiv:1712.05877")
def minmax(
    w_bits: int = 3, a_bits: int = 3, *, granularity: str = "tensor", symmetric: bool = False, activation: str = "lsq"
) -> Method:
    r"""Plain min-max: an affine grid over the range of the weights, recomputed each step, no gradient through the range.

    Forward: :math:`S = (\max(w, 0) - \min(w, 0))/(2^k - 1)`, :math:`Z = \mathrm{round}(-\min(w, 0)/S)`,
    :math:`w_q = S(\mathrm{clip}(\mathrm{round}(w/S) + Z, 0, 2^k-1) - Z)`; zero is exact. Symmetric, with
    :math:`N = 2^{k-1} - 1`: :math:`S = \max|w|/N`, :math:`w_q = S\,\mathrm{round}(w/S)`, integers from -N to N.
    Gradient: dw_q/dw = 1; S and Z are constants.

    Its nearest relative among this library's own arms is ``wnq(max_gain=0)``: max scaling on the symmetric range, detached;
    the symmetric range is ``wnq(max_gain=0, grid="symmetric")`` itself.

    Args:
        w_bits: width of the weights, 1 to 8 (2 to 8 where symmetric), or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        granularity: one range a ``"tensor"`` or one an output ``"channel"``.
        symmetric: zero point 0 and the integers from -N to N, [-127, 127] at 8 bits, as integer kernels like their weights.
        activation: input quantizer.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        B. Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
        arXiv:1712.05877, CVPR 2018, Eq. 12.

    Differences from the paper: the weight rule only. Activations use the common learned step instead of running ranges, and
    BatchNorm is not folded before the rounding. The paper's weights leave out the integer -128 but keep a zero point; the
    symmetric range, as in the runtimes that followed it, has none.
    """
    AffineRange(w_bits, granularity, symmetric=symmetric)
    return Method(
        weight=lambda _, axis: AffineRange(w_bits, granularity, axis, symmetric=symmetric),
        input=input_builder(activation, a_bits),
    )
