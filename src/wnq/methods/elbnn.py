"""ELBNN: the least-squares projection of weights onto a scale times few integers."""

from itertools import pairwise

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.normalizers import check_granularity, reduced_dims
from wnq.quantizer import Quantized, Quantizer

ITERATIONS = 10
"""Of scale and integers; the paper reports fewer than five until nothing changes."""

START = {1: 1.0, 2: 0.9, 4: 0.55}
"""First scale by largest integer, as a share of mean|w|: the search ends in a local optimum, and these reach the best one
of uniform, Gaussian and Student-t(3) weights alike."""


class LeastSquares(Quantizer):
    r"""The nearest point :math:`\alpha q` with integers q from ``integers``: q and alpha are found in turn.

    From :math:`\alpha` a fixed share of mean|w|: q is the nearest integer to :math:`w/\alpha` (of two equally near ones the
    larger), then :math:`\alpha = \langle w,q\rangle / \langle q,q\rangle`. Neither step can raise the error. Zero weights
    have alpha 0.

    Args:
        integers: ascending.
        bits: width of a code.
        granularity: one alpha a ``"tensor"`` or an output ``"channel"``.
        axis: output-channel dimension.
    """

    def __init__(self, integers: tuple[int, ...], bits: int, granularity: str, axis: int = 0) -> None:
        super().__init__()
        self.integers, self.bits, self.granularity, self.axis = integers, bits, granularity, axis

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, the integers and alpha."""
        dims, keep = reduced_dims(x, self.granularity, self.axis), self.granularity == "channel"
        levels = torch.tensor(self.integers, dtype=x.dtype, device=x.device)
        scale = x.abs().mean(dims, keepdim=keep) * START[self.integers[-1]]
        codes = torch.zeros_like(x, dtype=torch.int64)
        for _ in range(ITERATIONS):
            u = x / torch.where(scale > 0, scale, 1.0)
            # Summed comparisons: a threshold belongs to the level above it, and a NaN gets a code as well.
            codes = torch.stack([u >= (a + b) / 2 for a, b in pairwise(self.integers)]).sum(0)
            q = levels[codes]
            energy = q.square().sum(dims, keepdim=keep)
            scale = (x * q).sum(dims, keepdim=keep) / torch.where(energy > 0, energy, 1.0)
        return Quantized(codes.to(torch.uint8), levels, scale.reshape(-1 if keep else ()), self.axis)

    def extra_repr(self) -> str:
        """Show the integers in ``print(model)``."""
        return f"integers={self.integers}, granularity={self.granularity!r}"


@register(
    paper="arXiv:1707.09870",
    widths=(1, 2, 3),
    no_normalizer="its projection is the nearest point to the weights themselves, and finds their scale anyway",
)
def elbnn(
    w_bits: int = 2, a_bits: int = 32, *, top: int = 4, granularity: str = "tensor", activation: str = "lsq"
) -> Method:
    r"""The nearest weights of the form alpha times -1, 0, 1 (or two more powers of two), found by least squares.

    Forward: :math:`w_q = \alpha q`, with :math:`(\alpha, q)` from alternating :math:`q = \mathrm{nearest}(w/\alpha)` and
    :math:`\alpha = \langle w,q\rangle / \langle q,q\rangle`; q is ±1 at one bit, 0, ±1 at two, 0, ±1, ±2, ±4 at three.
    Gradient: dw_q/dw = 1. The paper does not round in training: there the procedure ``admm`` trains float weights and
    projects them, and this is the projection and the deployed form.

    Args:
        w_bits: 1, 2 (three of its four codes are used), 3 (seven of eight), or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        top: largest integer at three bits: 4, or 2 for 0, ±1, ±2.
        granularity: one alpha a ``"tensor"`` (the paper) or an output ``"channel"``.
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width, name or ``top`` out of range.

    References:
        C. Leng et al., Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, arXiv:1707.09870, AAAI 2018.

    Differences from the paper: equations written down from memory of it and re-derived (each half-step is a least-squares
    solution), not checked against its text. Always ten iterations, from a share of mean|w| that is ours; the paper iterates
    until nothing changes. Trained without the procedure, the gradient is the straight-through one.
    """
    if top not in (2, 4):
        raise ValueError(f"top must be 2 or 4, got {top!r}.")
    check_granularity(granularity)
    positive = {1: (1,), 2: (1,), 3: (1, 2, 4) if top == 4 else (1, 2)}[w_bits]
    integers = (*(-q for q in reversed(positive)), *(() if w_bits == 1 else (0,)), *positive)
    return Method(
        weight=lambda _, axis: LeastSquares(integers, w_bits, granularity, axis),
        input=input_builder(activation, a_bits),
    )
