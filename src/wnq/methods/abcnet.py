"""ABC-Net: weights and inputs as linear combinations of shifted signs."""

import torch
from torch import Tensor, nn

from wnq.activations import input_builder, register_input
from wnq.bases import as_rows, best_coefficients, from_rows, ladder
from wnq.methods.registry import Method, register
from wnq.normalizers import check_granularity
from wnq.quantizer import Quantized, Quantizer, along_axis, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes
from wnq.ste import straight_through


def nested_table(count: int, like: Tensor) -> Tensor:
    """Return the ``(count + 1, count)`` patterns of nested signs: in row c the last c are +1."""
    signs = torch.arange(count, device=like.device)
    region = torch.arange(count + 1, device=like.device).unsqueeze(1)
    return torch.where(signs >= count - region, 1.0, -1.0).to(like.dtype)


class BinaryBases(Quantizer):
    r"""Weights: :math:`\sum_i \alpha_i\,\mathrm{sign}(\bar w + u_i \sigma)`, alpha by least squares.

    The signs are nested (each is +1 wherever the one before is), so M bases take only M + 1 values; a code of
    :math:`\lceil\log_2(M+1)\rceil` bits would hold them. The width is M, as the paper counts and as its arithmetic costs.

    Args:
        bits: M, the number of bases, 1 to 8.
        granularity: statistics and coefficients of a ``"tensor"`` (the paper) or of each output ``"channel"``.
        axis: output-channel dimension.
    """

    def __init__(self, bits: int, granularity: str = "tensor", axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="w_bits")
        self.granularity = check_granularity(granularity)
        self.axis = axis

    def _fit(self, w: Tensor) -> tuple[Quantized, Tensor]:
        """Return codes and levels, and alpha ``(rows, bits)``."""
        rows = as_rows(w, self.granularity, self.axis)
        centred = rows - rows.mean(-1, keepdim=True)
        deviation = centred.square().mean(-1, keepdim=True).sqrt()
        shifts = torch.linspace(-1, 1, self.bits, dtype=w.dtype, device=w.device) if self.bits > 1 else w.new_zeros(1)
        positive = centred.unsqueeze(-1) + (shifts * deviation).unsqueeze(1) >= 0
        signs = torch.where(positive, 1.0, -1.0).to(w.dtype)
        alpha = best_coefficients(signs, rows)
        steps = ladder(nested_table(self.bits, w), alpha)
        return from_rows(steps.codes(positive.sum(-1)), steps.levels, w, self.granularity, self.axis), alpha

    def forward(self, x: Tensor) -> Tensor:
        """Return the combination; gradient: the sum of alpha, everywhere."""
        w = x.to(compute_dtype(x))
        quantized, alpha = self._fit(w.detach())
        total = alpha.sum(-1)
        factor = along_axis(total if self.granularity == "channel" else total.reshape(()), w.ndim, self.axis)
        book = quantized.codebook
        # The weight itself, with the gradient of w * factor: EWGS measures the rounding in the units of the weight.
        surrogate = straight_through(w, w * factor)
        return self.pass_through(quantized.dequantize(), surrogate, book.amax() - book.amin()).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and the M + 1 levels."""
        return self._fit(x)[0]

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bits={self.bits}, granularity={self.granularity!r}"


class BinaryActivations(StartsFromData):
    r"""Inputs: :math:`y = \sum_n \beta_n A_n` with :math:`A_n = 2 \cdot 1\{\mathrm{clip}(x + v_n, 0, 1) \ge 1/2\} - 1`.

    The shifts v and coefficients beta are learned. Gradients, with the window :math:`\omega_n = 1\{0 \le x + v_n \le 1\}`:
    :math:`dy/dx = \sum_n \beta_n \omega_n`, :math:`dy/dv_n = \beta_n \omega_n`, :math:`dy/d\beta_n = A_n`.

    N activations take N + 1 values. The first training batch starts them as a staircase of slope 1 from two deviations below its
    mean to two above, or to the end of its range: the steps, of height 2 beta_n and with the threshold 1/2 - v_n in the middle,
    are equal on either side of the mean. The output then follows the input up to a constant, which a BatchNorm behind the layer
    removes.

    Args:
        bits: N, the number of binary activations, 1 to 8.
    """

    signed = True

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        self.shift = nn.Parameter(torch.zeros(bits))
        self.beta = nn.Parameter(torch.full((bits,), 1 / bits))

    def start_(self, x: Tensor) -> None:
        """Set the staircase."""
        sums = torch.stack([x.mean(), x.square().mean()])
        ends = torch.stack([-x.amin(), x.amax()])
        sums, ends = across_processes(sums), across_processes(ends, "max")
        deviation = (sums[1] - sums[0].square()).clamp(min=0).sqrt()
        mean = sums[0]
        below = torch.minimum(mean + ends[0], 2 * deviation)
        above = torch.minimum(ends[1] - mean, 2 * deviation)
        constant = below + above <= 0
        below, above = torch.where(constant, 0.5, below), torch.where(constant, 0.5, above)
        # Half steps of a staircase from the low end over the mean to the high end: thresholds in the middle of each step.
        place = torch.linspace(-1, 1, 2 * self.bits + 1, dtype=x.dtype, device=x.device)
        corner = mean + place * torch.where(place > 0, above, below)
        self.shift.copy_(0.5 - corner[1::2])
        self.beta.copy_(corner[::2].diff() / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the combination of binary activations."""
        exact = x.to(compute_dtype(x))
        value = self.encode(exact.detach()).dequantize()
        surrogate = torch.zeros_like(exact)
        for shift, beta in zip(self.shift.to(exact.dtype), self.beta.to(exact.dtype), strict=True):
            window = (exact + shift).clamp(0, 1)
            sign = torch.where(window.detach() >= 0.5, 1.0, -1.0).to(exact.dtype)
            # 2 * window - 1 is what the sign rounds; the paper gives it the gradient of the window.
            surrogate = surrogate + beta * self.pass_through(sign, straight_through(2 * window - 1, window), 2.0)
        return straight_through(value, surrogate).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and the N + 1 levels, sorted: a negative beta makes the staircase step down."""
        self.check_ready()
        shift, order = self.shift.detach().to(x.dtype).sort()
        steps = ladder(nested_table(self.bits, x), self.beta.detach().to(x.dtype)[order].unsqueeze(0))
        region = torch.zeros(x.shape, dtype=torch.int64, device=x.device)
        for one in shift:
            region = region + ((x + one).clamp(0, 1) >= 0.5)
        return from_rows(steps.codes(region.reshape(1, -1)), steps.levels, x, "tensor", self.axis)


register_input("abcnet", BinaryActivations, paper="arXiv:1711.11294")


@register(paper="arXiv:1711.11294")
def abcnet(w_bits: int = 3, a_bits: int = 3, *, granularity: str = "tensor", activation: str = "abcnet") -> Method:
    r"""Approximate weights and inputs by linear combinations of shifted signs: M binary bases, N binary activations.

    Forward: :math:`w_q = \sum_{i=1}^M \alpha_i B_i`, :math:`B_i = \mathrm{sign}(\bar w + u_i \sigma)`, with
    :math:`\bar w = w - \mathrm{mean}(w)`, :math:`\sigma` its standard deviation, :math:`u_i = -1 + 2(i-1)/(M-1)` (0 for M = 1) and
    alpha the least-squares fit of w. Inputs: :math:`y = \sum_{n=1}^N \beta_n A_n`,
    :math:`A_n = 2 \cdot 1\{\mathrm{clip}(x + v_n, 0, 1) \ge 1/2\} - 1`, beta and v learned.
    Gradient: :math:`dL/dw = \sum_i \alpha_i\,dL/dB_i` in the paper's notation, where :math:`dL/dB_i` is taken of the layer without
    its coefficient. With :math:`g = dL/dw_q` that is :math:`dL/dw = g \sum_i \alpha_i`, mean, deviation and alpha being constants.
    Inputs: :math:`dL/dx = g \sum_n \beta_n 1\{0 \le x + v_n \le 1\}`, and accordingly for beta and v.

    Args:
        w_bits: M, the number of weight bases, 1 to 8, or 32. The signs are nested, so they take M + 1 of the 2^M values that M bits
            could have.
        a_bits: N, the number of binary activations, 1 to 8, or 32.
        granularity: statistics and coefficients of a ``"tensor"`` (the paper) or of each output ``"channel"``.
        activation: ``"abcnet"`` is the paper's. Its windows are 1 wide, made for inputs that a BatchNorm has scaled.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        X. Lin, C. Zhao and W. Pan, Towards Accurate Binary Convolutional Neural Network, arXiv:1711.11294, NeurIPS 2017,
        Sec. 3.1 and 3.2. Re-derived from a summary: the gradient is the chain rule of the combination with dB/dw = 1.

    Differences from the paper: v and beta start from the first batch, where the authors set them by hand, and a ridge of 1e-10
    decides between coefficients where bases coincide. A sign of 0 is +1. Coefficients a channel are an addition.
    """
    BinaryBases(w_bits, granularity)
    return Method(
        weight=lambda _, axis: BinaryBases(w_bits, granularity, axis), input=input_builder(activation, a_bits)
    )
