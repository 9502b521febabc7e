"""HWGQ: binary weights, and inputs on the optimal levels of a half-wave Gaussian."""

import functools
import itertools
import math

import torch
from torch import Tensor

from wnq.activations import input_builder, register_input
from wnq.methods.bwn import ScaledSign
from wnq.methods.registry import Method, register
from wnq.names import check_choice
from wnq.quantizer import Quantized, Quantizer, check_bits, compute_dtype

BACKWARDS = ("clipped", "vanilla", "log_tailed")


def _density(t: float) -> float:
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


def _above(t: float) -> float:
    """Return P(x > t) of a standard normal variable."""
    return math.erfc(t / math.sqrt(2)) / 2


@functools.cache
def optimal_step(bits: int) -> float:
    r"""Return the step d of the levels d, 2d, ..., (2^bits - 1)d with the least expected squared error on x > 0 of N(0, 1).

    The nearest level is the best one for each x, so the derivative of the error by d is that at fixed cells:
    :math:`-2\,(\sum_i i \int_i x\,\varphi - d \sum_i i^2 \int_i \varphi)`. It changes sign once; bisection, to the last bit.
    """
    count = 2**bits - 1
    low, high = 0.0, 2.0
    for _ in range(64):
        step = (low + high) / 2
        bounds = [0.0, *((i + 0.5) * step for i in range(1, count)), math.inf]
        falling = sum(
            i * (_density(a) - _density(b)) - step * i * i * (_above(a) - _above(b))
            for i, (a, b) in enumerate(itertools.pairwise(bounds), start=1)
        )
        low, high = (step, high) if falling > 0 else (low, step)
    return low


