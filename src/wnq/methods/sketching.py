"""Network Sketching: weights as sums of scaled signs of the residual."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.bases import as_rows, best_coefficients, from_rows, ladder, pattern_numbers, sign_table
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, check_bits


class Sketch(Quantizer):
    r""":math:`\sum_j a_j B_j` for each output channel, :math:`B_j` the sign of what the sum before leaves; gradient 1.

    Args:
        bits: number of terms, 1 to 8.
        refined: fit all coefficients anew after each sign, instead of the new one alone.
        axis: output-channel dimension.
    """

    def __init__(self, bits: int, *, refined: bool = True, axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="w_bits")
        self.refined = refined
        self.axis = axis

    def encode(self, x: Tensor) -> Quantized:
        """Return codes and one row of 2^bits levels a channel. The greedy signs need not point at the nearest level."""
        rows = as_rows(x, "channel", self.axis)
        residual = rows
        signs = rows.new_zeros(*rows.shape, 0)
        coefficients = rows.new_zeros(len(rows), 0)
        for j in range(self.bits):
            sign = torch.where(residual >= 0, 1.0, -1.0).to(x.dtype)
            signs = torch.cat([signs, sign.unsqueeze(-1)], dim=-1)
            if self.refined and j > 0:  # the mean magnitude is the fit of a single sign
                coefficients = best_coefficients(signs, rows)
                residual = rows - (signs * coefficients.unsqueeze(1)).sum(-1)
            else:
                scale = residual.abs().mean(-1, keepdim=True)
                coefficients = torch.cat([coefficients, scale], dim=-1)
                residual = residual - scale * sign
        steps = ladder(sign_table(self.bits, x), coefficients)
        return from_rows(steps.codes(pattern_numbers(signs > 0)), steps.levels, x, "channel", self.axis)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bits={self.bits}, refined={self.refined}"


@register(paper="arXiv:1706.02021")
def sketching(w_bits: int = 3, a_bits: int = 32, *, refined: bool = True, activation: str = "lsq") -> Method:
    r"""Binary expansion of each filter: the sign of the residual, one coefficient a term, term after term.

    Forward, for each output channel, with :math:`R_0 = w` and :math:`B_j = \mathrm{sign}(R_{j-1})`: direct,
    :math:`a_j = \mathrm{mean}|R_{j-1}|`, :math:`R_j = R_{j-1} - a_j B_j`; refined, after each new :math:`B_j`,
    :math:`a = (B^\top B)^{-1} B^\top w` over all terms so far and :math:`R_j = w - B a`. The value is
    :math:`w_q = \sum_{j \le K} a_j B_j`. Of a filter of t weights at most
    :math:`\lVert R_K \rVert^2 \le (1 - 1/t)^K \lVert w \rVert^2` is left. Gradient: dw_q/dw = 1.

    One term is BWN.

    Args:
        w_bits: K, the number of terms, 1 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        refined: the paper's refined approximation (its Algorithm 2), or the direct one (its Algorithm 1).
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        Y. Guo et al., Network Sketching: Exploiting Binary Structure in Deep CNNs, arXiv:1706.02021, CVPR 2017, Sec. 3. Re-derived
        from a summary: a_j is the least-squares coefficient of a sign, and the bound follows from
        :math:`(\sum|R|)^2 \ge \sum R^2`.

    Differences from the paper: it approximates trained weights, once; here the expansion is made anew from the float weights at
    each step and passes the gradient through, so that a net can be fine-tuned. A ridge of 1e-10 decides between coefficients where
    signs coincide. The sharing of partial sums at inference is not part of a weight quantizer.
    """
    if not isinstance(refined, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"refined must be true or false, got {refined!r}.")
    return Method(
        weight=lambda _, axis: Sketch(w_bits, refined=refined, axis=axis), input=input_builder(activation, a_bits)
    )
