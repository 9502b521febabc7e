"""HBB: binarized weights of mixed bitwidths within one layer."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.bases import from_rows, ladder, sign_table
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, check_bits


class MixedBinary(Quantizer):
    r"""Residual binarization where a share of the weights owns one sign more than the others; gradient 1.

    Args:
        bits: width of the stored code, 3 to 8: weights of ``bits - 2`` and of ``bits - 1`` signs have
            :math:`2^{bits-2} + 2^{bits-1}` levels together.
        share: part of the weights that owns ``bits - 1`` signs, 0 to 1.
        axis: output-channel dimension.
    """

    def __init__(self, bits: int, share: float, axis: int = 0) -> None:
        super().__init__()
        self.bits = check_bits(bits, where="w_bits", low=3)
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(
                f"share must be a number from 0 to 1, the part of the weights that owns {bits - 1} bits instead of {bits - 2}; "
                f"got {share!r}. For an average of b bits a weight, set it to b - {bits - 2}."
            )
        self.share = float(share)
        self.axis = axis

    @property
    def average_bits(self) -> float:
        """Signs a weight owns, on average: the paper's measure."""
        return self.bits - 2 + self.share

    def _owns_more(self, w: Tensor) -> Tensor:
        """Return where a weight owns the last sign: all but those whose magnitude is nearest to the mean magnitude."""
        magnitude = w.abs()
        nearest_first = (magnitude - magnitude.mean()).abs().argsort(stable=True)
        fewer = w.numel() - int(self.share * w.numel() + 0.5)
        return torch.ones_like(w, dtype=torch.bool).scatter(0, nearest_first[:fewer], False)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes; the levels of both kinds of weights are sorted together."""
        residual = x.reshape(-1)
        more = self._owns_more(residual)
        least = self.bits - 2
        pattern = torch.where(more, 0, 2 ** (least + 1))
        scales: list[Tensor] = []
        for n in range(least + 1):
            owner = torch.ones_like(more) if n < least else more
            scale = torch.where(owner, residual.abs(), 0.0).sum() / owner.sum().clamp(min=1)
            positive = owner & (residual >= 0)
            pattern = pattern + positive.long() * 2**n
            residual = residual - torch.where(positive, scale, -scale)
            scales.append(scale)
        fewer_signs = sign_table(least, x)
        both = [sign_table(least + 1, x), torch.cat([fewer_signs, fewer_signs.new_zeros(len(fewer_signs), 1)], dim=1)]
        steps = ladder(torch.cat(both), torch.stack(scales).unsqueeze(0))
        return from_rows(steps.codes(pattern.unsqueeze(0)), steps.levels, x, "tensor", self.axis)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bits={self.bits}, share={self.share}, average_bits={self.average_bits:g}"


@register(paper="arXiv:1805.10368", widths=range(3, 9))
def hbb(w_bits: int = 3, a_bits: int = 32, *, share: float = 0.4, activation: str = "lsq") -> Method:
    r"""Binarize the residual again for a share of the weights only, so that a layer has a fractional number of bits a weight.

    Forward: :math:`E_0 = w`, :math:`B_n = \mathrm{sign}(E_{n-1})`, :math:`E_n = E_{n-1} - \mu_n B_n`, where :math:`\mu_n` is the
    mean of :math:`|E_{n-1}|` over the weights of the layer that own at least n signs; :math:`w_q = \sum_n \mu_n B_n` over the signs
    that a weight owns. Middle-out: the weights with \|w\| nearest to the layer's mean of \|w\|, which one sign fits best, own the
    fewest. Gradient: dw_q/dw = 1; the means and who owns what are constants.

    The width counts the stored code. At 3 bits a weight owns 1 or 2 signs, which have 2 + 4 = 6 levels together. The paper counts
    the signs alone, on average ``w_bits - 2 + share`` a weight: the default is its 1.4 bits. It does not count the mask that says
    who owns how many; a file here holds it within the codes.

    Args:
        w_bits: width of the stored code, 3 to 8, or 32; weights own ``w_bits - 2`` or ``w_bits - 1`` signs.
        a_bits: width of the inputs, 1 to 8, or 32.
        share: part of the weights that owns ``w_bits - 1`` signs, 0 to 1.
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width, name or share out of range.

    References:
        J. Fromm, S. Patel and M. Philipose, Heterogeneous Bitwidth Binarization in Convolutional Neural Networks,
        arXiv:1805.10368, NeurIPS 2018. Re-derived from a summary: :math:`\mu_n` is the least-squares scale of the n-th sign
        over the weights that own it.

    Differences from the paper: a layer mixes two neighbouring widths, where the paper's 1.4 bits mix 1, 2 and 3. Ranks decide
    the mask, ties by their order in memory, so the share is exact. The gradient has no window. Inputs are not binarized.
    """
    MixedBinary(w_bits, share)
    return Method(weight=lambda _, axis: MixedBinary(w_bits, share, axis), input=input_builder(activation, a_bits))
