"""PACT: inputs clipped at a learned value, DoReFa-Net's weights."""

from wnq.activations import input_builder
from wnq.methods.dorefa import dorefa_weight
from wnq.methods.registry import Method, Recommended, register


@register(
    paper="arXiv:1805.06085",
    recommended=Recommended(
        quantizer_weight_decay=1.0, source="L2 regularization of alpha with the weights' coefficient"
    ),
)
def pact(w_bits: int = 3, a_bits: int = 3, *, activation: str = "pact") -> Method:
    r"""Learn where the inputs are clipped; the weights are DoReFa-Net's.

    Forward, inputs: :math:`y = \alpha\,\mathrm{round}_k(\mathrm{clip}(x, 0, \alpha)/\alpha)` with
    :math:`\mathrm{round}_k(v) = \mathrm{round}((2^k - 1) v)/(2^k - 1)`; weights: those of ``dorefa``.
    Gradient, inputs: :math:`dy/dx = 1_{0 \le x < \alpha}`, :math:`dy/d\alpha = 1_{x \ge \alpha}`; weights: that of ``dorefa``.

    Args:
        w_bits: width of the weights, 1 to 8, or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"pact"`` is the paper's; with another one the method is ``dorefa``.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        J. Choi et al., PACT: Parameterized Clipping Activation for Quantized Neural Networks, arXiv:1805.06085, 2018, Eq. 1-3.

    Differences from the paper: the clip stands in front of each quantized layer instead of in place of its ReLU, so that a
    negative input becomes 0 also where the net has no ReLU. Alpha starts at 8 in every layer.
    """
    return Method(weight=dorefa_weight(w_bits), input=input_builder(activation, a_bits))
