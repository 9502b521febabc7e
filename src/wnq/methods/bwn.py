"""BWN: binary weights with the least-squares scale of each filter."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.names import check_choice
from wnq.normalizers import reduced_dims
from wnq.quantizer import Quantized, Quantizer, compute_dtype
from wnq.ste import straight_through

GRADIENTS = ("identity", "paper")


class ScaledSign(Quantizer):
    r"""One bit: :math:`w_q = E\,\mathrm{sign}(w)` with E = mean|w| under stop-gradient.

    Args:
        granularity: one mean a ``"tensor"`` (DoReFa-Net) or one an output ``"channel"`` (XNOR-Net).
        axis: output-channel dimension.
        gradient: ``"identity"``, dw_q/dw = 1, or ``"paper"``, :math:`1/n + E\,1_{|w| \le 1}` with n weights to a mean.
    """

    bits = 1

    def __init__(self, granularity: str, axis: int = 0, gradient: str = "identity") -> None:
        super().__init__()
        self.granularity = granularity
        self.axis = axis
        self.gradient = check_choice(gradient, GRADIENTS, where="gradient")

    def _scale(self, w: Tensor) -> Tensor:
        """Mean absolute value, ``()`` or broadcastable per channel."""
        magnitude = w.detach().abs()
        if self.granularity == "tensor":
            return magnitude.mean()
        return magnitude.mean(reduced_dims(w, self.granularity, self.axis), keepdim=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ±mean|w|."""
        w = x.to(compute_dtype(x))
        scale = self._scale(w)
        value = torch.where(w >= 0, 1.0, -1.0).to(w.dtype) * scale
        surrogate = w
        if self.gradient == "paper":
            count = w.numel() // scale.numel()
            surrogate = straight_through(w, w / count + scale * w.clamp(-1, 1))
        return self.pass_through(value, surrogate, 2 * scale).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 and 1 for levels -1 and +1."""
        scale = self._scale(x).reshape(() if self.granularity == "tensor" else (-1,))
        return Quantized((x >= 0).to(torch.uint8), torch.tensor([-1.0, 1.0]).to(x), scale, self.axis)


@register(paper="arXiv:1603.05279", widths=(1,))
def bwn(w_bits: int = 1, a_bits: int = 32, *, gradient: str = "identity", activation: str = "lsq") -> Method:
    r"""One bit a weight: the sign times the filter's mean absolute value.

    Forward: :math:`w_q = \alpha\,\mathrm{sign}(w)`, :math:`\alpha = \mathrm{mean}|w|` for each output channel, which minimises
    :math:`\lVert w - \alpha\,\mathrm{sign}(w)\rVert`.

    Gradient: :math:`dw_q/dw = 1`, or the paper's :math:`dw_q/dw = 1/n + \alpha\,1_{|w| \le 1}` with n weights to a filter;
    alpha itself under stop-gradient.

    Args:
        w_bits: 1, or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's BWN).
        gradient: ``"identity"`` or ``"paper"``.
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        M. Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks,
        arXiv:1603.05279, ECCV 2016, Sec. 3.1 (scale and gradient) and Alg. 1.

    Differences from the paper: the gradient is by default the identity that the authors' and most later code uses, not that of the
    text. The text's is element-wise; the exact derivative through :math:`\alpha = \mathrm{mean}|w|` has
    :math:`\mathrm{sign}(w_i) \sum_j g_j\,\mathrm{sign}(w_j) / n` in place of :math:`g_i / n`.
    """
    ScaledSign("channel", gradient=gradient)
    return Method(weight=lambda _, axis: ScaledSign("channel", axis, gradient), input=input_builder(activation, a_bits))
