"""DoReFa-Net: tanh, then max scaling."""

from functools import partial

from wnq.activations import input_builder
from wnq.methods.bwn import ScaledSign
from wnq.methods.registry import Method, register
from wnq.normalized import normalized_weight
from wnq.normalizers import tanh_max


@register(paper="arXiv:1606.06160")
def dorefa(w_bits: int = 3, a_bits: int = 3, *, activation: str = "clip") -> Method:
    r"""Squash the weights by tanh, divide by the largest, round to 2^k levels; the gradient flows through both.

    Forward, k > 1: :math:`w_q = 2\,\mathrm{round}_k(\tanh w / (2\max|\tanh w|) + 1/2) - 1`, values in [-1, 1]; k = 1:
    :math:`w_q = \mathrm{sign}(w)\,\mathrm{mean}|w|`, one mean a layer. Gradient: straight through the rounding only; tanh and the
    maximum are differentiated, as in the authors' published code.

    Args:
        w_bits: width of the weights, 1 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"clip"`` is the paper's, a fixed clip at 1; ``"lsq"`` or ``"pact"`` to compare weight quantizers alone.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        S. Zhou et al., DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients,
        arXiv:1606.06160, 2016, Eq. 7-11.

    Differences from the paper: gradients of activations are not quantized. The values lie in [-1, 1] whatever the size of the
    float weights, so a net without BatchNorm changes scale.
    """
    if w_bits == 1:
        return Method(weight=lambda _, axis: ScaledSign("tensor", axis), input=input_builder(activation, a_bits))
    normalize = partial(tanh_max, granularity="tensor", max_gain=1.0)
    weight = normalized_weight(normalize, w_bits, grid="full", scale="one", granularity="tensor")
    return Method(weight=weight, input=input_builder(activation, a_bits))
