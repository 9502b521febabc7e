"""LQ-Nets: levels from a learned basis, for weights and inputs."""

import torch
from torch import Tensor

from wnq.activations import input_builder, register_input
from wnq.bases import as_rows, from_rows, ladder, least_squares, nearest, normal_equations, sign_table
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes

MOMENTUM = 0.9
"""Share of the old basis that one training step keeps."""

RIDGE = 1e-4
"""Weight of the old basis in a filter's least squares; the released code's."""

INPUT_RIDGE = 1e-6
"""The same for inputs, a share of the number of elements."""

START_STEPS = 20
"""Alternations that a basis starts with, at most."""

QUANTILE = 0.6745
"""Three quarters of a standard normal variable lie below; the released code starts its top levels by it."""


def refit(basis: Tensor, rows: Tensor, low: float, ridge: float, *, shared: bool = False) -> Tensor:
    """Return one full alternation of QEM: nearest levels for ``rows``, then the basis that fits these codes best.

    Neither half can raise the squared error. The ridge pulls toward the basis before, so it moves no fixed point, and a basis
    that the codes leave open keeps its value. Where the data hold NaN or infinity the whole basis does.

    Args:
        basis: ``(rows, bits)``.
        rows: ``(rows, n)``.
        low: -1 for patterns in {-1, 1}, 0 for {0, 1}.
        ridge: times n, the weight of the basis before.
        shared: sum the normal equations over the processes of a distributed job.
    """
    table = sign_table(basis.shape[-1], rows, low=low)
    steps = ladder(table, basis.to(rows.dtype))
    codes = nearest(steps.levels, rows)
    signs = table[steps.order].gather(1, codes.unsqueeze(-1).expand(-1, -1, table.shape[-1]))
    gram, moment = normal_equations(signs, rows)
    count = torch.full((1, 1), float(rows.shape[-1]), dtype=gram.dtype, device=gram.device)
    if shared:
        parts = across_processes(torch.cat([gram.flatten(), moment.flatten(), count.flatten()]), "sum")
        flat_gram, flat_moment, flat_count = parts.split([gram.numel(), moment.numel(), 1])
        gram, moment, count = flat_gram.view_as(gram), flat_moment.view_as(moment), flat_count.view_as(count)
    fitted = least_squares(gram, moment, ridge * count, basis).to(basis.dtype)
    return torch.where(fitted.isfinite().all(-1, keepdim=True), fitted, basis)


def powers(bits: int, like: Tensor) -> Tensor:
    """Return ``(1, bits)`` powers of two: the basis of a uniform grid."""
    return (2.0 ** torch.arange(bits, device=like.device)).to(like.dtype).unsqueeze(0)