@functools.cache
def optimal_levels(bits: int) -> tuple[float, ...]:
    """Return the 2^bits - 1 free levels with the least expected squared error on x > 0 of N(0, 1), ascending.

    Each is the mean of its cell, whose bounds are the mid-points of the levels (Lloyd's conditions). Newton's method on these
    equations, whose Jacobian is tridiagonal, from the levels that are best in the limit of many.
    """
    count = 2**bits - 1
    ranks = (torch.arange(count, dtype=torch.float64, device="cpu") + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri((1 + ranks) / 2)
    for _ in range(40):
        middle = (levels[1:] + levels[:-1]) / 2
        density = torch.exp(-middle.square() / 2) / math.sqrt(2 * math.pi)
        above = torch.special.erfc(middle / math.sqrt(2)) / 2
        ends = density.new_tensor([_density(0.0)]), density.new_tensor([0.0])
        density = torch.cat([ends[0], density, ends[1]])
        mass = -torch.cat([density.new_tensor([0.5]), above, ends[1]]).diff()
        means = -density.diff() / mass
        # Derivatives of a cell's mean by its lower and its upper bound; each bound moves by half of either neighbour.
        lower = density[1:-1] * (means[1:] - middle) / mass[1:] / 2
        upper = density[1:-1] * (middle - means[:-1]) / mass[:-1] / 2
        zero = density.new_zeros(1)
        own = torch.cat([zero, lower]) + torch.cat([upper, zero]) - 1
        jacobian = torch.diag(own) + torch.diag(lower, -1) + torch.diag(upper, 1)
        levels = levels - torch.linalg.solve(jacobian, means - levels)
    return tuple(levels.tolist())


class HalfWaveGaussian(Quantizer):
    r"""Fixed levels for inputs that are N(0, 1) before their ReLU.

    Zero for x <= 0, else the nearest of :math:`2^k - 1` positive levels.

    The levels minimise the expected squared error over x > 0, so that the smallest one also serves all small positive inputs.

    Gradient, with :math:`q_m` the largest level: ``"clipped"``: :math:`1_{0 < x \le q_m}`; ``"vanilla"``: :math:`1_{x > 0}`;
    ``"log_tailed"``: 1 up to :math:`q_m` and :math:`1/(x - \tau)`, :math:`\tau = q_m - 1`, beyond.

    Args:
        bits: 1 to 8.
        uniform: levels at multiples of one step; else each where it is best.
        backward: ``"clipped"``, ``"vanilla"`` or ``"log_tailed"``.
    """

    signed = False

    def __init__(self, bits: int, *, uniform: bool = True, backward: str = "clipped") -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        self.uniform = uniform
        self.backward = check_choice(backward, BACKWARDS, where="backward")
        self.count = 2**bits - 1
        self.step = optimal_step(bits) if uniform else 1.0
        self.grid = tuple(map(float, range(1, self.count + 1))) if uniform else optimal_levels(bits)
        self.top = self.step * self.grid[-1]

    def _rank(self, x: Tensor) -> Tensor:
        """Return 0 for x <= 0, else the number of the nearest positive level, as a float."""
        if self.uniform:
            nearest = torch.floor(x / self.step + 0.5).clamp(1, self.count)
        else:
            grid = torch.tensor(self.grid, dtype=x.dtype, device=x.device)
            nearest = torch.bucketize(x.contiguous(), (grid[1:] + grid[:-1]) / 2).to(x.dtype) + 1
        return torch.where(x > 0, nearest, 0.0)

    def _levels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return levels and scale."""
        step = torch.full((), self.step, dtype=x.dtype, device=x.device)
        if self.uniform:
            return torch.arange(self.count + 1, dtype=x.dtype, device=x.device), step
        return torch.tensor((0.0, *self.grid), dtype=x.dtype, device=x.device), step

    def forward(self, x: Tensor) -> Tensor:
        """Return the levels."""
        exact = x.to(compute_dtype(x))
        levels, step = self._levels(exact)
        rank = self._rank(exact.detach())
        value = rank * step if self.uniform else levels[rank.long()]
        surrogate = exact.relu()
        if self.backward != "vanilla":
            surrogate = surrogate.clamp(max=self.top)
        if self.backward == "log_tailed":
            surrogate = surrogate + torch.log1p((exact - self.top).relu())
        return self.pass_through(value, surrogate, self.top).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1."""
        return Quantized(self._rank(x).to(torch.uint8), *self._levels(x))

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bits={self.bits}, uniform={self.uniform}, backward={self.backward!r}"


register_input("hwgq", HalfWaveGaussian, paper="arXiv:1702.00953")


@register(paper="arXiv:1702.00953", widths=(1,))
def hwgq(w_bits: int = 1, a_bits: int = 2, *, activation: str = "hwgq") -> Method:
    r"""Binary weights with the scale of each filter, inputs on the optimal levels of a half-wave Gaussian.

    Forward: :math:`w_q = \alpha\,\mathrm{sign}(w)`, :math:`\alpha = \mathrm{mean}|w|` of each filter; :math:`x_q = 0` for
    :math:`x \le 0`, else :math:`d\,\mathrm{clip}(\mathrm{round}(x/d), 1, 2^k - 1)` with the step d that minimises
    :math:`\int_0^\infty \varphi(x)\,(x_q - x)^2 dx`: 0.7979, 0.5388, 0.3217, 0.1842 for k = 1 to 4.

    Gradient: :math:`dw_q/dw = 1`, alpha under stop-gradient; :math:`dx_q/dx = 1_{0 < x \le q_m}`, :math:`q_m = (2^k - 1)\,d`.

    The levels are constants. They fit inputs of mean 0 and variance 1 before the ReLU, as a BatchNorm gives; the quantizer is the
    ReLU, and one more in front of it changes nothing.

    Args:
        w_bits: 1, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"hwgq"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        Z. Cai et al., Deep Learning with Low Precision by Half-wave Gaussian Quantization, arXiv:1702.00953, CVPR 2017, Sec. 3-4.

    Differences from the paper: the step is solved to the last bit, 0.5388 at two bits where the authors' code has 0.538 (their
    levels 0.538, 1.076, 1.614, thresholds 0.807 and 1.345). Ties at a threshold go up. :class:`HalfWaveGaussian` also has free
    levels and the other two backward functions, which are written from memory; of the log-tailed one, :math:`\tau = q_m - 1` is
    derived: the derivative is continuous at :math:`q_m`.
    """
    return Method(weight=lambda _, axis: ScaledSign("channel", axis), input=input_builder(activation, a_bits))
