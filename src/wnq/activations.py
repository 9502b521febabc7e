"""Input quantizers: the registry, a clipped ReLU with a fixed clip, PACT, and the learned step.

A paper's own input quantizer stands in the paper's file under ``methods/`` and registers itself here.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wnq.learned_step import LearnedStep, RoundToStep
from wnq.names import did_you_mean
from wnq.quantizer import FLOAT_BITS, Quantized, Quantizer, check_bits, compute_dtype


@dataclass(frozen=True)
class InputInfo:
    """What the registry knows of an input quantizer.

    Attributes:
        name: what a method's ``activation`` option calls it.
        paper: where it was published.
        build: width -> a fresh one.
        widths: the widths that it defines.
    """

    name: str
    paper: str
    build: Callable[[int], Quantizer]
    widths: tuple[int, ...]

    @property
    def summary(self) -> str:
        """First line of the quantizer's docstring."""
        return (inspect.getdoc(type(self.build(self.widths[0]))) or "").splitlines()[0]


_REGISTRY: dict[str, InputInfo] = {}


def register_input(
    name: str, build: Callable[[int], Quantizer], *, paper: str, widths: Sequence[int] = range(1, 9)
) -> None:
    """Make an input quantizer known by name, for the ``activation`` option of every method.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"input quantizer {name!r} is registered already; a name must be unique.")
    _REGISTRY[name] = InputInfo(name, paper, build, tuple(widths))


def list_inputs() -> list[InputInfo]:
    """Return every registered input quantizer, by name."""
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


def input_builder(activation: str, bits: int) -> Callable[[], Quantizer] | None:
    """Return a factory of fresh input quantizers, or None at 32 bits (inputs stay float).

    Raises:
        ValueError: unknown input quantizer, or a width that it does not define.
    """
    if activation not in _REGISTRY:
        hint = did_you_mean(activation, _REGISTRY)
        raise ValueError(f"activation must be one of {', '.join(map(repr, _REGISTRY))}, got {activation!r}.{hint}")
    info = _REGISTRY[activation]
    if bits == FLOAT_BITS:
        return None
    check_bits(bits, where="a_bits (or 32 for float inputs)")
    if bits not in info.widths:
        raise ValueError(
            f"activation {activation!r} defines a_bits {', '.join(map(str, info.widths))}, or 32 for float; got {bits}."
        )
    return lambda: info.build(bits)


class ClippedReLU(Quantizer):
    r"""A rectifier with a fixed upper end, in equal steps.

    Forward: :math:`y = s\,\mathrm{round}(\mathrm{clip}(x, 0, c)/s)` with :math:`s = c/(2^k-1)`.
    Gradient: dy/dx = 1 for 0 < x < c, else 0.

    Args:
        bits: 1 to 8.
        clip: upper end of the range, > 0. DoReFa-Net's activations are ``clip=1``.

    References:
        S. Zhou et al., DoReFa-Net, arXiv:1606.06160, Eq. 11 (clip 1).

    Differences from the paper: none known.
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
        step = self.step.to(compute_dtype(x))
        return RoundToStep.apply(x, step, 0.0, float(2**self.bits - 1), self.ewgs)  # pyright: ignore[reportReturnType]

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1."""
        return unsigned_codes(x, self.step.to(x.dtype), self.bits)


class PACT(Quantizer):
    r"""A rectifier with a learned upper end, in equal steps.

    Forward: :math:`y = \mathrm{clip}(x, 0, \alpha)`, rounded to :math:`2^k` levels.
    Gradient: dy/dx = 1 for 0 <= x < alpha, :math:`dy/d\alpha = 1` for x >= alpha; none through the rounding.

    The paper puts the weights' L2 penalty on alpha: give it weight decay, not zero.

    Args:
        bits: 1 to 8.
        start: first value of alpha, > 0; the paper starts at 8 to 10.

    References:
        J. Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, arXiv:1805.06085, Eq. 1-3.

    Differences from the paper: none known.
    """

    signed = False

    def __init__(self, bits: int, start: float = 8.0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        if not start > 0:
            raise ValueError(f"start must be positive, got {start!r}.")
        self.alpha = nn.Parameter(torch.tensor(float(start)))

    def _step(self, x: Tensor) -> Tensor:
        return self.alpha.detach().to(x.dtype) / (2**self.bits - 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the clipped, rounded values."""
        exact = x.to(compute_dtype(x))
        alpha, step = self.alpha.to(exact.dtype), self._step(exact)
        clipped = torch.where(exact < alpha, torch.where(exact >= 0, exact, 0), alpha)
        rounded = torch.clamp(exact / step, 0, 2**self.bits - 1).round() * step
        return self.pass_through(rounded, clipped, alpha.detach()).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 to 2^bits - 1."""
        return unsigned_codes(x, self._step(x), self.bits)


def unsigned_codes(x: Tensor, step: Tensor, bits: int) -> Quantized:
    """Return codes 0 to 2^bits - 1 of ``round(clip(x / step))``."""
    codes = torch.clamp(x / step, 0, 2**bits - 1).round().to(torch.uint8)
    return Quantized(codes, torch.arange(2**bits, device=x.device, dtype=step.dtype), step.detach().clone())


register_input("lsq", lambda bits: LearnedStep(bits, is_weight=False), paper="arXiv:1902.08153")
register_input("pact", PACT, paper="arXiv:1805.06085")
register_input("clip", ClippedReLU, paper="arXiv:1606.06160")
