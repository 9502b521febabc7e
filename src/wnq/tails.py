r"""One tensor in numbers: its tail, its quantization error, and the law between the two.

With
``C = max|w| / rms(w)``, the crest factor, a uniform grid over ``[-max|w|, max|w|]`` errs by about ``C^2 / (12 N^2)``
(:func:`predicted_error`), so a method lowers the rounding error at a given width exactly as far as it lowers C.

Sums run in float64 over pieces of :data:`CHUNK` elements, so memory stays bounded for any weight. NaN and infinity are
counted and left out of every other number. What is undefined (the crest factor of an all-zero weight) is NaN.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.quantizer import GRIDS, Quantized, check_bits

CHUNK = 1 << 22
"""Elements converted to float64 at a time (32 MiB)."""

TAIL = 3.0
"""Where the tail begins, in units of rms. A Gaussian has 0.27 % of its samples beyond, a Laplace density 1.4 %."""


@dataclass(frozen=True)
class TensorStats:
    """Statistics of a float tensor, over its finite elements."""

    parameters: int
    """Number of elements, non-finite ones included."""
    nonfinite: int
    """Number of NaN and infinite elements."""
    peak: float
    """max|w|; 0 for a tensor without finite elements."""
    rms: float
    """Root of the mean square (about zero)."""
    crest: float
    """Crest factor max|w| / rms, at least 1: uniform 1.73, d Gaussian samples about sqrt(2 ln d). NaN if rms is 0."""
    kurtosis: float
    """Fourth over squared second central moment, at least 1: uniform 1.8, Gaussian 3, Laplace 6. NaN if constant."""
    tail_mass: float
    """Fraction of elements with |w| > 3 rms, 0 to 1/9. NaN if rms is 0."""
    outlier_energy: float
    """Share of the squared norm held by those elements, 0 to 1. NaN if rms is 0."""


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


@dataclass(frozen=True)
class Histogram:
    """Counts of w / rms, so that layers and models compare. The outermost bins also hold what lies beyond them."""

    edges: tuple[float, ...]
    """Ascending, evenly spaced, in units of rms; one more than there are counts."""
    counts: tuple[int, ...]
    """Finite elements a bin; they add up to all of them."""

    def density(self) -> list[float]:
        """Return counts / (n * bin width), which compares histograms of different ranges; zeros if all is empty."""
        total = max(1, sum(self.counts))
        return [c / total / (self.edges[1] - self.edges[0]) for c in self.counts]


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
    if grid not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(map(repr, GRIDS))}, got {grid!r}.")
    check_bits(bits, where="bits", low=2 if grid == "symmetric" else 1)
    if grid == "symmetric":
        return crest**2 / (12 * (2 ** (bits - 1) - 1) ** 2)
    return crest**2 / (3 * (2**bits - 1) ** 2)


def _finite_chunks(weight: Tensor) -> Iterator[Tensor]:
    for chunk in weight.detach().reshape(-1).split(CHUNK):
        exact = chunk.double()
        finite = torch.isfinite(exact)
        yield exact if finite.all() else exact[finite]


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator > 0 else math.nan


def tensor_stats(weight: Tensor) -> TensorStats:
    """Return the statistics of a floating-point tensor of any shape and precision."""
    count, low, high = 0, math.inf, -math.inf
    for w in _finite_chunks(weight):
        if w.numel():
            count, low, high = count + w.numel(), min(low, w.min().item()), max(high, w.max().item())
    peak = max(-low, high) if count else 0.0
    total = square = 0.0
    # Division by the peak keeps squares and fourth powers of very small and very large weights in range.
    for w in _finite_chunks(weight):
        w = w / (peak or 1.0)
        total, square = total + w.sum().item(), square + w.square().sum().item()
    mean, rms = total / max(1, count), math.sqrt(square / max(1, count))
    second = fourth = beyond = outlier = 0.0
    for w in _finite_chunks(weight):
        w = w / (peak or 1.0)
        centred = (w - mean).square()
        second, fourth = second + centred.sum().item(), fourth + centred.square().sum().item()
        tail = w[w.abs() > TAIL * rms]
        beyond, outlier = beyond + tail.numel(), outlier + tail.square().sum().item()
    return TensorStats(
        parameters=weight.numel(),
        nonfinite=weight.numel() - count,
        peak=peak,
        rms=rms * peak,
        crest=_ratio(1.0, rms),
        kurtosis=_ratio(fourth * count, second**2) if low < high else math.nan,
        tail_mass=_ratio(beyond, count) if rms > 0 else math.nan,
        outlier_energy=_ratio(outlier, square),
    )


def _pieces(weight: Tensor, quantized: Quantized) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield float64 weights, their codes and their float64 quantized values, a bounded number at a time."""
    codes, levels, scale, axis = quantized
    if levels.ndim == 1 and scale.ndim == 0:
        for w, c in zip(weight.reshape(-1).split(CHUNK), codes.reshape(-1).split(CHUNK), strict=True):
            yield w.double(), c, quantized._replace(codes=c, axis=0).dequantize().double()
        return
    channels = weight.shape[axis]
    rows = max(1, CHUNK * channels // max(1, weight.numel()))
    for start in range(0, channels, rows):
        part = slice(start, start + rows)
        w, c = (t.narrow(axis, start, min(rows, channels - start)) for t in (weight, codes))
        piece = Quantized(c, levels[part] if levels.ndim > 1 else levels, scale[part] if scale.ndim else scale, axis)
        yield w.double(), c, piece.dequantize().double()


def _mean_square_step(quantized: Quantized) -> float | None:
    """Return the mean over channels of the squared level spacing; None if the levels are not evenly spaced."""
    if quantized.n_levels < 2:
        return None
    gaps = quantized.levels.double().diff(dim=-1)
    spacing = gaps.mean(-1)
    if not torch.allclose(gaps, spacing.unsqueeze(-1).expand_as(gaps), rtol=1e-5, atol=0):
        return None
    return (spacing * quantized.scale.double()).square().mean().item()


def error_stats(weight: Tensor, quantized: Quantized) -> ErrorStats:
    """Compare a finite float weight with its quantized form.

    Raises:
        ValueError: the two differ in shape.
    """
    if weight.shape != quantized.codes.shape:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)} but its codes have {tuple(quantized.codes.shape)}; "
            "pass quantizer.quantize(weight) of the same weight."
        )
    weight = weight.detach()
    error = energy = inner = norm = zeros = 0.0
    used = torch.zeros(256, dtype=torch.long, device=weight.device)
    for w, codes, values in _pieces(weight, quantized):
        error, energy = error + (w - values).square().sum().item(), energy + w.square().sum().item()
        inner, norm = inner + (w * values).sum().item(), norm + values.square().sum().item()
        zeros += (values == 0).sum().item()
        used += torch.bincount(codes.reshape(-1).long(), minlength=256)
    count = weight.numel()
    share = used[used > 0].double() / max(1, count)
    rescale = _ratio(inner, norm)
    step = _mean_square_step(quantized)
    return ErrorStats(
        relative_error=_ratio(error, energy),
        rescale=rescale,
        # Rounding can push an exact fit below zero; a w_q of zeros leaves the whole weight as error.
        rescaled_error=max(0.0, 1 - (inner * rescale / energy if norm > 0 else 0.0)) if energy > 0 else math.nan,
        law_error=None if step is None else _ratio(step * count / 12, energy),
        zeros=_ratio(zeros, count),
        entropy=max(0.0, -(share * share.log2()).sum().item()),
        levels_used=int((used > 0).sum()),
    )


