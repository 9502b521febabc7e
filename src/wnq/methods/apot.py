"""APoT: levels that are sums of powers of two, on standardised weights, with a learned clip."""

import itertools

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.methods.registry import Method, Recommended, register
from wnq.quantizer import Quantized, Quantizer, check_bits, compute_dtype
from wnq.starting import started
from wnq.ste import straight_through

SMALLEST = 1e-8
"""Least clip."""

EPSILON = 1e-5
"""Added to the standard deviation."""


def apot_levels(bits: int) -> list[int]:
    r"""Return the :math:`2^k` magnitudes of k bits, ascending integers from 0: multiples of the smallest power of two.

    Two bits make one term. With n = k // 2 terms, term i is 0 or one of :math:`2^{-i}, 2^{-(i+n)}, 2^{-(i+2n)}`; an odd
    width has one bit more, a term that is 0 or :math:`2^{-2n}`, and the last power of the others moves one place down, to
    :math:`2^{-(i+2n+1)}`. All sums differ, because no power occurs in two terms.
    """
    terms, odd = divmod(bits, 2)
    lowest = 3 * terms - 1 + odd
    powers = [[0, *(2 ** (lowest - e) for e in (i, i + terms, i + 2 * terms + odd))] for i in range(terms)]
    if odd:
        powers.append([0, 2 ** (lowest - 2 * terms)])
    return sorted(sum(chosen) for chosen in itertools.product(*powers))


