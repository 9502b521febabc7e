"""WNQ: weight-normalization based quantization."""

from functools import partial

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.normalized import normalized_weight
from wnq.normalizers import max_abs


@register(paper="arXiv:1907.00593")
def wnq(
    w_bits: int = 3,
    a_bits: int = 3,
    *,
    grid: str = "full",
    scale: str = "max",
    granularity: str = "tensor",
    max_gain: float = 1.0,
    activation: str = "lsq",
) -> Method:
    r"""Divide by the largest absolute value, with the gradient flowing through it; round; multiply back.

    Forward, with :math:`m = \max|w|` and :math:`u = w/m`: :math:`w_q = s\,Q(u)`. On the full grid, :math:`M = 2^k - 1`,
    :math:`Q(u) = 2\,\mathrm{round}(M(u+1)/2)/M - 1`; on the symmetric grid, :math:`N = 2^{k-1}-1`,
    :math:`Q(u) = \mathrm{round}(N u)/N`.

    Gradient, with :math:`g = dL/dQ` passed straight through the rounding, :math:`i^*` the place of the maximum and s = 1:
    :math:`dL/dw_j = g_j/m` for :math:`j \ne i^*` and
    :math:`dL/dw_{i^*} = -(\mathrm{sign}(w_{i^*})/m)\sum_{j\ne i^*} g_j u_j`. For s = m, with :math:`g = dL/dw_q`:
    :math:`dL/dw_j = g_j` and :math:`dL/dw_{i^*} = g_{i^*} + \mathrm{sign}(w_{i^*}) \sum_j g_j (Q_j - u_j)`.

    Args:
        w_bits: width of the weights, 1 to 8, or 32 for float weights.
        a_bits: width of the inputs, 1 to 8, or 32 for float inputs.
        grid: ``"full"`` (2^k levels, no zero) or ``"symmetric"`` (2^k - 1 levels, zero exact, k >= 2).
        scale: ``"max"`` (s = m), ``"one"`` (s = 1, for a BatchNorm to absorb), ``"learned"`` (s a parameter) or
            ``"optimal"`` (least squares, under stop-gradient).
        granularity: one maximum a ``"tensor"`` or one an output ``"channel"``.
        max_gain: share of the gradient through the maximum that is kept, >= 0: 1 is exact, 0 is plain max scaling (detached).
        activation: input quantizer: ``"lsq"`` (learned step), ``"pact"`` (learned clip) or ``"clip"`` (fixed at 1).

    Returns:
        The method.

    Raises:
        ValueError: a width, name or gain out of range.

    Example:
        >>> import torch, wnq
        >>> quantizer = wnq.get_method("wnq", w_bits=2).weight(torch.tensor([0.1, -0.4, 0.9]), 0)
        >>> quantizer(torch.tensor([0.1, -0.4, 0.9]))
        tensor([ 0.3000, -0.3000,  0.9000])

    References:
        W.-P. Cai and W.-J. Li, Weight Normalization based Quantization for Deep Neural Network Compression,
        arXiv:1907.00593, 2019.

    Differences from the paper: the grids, the scale, ties and the activation quantizer are choices of this library, where the
    paper is silent. Tied maxima share the gradient evenly; ``max_gain``, the learned and the optimal scale are additions.
    """
    if not 0 <= max_gain < float("inf"):
        raise ValueError(f"max_gain must be a finite number >= 0, got {max_gain!r}.")
    normalize = partial(max_abs, granularity=granularity, max_gain=max_gain)
    weight = normalized_weight(normalize, w_bits, grid=grid, scale=scale, granularity=granularity)
    return Method(weight=weight, input=input_builder(activation, a_bits))
