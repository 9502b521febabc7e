"""No normalization: the grid of the first weights, kept. The control that every normalizer is measured against."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.methods.sawb import ClippedGrid
from wnq.normalizers import reduced_dims
from wnq.quantizer import compute_dtype


class FixedGrid(ClippedGrid):
    """The grid between plus and minus the largest magnitude of the weight that the quantizer was built from."""

    peak: Tensor

    def __init__(self, weight: Tensor, bits: int, grid: str, granularity: str, axis: int = 0) -> None:
        super().__init__(bits, grid, granularity, axis)
        self.register_buffer("peak", self._peak(weight))

    def _peak(self, weight: Tensor) -> Tensor:
        magnitude = weight.detach().to(compute_dtype(weight)).abs()
        return magnitude.amax(reduced_dims(magnitude, self.granularity, self.axis))

    def reset_(self, x: Tensor) -> None:
        """Take the range of another start."""
        self.peak.copy_(self._peak(x))

    def clip(self, w: Tensor) -> Tensor:
        """Return the range, whatever the weights are now."""
        return self.peak.to(w.dtype)


@register(
    paper="arXiv:1907.00593", no_normalizer="it is the arm without one: its range belongs to the weights as they were"
)
def fixed(
    w_bits: int = 3, a_bits: int = 3, *, grid: str = "full", granularity: str = "tensor", activation: str = "lsq"
) -> Method:
    r"""Round on the grid of the float start and never move it: uniform quantization without any normalization.

    Forward, with :math:`m_0 = \max|w|` of the weights that training starts from: :math:`w_q = m_0\,Q(w/m_0)`, Q as in
    ``wnq``; weights that grow beyond the range take its ends. Gradient: :math:`dw_q/dw = 1` everywhere; :math:`m_0` is a
    constant.

    Its first step is that of ``wnq`` and of ``wnq(max_gain=0)``, bit for bit; what differs later is due to the range that
    follows the weights there, and to the gradient through it.

    Args:
        w_bits: width of the weights, 1 to 8 (2 to 8 on the symmetric grid), or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        grid: ``"full"`` or ``"symmetric"``, see :class:`wnq.quantizer.Uniform`.
        granularity: one range a ``"tensor"`` or one an output ``"channel"``.
        activation: input quantizer.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        W.-P. Cai and W.-J. Li, Weight Normalization based Quantization for Deep Neural Network Compression,
        arXiv:1907.00593, 2019: the method without its normalization.

    Differences from the paper: the paper has no such arm; its reviewers asked for one. That the range is that of the start, and
    not [-1, 1], keeps everything else equal: dividing by a constant is no normalization.
    """
    FixedGrid(torch.zeros(1, 1), w_bits, grid, granularity)
    return Method(
        weight=lambda weight, axis: FixedGrid(weight, w_bits, grid, granularity, axis),
        input=input_builder(activation, a_bits),
    )