class AdditivePowers(Quantizer):
    r"""Rounds x/alpha, clipped, to the nearest sum of powers of two, times the learned clip alpha.

    :math:`\hat x = \alpha\,\Pi(\mathrm{clip}(x/\alpha, -1, 1))` (unsigned: from 0), where :math:`\Pi` rounds to the nearest of
    :func:`apot_levels` over the largest of them; of two equally near ones, the one of smaller magnitude. Gradients: of x 1 inside
    the clip and 0 outside (1 everywhere if not ``clip_gradient``); of alpha :math:`\Pi(x/\alpha) - x/\alpha` inside, the sign
    outside. Below 1e-8, the forward pass uses this bound for alpha, which keeps its gradient.

    Args:
        bits: 2 to 8; signed levels spend one on the sign.
        signed: levels on both sides of zero.
        start: first value of alpha.
        clip_gradient: no gradient for elements outside the clip.
    """

    magnitudes: Tensor

    def __init__(self, bits: int, *, signed: bool, start: float, clip_gradient: bool = True) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits", low=2)
        if not start > 0:
            raise ValueError(f"start must be positive, got {start!r}.")
        self.signed = signed
        self.clip_gradient = clip_gradient
        levels = apot_levels(bits - 1 if signed else bits)
        self.top = levels[-1]
        self.register_buffer("magnitudes", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.alpha = nn.Parameter(torch.tensor(float(start)))

    def _clip(self, dtype: torch.dtype) -> Tensor:
        alpha = self.alpha.to(dtype)
        return straight_through(alpha.clamp(min=SMALLEST), alpha)

    def _nearest(self, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nearest level, an integer, and its code, for multiples of the smallest power of two."""
        wanted = wanted.detach().contiguous()
        magnitudes = self.magnitudes.to(wanted.dtype)
        rank = torch.searchsorted((magnitudes[1:] + magnitudes[:-1]) / 2, wanted.abs() if self.signed else wanted)
        if not self.signed:
            return magnitudes[rank], rank.to(torch.uint8)
        sign = torch.where(wanted < 0, -1, 1)
        return magnitudes[rank] * sign, (len(magnitudes) - 1 + rank * sign).to(torch.uint8)

    def _scaled(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return x in multiples of the smallest level, and that level."""
        unit = self._clip(x.dtype) / self.top
        return x / unit, unit

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        exact = x.to(compute_dtype(x))
        scaled, unit = self._scaled(exact)
        clipped = scaled.clamp(-self.top if self.signed else 0, self.top)
        levels = self.pass_through(self._nearest(scaled)[0], clipped, self.top * (2 if self.signed else 1))
        values = levels * unit
        if not self.clip_gradient:
            values = straight_through(values, values + torch.where(scaled.detach() == clipped.detach(), 0, exact))
        return values.to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, and levels that are multiples of the smallest power of two."""
        scaled, unit = self._scaled(x)
        magnitudes = self.magnitudes.to(x.dtype)
        levels = torch.cat([-magnitudes[1:].flip(0), magnitudes]) if self.signed else magnitudes
        return Quantized(self._nearest(scaled)[1], levels, unit.detach().clone(), self.axis)

    def extra_repr(self) -> str:
        """Show width and sign in ``print(model)``."""
        return f"bits={self.bits}, {'signed' if self.signed else 'unsigned'}"


class StandardizedPowers(Quantizer):
    r"""Additive powers of two of standardised weights: :math:`(w - \mu)/(\sigma + 10^{-5})`, one mean and deviation a layer.

    Args:
        bits: 2 to 8.
        attach_statistics: differentiate through mean and deviation.
        clip_gradient: see :class:`AdditivePowers`; without effect at two bits, whose gradient is 1 everywhere.
        scale_back: multiply the values by :math:`\sigma + 10^{-5}`.
        start: first value of alpha, in standard deviations.
    """

    def __init__(
        self, bits: int, *, attach_statistics: bool, clip_gradient: bool, scale_back: bool, start: float = 3.0
    ) -> None:
        super().__init__()
        self.quantizer = AdditivePowers(bits, signed=True, start=start, clip_gradient=clip_gradient and bits > 2)
        self.bits = bits
        self.start = start
        self.attach_statistics = attach_statistics
        self.scale_back = scale_back

    def reset_(self, x: Tensor) -> None:
        """Start the clip anew."""
        self.quantizer.alpha.data.fill_(self.start)

    def _standardized(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the standardised weights and what they were divided by."""
        statistics = w if self.attach_statistics else w.detach()
        mean = statistics.mean()
        variance = (statistics - mean).square().mean()
        deviation = torch.where(variance > 0, variance, 1.0).sqrt() * (variance > 0) + EPSILON
        return (w - mean) / deviation, deviation

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        w = x.to(compute_dtype(x))
        standard, deviation = self._standardized(w)
        values = self.quantizer(standard)
        if not self.scale_back:
            return values.to(x.dtype)
        # Codes' values are level * (alpha * deviation), which differs from (level * alpha) * deviation in the last bit.
        return straight_through(self.encode(w.detach()).dequantize(), values * deviation).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return the codes of the standardised weights."""
        standard, deviation = self._standardized(x)
        quantized = self.quantizer.encode(standard)._replace(axis=self.axis)
        return quantized._replace(scale=quantized.scale * deviation) if self.scale_back else quantized

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"attach_statistics={self.attach_statistics}, scale_back={self.scale_back}"


@register(
    paper="arXiv:1909.13144",
    widths=range(2, 9),
    recommended=Recommended(
        weight_decay_at={2: 0.3},
        quantizer_lr=0.5,
        quantizer_weight_decay=1.0,
        source="the authors' CIFAR-10 scripts: weights 0.04, clip of weights 0.02, decay 1e-4 of both, 3e-5 at 2 bits",
    ),
)
def apot(
    w_bits: int = 3,
    a_bits: int = 3,
    *,
    attach_statistics: bool = True,
    clip_gradient: bool = True,
    scale_back: bool = False,
    start: float = 3.0,
    activation: str = "apot",
) -> Method:
    r"""Standardise a layer's weights, clip them at a learned threshold, round to sums of powers of two.

    Forward: :math:`\tilde w = (w - \mu)/(\sigma + 10^{-5})`, :math:`w_q = \alpha\,\Pi(\mathrm{clip}(\tilde w/\alpha, -1, 1))`,
    alpha starting at 3. :math:`\Pi` rounds to the nearest of :math:`\pm\gamma\sum_i p_i` with
    :math:`p_i \in \{0, 2^{-i}, 2^{-(i+n)}, 2^{-(i+2n)}\}` for n terms of two bits each, one bit being the sign and gamma
    making the largest level 1; at 2 bits the levels are -1, 0, 1. Inputs: the same without sign and standardisation, alpha
    starting at 6.
    Gradient: :math:`dw_q/d\tilde w = 1` inside the clip, 0 outside, 1 everywhere at 2 bits;
    :math:`dw_q/d\alpha = \Pi(\tilde w/\alpha) - \tilde w/\alpha` inside, :math:`\mathrm{sign}(\tilde w)` outside; then through
    mean and deviation.

    Args:
        w_bits: width of the weights, 2 to 8, or 32.
        a_bits: width of the inputs, 2 to 8 with ``"apot"``, or 32.
        attach_statistics: differentiate through mean and deviation, as the authors' ImageNet code does; False: hold them constant,
            as their CIFAR code does.
        clip_gradient: no gradient for weights outside the clip at 3 bits and more, as the authors' ImageNet code has it; False: 1
            everywhere, as their CIFAR code has it.
        scale_back: multiply by :math:`\sigma + 10^{-5}`, for nets without BatchNorm; the mean stays away.
        start: first value of alpha of the weights, > 0. With the paper's 3, 2 bits keep only weights beyond 1.5 deviations. Start
            lower (1.5) where weights have no tails, as a fresh net's uniform ones: a layer that rounds to zeros only stays so.
        activation: ``"apot"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width, name or start out of range.

    References:
        Y. Li et al., Additive Powers-of-Two Quantization: An Efficient Non-uniform Discretization for Neural Networks,
        arXiv:1909.13144, ICLR 2020, Eq. 3-8, and the authors' code (odd numbers of magnitude bits, starts, options).

    Differences from the paper: the deviation is that of the population (the authors' code divides by the count less one). The
    values are those of the standardised weights, as in the paper, so a net without BatchNorm changes scale; ``scale_back`` and
    ``start`` are additions. The terms follow the authors' pattern also beyond the 6 magnitude bits of their code; their first and
    last layers are uniform at 8 bits. Alpha of the inputs has its own learning rate there, 0.1 where that of the weights has 0.02;
    here they share one.
    """
    AdditivePowers(w_bits, signed=True, start=start)

    def build() -> StandardizedPowers:
        return StandardizedPowers(
            w_bits,
            attach_statistics=attach_statistics,
            clip_gradient=clip_gradient,
            scale_back=scale_back,
            start=start,
        )

    return Method(weight=started(build), input=input_builder(activation, a_bits))


register_input(
    "apot", lambda bits: AdditivePowers(bits, signed=False, start=6.0), paper="arXiv:1909.13144", widths=range(2, 9)
)