class LearnedBasis(Quantizer):
    r"""Weights: levels :math:`e \cdot v_c` with :math:`e \in \{-1, 1\}^K` and a basis :math:`v_c` of each output channel.

    The basis is state, not a parameter: :meth:`observe_` moves it a tenth of the way to the least-squares fit, once per
    training step. ``forward`` rounds to the nearest level, dw_q/dw = 1.

    Args:
        bits: K, 1 to 8.
        weight: the layer's weight, which the basis starts from.
        axis: output-channel dimension.
    """

    basis: Tensor

    def __init__(self, bits: int, weight: Tensor, axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="w_bits")
        self.axis = axis
        rows = as_rows(weight.detach(), "channel", axis)
        self.register_buffer("basis", torch.zeros(len(rows), bits, dtype=compute_dtype(weight), device=weight.device))
        self.reset_(weight)

    def _rows(self, x: Tensor) -> Tensor:
        return as_rows(x.detach().to(compute_dtype(x)), "channel", self.axis)

    @torch.no_grad()
    def reset_(self, x: Tensor) -> None:
        """Start from the paper's basis for the spread that the weights have, then alternate."""
        rows = self._rows(x)
        spread = rows.square().mean(-1, keepdim=True).sqrt()
        basis = QUANTILE * spread * powers(self.bits, rows) / 2 ** (self.bits - 1)
        for _ in range(START_STEPS):
            before, basis = basis, refit(basis, rows, -1.0, RIDGE / rows.shape[-1])
            if torch.equal(before, basis):
                break
        self.basis.copy_(basis)

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Move the basis toward the best fit of the weights as they are now."""
        rows = self._rows(x)
        fitted = refit(self.basis, rows, -1.0, RIDGE / rows.shape[-1])
        self.basis.copy_(MOMENTUM * self.basis + (1 - MOMENTUM) * fitted)

    def encode(self, x: Tensor) -> Quantized:
        """Return the nearest levels, one row of levels a channel."""
        levels = ladder(sign_table(self.bits, x), self.basis.to(x.dtype)).levels
        return from_rows(nearest(levels, as_rows(x, "channel", self.axis)), levels, x, "channel", self.axis)


class LearnedInputBasis(StartsFromData):
    r"""Inputs: levels :math:`e \cdot v` with :math:`e \in \{0, 1\}^K`, one basis v a layer.

    Zero is always a level. The basis is state: the first training batch starts it, every later one moves it a tenth of the way to
    its own least-squares fit. Gradient: dy/dx = 1 for 0 < x < the top level, else 0.

    All processes of a distributed job sum their normal equations, so they keep one basis.

    Args:
        bits: K, 1 to 8.
    """

    signed = False
    basis: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        self.register_buffer("basis", torch.ones(1, bits))

    def _start(self, rows: Tensor) -> Tensor:
        """Return the released code's start for a rectified Gaussian with the batch's mean square, then alternated."""
        square = across_processes(rows.square().mean())
        spread = torch.where((square > 0) & square.isfinite(), 2 * square, 1.0).sqrt()
        basis = 2 * QUANTILE * spread * powers(self.bits, rows) / (2**self.bits - 1)
        for _ in range(START_STEPS):
            basis = refit(basis, rows, 0.0, INPUT_RIDGE, shared=True)
        return basis

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Start at the first batch; move toward the best fit of every later one."""
        rows = x.detach().to(compute_dtype(x)).reshape(1, -1)
        if not self.ready:
            self.basis.copy_(self._start(rows))
            self.mark_ready_()
            return
        fitted = refit(self.basis, rows, 0.0, INPUT_RIDGE, shared=True)
        self.basis.copy_(MOMENTUM * self.basis + (1 - MOMENTUM) * fitted)

    def _levels(self, x: Tensor) -> Tensor:
        self.check_ready()
        return ladder(sign_table(self.bits, x, low=0.0), self.basis.to(x.dtype)).levels

    def forward(self, x: Tensor) -> Tensor:
        """Return the nearest levels."""
        exact = x.to(compute_dtype(x))
        quantized = self.encode(exact.detach())
        low, top = quantized.levels[0], quantized.levels[-1]
        inside = torch.where((exact > 0) & (exact < top), exact, exact.detach())
        return self.pass_through(quantized.dequantize(), inside, top - low).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return the nearest levels."""
        levels = self._levels(x)
        return from_rows(nearest(levels, x.reshape(1, -1)), levels, x, "tensor", self.axis)


register_input("lqnets", LearnedInputBasis, paper="arXiv:1807.10029")


@register(paper="arXiv:1807.10029")
def lqnets(w_bits: int = 3, a_bits: int = 3, *, activation: str = "lqnets") -> Method:
    r"""Round to sums of a few learned coefficients with free signs, refitted by least squares as training goes on.

    Forward: :math:`w_q = \arg\min_{q \in \{e \cdot v_c : e \in \{-1,1\}^K\}} |w - q|` with a basis :math:`v_c \in R^K` of
    each output channel. Each training step moves it,
    :math:`v \leftarrow 0.9\,v + 0.1\,(B^\top B + \delta I)^{-1}(B^\top w + \delta v)` with :math:`\delta = 10^{-4}`, where the rows
    of B are the patterns e of the levels that the channel's weights round to.
    Inputs: :math:`e \in \{0,1\}^K`, one basis a layer, in the same way.
    Gradient: dw_q/dw = 1; the basis gets none. Inputs: dy/dx = 1 for 0 < x < the top level, else 0.

    Args:
        w_bits: width of the weights, 1 to 8, or 32. The paper goes to 4.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"lqnets"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        D. Zhang et al., LQ-Nets: Learned Quantization for Highly Accurate and Compact Deep Neural Networks,
        arXiv:1807.10029, ECCV 2018, Sec. 3 and Algorithm 1; ridge and starting basis as in the authors' code.

    Differences from the paper: bases start from the float weights and from the first batch, by up to 20 full alternations,
    where the authors train from scratch and start from the spread of their initialization. A step refits the basis before it
    rounds, not after. The refit of inputs has a ridge too, so that unused codes do no harm, and processes fit one basis together.
    Inputs below zero get no gradient, where the authors leave that to the ReLU in front. Widths 5 to 8 are additions.
    """
    check_bits(w_bits, where="w_bits")
    return Method(weight=lambda w, axis: LearnedBasis(w_bits, w, axis), input=input_builder(activation, a_bits))
