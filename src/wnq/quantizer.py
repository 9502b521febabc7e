"""The contract: what a quantizer is, what it returns, and the two general-purpose ones.

Read this file first. A quantizer answers twice for the same tensor: ``forward(x)`` gives the quantized *values* with a
useful gradient (training), ``quantize(x)`` gives the exact *codes* behind them (packing, export, analysis). The first law
of the library is that both agree bit for bit: ``forward(x) == quantize(x).dequantize()``.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from wnq.ste import elementwise_scaled, straight_through

GRIDS = ("full", "symmetric")

FLOAT_BITS = 32
"""The width that means: leave it in floating point."""


class Quantized(NamedTuple):
    """A tensor as small integers: ``value = scale * levels[code]``.

    Attributes:
        codes: uint8, the shape of the tensor, values in ``[0, n_levels)``.
        levels: float, ``(n_levels,)`` or ``(channels, n_levels)``, ascending. Integers for every uniform quantizer, so an
            exporter can read the grid off them.
        scale: float, ``()`` or ``(channels,)``.
        axis: the dimension of ``codes`` that ``channels`` runs along (1 for transposed convolutions, else 0).
    """

    codes: Tensor
    levels: Tensor
    scale: Tensor
    axis: int = 0

    @property
    def n_levels(self) -> int:
        """Size of the grid, at most ``2**bits``."""
        return self.levels.shape[-1]

    @property
    def codebook(self) -> Tensor:
        """The values a code can stand for: ``(n_levels,)``, or ``(channels, n_levels)`` one row per channel."""
        return self.levels * self.scale.unsqueeze(-1) if self.scale.ndim else self.levels * self.scale

    def dequantize(self) -> Tensor:
        """Return the values, in the floating-point type of ``scale``. Equal to a look-up in :attr:`codebook`."""
        index = self.codes.long()
        if self.levels.ndim == 1:
            values = self.levels[index]
        else:
            channel = torch.arange(self.levels.shape[0], device=index.device)
            values = self.levels[along_axis(channel, index.ndim, self.axis), index]
        return values * along_axis(self.scale, index.ndim, self.axis)


class Quantizer(nn.Module):
    """Base class: a module whose ``forward`` is differentiable, pure and exactly reproduced by ``quantize``.

    The least a subclass writes is :meth:`encode`; it then has the straight-through gradient. Others override ``forward``.

    Computation runs in float32 (float64 for float64 input) and the result has the dtype, shape and device of the input.
    A NaN in the input stays a NaN in ``forward``, so that a training loop sees it; an infinity saturates or becomes NaN.
    ``quantize`` has no integer to offer for either and raises ``ValueError``.
    """

    bits: int
    """Width of a code, 1 to 8."""

    axis: int = 0
    """Dimension that per-channel statistics run along."""

    ewgs: float = 0.0
    """Element-wise gradient scaling of the rounding, see :func:`wnq.ste.elementwise_scaled`; 0: straight through."""

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and codebook of ``x``, which has :func:`compute_dtype`; what a NaN becomes does not matter."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the quantized values of ``x``. No side effects: reading ``layer.weight`` calls this."""
        exact = x.to(compute_dtype(x))
        quantized = self.encode(exact.detach())
        span = 1.0
        if self.ewgs:
            book = quantized.codebook
            span = book.amax() - book.amin()
        return self.pass_through(quantized.dequantize(), exact, span).to(x.dtype)

    @torch.no_grad()
    def quantize(self, x: Tensor) -> Quantized:
        """Return the exact integers behind ``forward(x)``.

        Raises:
            ValueError: ``x`` holds NaN or infinity.
        """
        check_finite(x, where="the tensor to quantize")
        return self.encode(x.detach().to(compute_dtype(x)))

    def pass_through(self, value: Tensor, surrogate: Tensor, span: float | Tensor) -> Tensor:
        """Return ``value`` with the gradient of ``surrogate``, as :attr:`ewgs` says; every rounding ends here.

        Args:
            value: the rounded values.
            surrogate: what they were before, in the same units.
            span: largest minus smallest level, in the same units.
        """
        if not self.ewgs:
            return straight_through(value, surrogate)
        return elementwise_scaled(value, surrogate, self.ewgs, span)

    def reset_(self, x: Tensor) -> None:
        """Set learned parameters from ``x`` anew (a weight was loaded); nothing to do for quantizers without any."""

    def observe_(self, x: Tensor) -> None:
        """See ``x`` once per training step, before the forward pass: update running statistics; most need nothing.

        A weight quantizer is given the float weight itself and may project it in place, under ``no_grad``.
        """

    def extra_repr(self) -> str:
        """Show the width in ``print(model)``."""
        return f"bits={self.bits}"


def check_bits(bits: int, *, where: str, low: int = 1, high: int = 8) -> int:
    """Return ``bits`` if it is an integer in ``[low, high]``.

    Raises:
        ValueError: with the name of the setting, what was expected and what came.
    """
    if isinstance(bits, bool) or not isinstance(bits, int) or not low <= bits <= high:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"{where} must be an integer from {low} to {high}, got {bits!r}.")
    return bits


def check_finite(x: Tensor, *, where: str) -> None:
    """Raise ``ValueError`` naming ``where`` and the count if ``x`` holds NaN or infinity."""
    bad = int((~torch.isfinite(x)).sum())
    if bad:
        raise ValueError(
            f"{where} holds {bad} NaN or infinite value{'s' if bad > 1 else ''} of {x.numel()}; "
            "a quantizer has no code for them. Load a finite checkpoint, or lower the learning rate that produced this one."
        )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the type quantizers compute in: float64 stays, everything else becomes float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def along_axis(per_channel: Tensor, ndim: int, axis: int) -> Tensor:
    """View a ``(channels,)`` tensor so that it broadcasts along ``axis`` of an ``ndim``-dimensional one; scalars pass."""
    if per_channel.ndim == 0:
        return per_channel
    return per_channel.reshape([-1 if d == axis else 1 for d in range(ndim)])


