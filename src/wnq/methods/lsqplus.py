"""LSQ+: LSQ with a learned offset for inputs, and starts that fit the tensor."""

import math

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.learned_step import LearnedStep, RoundToStep, positive
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes, started
from wnq.ste import grad_scale

RANGES = 16
"""Candidates for either end of the range in the search for a start."""

SAMPLE = 2**14
"""Most elements of the first batch that the search looks at, evenly spaced."""


class WeightStep(LearnedStep):
    r"""LSQ's weight quantizer, the step starting at :math:`\max(|\mu - 3\sigma|, |\mu + 3\sigma|) / 2^{k-1}`."""

    def __init__(self, bits: int) -> None:
        super().__init__(bits, is_weight=True)

    def start_(self, x: Tensor) -> None:
        """Set the step from mean and standard deviation of the weight."""
        mean, deviation = x.mean(), x.std(correction=0)
        reach = torch.maximum((mean - 3 * deviation).abs(), (mean + 3 * deviation).abs())
        self.step.data.copy_(torch.where(reach > 0, reach / 2 ** (self.bits - 1), 1.0))


class OffsetStep(StartsFromData):
    r"""Learned step and offset: :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}((x - \beta)/s, 0, 2^k - 1)) + \beta`.

    Gradients, with :math:`v = (x - \beta)/s`: of x 1 strictly inside the range, 0 outside; of s :math:`\bar v - v` inside,
    :math:`\bar v` outside; of beta 0 inside, 1 outside. Those of s and beta are multiplied by :math:`1/\sqrt{N (2^k - 1)}`, N the
    features of one sample.

    The first batch sets s and beta: of the ranges whose ends lie at 1/16, 2/16, ... 16/16 of the way from the mean to the smallest
    and to the largest value, the one with the least squared error, on at most 2^14 evenly spaced elements. All processes of a
    distributed job search together.

    Args:
        bits: 1 to 8.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        self.top = 2**bits - 1
        self.step = nn.Parameter(torch.ones(()))
        self.offset = nn.Parameter(torch.zeros(()))

    def start_(self, x: Tensor) -> None:
        """Search the range of least squared error."""
        low, high = across_processes(x.amin(), "min"), across_processes(x.amax(), "max")
        centre = across_processes(x.mean())
        share = torch.arange(1, RANGES + 1, device=x.device, dtype=x.dtype) / RANGES
        lows, highs = centre + (low - centre) * share, centre + (high - centre) * share
        sample = x.flatten()[:: max(1, math.ceil(x.numel() / SAMPLE))]
        errors: list[Tensor] = []
        for start in lows.unbind():
            step = ((highs - start) / self.top).unsqueeze(1)
            codes = ((sample - start) / torch.where(step > 0, step, 1.0)).clamp(0, self.top).round()
            errors.append((codes * step + start - sample).square().mean(1))
        best = across_processes(torch.cat(errors)).argmin()
        start, end = lows[best // RANGES], highs[best % RANGES]
        self.offset.data.copy_(start)
        self.step.data.copy_(torch.where(end > start, (end - start) / self.top, 1 / self.top))

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        self.check_ready()
        exact = x.to(compute_dtype(x))
        factor = (max(1, math.prod(x.shape[1:])) * self.top) ** -0.5
        step = grad_scale(positive(self.step.to(exact.dtype)), factor)
        offset = grad_scale(self.offset.to(exact.dtype), factor)
        multiple: Tensor = RoundToStep.apply(exact - offset, step, 0.0, float(self.top), self.ewgs)  # pyright: ignore[reportAssignmentType]
        return (multiple + offset).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1; the levels are the values themselves, multiples of the step plus the offset."""
        self.check_ready()
        step, offset = positive(self.step.detach().to(x.dtype)), self.offset.detach().to(x.dtype)
        codes = ((x - offset) / step).clamp(0, self.top).round()
        grid = torch.arange(self.top + 1, device=x.device, dtype=x.dtype)
        return Quantized(codes.to(torch.uint8), grid * step + offset, torch.ones((), dtype=x.dtype, device=x.device))


@register(paper="arXiv:2004.09576", widths=range(2, 9))
def lsqplus(w_bits: int = 3, a_bits: int = 3, *, activation: str = "lsqplus") -> Method:
    r"""LSQ with a learned offset for the inputs, and with starts chosen by the spread of weights and the error of inputs.

    Forward, weights: :math:`\hat w = s\,\mathrm{round}(\mathrm{clip}(w/s, -2^{k-1}, 2^{k-1} - 1))`, the step starting at
    :math:`\max(|\mu - 3\sigma|, |\mu + 3\sigma|) / 2^{k-1}`; inputs:
    :math:`\hat x = s\,\mathrm{round}(\mathrm{clip}((x - \beta)/s, 0, 2^k - 1)) + \beta`, s and beta starting where the squared
    error on the first batch is least.
    Gradient: LSQ's for both steps; :math:`d\hat x/d\beta = 1` outside the clip range, 0 inside.

    Args:
        w_bits: width of the weights, 2 to 8 (one signed bit has no positive level), or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"lsqplus"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        Y. Bhalgat et al., LSQ+: Improving Low-bit Quantization through Learnable Offsets and Better Initialization,
        arXiv:2004.09576, CVPR Workshops 2020, Sec. 3.

    Differences from the paper: the gradients were derived anew from the forward formula and LSQ's rules, not checked against the
    printed equations. Of the paper's configurations this is the one with codes from 0 to :math:`2^k - 1` and a learned offset. The
    squared error is searched on a grid of 256 ranges instead of by gradient descent. N counts the features of one sample, as in
    :class:`wnq.learned_step.LearnedStep`.
    """
    return Method(weight=started(lambda: WeightStep(w_bits)), input=input_builder(activation, a_bits))


register_input("lsqplus", OffsetStep, paper="arXiv:2004.09576")
