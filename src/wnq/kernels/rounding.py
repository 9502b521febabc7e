"""Inputs to the multiples of a step: one pass over memory forward, one backward.

Without contraction (``enable_fp_fusion=False``) and with the division of IEEE 754, each operation rounds as it does alone: the
values are those of the plain operations bit for bit. In half precision the plain backward pass divides in that type; here it is
float32, and an input within a rounding error of a bound can change sides.
"""
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
PROGRAMS = 1024
"""Backward: at most so many, each with one sum for the step's gradient, added up in a fixed order."""
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def clamp(v, low, high):
    """Limit to [low, high]; a NaN stays one."""
    return tl.where(v < low, low, tl.where(v > high, high, v))


@triton.jit
def round_half_even(v):
    """Round where |v| < 2^22: next to 1.5 * 2^23 a float32 has no place for a fraction."""
    return (v + 12582912.0) - 12582912.0


@triton.jit
def _forward(x, y, step, magnitude, slope, n, low, high, smallest, factor, BLOCK: tl.constexpr):
    learned = tl.load(step)
    size = tl.abs(learned)
    size = tl.where(size < smallest, smallest, size)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = place < n
    v = tl.div_rn(tl.load(x + place, mask=there).to(tl.float32), size)
    rounded = round_half_even(clamp(v, low, high)) * size
    tl.store(y + place, rounded.to(y.dtype.element_ty), mask=there)
    if tl.program_id(0) == 0:
        tl.store(magnitude, size)
        tl.store(slope, tl.where(learned > 0, factor, tl.where(learned < 0, -factor, 0.0)))


@triton.jit
def _backward(grad, x, grad_x, sums, magnitude, slope, n, low, high, OF_STEP: tl.constexpr, BLOCK: tl.constexpr):
    size = tl.load(magnitude)
    total = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n, tl.num_programs(0).to(tl.int64) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        there = place < n
        g = tl.load(grad + place, mask=there, other=0.0)
        exact = tl.load(x + place, mask=there, other=0.0).to(tl.float32)
        v = tl.div_rn(exact, size)
        outside = (v <= low) | (v >= high)
        tl.store(grad_x + place, tl.where(outside, 0.0, g), mask=there)
        if OF_STEP:
            rounded = round_half_even(clamp(v, low, high)) * size
            total += g.to(tl.float32) * (rounded - tl.where(outside, 0.0, exact))
    if OF_STEP:
        tl.store(sums + tl.program_id(0), tl.sum(total, 0) / size * tl.load(slope))


def forward(
    x: Tensor, step: Tensor, low: float, high: float, factor: float | None, smallest: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``s * round(clamp(x / s, low, high))``, s, and ds/dstep, with s = max(|step|, smallest).

    Args:
        x: what :func:`wnq.kernels.usable` accepts.
        step: one float32 number.
        low: a whole number, as is ``high``; both below 2^22.
        high: the largest multiple.
        factor: multiplies ds/dstep, which is the sign of the step; None: 1.
        smallest: of s.
    """
    y, magnitude, slope, n = torch.empty_like(x), torch.empty_like(step), torch.empty_like(step), x.numel()
    factor = 1.0 if factor is None else factor
    grid = (-(-n // BLOCK),)
    _forward[grid](x, y, step, magnitude, slope, n, low, high, smallest, factor, BLOCK=BLOCK, **OPTIONS)
    return y, magnitude, slope


def backward(
    grad: Tensor, x: Tensor, magnitude: Tensor, slope: Tensor, low: float, high: float, *, of_step: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of x and, if asked for, of the step.

    Args:
        grad: of the output, in the memory order of ``x``.
        x: as in :func:`forward`.
        magnitude: s, from :func:`forward`.
        slope: from :func:`forward`.
        low: as in :func:`forward`.
        high: as in :func:`forward`.
        of_step: whether the step's gradient is wanted.
    """
    grad_x, n = torch.empty_like(x), x.numel()
    programs = min(-(-n // BLOCK), PROGRAMS)
    sums = torch.empty(programs, dtype=torch.float32, device=x.device) if of_step else None
    _backward[(programs,)](
        grad, x, grad_x, sums, magnitude, slope, n, low, high, OF_STEP=of_step, BLOCK=BLOCK, **OPTIONS
    )
    return grad_x, None if sums is None else sums.sum()
