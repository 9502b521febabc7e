"""What a quantizer made of a tensor, and what the law says it makes."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from wnq.quantizer import Quantized
from wnq.tails import pieces
from wnq.tails.flat import Flat
from wnq.tails.moments import ratio, safe_scale
from wnq.tails.pieces import Array, Room, blocks, dot, in_threads, plain, readable, rows_of
from wnq.theory.expected import step_width


@dataclass(frozen=True)
class ErrorStats:
    """What a quantizer made of a tensor."""

    relative_error: float
    """|w - w_q|^2 / |w|^2. Beyond 1 where the method does not keep magnitudes and leaves them to a BatchNorm."""
    rescale: float
    """Least-squares factor <w, w_q> / |w_q|^2: 1 where magnitudes are kept. NaN if w_q is zero."""
    rescaled_error: float
    """|w - rescale * w_q|^2 / |w|^2 = 1 - cos^2(w, w_q), 0 to 1: the error of direction, whatever the scale."""
    law_error: float | None
    """Rounding error the law predicts from the actual steps, mean(step^2) / 12 / mean(w^2). None for unevenly spaced
    levels. It knows no clipping: where the grid ends before the weights do, the measured error is larger."""
    zeros: float
    """Fraction of weights that become exactly 0."""
    entropy: float
    """Zero-order entropy of the codes in bits a weight, 0 to bits: what an ideal entropy coder would need."""
    levels_used: int
    """Number of distinct codes that occur."""


def predicted_error(bits: int, crest: float, grid: str = "full") -> float:
    """Return the relative error |w - w_q|^2 / |w|^2 that the law predicts for max scaling.

    A grid over [-m, m], m = max|w|, has the step D = m / N, N = 2^(k-1) - 1 (symmetric), or 2 m / M, M = 2^k - 1.
    If the density is flat across one step, the rounding error is uniform in [-D/2, D/2] and has variance D^2 / 12.
    Divided by the mean square (m / C)^2 this is C^2 / (12 N^2), or C^2 / (3 M^2): only width and crest factor count.

    Args:
        bits: 1 to 8; at least 2 on the symmetric grid.
        crest: the crest factor C, at least 1.
        grid: ``"full"`` or ``"symmetric"``.

    Raises:
        ValueError: bits or grid out of range.
    """
    return (step_width(bits, grid) * crest) ** 2 / 12


def _mean_square_step(quantized: Quantized, scale: float) -> float | None:
    """Return the mean over channels of the squared level spacing; None if the levels are not evenly spaced."""
    if quantized.n_levels < 2:
        return None
    gaps = quantized.levels.cpu().double().diff(dim=-1)
    spacing = gaps.mean(-1)
    if not torch.allclose(gaps, spacing.unsqueeze(-1).expand_as(gaps), rtol=1e-5, atol=0):
        return None
    return (spacing * quantized.scale.cpu().double() * scale).square().mean().item()


def error_stats(weight: Tensor, quantized: Quantized) -> ErrorStats:
    """Compare a float weight with its quantized form; NaN and infinity in it, and their codes, are left out.

    Raises:
        ValueError: the two differ in shape; complex numbers, a sparse tensor, or one without data.
    """
    if weight.shape != quantized.codes.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but its codes have {tuple(quantized.codes.shape)}; "
            "pass quantizer.quantize(weight) of the same weight."
        )
    weight, codes = readable(weight, where="error_stats"), quantized.codes
    book = quantized.codebook.to(weight.device).double()
    scale = 1.0
    if weight.dtype == torch.float64:
        flat = Flat(weight)
        peak = flat.moments().peak / flat.scale
        scale = safe_scale(max(peak, book.abs().max().item()))
    codes = codes.to(weight.device)
    if book.ndim > 1:
        weight, codes = rows_of(weight, quantized.axis), rows_of(codes, quantized.axis)
    else:
        weight, codes = weight.reshape(1, -1), codes.reshape(1, -1)
    gather = _gather if weight.device.type == "cpu" else _gather_on_device
    (error, energy, inner, norm, zeros), used = gather(weight, codes, book.reshape(-1, book.shape[-1]) * scale, scale)
    count = int(used.sum())
    share = used[used > 0] / max(1, count)
    rescale = ratio(inner, norm)
    step = _mean_square_step(quantized, scale)
    return ErrorStats(
        relative_error=ratio(error, energy),
        rescale=rescale,
        # Rounding can push an exact fit below zero; a w_q of zeros leaves the whole weight as error.
        rescaled_error=max(0.0, 1 - (inner * rescale / energy if norm > 0 else 0.0)) if energy > 0 else math.nan,
        law_error=None if step is None else ratio(step * count / 12, energy),
        zeros=ratio(zeros, count),
        entropy=max(0.0, -float((share * np.log2(share)).sum())),
        levels_used=int((used > 0).sum()),
    )


def _gather(weight: Tensor, codes: Tensor, book: Tensor, scale: float) -> tuple[list[float], Array]:
    """Return |w - w_q|^2, |w|^2, <w, w_q>, |w_q|^2 and the number of zeros of matrices, and how often each code occurs."""
    parts = blocks(weight, pieces.CHUNK)
    values, levels = book.numpy().reshape(-1), book.shape[1]

    def of_block(i: int, room: Room) -> tuple[list[float], Array]:
        piece = weight[parts[i]].reshape(-1)
        n = piece.numel()
        index = room.array(0, n, np.intp)
        np.copyto(index, codes[parts[i]].reshape(-1).numpy(), casting="unsafe")
        exact = np.multiply(plain(piece, room), scale, out=room.array(2, n, np.float64), dtype=np.float64)
        energy, finite = dot(exact, exact), None
        if not math.isfinite(energy):
            finite = np.isfinite(exact)
            exact = exact[finite]
            energy = dot(exact, exact)
        used = np.bincount(index if finite is None else index[finite], minlength=256)
        if len(book) > 1:
            first = np.arange(parts[i][0].start, parts[i][0].stop) * levels
            table = index.reshape(len(first), -1)
            np.add(table, first[:, None], out=table)
        index = index if finite is None else index[finite]
        quantized = np.take(values, index, out=room.array(1, index.size, np.float64), mode="clip")
        sums = energy, dot(exact, quantized), dot(quantized, quantized)
        zeros = index.size - int(np.count_nonzero(quantized))
        np.subtract(exact, quantized, out=exact)
        return [dot(exact, exact), *sums, zeros], used

    found = in_threads(of_block, len(parts))
    used = sum((row[1] for row in found), np.zeros(256, np.int64))
    return [math.fsum(column) for column in zip(*(row[0] for row in found), strict=True)] or [0.0] * 5, used


def _gather_on_device(weight: Tensor, codes: Tensor, book: Tensor, scale: float) -> tuple[list[float], Array]:
    used = torch.zeros(256, dtype=torch.long, device=weight.device)
    sums = torch.zeros(5, dtype=torch.float64, device=weight.device)
    for rows, columns in blocks(weight, pieces.DEVICE_CHUNK):
        index = codes[rows, columns].long()
        w = weight[rows, columns].double() * scale
        finite = torch.isfinite(w)
        # The codes of non-finite elements go to one place more, which is dropped.
        used += torch.bincount(torch.where(finite, index, 256).reshape(-1), minlength=257)[:256]
        own = (book[rows] if len(book) > 1 else book).expand(len(index), -1)
        w, v = (torch.where(finite, x, 0.0) for x in (w, own.gather(1, index)))
        zeros = ((v == 0) & finite).sum().double()
        sums += torch.stack([(w - v).square().sum(), w.square().sum(), (w * v).sum(), v.square().sum(), zeros])
    return sums.tolist(), used.cpu().numpy()
