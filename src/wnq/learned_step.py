"""Uniform quantization with a learned step, for weights and activations (LSQ), and its fast backward pass."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from wnq import kernels
from wnq.quantizer import Quantized, check_bits, compute_dtype
from wnq.starting import StartsFromData, across_processes

Bound = float | Tensor

SMALLEST_STEP = 1e-12
"""What a learned step of zero is read as."""


class _Magnitude(torch.autograd.Function):
    """``max(|step|, SMALLEST_STEP)``; backward, ``g * factor * sign(step)``, also below the floor."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(step)
        ctx.factor = factor
        return step.abs().clamp(min=SMALLEST_STEP)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (step,) = ctx.saved_tensors
        return grad * ctx.factor * step.sign(), None


def positive(step: Tensor, factor: float = 1.0) -> Tensor:
    """Return the magnitude of a learned step, at least :data:`SMALLEST_STEP`, differentiably; its gradient times ``factor``.

    A large learning rate can carry a step past zero. Read as its magnitude it turns back there; held at a floor instead, it would
    make the layer's output vanish, and a BatchNorm behind it would never let it return.
    """
    return _Magnitude.apply(step, factor)  # pyright: ignore[reportReturnType]


def starting_step(magnitude: Tensor, high: Tensor) -> Tensor:
    r"""Return :math:`2\,\mathrm{mean}|v| / \sqrt{Q_p}`, or :math:`1/Q_p` where the mean is zero."""
    return torch.where(magnitude > 0, 2 * magnitude / high.sqrt(), 1 / high)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of two tensors of one shape, accumulated in float32 at least; one BLAS pass where their layouts agree."""
    a, b = a.to(compute_dtype(a)), b.to(compute_dtype(b))
    if a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))
    if a.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b)):
        return torch.dot(a.permute(0, 2, 3, 1).reshape(-1), b.permute(0, 2, 3, 1).reshape(-1))
    return (a * b).sum()


def _fused(x: Tensor, step: Tensor, low: Bound, high: Bound, ewgs: float) -> bool:
    """Whether the kernels can do it: not with bounds that only the device knows."""
    if ewgs or not kernels.usable(x):
        return False
    known = isinstance(low, float) and isinstance(high, float)
    return known and step.dtype == torch.float32 and step.numel() == 1 and step.device == x.device


class RoundToStep(torch.autograd.Function):
    r"""``step * round(clamp(x / step, low, high))`` with LSQ's gradients, in few passes over memory.

    With v = x/step, the gradient of the step is :math:`\sum g (\bar v - v)` inside the bounds and :math:`\sum g\,\bar v`
    outside. Since the output is :math:`y = \bar v\,step` and the input's gradient is :math:`d = g` inside and 0 outside,
    it equals :math:`(\langle g, y\rangle - \langle d, x\rangle) / step`: two inner products, nothing else saved.

    On CUDA one kernel does either pass. There alone ``factor`` may be given, of a step of any sign: :func:`positive` is part
    of the kernels then.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, step: Tensor, low: Bound, high: Bound, ewgs: float = 0.0, factor: float | None = None
    ) -> Tensor:
        ctx.bounds, ctx.ewgs = (low, high), ewgs
        ctx.fused = factor is not None or _fused(x, step, low, high, ewgs)
        if ctx.fused:
            from wnq.kernels import rounding as kernel

            smallest = 0.0 if factor is None else SMALLEST_STEP
            y, step, ctx.slope = kernel.forward(x, step, low, high, factor, smallest)  # pyright: ignore[reportArgumentType]
            # The place between is that of the rounded values, where ``wnq.compact`` learns that they are no longer needed.
            ctx.save_for_backward(x, step, step)
            return y
        exact = x.to(compute_dtype(x))
        if isinstance(low, Tensor) or isinstance(high, Tensor) or torch.compiler.is_compiling():
            # Torch 2.11 compiles a result that is another one's alias, or was changed in place, without a gradient.
            value = torch.clamp(exact / step, low, high).round() * step  # pyright: ignore[reportArgumentType, reportCallIssue]
            value = value if exact is x else value.to(x.dtype)
        else:
            scaled = exact / step if exact is x else exact.div_(step)
            value = scaled.clamp_(low, high).round_().mul_(step).to(x.dtype)
        bounds = (low, high) if isinstance(low, Tensor) else ()
        ctx.save_for_backward(x, value, step, *bounds)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, value, step, *bounds = ctx.saved_tensors
        if ctx.fused:
            return *_fused_backward(ctx, grad, x, step), None, None, None, None
        low, high = bounds or ctx.bounds
        # Half-precision input stays so here: only elements within a rounding error of a bound can change sides.
        scaled = x / step.to(x.dtype)
        if bounds or torch.compiler.is_compiling():
            grad_x = torch.where((scaled > low) & (scaled < high), grad, 0)
        else:
            # In place of the quotient: fresh memory costs more than the pass that fills it.
            grad_x = torch.ops.aten.hardtanh_backward.grad_input(grad, scaled, low, high, grad_input=scaled)
        grad_step = None
        if ctx.needs_input_grad[1]:
            grad_step = ((_inner(grad, value) - _inner(grad_x, x)) / step).to(step.dtype).reshape(step.shape)
        if ctx.ewgs:
            # Of the input only: the step keeps LSQ's gradient, which the rescaling would bias.
            grad_x = grad_x + grad_x.abs() * ((x - value) / (step * (high - low)) * ctx.ewgs).to(grad_x.dtype)
        return grad_x, grad_step, None, None, None, None


