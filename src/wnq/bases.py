"""Sums of signed coefficients: what quantizers with several binary bases share.

Such a quantizer gives every element a pattern of signs (a row of a table) and every channel a few coefficients; the value
is their inner product. Tensors are handled as rows here, ``(1, n)`` for a whole tensor or ``(channels, n)``, so that one
statistic a layer and one a channel are the same code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wnq.quantizer import Quantized

RIDGE = 1e-10
"""Of :func:`best_coefficients`, a share of the number of elements; it only decides where signs depend on each other."""


class Ladder(NamedTuple):
    """Levels in ascending order, and the way between a pattern's number and its code.

    Attributes:
        levels: ``(rows, patterns)``, ascending; equal where two patterns have one value.
        order: code -> pattern.
        rank: pattern -> code.
    """

    levels: Tensor
    order: Tensor
    rank: Tensor

    def codes(self, patterns: Tensor) -> Tensor:
        """Return the codes of patterns ``(rows, n)``, given by number."""
        return self.rank.gather(1, patterns)


def sign_table(count: int, like: Tensor, *, low: float = -1.0) -> Tensor:
    """Return all ``(2**count, count)`` patterns of {low, 1}; bit j of a row's number is element j."""
    bit = torch.arange(count, device=like.device)
    on = (torch.arange(2**count, device=like.device).unsqueeze(1) >> bit) & 1
    return torch.where(on > 0, 1.0, low).to(like.dtype)


def pattern_numbers(positive: Tensor) -> Tensor:
    """Return the row of :func:`sign_table` for signs given as booleans ``(rows, n, count)``."""
    weight = 2 ** torch.arange(positive.shape[-1], device=positive.device)
    return (positive.long() * weight).sum(-1)


def ladder(table: Tensor, coefficients: Tensor) -> Ladder:
    """Sort the values of all patterns.

    Args:
        table: ``(patterns, count)``.
        coefficients: ``(rows, count)``.
    """
    levels, order = (table * coefficients.unsqueeze(-2)).sum(-1).sort(dim=-1, stable=True)
    return Ladder(levels, order, order.argsort(dim=-1))


def nearest(levels: Tensor, rows: Tensor) -> Tensor:
    """Return the code of the nearest level, thresholds being the mid-points; an element on a threshold takes the lower level.

    Args:
        levels: ``(rows, n_levels)``, ascending, at least two.
        rows: ``(rows, n)``.
    """
    thresholds = (levels[:, 1:] + levels[:, :-1]) / 2
    return torch.searchsorted(thresholds.contiguous(), rows.contiguous())


def as_rows(x: Tensor, granularity: str, axis: int) -> Tensor:
    """Return ``x`` as ``(1, n)`` per ``"tensor"``, or ``(channels, n)`` per ``"channel"``.

    Raises:
        ValueError: per channel of a tensor with fewer than two dimensions, where a channel would be a single number.
    """
    if granularity == "tensor":
        return x.reshape(1, -1)
    if x.ndim < 2:
        raise ValueError(
            f"one statistic a channel needs a weight of at least 2 dimensions, got shape {tuple(x.shape)}."
        )
    return x.movedim(axis, 0).reshape(x.shape[axis], -1)


def from_rows(codes: Tensor, levels: Tensor, x: Tensor, granularity: str, axis: int) -> Quantized:
    """Return codes ``(rows, n)`` and levels ``(rows, n_levels)`` in the shape of ``x``, with scale 1."""
    if granularity == "tensor":
        codes, levels = codes.reshape(x.shape), levels.reshape(-1)
    else:
        codes = codes.reshape(x.movedim(axis, 0).shape).movedim(0, axis)
    return Quantized(codes.to(torch.uint8), levels, torch.ones((), dtype=levels.dtype, device=x.device), axis)


def normal_equations(signs: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return :math:`B^\top B` ``(rows, count, count)`` and :math:`B^\top x` ``(rows, count)``, in float64.

    Args:
        signs: B, ``(rows, n, count)``, entries -1, 0 or 1.
        rows: x, ``(rows, n)``.
    """
    with torch.autocast(signs.device.type, enabled=False):
        # Sums of whole numbers: exact in float32 up to 2^24 elements a row.
        gram = signs.transpose(1, 2) @ signs
    # The products are exact. Their sums need float64: where bases depend on each other, only equations that agree to
    # many digits have a bounded solution.
    return gram.double(), (signs * rows.unsqueeze(-1)).sum(1, dtype=torch.float64)


def least_squares(gram: Tensor, moment: Tensor, ridge: float | Tensor, prior: Tensor | None = None) -> Tensor:
    r"""Return :math:`\arg\min_v \lVert x - Bv\rVert^2 + \rho\,\lVert v - v_0\rVert^2`, in float64.

    With ridge > 0 there is always one answer: what the data leave open stays at the prior. A NaN or infinity in the equations
    makes the answer NaN; nothing raises and nothing waits for the device.

    Args:
        gram: :math:`B^\top B` ``(rows, count, count)``, float64.
        moment: :math:`B^\top x` ``(rows, count)``, float64.
        ridge: :math:`\rho`.
        prior: :math:`v_0`, zero if not given.
    """
    damped = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    if prior is not None:
        moment = moment + ridge * prior.to(gram.dtype)
    return torch.linalg.solve_ex(damped, moment.unsqueeze(-1)).result.squeeze(-1)


def best_coefficients(signs: Tensor, rows: Tensor) -> Tensor:
    """Return the coefficients ``(rows, count)`` with which signs ``(rows, n, count)`` fit ``rows`` best."""
    return least_squares(*normal_equations(signs, rows), RIDGE * rows.shape[-1]).to(rows.dtype)
