"""QIL: a learned interval and a learned power map weights to [-1, 1] and inputs to [0, 1]."""

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.methods.registry import Method, Recommended, register
from wnq.names import check_choice
from wnq.quantizer import Quantized, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes, started
from wnq.ste import straight_through

SCALES = ("one", "clip")

FLOOR = 1e-6
"""Transformed magnitudes up to this are 0: there the slope of a power below 1 has no bound."""

SMALLEST = 1e-8
"""Least half-width of the interval."""

FLATTEST = 0.1
"""Least power."""


class Interval(StartsFromData):
    r"""Uniform rounding of the share of the interval [c - d, c + d] that the magnitude covers.

    Weights: :math:`\hat w = \mathrm{sign}(w)\,t^\gamma` with :math:`t = \mathrm{clip}((|w| - c)/(2d) + 1/2, 0, 1)`, rounded to
    :math:`Q = 2^{k-1} - 1` steps a sign. Inputs: :math:`\hat x = t`, negative ones 0, rounded to :math:`Q = 2^k - 1` steps.

    c and d start at half of the largest magnitude of the weight (of the first batch), so that nothing is pruned or clipped; gamma
    starts at 1. Below 1e-8 for d and 0.1 for gamma, the forward pass uses these bounds and the parameters keep their gradients.

    Args:
        bits: 2 to 8 for weights, 1 to 8 for inputs.
        is_weight: weights or inputs.
        learn_gamma: gamma is a parameter; else it is 1.
        scale: ``"one"`` or ``"clip"``: what multiplies the values, 1 or c + d.
    """

    def __init__(self, bits: int, *, is_weight: bool, learn_gamma: bool = False, scale: str = "one") -> None:
        super().__init__(is_weight=is_weight)
        self.bits = check_bits(bits, where="bits", low=2 if is_weight else 1)
        self.top = 2 ** (bits - 1) - 1 if is_weight else 2**bits - 1
        self.bottom = -self.top if is_weight else 0
        self.signed = is_weight
        self.scale = check_choice(scale, SCALES, where="scale")
        self.centre = nn.Parameter(torch.tensor(0.5))
        self.halfwidth = nn.Parameter(torch.tensor(0.5))
        self.gamma = nn.Parameter(torch.ones(())) if learn_gamma else None

    def start_(self, x: Tensor) -> None:
        """Start the interval at [0, largest magnitude]."""
        largest = (x.abs() if self.is_weight else x).amax()
        largest = largest if self.is_weight else across_processes(largest, "max")
        half = torch.where(largest > 0, largest / 2, 0.5)
        self.centre.data.copy_(half)
        self.halfwidth.data.copy_(half)
        if self.gamma is not None:
            self.gamma.data.fill_(1.0)

    def _interval(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        half = self.halfwidth.to(dtype)
        return self.centre.to(dtype), straight_through(half.clamp(min=SMALLEST), half)

    def transformed(self, x: Tensor) -> Tensor:
        """Return the transformed values, differentiable in ``x`` and the parameters."""
        centre, half = self._interval(x.dtype)
        share = ((x.abs() if self.is_weight else x) - centre) / (2 * half) + 0.5
        inside = (share > FLOOR) & (share <= 1)
        # A power of the elements outside, whose slope may be infinite, must not enter the graph even unselected.
        power = torch.where(inside, share, 1.0)
        if self.gamma is not None:
            gamma = self.gamma.to(x.dtype)
            power = power ** straight_through(gamma.clamp(min=FLATTEST), gamma)
        outside = torch.where(share > 1, share.detach().clamp(max=1), (share.detach() * 0))
        magnitude = torch.where(inside, power, outside)
        return x.detach().sign() * magnitude if self.is_weight else magnitude

    def _step(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        if self.scale == "one":
            return torch.full((), 1 / self.top, dtype=dtype, device=device)
        centre, half = self._interval(dtype)
        return (centre + half) / self.top

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        self.check_ready()
        exact = x.to(compute_dtype(x))
        wanted = self.transformed(exact) * self.top
        integers = self.pass_through(wanted.round(), wanted, self.top - self.bottom)
        return (integers * self._step(exact.dtype, x.device)).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and integer levels."""
        self.check_ready()
        integers = (self.transformed(x) * self.top).round()
        levels = torch.arange(self.bottom, self.top + 1, device=x.device, dtype=x.dtype)
        step = self._step(x.dtype, x.device).detach().clone()
        return Quantized((integers.detach() - self.bottom).to(torch.uint8), levels, step, self.axis)

    def extra_repr(self) -> str:
        """Show width and kind in ``print(model)``."""
        power = "" if self.gamma is None else ", learned power"
        return f"bits={self.bits}, {'weight' if self.is_weight else 'input'}, scale={self.scale!r}{power}"


@register(
    paper="arXiv:1808.05779",
    widths=range(2, 9),
    recommended=Recommended(
        quantizer_lr=0.01,
        source="the paper's gradient scale 0.01 of c, d and gamma, as MQBench's documentation gives it",
    ),
)
def qil(
    w_bits: int = 3, a_bits: int = 3, *, learn_gamma: bool = True, scale: str = "one", activation: str = "qil"
) -> Method:
    r"""Learn the interval of magnitudes that is quantized: smaller ones are pruned to zero, larger ones clipped.

    Forward: with :math:`\alpha = 1/(2d)` and :math:`\beta = 1/2 - c/(2d)`, :math:`\hat w = 0` where :math:`|w| < c - d`,
    :math:`\mathrm{sign}(w)(\alpha|w| + \beta)^\gamma` up to :math:`c + d`, :math:`\mathrm{sign}(w)` above;
    :math:`w_q = \mathrm{round}(Q \hat w)/Q` with :math:`Q = 2^{k-1} - 1`. Inputs likewise without sign, :math:`\gamma = 1` and
    :math:`Q = 2^k - 1`.
    Gradient: straight through the rounding only; with :math:`t = \alpha|w| + \beta` inside the interval
    :math:`d\hat w/dw = \gamma t^{\gamma-1}/(2d)`, :math:`d\hat w/dc = -\mathrm{sign}(w)\,\gamma t^{\gamma-1}/(2d)`,
    :math:`d\hat w/dd = \mathrm{sign}(w)\,\gamma t^{\gamma-1}(1/2 - t)/d`,
    :math:`d\hat w/d\gamma = \mathrm{sign}(w)\,t^\gamma \ln t`; outside it all are 0.

    Args:
        w_bits: width of the weights, 2 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        learn_gamma: learn the power, as the paper does; MQBench reports that it could not make it converge. False: 1.
        scale: ``"one"``: values in [-1, 1], the paper's, for layers whose scale a BatchNorm absorbs; ``"clip"``: times c + d, with
            gradient, which keeps the weights' magnitudes.
        activation: ``"qil"`` is the paper's, with values in [0, 1]; use ``"lsq"`` in a net without BatchNorm.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        S. Jung et al., Learning to Quantize Deep Networks by Optimizing Quantization Intervals with Task Loss, arXiv:1808.05779,
        CVPR 2019, Sec. 3; Y. Li et al., MQBench, arXiv:2111.03759.

    Differences from the paper: the formulas are those of MQBench's documentation; the derivatives follow from them, and the number
    of levels from the paper's 2-bit weights being ternary. Start: nothing pruned or clipped. Transformed magnitudes up to 1e-6 are
    0 without gradient, d stays at least 1e-8 and gamma 0.1. Progressive widths are the recipe's matter.
    """
    Interval(w_bits, is_weight=True, scale=scale)
    return Method(
        weight=started(lambda: Interval(w_bits, is_weight=True, learn_gamma=learn_gamma, scale=scale)),
        input=input_builder(activation, a_bits),
    )


register_input("qil", lambda bits: Interval(bits, is_weight=False), paper="arXiv:1808.05779")
