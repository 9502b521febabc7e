"""XNOR-Net: binary weights, binary inputs, and the map of the inputs' magnitudes behind the layer."""

import math

import torch.nn.functional as F
from torch import Tensor, nn

from wnq.activations import input_builder
from wnq.methods.bwn import ScaledSign
from wnq.methods.registry import Method, register
from wnq.quantizer import FLOAT_BITS

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


class ScaleMap(nn.Module):
    r"""What a layer's output passes through: :math:`y = K \odot (y - b) + b`, K from the layer's float input, b its bias.

    Convolution: K is the mean of :math:`|x|` over the channels, averaged over the window of each output position: convolved with a
    box of height 1/(kernel size), with the layer's stride, dilation and padding. At a border the padding counts in the average, as
    zeros where the layer pads with zeros. A layer with groups has one map a group, from the channels that the group sees.
    Linear: K is the mean of :math:`|x|` over the features.

    K is differentiable: the input receives a gradient through the magnitudes too.

    Args:
        layer: whose output it is for; only its kind is looked at.

    Raises:
        ValueError: the layer is no convolution and not linear.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if not isinstance(layer, (Convolution, nn.Linear)):
            raise ValueError(
                "xnor's scale map is defined for Conv1d, Conv2d, Conv3d and Linear, got "
                f"{type(layer).__name__.removeprefix('Parametrized')}; give the layer another method in "
                "make_plan(override=...), or set scale_map=False."
            )

    def forward(self, layer: Convolution | nn.Linear, x: Tensor, y: Tensor) -> Tensor:
        """Return the scaled output, of the type of ``y``."""
        if isinstance(layer, nn.Linear):
            scale, bias = x.abs().mean(-1, keepdim=True), layer.bias
        else:
            scale, bias = convolution_map(layer, x), layer.bias
            bias = None if bias is None else bias.reshape(-1, *[1] * len(layer.kernel_size))
        return (y * scale if bias is None else (y - bias) * scale + bias).to(y.dtype)


def convolution_map(layer: Convolution, x: Tensor) -> Tensor:
    """Return K of a convolution's float input, ``(..., 1, *size)``, or ``(..., out_channels, *size)`` with groups."""
    size, groups = layer.kernel_size, layer.groups
    channel = x.ndim - len(size) - 1
    magnitude = x.abs().unflatten(channel, (groups, -1)).mean(channel + 1)
    box = magnitude.new_ones((groups, 1, *size)) / math.prod(size)
    padding = layer.padding
    if layer.padding_mode != "zeros":
        magnitude, padding = F.pad(magnitude, both_sides(layer), mode=layer.padding_mode), 0
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    scale = convolve(magnitude, box, None, layer.stride, padding, layer.dilation, groups)
    return scale if groups == 1 else scale.repeat_interleave(layer.out_channels // groups, channel)


def both_sides(layer: Convolution) -> list[int]:
    """Return the layer's padding as ``F.pad`` wants it: the last dimension first, before and after."""
    amounts: list[int] = []
    for d in reversed(range(len(layer.kernel_size))):
        if layer.padding == "same":
            total = layer.dilation[d] * (layer.kernel_size[d] - 1)
            amounts += [total // 2, total - total // 2]
        else:
            amount = 0 if isinstance(layer.padding, str) else layer.padding[d]
            amounts += [amount, amount]
    return amounts


@register(paper="arXiv:1603.05279", widths=(1,))
def xnor(
    w_bits: int = 1,
    a_bits: int = 1,
    *,
    scale_map: bool = True,
    gradient: str = "identity",
    activation: str = "sign",
) -> Method:
    r"""Binary weights with the scale of each filter, binary inputs with the scale of each output position.

    Forward: :math:`y = K\alpha \odot (\mathrm{sign}(x) * \mathrm{sign}(w)) + b` with
    :math:`\alpha = \mathrm{mean}|w|` of each filter, :math:`A = \mathrm{mean}_c |x|` over the channels and :math:`K = A * k`, k the
    box of the kernel's size and height 1/(kernel size); linear layers: K is the mean of :math:`|x|` over the features.

    Gradient: :math:`dw_q/dw` as in ``bwn``; :math:`d\,\mathrm{sign}(x)/dx = 1_{|x| \le 1}`; K is differentiated by autograd.

    The paper's block order is BatchNorm, sign, convolution, pooling: the input takes both signs, so no ReLU stands before it, and
    pooling comes after the convolution, because the maximum of signs is nearly always +1.

    Args:
        w_bits: 1, or 32, which leaves the map out.
        a_bits: width of the inputs: 1, or 32 for float inputs without a map (the paper's BWN); others by ``activation``.
        scale_map: multiply by K, see :class:`ScaleMap`. It replaces the magnitude that the sign takes away, so it counts only where
            ``activation`` is ``"sign"`` and ``a_bits`` is 1.
        gradient: of the weights, ``"identity"`` or ``"paper"``, see ``bwn``.
        activation: ``"sign"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range; when it is attached, a map for a layer other than Conv1d to 3d or Linear.

    References:
        M. Rastegari et al., XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks,
        arXiv:1603.05279, ECCV 2016, Sec. 3.2.

    Differences from the paper: the gradient of the weights, as in ``bwn``. The paper gives no backward pass for K; here K is part
    of the graph. Groups, padding modes other than zeros, 1-d and 3-d convolutions and linear layers follow the same rule, where the
    paper has 2-d convolutions without groups. A bias is added after the map. Gradients are not binarized, and the paper's k-bit
    extension of the sign is left to other methods.
    """
    ScaledSign("channel", gradient=gradient)
    mapped = scale_map and activation == "sign" and a_bits != FLOAT_BITS
    return Method(
        weight=lambda _, axis: ScaledSign("channel", axis, gradient),
        input=input_builder(activation, a_bits),
        output=ScaleMap if mapped else None,
    )
