"""TWN: ternary weights by a threshold."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.normalizers import check_granularity, reduced_dims
from wnq.quantizer import Quantized, Quantizer, compute_dtype


class ThresholdTernary(Quantizer):
    r""":math:`w_q = \alpha\,\mathrm{sign}(w)\,1_{|w| > \Delta}` with :math:`\Delta = t\,\mathrm{mean}|w|`.

    Alpha is the mean of the magnitudes above the threshold.

    The threshold is no mid-point of the levels, so a codebook alone cannot encode: this class owns the codes.
    """

    bits = 2

    def __init__(self, threshold: float, granularity: str, axis: int = 0) -> None:
        super().__init__()
        self.threshold = threshold
        self.granularity = granularity
        self.axis = axis

    def _ternary(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs in {-1, 0, 1} and alpha, broadcastable."""
        w = w.detach()
        magnitude = w.abs()
        dims = reduced_dims(w, self.granularity, self.axis)
        keep = self.granularity == "channel"
        mean = magnitude.mean(dims, keepdim=keep)
        above = (magnitude > self.threshold * mean).to(w.dtype)
        kept = above.sum(dims, keepdim=keep)
        alpha = (magnitude * above).sum(dims, keepdim=keep) / kept.clamp(min=1)
        return w.sign() * above, alpha

    def forward(self, x: Tensor) -> Tensor:
        """Return values in {-alpha, 0, alpha}; gradient 1 everywhere."""
        w = x.to(compute_dtype(x))
        ternary, alpha = self._ternary(w)
        return self.pass_through(ternary * alpha, w, 2 * alpha).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0, 1, 2 for levels -1, 0, 1."""
        ternary, alpha = self._ternary(x)
        levels = torch.tensor([-1.0, 0.0, 1.0], dtype=alpha.dtype, device=x.device)
        scale = alpha.reshape(() if self.granularity == "tensor" else (-1,))
        return Quantized((ternary + 1).to(torch.uint8), levels, scale, self.axis)


@register(paper="arXiv:1605.04711", widths=(2,))
def twn(
    w_bits: int = 2,
    a_bits: int = 32,
    *,
    threshold: float = 0.7,
    granularity: str = "tensor",
    activation: str = "lsq",
) -> Method:
    r"""Ternary weights: zero below a threshold, one magnitude above it.

    Forward: :math:`\Delta = t\,\mathrm{mean}|w|`, :math:`\alpha = \mathrm{mean}\{|w| : |w| > \Delta\}`,
    :math:`w_q = \alpha\,\mathrm{sign}(w)\,1_{|w| > \Delta}`. Gradient: dw_q/dw = 1.

    Args:
        w_bits: 2 (three of its four codes are used), or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        threshold: t, > 0: 0.7 in the paper's first version, 0.75 in its third and in the authors' code.
        granularity: statistics of a ``"tensor"`` (the paper) or of each output ``"channel"`` (the authors' code).
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width, name or threshold out of range.

    References:
        F. Li et al., Ternary Weight Networks, arXiv:1605.04711, 2016, Eq. 5-6.

    Differences from the paper: none known.
    """
    if not threshold > 0:
        raise ValueError(f"threshold must be positive, got {threshold!r}.")
    check_granularity(granularity)
    return Method(
        weight=lambda _, axis: ThresholdTernary(threshold, granularity, axis), input=input_builder(activation, a_bits)
    )
