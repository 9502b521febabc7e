"""EWGS: learned ranges, and a rounding whose gradient knows how far each element is from its level."""

import math

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.methods.registry import Method, Recommended, register
from wnq.quantizer import Quantized, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes, started
from wnq.ste import straight_through

SMALLEST = 1e-8
"""Least width of the range."""

DELTA = 1e-3
"""Scaling factor where no other is asked for, the authors' fixed one."""


class LearnedRange(StartsFromData):
    r"""Uniform rounding on the learned range [l, u], times a learned scale.

    With :math:`x_n = \mathrm{clip}((x - l)/(u - l), 0, 1)`, :math:`M = 2^k - 1` and :math:`x_q = \mathrm{round}(M x_n)/M`, weights
    become :math:`|s|\,(2 x_q - 1)` and inputs :math:`|s|\,x_q`. The gradient of :math:`x_n` is
    :math:`g\,(1 + \delta\,\mathrm{sign}(g)(x_n - x_q))` for the gradient g of :math:`x_q`; everything else is differentiated.

    Weights: l and u start at 3 standard deviations on either side of zero, s where the values' mean magnitude is the weights'.
    Inputs: u starts at :math:`3\sigma/\sqrt{1 - 2/\pi}`, l at 0, or at the first batch's least value if that is negative, and s at
    u - l. Below 1e-8 for u - l, the forward pass uses this bound and the parameters keep their gradients.

    Args:
        bits: 1 to 8.
        is_weight: weights or inputs.
    """

    ewgs = DELTA
    signed: bool

    def __init__(self, bits: int, *, is_weight: bool) -> None:
        super().__init__(is_weight=is_weight)
        self.bits = check_bits(bits, where="bits")
        self.top = 2**bits - 1
        self.signed = is_weight
        self.low = nn.Parameter(torch.tensor(-1.0 if is_weight else 0.0))
        self.high = nn.Parameter(torch.tensor(1.0))
        self.scale = nn.Parameter(torch.ones(()))

    def start_(self, x: Tensor) -> None:
        """Start the range from the standard deviation, and the scale so that the size of the values is kept."""
        deviation, magnitude = x.std(correction=0), x.abs().mean()
        if not self.is_weight:
            deviation, magnitude = across_processes(deviation), across_processes(magnitude)
        # A constant tensor has a deviation of zero, or of its mean's rounding error.
        varies = deviation > 1e-6 * magnitude
        if self.is_weight:
            reach = torch.where(varies, 3 * deviation, torch.where(magnitude > 0, magnitude, 1.0))
            low, high = -reach, reach
        else:
            low = across_processes(x.amin(), "min").clamp(max=0)
            reach = 3 / math.sqrt(1 - 2 / math.pi) * deviation
            high = torch.where(varies, reach, low + torch.where(magnitude > 0, magnitude, 1.0))
        self.low.data.copy_(low)
        self.high.data.copy_(high)
        if self.is_weight:
            integers = 2 * (self._share(x) * self.top).round() - self.top
            self.scale.data.copy_(magnitude * self.top / integers.abs().mean())
        else:
            self.scale.data.copy_(high - low)

    def _share(self, x: Tensor) -> Tensor:
        """Return x_n, differentiable in ``x`` and the range."""
        low = self.low.to(x.dtype)
        width = self.high.to(x.dtype) - low
        return ((x - low) / straight_through(width.clamp(min=SMALLEST), width)).clamp(0, 1)

    def _step(self, dtype: torch.dtype) -> Tensor:
        scale = self.scale.to(dtype)
        # Unlike abs, the slope at zero is 1: a layer of zeros starts at scale 0 and must be able to leave it.
        return torch.where(scale < 0, -scale, scale) / self.top

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        self.check_ready()
        exact = x.to(compute_dtype(x))
        wanted = self._share(exact) * self.top
        codes = self.pass_through(wanted.round(), wanted, self.top)
        integers = 2 * codes - self.top if self.is_weight else codes
        return (integers * self._step(exact.dtype)).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and integer levels: odd numbers for weights, 0 to 2^bits - 1 for inputs."""
        self.check_ready()
        codes = (self._share(x) * self.top).round().detach().to(torch.uint8)
        grid = torch.arange(self.top + 1, device=x.device, dtype=x.dtype)
        levels = 2 * grid - self.top if self.is_weight else grid
        return Quantized(codes, levels, self._step(x.dtype).detach().clone(), self.axis)

    def extra_repr(self) -> str:
        """Show width, kind and scaling factor in ``print(model)``."""
        return f"bits={self.bits}, {'weight' if self.is_weight else 'input'}, ewgs={self.ewgs}"


@register(
    paper="arXiv:2104.00903",
    recommended=Recommended(
        quantizer_lr=0.01,
        source="the authors' CIFAR-10 setting: learning rate 1e-3 for weights, 1e-5 for quantizers (Adam)",
    ),
)
def ewgs(w_bits: int = 3, a_bits: int = 3, *, activation: str = "ewgs") -> Method:
    r"""Learned ranges for weights and inputs; the gradient of a rounding grows or shrinks with the element's rounding error.

    Forward: :math:`x_n = \mathrm{clip}((w - l)/(u - l), 0, 1)`, :math:`x_q = \mathrm{round}(M x_n)/M` with :math:`M = 2^k - 1`,
    :math:`w_q = 2|s|(x_q - 1/2)`; inputs: :math:`|s|\,x_q`. l, u and s are learned, one each a layer.
    Gradient: :math:`dL/dx_n = g\,(1 + \delta\,\mathrm{sign}(g)(x_n - x_q))` with :math:`g = dL/dx_q`; the rest is
    differentiated, so that :math:`dw_q/dw = 2|s|/(u - l)` inside the range at :math:`\delta = 0`.

    :math:`\delta` is 1e-3 here. The common option ``ewgs`` replaces it; 0 makes it the straight-through estimator.

    Args:
        w_bits: width of the weights, 1 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"ewgs"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        J. Lee et al., Network Quantization with Element-wise Gradient Scaling, arXiv:2104.00903, CVPR 2021, Sec. 3, and the
        authors' code.

    Differences from the paper: :math:`\delta` is fixed, not estimated from the Hessian's trace during training. The one learned
    scale of a layer's output is split in two, a factor of the weights and one of the inputs, which start where each keeps its size,
    not where the layer's output does; a bias is not scaled. An input range that starts below zero is shifted to begin at zero, as
    in the authors' code. The ranges' optimizer is the recipe's.
    """
    return Method(weight=started(lambda: LearnedRange(w_bits, is_weight=True)), input=input_builder(activation, a_bits))


register_input("ewgs", lambda bits: LearnedRange(bits, is_weight=False), paper="arXiv:2104.00903")
