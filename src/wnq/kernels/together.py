"""The weights of all layers by the largest of each: two launches forward, two backward, however many layers there are.

Rounding as in ``rounding``. The weights are rows of one matrix, each row in one weight's possession and one program's care. The
first launch leaves what it found in each row; in the second, each program puts together the rows of its weight before it goes on.
"""
# pyright: basic, reportMissingImports=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from wnq.kernels.maximum import _level, gradient, through_maximum

OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
PARTS = 512
"""Rows whose findings a program reads at once."""


@triton.jit
def _find(w, parts, WIDTH: tl.constexpr):
    """The largest magnitude of a row, as the integer of the same bits: the order is the same, a NaN comes last."""
    row = tl.program_id(0).to(tl.int64)
    bits = tl.load(w + row * WIDTH + tl.arange(0, WIDTH)).to(tl.int32, bitcast=True)
    tl.store(parts + row, tl.max(bits & 0x7FFFFFFF, 0))


@triton.jit
def _round(
    w, y, parts, maximum, owner, first, divisors, inverses, kinds,
    DIVIDES: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(owner + row)
    begin, end = tl.load(first + weight), tl.load(first + weight + 1)
    found = tl.zeros((PARTS,), tl.int32)
    for start in range(begin, end, PARTS):
        part = start + tl.arange(0, PARTS)
        found = tl.maximum(found, tl.load(parts + part, mask=part < end, other=0))
    largest = tl.max(found, 0).to(tl.float32, bitcast=True)
    if row == begin:
        tl.store(maximum + weight, largest)
    unit = tl.where(largest == 0, 1.0, largest)
    divisor, kind = tl.load(divisors + weight), tl.load(kinds + weight)
    if DIVIDES:
        step = tl.div_rn(largest, divisor)
    else:
        step = largest * tl.load(inverses + weight)
    place = row * WIDTH + tl.arange(0, WIDTH)
    u = tl.div_rn(tl.load(w + place), unit)
    if kind == 0:
        tl.store(y + place, _level(u, divisor, "sign") * step)
    elif kind == 1:
        tl.store(y + place, _level(u, divisor, "full") * step)
    else:
        tl.store(y + place, _level(u, divisor, "symmetric") * step)


@triton.jit
def _collect(grad, w, y, parts, maximum, owner, WIDTH: tl.constexpr):
    """How often the maximum is attained in a row, and <g, y - w> there."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.load(maximum + tl.load(owner + row))
    place = row * WIDTH + tl.arange(0, WIDTH)
    weight = tl.load(w + place)
    ties = tl.sum(tl.where(tl.abs(weight) == largest, 1.0, 0.0), 0)
    inner = tl.sum((tl.load(y + place) - weight) * tl.load(grad + place), 0)
    tl.store(parts + row, ties)
    tl.store(parts + tl.num_programs(0) + row, inner)


@triton.jit
def _apply(grad, w, grad_w, parts, maximum, owner, first, gains, PARTS: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(owner + row)
    begin, end = tl.load(first + weight), tl.load(first + weight + 1)
    ties, inner = tl.zeros((PARTS,), tl.float32), tl.zeros((PARTS,), tl.float32)
    for start in range(begin, end, PARTS):
        part = start + tl.arange(0, PARTS)
        ties += tl.load(parts + part, mask=part < end, other=0.0)
        inner += tl.load(parts + tl.num_programs(0) + part, mask=part < end, other=0.0)
    largest = tl.load(maximum + weight)
    through = through_maximum(largest, tl.sum(ties, 0), tl.sum(inner, 0), tl.load(gains + weight))
    place = row * WIDTH + tl.arange(0, WIDTH)
    tl.store(grad_w + place, gradient(tl.load(grad + place), tl.load(w + place), largest, through))


def forward(
    w: Tensor, *, owner: Tensor, first: Tensor, divisor: Tensor, inverse: Tensor, kind: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``m / divisor * level(w / m)`` and the m = max|w| of each weight.

    Args:
        w: float32, ``(rows, width)``, the width a power of two; the last row of a weight is filled up with zeros.
        owner: int64, ``(rows,)``: the weight that a row belongs to.
        first: int64, ``(weights + 1,)``: the row that each weight begins with, and the number of rows.
        divisor: float32, ``(weights,)``: the largest level of each.
        inverse: of the divisor.
        kind: int64, ``(weights,)``: 0 the sign, 1 the full grid, 2 the symmetric one.
    """
    rows, width = w.shape
    y, maximum = torch.empty_like(w), torch.empty_like(divisor)
    parts = torch.empty(rows, dtype=torch.int32, device=w.device)
    _find[(rows,)](w, parts, WIDTH=width, **OPTIONS)
    # By a Python number torch divides on the CPU, and on CUDA multiplies by its inverse in float32.
    _round[(rows,)](
        w, y, parts, maximum, owner, first, divisor, inverse, kind,
        DIVIDES=not w.is_cuda, PARTS=PARTS, WIDTH=width, **OPTIONS,
    )  # fmt: skip
    return y, maximum


def backward(
    grad: Tensor, w: Tensor, y: Tensor, maximum: Tensor, *, owner: Tensor, first: Tensor, gain: Tensor
) -> Tensor:
    """Return the gradient of the weights.

    Args:
        grad: of the output, laid out as it is; zeros where a row is filled up.
        w: as in :func:`forward`.
        y: from :func:`forward`.
        maximum: from :func:`forward`.
        owner: as in :func:`forward`.
        first: as in :func:`forward`.
        gain: float32, ``(weights,)``: share of the gradient through the maximum.
    """
    (rows, width), grad_w = w.shape, torch.empty_like(w)
    parts = torch.empty(2 * rows, dtype=torch.float32, device=w.device)
    _collect[(rows,)](grad, w, y, parts, maximum, owner, WIDTH=width, **OPTIONS)
    _apply[(rows,)](grad, w, grad_w, parts, maximum, owner, first, gain, PARTS=PARTS, WIDTH=width, **OPTIONS)
    return grad_w