def _fused_backward(ctx: Any, grad: Tensor, x: Tensor, step: Tensor) -> tuple[Tensor, Tensor | None]:
    from wnq.kernels import rounding as kernel

    if torch.is_grad_enabled():
        raise RuntimeError("rounding to a step has no second derivative; take the first without create_graph=True.")
    of_step = ctx.needs_input_grad[1]
    return kernel.backward(kernels.ordered_as(grad, x), x, step, ctx.slope, *ctx.bounds, of_step=of_step)


class LearnedStep(StartsFromData):
    r"""A learned step between equidistant levels; inputs are unsigned or signed as the first batch is.

    Forward: :math:`\hat v = s \cdot \mathrm{round}(\mathrm{clip}(v/s, -Q_n, Q_p))`.
    Gradient: :math:`d\hat v/dv = 1` strictly inside the clip range, 0 outside; :math:`d\hat v/ds = \bar v - v/s` inside,
    :math:`-Q_n` or :math:`Q_p` outside, multiplied by :math:`1/\sqrt{N Q_p}` with N the number of weights, or of
    features of one sample. Signed: :math:`Q_n = 2^{k-1}`, :math:`Q_p = 2^{k-1}-1`; unsigned: 0 and :math:`2^k-1`.
    The step starts at :math:`2\,\mathrm{mean}|v| / \sqrt{Q_p}`.

    As an input quantizer it meets its first batch in :meth:`observe_`: that batch sets the step and decides the sign: unsigned
    if no value is negative (after a ReLU), signed otherwise. All processes of a distributed job decide together.

    Args:
        bits: 1 to 8; a weight needs at least 2, because one signed bit has no positive level.
        is_weight: the tensor is a weight (signed, initialised by :meth:`reset_`) rather than an activation.

    References:
        S. K. Esser et al., Learned Step Size Quantization, arXiv:1902.08153, ICLR 2020, Eq. 1-5.

    Differences from the paper: whether activations are signed is decided from data instead of by layer; a first batch of
    zeros starts the step at ``1 / Q_p``; a step that training carries past zero is read as its magnitude; N counts the
    features of one sample, so that batch size and number of processes do not matter.
    """

    step: nn.Parameter
    offset: Tensor

    def __init__(self, bits: int, *, is_weight: bool) -> None:
        super().__init__(is_weight=is_weight)
        self.bits = check_bits(
            bits, where="bits of a learned-step weight" if is_weight else "bits", low=2 if is_weight else 1
        )
        self.step = nn.Parameter(torch.ones(()))
        self.register_buffer("offset", torch.tensor(float(2 ** (bits - 1)) if is_weight else 0.0))
        self._signed: bool | None = True if is_weight else None

    @property
    def signed(self) -> bool | None:
        """Whether negative values have levels; None before the first batch."""
        if self._signed is None and not torch.compiler.is_compiling() and self.ready:
            self._signed = bool(self.offset > 0)
        return self._signed

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._signed = True if self.is_weight else bool(self.offset > 0) if self.ready else None

    def start_(self, x: Tensor) -> None:
        """Set the step and, for an input, the sign."""
        magnitude = x.abs().mean()
        if not self.is_weight:
            magnitude = across_processes(magnitude)
            self.offset.copy_(across_processes((x < 0).any().to(x.dtype), "max") * 2 ** (self.bits - 1))
        high = (2**self.bits - 1 - self.offset.to(x.dtype)).clamp(min=1)
        self.step.data.copy_(starting_step(magnitude, high))

    def _bounds(self) -> tuple[Bound, Bound]:
        if self.signed is None:
            return -self.offset, 2**self.bits - 1 - self.offset
        low = -float(2 ** (self.bits - 1)) if self.signed else 0.0
        return low, low + 2**self.bits - 1

    def forward(self, x: Tensor) -> Tensor:
        """Return the rounded values."""
        self.check_ready()
        low, high = self._bounds()
        peak = 2 ** (self.bits - 1) - 1 if self.is_weight or self.signed else 2**self.bits - 1
        features = x.numel() if self.is_weight else math.prod(x.shape[1:])
        step, factor = self.step.to(compute_dtype(x)), (max(1, features) * max(1, peak)) ** -0.5
        if _fused(x, step, low, high, self.ewgs):
            return RoundToStep.apply(x, step, low, high, 0.0, factor)  # pyright: ignore[reportReturnType]
        return RoundToStep.apply(x, positive(step, factor), low, high, self.ewgs)  # pyright: ignore[reportReturnType]

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, integer levels from -Qn to Qp, and the step."""
        self.check_ready()
        step = positive(self.step.detach().to(x.dtype))
        integers = torch.clamp(x / step, *self._bounds()).round()  # pyright: ignore[reportArgumentType, reportCallIssue]
        levels = torch.arange(2**self.bits, device=x.device, dtype=step.dtype) - self.offset
        return Quantized((integers + self.offset).to(torch.uint8), levels, step.clone(), self.axis)

    def extra_repr(self) -> str:
        """Show width and sign in ``print(model)``."""
        sign = {True: "signed", False: "unsigned", None: "sign decided by the first batch"}[self.signed]
        return f"bits={self.bits}, {sign}"
