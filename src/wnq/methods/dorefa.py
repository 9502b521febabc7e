"""DoReFa-Net: tanh, then max scaling, in the three variants that go by its name."""

from functools import partial

from wnq.activations import input_builder
from wnq.methods.bwn import ScaledSign
from wnq.methods.registry import Method, WeightBuilder, register
from wnq.normalized import normalized_weight
from wnq.normalizers import tanh_max


def dorefa_weight(w_bits: int, *, max_gain: float = 1.0, scale: str = "one") -> WeightBuilder:
    """Return the builder of DoReFa-Net's weight quantizer.

    Args:
        w_bits: 1 to 8; at one bit there is no maximum, and the arguments below count for nothing.
        max_gain: share of the gradient through the maximum that is kept.
        scale: ``"one"``, or ``"max"`` to multiply the values by max|tanh w|.
    """
    if w_bits == 1:
        return lambda _, axis: ScaledSign("tensor", axis)
    normalize = partial(tanh_max, granularity="tensor", max_gain=max_gain)
    return normalized_weight(normalize, w_bits, grid="full", scale=scale, granularity="tensor")


@register(paper="arXiv:1606.06160")
def dorefa(w_bits: int = 3, a_bits: int = 3, *, activation: str = "clip") -> Method:
    r"""Squash the weights by tanh, divide by the largest, round to 2^k levels; the gradient flows through both.

    Forward, k > 1, with :math:`t = \tanh w` and :math:`m = \max|t|`: :math:`w_q = 2\,\mathrm{round}_k(t / (2 m) + 1/2) - 1`,
    values in [-1, 1]; k = 1: :math:`w_q = \mathrm{sign}(w)\,\mathrm{mean}|w|`, one mean a layer.
    Gradient: straight through the rounding only; tanh and the maximum are differentiated, as in the authors' published code.
    With :math:`g = dL/dw_q` and :math:`i^*` the place of the maximum, :math:`dL/dw_j = (1 - t_j^2)\,g_j/m`, and at
    :math:`i^*` less :math:`(1 - m^2)\,\mathrm{sign}(t_{i^*}) \sum_j g_j t_j / m^2`. k = 1: dw_q/dw = 1.

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
    return Method(weight=dorefa_weight(w_bits), input=input_builder(activation, a_bits))


@register(paper="arXiv:1606.06160")
def dorefa_detached(w_bits: int = 3, a_bits: int = 3, *, activation: str = "clip") -> Method:
    r"""DoReFa-Net with the maximum as a constant: the same values, no gradient through the maximum.

    Forward: that of ``dorefa``. Gradient, k > 1, with :math:`t = \tanh w` and m = max|t|:
    :math:`dL/dw_j = (1 - t_j^2)\,g_j / m` for every weight, the largest included; k = 1: that of ``dorefa``.

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
        arXiv:1606.06160, 2016, Eq. 7-11; the stop-gradient is that of MetaQuant's code, arXiv:1910.01247.

    Differences from the paper: the authors' published code differentiates the maximum, which is ``dorefa``. Otherwise those of
    ``dorefa``.
    """
    return Method(weight=dorefa_weight(w_bits, max_gain=0.0), input=input_builder(activation, a_bits))


@register(paper="arXiv:1606.06160")
def dorefa_rescaled(w_bits: int = 3, a_bits: int = 3, *, activation: str = "clip") -> Method:
    r"""DoReFa-Net with the maximum as a constant that also multiplies the result: values keep the size of the weights.

    Forward, k > 1, with :math:`t = \tanh w` and :math:`m = \max|t|`, the maximum after tanh:
    :math:`w_q = m\,(2\,\mathrm{round}_k(t / (2 m) + 1/2) - 1)`, values in [-m, m]; k = 1: that of ``dorefa``.
    Gradient: :math:`dL/dw_j = (1 - t_j^2)\,g_j`, in which m cancels; k = 1: dw_q/dw = 1.

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
        arXiv:1606.06160, 2016, Eq. 7-11; the factor is that of the widely used re-implementation zzzxxxttt/pytorch_DoReFaNet,
        which multiplies by its detached max|tanh w| and not by max|w|.

    Differences from the paper: the factor m and the stop-gradient on it. Otherwise those of ``dorefa``.
    """
    return Method(weight=dorefa_weight(w_bits, max_gain=0.0, scale="max"), input=input_builder(activation, a_bits))
