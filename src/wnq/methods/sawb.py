"""SAWB: clip the weights at a statistic of them, and the grid between plus and minus a clip that it shares with others."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, Recommended, register
from wnq.normalizers import check_granularity, reduced_dims
from wnq.quantizer import Quantized, Quantizer, Uniform, along_axis, compute_dtype

COEFFICIENTS = {
    ("full", 2): (3.12, -2.064),
    ("full", 3): (7.509, -6.892),
    ("full", 4): (12.68, -12.80),
    ("full", 5): (17.74, -18.64),
    ("full", 8): (31.76, -35.04),
    ("symmetric", 2): (2.6, -1.71),
    ("symmetric", 4): (12.035, -12.03),
    ("symmetric", 8): (31.76, -35.04),
}
"""(grid, width) -> the factors of the root mean square and of the mean absolute value."""


class ClippedGrid(Quantizer):
    r""":math:`w_q = c\,Q(w/c)`: a uniform grid from -c to c, with c a statistic of the weights under stop-gradient.

    The gradient is 1 everywhere, also outside the clip. Subclasses say what c is.

    Args:
        bits: width of a code.
        grid: ``"full"`` or ``"symmetric"``, see :class:`wnq.quantizer.Uniform`.
        granularity: one clip a ``"tensor"`` or one an output ``"channel"``.
        axis: output-channel dimension.
    """

    def __init__(self, bits: int, grid: str, granularity: str, axis: int = 0) -> None:
        super().__init__()
        self.granularity = check_granularity(granularity)
        self.grid = Uniform(bits, grid)
        self.bits = bits
        self.axis = axis

    def clip(self, w: Tensor) -> Tensor:
        """Return c >= 0 of detached weights, ``()`` or ``(channels,)``; zero makes all values zero."""
        raise NotImplementedError

    def statistic(self, w: Tensor) -> list[int]:
        """Return the dimensions that a statistic runs over."""
        return reduced_dims(w, self.granularity, self.axis)

    def _units(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return w/c and the step, c over the largest integer level."""
        clip = self.clip(w)
        u = w / along_axis(torch.where(clip > 0, clip, 1.0), w.ndim, self.axis)
        return u, clip / self.grid.divisor

    def forward(self, x: Tensor) -> Tensor:
        """Return c * Q(w / c)."""
        w = x.to(compute_dtype(x))
        u, step = self._units(w.detach())
        step = along_axis(step, w.ndim, self.axis)
        return self.pass_through(self.grid.integers(u) * step, w, 2 * self.grid.divisor * step).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, integer levels and one step a tensor or channel."""
        u, step = self._units(x.detach())
        return Quantized(self.grid.codes(u), self.grid.levels(x), step, self.axis)


class StatisticsAware(ClippedGrid):
    r"""The clip is :math:`\alpha = c_1 \sqrt{E[w^2]} + c_2 E|w|`; where that is not positive, the largest magnitude."""

    def __init__(self, bits: int, grid: str, granularity: str, axis: int = 0) -> None:
        super().__init__(bits, grid, granularity, axis)
        if (grid, bits) not in COEFFICIENTS:
            known = ", ".join(str(width) for name, width in COEFFICIENTS if name == grid)
            raise ValueError(f"grid {grid!r} has published coefficients at w_bits {known}; got {bits}.")
        self.coefficients = COEFFICIENTS[grid, bits]

    def clip(self, w: Tensor) -> Tensor:
        """Return alpha."""
        dims = self.statistic(w)
        magnitude = w.abs()
        square, mean = self.coefficients
        alpha = square * w.square().mean(dims).sqrt() + mean * magnitude.mean(dims)
        return torch.where(alpha <= 0, magnitude.amax(dims), alpha)


@register(
    paper="arXiv:1807.06964",
    widths=(2, 3, 4, 5, 8),
    recommended=Recommended(
        quantizer_weight_decay=1.0, source="its inputs are PACT's, arXiv:1805.06085, whose clip takes the weights' L2"
    ),
)
def sawb(
    w_bits: int = 3, a_bits: int = 3, *, grid: str = "full", granularity: str = "tensor", activation: str = "pact"
) -> Method:
    r"""Clip the weights where two of their moments say that the error is least; round between.

    Forward: :math:`\alpha = c_1 \sqrt{E[w^2]} + c_2 E|w|`, :math:`w_q = \alpha\,Q(\mathrm{clip}(w/\alpha, -1, 1))` with Q the
    uniform rounding of [-1, 1] that has both ends as levels: {±α, ±α/3} at 2 bits, {-α, 0, α} on the symmetric grid. The pairs
    :math:`(c_1, c_2)` are a linear fit of the best clip of six distributions: full grid (3.12, -2.064), (7.509, -6.892),
    (12.68, -12.80), (17.74, -18.64), (31.76, -35.04) at 2, 3, 4, 5, 8 bits; symmetric grid (2.6, -1.71), (12.035, -12.03),
    (31.76, -35.04) at 2, 4, 8 bits.
    Gradient: dw_q/dw = 1, also outside the clip; none through alpha.

    Args:
        w_bits: 2, 3, 4, 5 or 8, the widths with published coefficients, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        grid: ``"full"`` (2^k levels, no zero) or ``"symmetric"`` (2^k - 1 levels, zero exact; 2, 4 and 8 bits).
        granularity: one clip a ``"tensor"`` (the paper) or one an output ``"channel"``.
        activation: ``"pact"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range, or a grid without coefficients at this width.

    References:
        J. Choi et al., Bridging the Accuracy Gap for 2-bit Quantized Neural Networks (QNN), arXiv:1807.06964, 2018; the
        coefficients are those of its company's library, fms-model-optimizer (IBM).

    Differences from the paper: alpha is not positive for weights of nearly one magnitude at 4 bits and more, because c2 is
    negative; it is then max|w|, as in that library. The gradient is that library's SAWB+; its plain SAWB has none outside the
    clip.
    """
    StatisticsAware(w_bits, grid, granularity)
    return Method(
        weight=lambda _, axis: StatisticsAware(w_bits, grid, granularity, axis),
        input=input_builder(activation, a_bits),
    )
