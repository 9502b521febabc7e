"""Input quantizers: a clipped ReLU with a fixed clip, PACT, and the learned step."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wnq.learned_step import LearnedStep, RoundToStep
from wnq.quantizer import FLOAT_BITS, Quantized, Quantizer, check_bits, check_finite, compute_dtype
from wnq.ste import straight_through


class ClippedReLU(Quantizer):
    r"""Fixed clip: :math:`y = s\,\mathrm{round}(\mathrm{clip}(x, 0, c)/s)` with :math:`s = c/(2^k-1)`; dy/dx = 1 for 0 < x < c.

    Args:
        bits: 1 to 8.
        clip: upper end of the range, > 0. DoReFa-Net's activations are ``clip=1``.

    References:
        S. Zhou et al., DoReFa-Net, arXiv:1606.06160, Eq. 11 (clip 1).
    """

    signed = False
    step: Tensor

    def __init__(self, bits: int, clip: float = 1.0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        if not clip > 0:
            raise ValueError(f"clip must be positive, got {clip!r}.")
        self.register_buffer("step", torch.tensor(clip / (2**bits - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the clipped, rounded values."""
        return RoundToStep.apply(x, self.step.to(compute_dtype(x)), 0.0, float(2**self.bits - 1))  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1."""
        return _unsigned_codes(x, self.step.to(compute_dtype(x)), self.bits)


class PACT(Quantizer):
    r"""Learned clip: :math:`y = \mathrm{clip}(x, 0, \alpha)`, rounded to :math:`2^k` levels.

    Gradients: dy/dx = 1 for 0 <= x < alpha, :math:`dy/d\alpha = 1` for x >= alpha; no gradient through the rounding. The paper
    puts the weights' L2 penalty on alpha: give it weight decay, not zero.

    Args:
        bits: 1 to 8.
        start: first value of alpha, > 0; the paper starts at 8 to 10.

    References:
        J. Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, arXiv:1805.06085, Eq. 1-3.
    """

    signed = False

    def __init__(self, bits: int, start: float = 8.0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        if not start > 0:
            raise ValueError(f"start must be positive, got {start!r}.")
        self.alpha = nn.Parameter(torch.tensor(float(start)))

    def _step(self, x: Tensor) -> Tensor:
        return self.alpha.to(compute_dtype(x)) / (2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the clipped, rounded values."""
        exact = x.to(compute_dtype(x))
        alpha, step = self.alpha.to(exact.dtype), self._step(x).detach()
        clipped = torch.where(exact < alpha, torch.where(exact >= 0, exact, 0), alpha)
        rounded = torch.clamp(exact / step, 0, 2**self.bits - 1).round() * step
        return straight_through(rounded, clipped).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1."""
        return _unsigned_codes(x, self._step(x), self.bits)


def _unsigned_codes(x: Tensor, step: Tensor, bits: int) -> Quantized:
    check_finite(x, where="the activation to quantize")
    codes = torch.clamp(x.to(step.dtype) / step, 0, 2**bits - 1).round().to(torch.uint8)
    return Quantized(codes, torch.arange(2**bits, device=x.device, dtype=step.dtype), step.detach().clone())


ACTIVATIONS: dict[str, Callable[[int], Quantizer]] = {
    "lsq": lambda bits: LearnedStep(bits, is_weight=False),
    "pact": PACT,
    "clip": ClippedReLU,
}
"""What a method's ``activation`` option may name."""


def input_builder(activation: str, bits: int) -> Callable[[], Quantizer] | None:
    """Return a factory of fresh input quantizers, or None at 32 bits (inputs stay float).

    Raises:
        ValueError: unknown activation quantizer, or bits neither 1 to 8 nor 32.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}.")
    if bits == FLOAT_BITS:
        return None
    check_bits(bits, where="a_bits (or 32 for float inputs)")
    return lambda: ACTIVATIONS[activation](bits)
