"""N2UQ: input thresholds at learned, unequal distances with equidistant outputs; weights scaled by their mean magnitude."""

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.learned_step import starting_step
from wnq.methods.registry import Method, Recommended, register
from wnq.methods.sawb import ClippedGrid
from wnq.quantizer import Quantized, along_axis, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes
from wnq.ste import straight_through

SMALLEST = 1e-3
"""Lower bound of a learned interval, in units in which the whole first range is 2 wide."""


class MeanClipped(ClippedGrid):
    r"""The clip is :math:`(2^k - 1)/2^{k-1}` times the mean absolute value of an output channel.

    Args:
        bits: 1 to 8.
        axis: output-channel dimension.
        by_scale: divide the gradient by the clip.
    """

    def __init__(self, bits: int, axis: int = 0, *, by_scale: bool = False) -> None:
        super().__init__(bits, "full", "channel", axis)
        self.by_scale = by_scale

    def clip(self, w: Tensor) -> Tensor:
        """Return the clip of each channel."""
        return w.abs().mean(self.statistic(w)) * (self.grid.divisor / 2 ** (self.bits - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return c * Q(w / c)."""
        if not self.by_scale:
            return super().forward(x)
        w = x.to(compute_dtype(x))
        clip = self.clip(w.detach())
        scaled = w / along_axis(torch.where(clip > 0, clip, 1.0), w.ndim, self.axis)
        return super().forward(straight_through(w, scaled)).to(x.dtype)


class LearnedThresholds(StartsFromData):
    r"""Thresholds at learned distances, equidistant outputs: "nonuniform-to-uniform".

    With :math:`n = 2^k - 1`, learned :math:`a_1, \dots, a_n > 0`, ``start`` :math:`b_1`, scales :math:`\sigma` (in) and
    :math:`\tau` (out), :math:`z = \sigma x` and the edges :math:`b_{i+1} = b_i + a_i`:

    Forward: the code is the number of thresholds :math:`T_i = b_i + a_i/2` below z, and
    :math:`y = (2\tau/n)(\mathrm{code} - o)`, o = 0 for an input without negative values.
    Backward: that of :math:`\bar y = (2\tau/n)(E - o)` with :math:`E = i - 1 + (z - b_i)/a_i` on segment i, 0 below and n
    above, except for :math:`\tau`, whose factor is the rounded value. E is the mean of a code drawn at random, up with
    probability :math:`(z - b_i)/a_i`; the threshold is where this is 1/2. So, with :math:`h = (2\tau/n)\,dL/dy` and sums over
    the inputs in a segment:

    .. math:: dL/dx = h\,\sigma/a_i, \quad dL/db_1 = -\sum_i \frac{1}{a_i} \sum_{z \in i} h, \quad
        dL/da_i = -\frac{1}{a_i^2} \sum_{z \in i} h\,(z - b_i) - \sum_{j > i} \frac{1}{a_j} \sum_{z \in j} h.

    The first batch sets the range: edges equidistant, :math:`2/n` apart, and the scales so that forward and backward are those of
    a learned step (LSQ) at its start, :math:`2\,\mathrm{mean}|x|/\sqrt{Q_p}`; it also decides the sign, as there.
    All processes of a distributed job decide together.

    Args:
        bits: 1 to 8.

    References:
        Z. Liu et al., Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through
        Estimation, arXiv:2111.14826, CVPR 2022.

    Differences from the paper: the range starts from data instead of [0, 2], so that no learned bias and PReLU need stand in
    front; signed inputs are an addition. An interval that reaches its lower bound, 0.001, gets a gradient there; in the
    authors' code it gets none and stays.
    """

    start: nn.Parameter
    intervals: nn.Parameter
    scale_in: nn.Parameter
    scale_out: nn.Parameter
    offset: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        self.count = 2**bits - 1
        self.start = nn.Parameter(torch.zeros(()))
        self.intervals = nn.Parameter(torch.full((self.count,), 2 / self.count))
        self.scale_in = nn.Parameter(torch.ones(()))
        self.scale_out = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.tensor(0.0))

    @property
    def signed(self) -> bool | None:
        """Whether negative values have levels; None before the first batch."""
        return bool(self.offset > 0) if self.ready else None

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Set range and sign from the first batch; keep the intervals positive at every later one."""
        super().observe_(x)
        self.intervals.data.clamp_(min=SMALLEST)

    def start_(self, x: Tensor) -> None:
        """Set range and sign."""
        magnitude = across_processes(x.abs().mean())
        self.offset.copy_(across_processes((x < 0).any().to(x.dtype), "max") * 2 ** (self.bits - 1))
        high = (self.count - self.offset.to(x.dtype)).clamp(min=1)
        half = starting_step(magnitude, high) * (self.count / 2)
        self.start.data.copy_(self.offset * (-2 / self.count))
        self.intervals.data.fill_(2 / self.count)
        self.scale_in.data.copy_(1 / half)
        self.scale_out.data.copy_(half)

    def _edges(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return the intervals and the edges between segments, one more."""
        intervals = self.intervals.to(z.dtype).clamp(min=SMALLEST)
        return intervals, self.start.to(z.dtype) + torch.cat([intervals.new_zeros(1), intervals.cumsum(0)])

    @torch.no_grad()
    def _place(self, z: Tensor, intervals: Tensor, edges: Tensor) -> Tensor:
        """Return how many edges and thresholds lie below each element; they alternate, so that one search finds both."""
        marks = torch.stack([edges[:-1], edges[:-1] + intervals / 2], dim=1).reshape(-1)
        return torch.bucketize(z, torch.cat([marks, edges[-1:]]), out_int32=True)

    def _step(self, x: Tensor) -> Tensor:
        return self.scale_out.to(x.dtype) * (2 / self.count)

    def forward(self, x: Tensor) -> Tensor:
        """Return the values."""
        self.check_ready()
        exact = x.to(compute_dtype(x))
        z = (exact * self.scale_in.to(exact.dtype)).contiguous()
        intervals, edges = self._edges(z)
        place = self._place(z, intervals, edges)
        # The mean code is piecewise linear: slope * z + rest, with a flat piece at either end.
        ends = intervals.new_zeros(1)
        order = torch.arange(self.count, device=z.device, dtype=z.dtype)
        slopes = torch.cat([ends, 1 / intervals, ends])
        rests = torch.cat([ends, order - edges[:-1] / intervals, ends + self.count])
        piece = ((place + 1) // 2).reshape(-1)
        mean = slopes.index_select(0, piece).view(z.shape) * z + rests.index_select(0, piece).view(z.shape)
        offset = self.offset.to(z.dtype)
        integers = self.pass_through((place // 2).to(z.dtype) - offset, mean - offset, float(self.count))
        return (integers * self._step(z)).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, consecutive integer levels and the distance between outputs."""
        self.check_ready()
        z = (x.detach() * self.scale_in.detach().to(x.dtype)).contiguous()
        codes = self._place(z, *self._edges(z)) // 2
        levels = torch.arange(self.count + 1, device=x.device, dtype=x.dtype) - self.offset.to(x.dtype)
        return Quantized(codes.to(torch.uint8), levels, self._step(x).detach().clone(), self.axis)


register_input("n2uq", LearnedThresholds, paper="arXiv:2111.14826")


@register(
    paper="arXiv:2111.14826",
    recommended=Recommended(weight_decay=0.0, source="the authors' released scripts: Adam without weight decay"),
)
def n2uq(w_bits: int = 2, a_bits: int = 2, *, by_scale: bool = False, activation: str = "n2uq") -> Method:
    r"""Learn unequal thresholds for the inputs, with equidistant outputs; scale weights by their mean magnitude.

    Forward, weights, :math:`s = \frac{2^k - 1}{2^{k-1}}\,\mathrm{mean}|w|` of each output channel and :math:`M = 2^k - 1`:
    :math:`w_q = s\,(2\,\mathrm{round}(M(\mathrm{clip}(w/s, -1, 1) + 1)/2)/M - 1)`; at one bit ±mean|w|, as BWN.
    Inputs: see :class:`LearnedThresholds`.
    Gradient, weights: dw_q/dw = 1, also outside the clip; s under stop-gradient. Inputs: that of the mean of a randomly rounded
    code, a piecewise linear function, with respect to the input, the intervals and the scales.

    The factor of the mean makes the levels equally likely for uniform weights. The values equal those of ``statsq``.

    Args:
        w_bits: width of the weights, 1 to 8 (the paper: 2 to 4), or 32.
        a_bits: width of the inputs, 1 to 8 (the paper: 2 to 4), or 32.
        by_scale: divide the gradient of the weights by s, as the authors' code does; Adam undoes most of it, SGD does not.
        activation: ``"n2uq"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        Z. Liu et al., Nonuniform-to-Uniform Quantization: Towards Accurate Quantization via Generalized Straight-Through
        Estimation, arXiv:2111.14826, CVPR 2022.

    Differences from the paper: the quantizers only, in the net as it is; the authors also put PReLUs and learned biases
    around each layer. The gradient of the intervals is re-derived here. A weight halfway between two levels goes up, where the
    authors' code rounds to the even one. Of the input quantizer: see :class:`LearnedThresholds`.
    """
    return Method(
        weight=lambda _, axis: MeanClipped(w_bits, axis, by_scale=by_scale), input=input_builder(activation, a_bits)
    )
