"""Weights by the largest of them: one launch for a small layer, two for a large one, forward and backward.

Rounding as in ``rounding``. A small layer is one program's: its largest weight first, then all of them. In a large layer each
program leaves what it found in its part, and each program of the second launch puts the parts together before it goes on.
"""
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from wnq.kernels.rounding import clamp, round_half_even

ALONE = 2**16
"""Up to so many weights are one program's: a second launch would cost more."""
PROGRAMS = 1024


def _plan(n: int) -> tuple[int, dict[str, int | bool]]:
    """Return the number of programs for ``n`` weights and how each of them works."""
    block, warps = (8192, 32) if 4096 < n <= ALONE else (4096, 8)
    programs = 1 if n <= ALONE else min(-(-n // block), PROGRAMS)
    return programs, {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit
def _largest(w, n, BLOCK: tl.constexpr):
    """The largest magnitude in this program's part, as the integer of the same bits: the order is the same, a NaN comes last."""
    found = tl.zeros((BLOCK,), tl.int32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        bits = tl.load(w + place, mask=place < n, other=0.0).to(tl.int32, bitcast=True)
        found = tl.maximum(found, bits & 0x7FFFFFFF)
    return tl.max(found, 0)


@triton.jit
def _level(u, divisor, GRID: tl.constexpr):
    """The integer level of u = w / max|w|, as :class:`wnq.quantizer.Uniform` has it."""
    if GRID == "sign":
        level = tl.where(u >= 0, 1.0, tl.where(u < 0, -1.0, u))
    elif GRID == "full":
        level = 2 * clamp(tl.floor(u * (divisor * 0.5) + (divisor + 1) * 0.5), 0.0, divisor) - divisor
    else:
        level = clamp(round_half_even(u * divisor), -divisor, divisor)
    return level


@triton.jit
def _find(w, parts, n, BLOCK: tl.constexpr):
    tl.store(parts + tl.program_id(0), _largest(w, n, BLOCK))


@triton.jit
def _round(
    w, y, parts, maximum, n, divisor, inverse,
    GRID: tl.constexpr, DIVIDES: tl.constexpr, ONE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if ONE:
        bits = _largest(w, n, BLOCK)
    else:
        part = tl.arange(0, PARTS)
        bits = tl.max(tl.load(parts + part, mask=part < tl.num_programs(0), other=0), 0)
    largest = bits.to(tl.float32, bitcast=True)
    unit = tl.where(largest == 0, 1.0, largest)
    if DIVIDES:
        step = tl.div_rn(largest, divisor)
    else:
        step = largest * inverse
    if tl.program_id(0) == 0:
        tl.store(maximum, largest)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        u = tl.div_rn(tl.load(w + place, mask=place < n, other=0.0), unit)
        tl.store(y + place, _level(u, divisor, GRID) * step, mask=place < n)


@triton.jit
def _sums(grad, w, y, largest, n, BLOCK: tl.constexpr):
    """How often the maximum is attained in this program's part, and <g, y - w> there."""
    ties = tl.zeros((BLOCK,), tl.float32)
    inner = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < n
        weight = tl.load(w + place, mask=there, other=0.0)
        difference = tl.load(y + place, mask=there, other=0.0) - weight
        ties += tl.where((tl.abs(weight) == largest) & there, 1.0, 0.0)
        inner += difference * tl.load(grad + place, mask=there, other=0.0)
    return tl.sum(ties, 0), tl.sum(inner, 0)


@triton.jit
def through_maximum(largest, ties, inner, gain):
    """What each of the largest weights gets beyond its own gradient, but for its sign, given <g, y - w>."""
    unit = tl.where(largest == 0, 1.0, largest)
    through = tl.where(largest == 0, 0.0, 1.0) * inner * tl.div_rn(gain, unit * tl.where(ties < 1, 1.0, ties))
    return tl.where(gain == 0, 0.0, through)


@triton.jit
def gradient(grad, weight, largest, through):
    """The gradient of a weight, given that of what it was rounded to; none where all weights are zero."""
    more = tl.where(weight == largest, through, tl.where(weight == -largest, -through, 0.0))
    return grad * tl.where(largest == 0, 0.0, 1.0) + more


@triton.jit
def _collect(grad, w, y, parts, maximum, n, BLOCK: tl.constexpr):
    ties, inner = _sums(grad, w, y, tl.load(maximum), n, BLOCK)
    tl.store(parts + tl.program_id(0), ties)
    tl.store(parts + tl.num_programs(0) + tl.program_id(0), inner)


@triton.jit
def _apply(
    grad, w, y, grad_w, parts, maximum, n, gain, ONE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    largest = tl.load(maximum)
    if ONE:
        ties, inner = _sums(grad, w, y, largest, n, BLOCK)
    else:
        part, programs = tl.arange(0, PARTS), tl.num_programs(0)
        ties = tl.sum(tl.load(parts + part, mask=part < programs, other=0.0), 0)
        inner = tl.sum(tl.load(parts + programs + part, mask=part < programs, other=0.0), 0)
    through = through_maximum(largest, ties, inner, gain)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < n
        weight = tl.load(w + place, mask=there, other=0.0)
        own = tl.load(grad + place, mask=there, other=0.0)
        tl.store(grad_w + place, gradient(own, weight, largest, through), mask=there)


def forward(w: Tensor, divisor: int, grid: str) -> tuple[Tensor, Tensor]:
    """Return ``m / divisor * level(w / m)`` and m = max|w|.

    Args:
        w: float32, what :func:`wnq.kernels.usable` accepts.
        divisor: the largest level.
        grid: ``"full"``, ``"symmetric"``, or ``"sign"`` at one bit.
    """
    n, y, maximum = w.numel(), torch.empty_like(w), w.new_empty(())
    programs, how = _plan(n)
    parts = None if programs == 1 else torch.empty(programs, dtype=torch.int32, device=w.device)
    if parts is not None:
        _find[(programs,)](w, parts, n, **how)
    # By a Python number torch divides on the CPU, and on CUDA multiplies by its inverse in float32.
    _round[(programs,)](
        w, y, parts, maximum, n, float(divisor), 1 / divisor,
        GRID=grid, DIVIDES=not w.is_cuda, ONE=programs == 1, PARTS=PROGRAMS, **how,
    )  # fmt: skip
    return y, maximum


def backward(grad: Tensor, w: Tensor, y: Tensor, maximum: Tensor, gain: float) -> Tensor:
    """Return the gradient of the weight.

    Args:
        grad: of the output, in the memory order of ``w``.
        w: as in :func:`forward`.
        y: from :func:`forward`.
        maximum: from :func:`forward`.
        gain: share of the gradient through the maximum.
    """
    if gain == 0:
        return grad * maximum.sign()
    n, grad_w = w.numel(), torch.empty_like(w)
    programs, how = _plan(n)
    parts = None if programs == 1 else torch.empty(2 * programs, dtype=torch.float32, device=w.device)
    if parts is not None:
        _collect[(programs,)](grad, w, y, parts, maximum, n, **how)
    _apply[(programs,)](grad, w, y, grad_w, parts, maximum, n, float(gain), ONE=programs == 1, PARTS=PROGRAMS, **how)
    return grad_w