def histogram(weight: Tensor, bins: int | None = None, *, limit: float | None = None) -> Histogram:
    """Count w / rms in evenly spaced bins over [-limit, limit].

    Args:
        weight: any floating-point tensor; an all-zero one counts into the middle bin.
        bins: at least 1; an odd number puts a bin astride zero. By default the width follows Scott's rule,
            3.5 n^(-1/3) rms, with at most 401 bins: tensors of one size then share a bin width, whatever their tails.
        limit: half the range in units of rms; by default at least the crest factor, so that nothing lies beyond.

    Raises:
        ValueError: bins or limit out of range.
    """
    if (bins is not None and bins < 1) or (limit is not None and not 0 < limit < math.inf):
        raise ValueError(f"histogram needs bins >= 1 and a finite limit > 0, got bins={bins} and limit={limit}.")
    stats = tensor_stats(weight)
    half = limit if limit is not None else (stats.crest if stats.rms > 0 else 1.0)
    number = bins or 1
    if bins is None:
        width = max(3.5 * max(1, stats.parameters - stats.nonfinite) ** (-1 / 3), half / 200)
        number = 2 * math.ceil(half / width - 0.5) + 1
        half = half if limit is not None else number * width / 2
    edges = torch.linspace(-half, half, number + 1, dtype=torch.float64, device=weight.device)
    counts = torch.zeros(number, dtype=torch.long, device=weight.device)
    for w in _finite_chunks(weight):
        place = torch.bucketize(w / (stats.rms or 1.0), edges[1:-1], right=True)
        counts += torch.bincount(place, minlength=number)
    return Histogram(tuple(edges.tolist()), tuple(counts.tolist()))