class Uniform(Quantizer):
    r"""Uniform rounding of ``u`` in [-1, 1] to ``bits`` bits; values outside are clamped. Gradient 1 everywhere.

    ``full`` grid, bits >= 1, with :math:`M = 2^k - 1`: :math:`Q(u) = 2\,\mathrm{round}(M (u + 1) / 2) / M - 1`. It has
    :math:`2^k` levels, the odd integers up to ±M over M, and no zero; at one bit it is the sign.
    ``symmetric`` grid, bits >= 2, with :math:`N = 2^{k-1} - 1`: :math:`Q(u) = \mathrm{round}(N u) / N`. It has
    :math:`2^k - 1` levels with an exact zero; at two bits it is ternary.

    On the full grid ties round up, so that zero, a tie at every width, becomes the smallest positive level, as sign(0) does.

    Args:
        bits: 1 to 8 (2 to 8 on the symmetric grid).
        grid: ``"full"`` or ``"symmetric"``.

    References:
        W.-P. Cai and W.-J. Li, Weight Normalization based Quantization for Deep Neural Network Compression,
        arXiv:1907.00593, 2019.
    """

    def __init__(self, bits: int, grid: str = "full") -> None:
        super().__init__()
        if grid not in GRIDS:
            raise ValueError(f"grid must be one of {', '.join(map(repr, GRIDS))}, got {grid!r}.")
        where = "bits of the symmetric grid" if grid == "symmetric" else "bits"
        self.bits = check_bits(bits, where=where, low=2 if grid == "symmetric" else 1)
        self.grid = grid
        self.divisor = 2**bits - 1 if grid == "full" else 2 ** (bits - 1) - 1

    def levels(self, like: Tensor) -> Tensor:
        """Return the integer levels, ascending: odd numbers on the full grid, consecutive ones on the symmetric grid."""
        stride = 2 if self.grid == "full" else 1
        return torch.arange(-self.divisor, self.divisor + 1, stride, device=like.device, dtype=compute_dtype(like))

    def _codes(self, u: Tensor) -> Tensor:
        """Codes as floats; a NaN stays one."""
        if self.bits == 1:
            return torch.where(u >= 0, 1.0, torch.where(u < 0, 0.0, u))
        if self.grid == "full":
            return (u * (self.divisor / 2)).add_(2 ** (self.bits - 1)).floor_().clamp_(0, self.divisor)
        return (u * self.divisor).round_().clamp_(-self.divisor, self.divisor).add_(self.divisor)

    def rounded(self, u: Tensor) -> Tensor:
        """Return the integer level of each element, Q(u) times the divisor, without a gradient of use."""
        codes = self._codes(u)
        return (codes.mul_(2) if self.grid == "full" else codes).sub_(self.divisor)

    def integers(self, u: Tensor) -> Tensor:
        """Return the integer level of each element, with the gradient of ``divisor * u``: Q(u) times the divisor."""
        return self.pass_through(self.rounded(u), u * self.divisor, 2 * self.divisor)

    def codes(self, u: Tensor) -> Tensor:
        """Return the uint8 codes of ``u``."""
        return self._codes(u).to(torch.uint8)

    def forward(self, x: Tensor) -> Tensor:
        """Return Q(x), values in [-1, 1]."""
        return (self.integers(x.to(compute_dtype(x))) * self._step(x)).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes, integer levels and the step 1/divisor."""
        return Quantized(self.codes(x), self.levels(x), self._step(x))

    def _step(self, x: Tensor) -> Tensor:
        return torch.full((), 1 / self.divisor, dtype=compute_dtype(x), device=x.device)

    def extra_repr(self) -> str:
        """Show width and grid in ``print(model)``."""
        return f"bits={self.bits}, grid={self.grid!r}"


class CodebookQuantizer(Quantizer):
    """Rounds every element to the nearest value of a fixed codebook; gradient 1 everywhere.

    Exact on values that already are codebook entries, which is how a frozen layer gets its codes back.

    Args:
        levels: ``(n_levels,)`` or ``(channels, n_levels)``, as in :class:`Quantized`.
        scale: ``()`` or ``(channels,)``.
        axis: the dimension channels run along.
        bits: width of a code.
    """

    levels: Tensor
    scale: Tensor

    def __init__(self, levels: Tensor, scale: Tensor, bits: int, axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="bits")
        if levels.shape[-1] > 2**bits:
            raise ValueError(f"a codebook at {bits} bits has at most {2**bits} levels, got {levels.shape[-1]}.")
        self.axis = axis
        self.register_buffer("levels", levels.detach().clone())
        self.register_buffer("scale", scale.detach().clone())

    def encode(self, x: Tensor) -> Quantized:
        """Return the code of the nearest codebook value (of two equally near ones, the one that sorts first)."""
        book = Quantized(x, self.levels, self.scale, self.axis).codebook
        book, order = book.sort(dim=-1)
        values = x.to(book.dtype).contiguous()
        if book.ndim == 1:
            rank = torch.searchsorted((book[1:] + book[:-1]) / 2, values)
            return Quantized(order[rank].to(torch.uint8), self.levels, self.scale, self.axis)
        rows = values.movedim(self.axis, 0).reshape(book.shape[0], -1)
        rank = torch.searchsorted((book[:, 1:] + book[:, :-1]) / 2, rows.contiguous())
        codes = order.gather(1, rank).reshape(values.movedim(self.axis, 0).shape).movedim(0, self.axis)
        return Quantized(codes.to(torch.uint8), self.levels, self.scale, self.axis)
