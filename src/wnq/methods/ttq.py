"""TTQ: ternary weights whose two values are learned."""

import torch
from torch import Tensor, nn

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, compute_dtype
from wnq.ste import straight_through


class TrainedTernary(Quantizer):
    r""":math:`w_q \in \{-W_n, 0, W_p\}` by the threshold :math:`t\,\max|w|`, with both values learned.

    Nothing keeps a learned value positive, and nothing is clamped here: the three levels are sorted when they are stored.

    Args:
        weight: the layer's weight, which the values start from.
        threshold: t, the share of the largest magnitude at or below which a weight is zero.
    """

    bits = 2

    def __init__(self, weight: Tensor, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.positive = nn.Parameter(torch.ones((), dtype=compute_dtype(weight), device=weight.device))
        self.negative = nn.Parameter(torch.ones((), dtype=compute_dtype(weight), device=weight.device))
        self.reset_(weight)

    def _sides(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the weights lie above the threshold, and where below its negative."""
        w = w.detach()
        threshold = self.threshold * w.abs().amax()
        return w > threshold, w < -threshold

    @torch.no_grad()
    def reset_(self, x: Tensor) -> None:
        """Start each value at the mean magnitude of its side; an empty side takes the other's, or 1."""
        w = x.detach().to(compute_dtype(x))
        sides = self._sides(w)
        means = [torch.where(side, w.abs(), 0.0).sum() / side.sum().clamp(min=1) for side in sides]
        other = [torch.where(mean > 0, mean, 1.0) for mean in reversed(means)]
        for value, mean, instead in zip((self.positive, self.negative), means, other, strict=True):
            value.data.copy_(torch.where(mean > 0, mean, instead))

    def forward(self, x: Tensor) -> Tensor:
        """Return values in {-Wn, 0, Wp}."""
        w = x.to(compute_dtype(x))
        positive, negative = self.positive.to(w.dtype), self.negative.to(w.dtype)
        above, below = self._sides(w)
        ternary = torch.where(above, positive, torch.where(below, -negative, torch.zeros_like(positive)))
        slope = torch.where(above, positive, torch.where(below, negative, torch.ones_like(positive))).detach()
        span = positive.detach().abs() + negative.detach().abs()
        value = self.pass_through(ternary, straight_through(w, w * slope), span)
        return (value + (ternary - ternary.detach())).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes of the three values in ascending order; scale 1."""
        positive, negative = self.positive.detach().to(x.dtype), self.negative.detach().to(x.dtype)
        above, below = self._sides(x)
        levels, order = torch.stack((-negative, torch.zeros_like(positive), positive)).sort(stable=True)
        codes = order.argsort()[1 + above.long() - below.long()]
        return Quantized(codes.to(torch.uint8), levels, torch.ones_like(positive), self.axis)

    def extra_repr(self) -> str:
        """Show the threshold in ``print(model)``."""
        return f"bits={self.bits}, threshold={self.threshold}"


@register(paper="arXiv:1612.01064", widths=(2,))
def ttq(w_bits: int = 2, a_bits: int = 32, *, threshold: float = 0.05, activation: str = "lsq") -> Method:
    r"""Ternary weights with a learned positive and a learned negative value, one pair a layer.

    Forward, with :math:`\Delta = t\,\max|w|` under stop-gradient: :math:`w_q = W_p` where :math:`w > \Delta`,
    :math:`-W_n` where :math:`w < -\Delta`, 0 elsewhere.

    Gradient, with :math:`g = dL/dw_q`: :math:`dL/dW_p = \sum_{w > \Delta} g`, :math:`dL/dW_n = -\sum_{w < -\Delta} g`;
    :math:`dL/dw = W_p\,g` above the threshold, :math:`g` in the dead zone, :math:`W_n\,g` below.

    Args:
        w_bits: 2 (three of its four codes are used), or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        threshold: t, at least 0 and below 1; 0.05 for all layers in the paper.
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width, name or threshold out of range.

    References:
        C. Zhu et al., Trained Ternary Quantization, arXiv:1612.01064, ICLR 2017, Sec. 3.

    Differences from the paper: the values start at the mean magnitude of the weights beyond the threshold, sign by sign, so that
    a trained float net keeps its scale. The maximum is a constant of the gradient, as in the authors' code. ``threshold=0`` is
    allowed. A learned value that training makes negative is left as it is, and the stored levels are sorted.
    """
    if not 0 <= threshold < 1:
        raise ValueError(f"threshold must be at least 0 and below 1, got {threshold!r}.")
    return Method(weight=lambda weight, _: TrainedTernary(weight, threshold), input=input_builder(activation, a_bits))
