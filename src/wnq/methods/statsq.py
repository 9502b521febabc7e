"""StatsQ: the scale of a row is twice its mean absolute value."""

from wnq.activations import input_builder
from wnq.methods.n2uq import MeanClipped
from wnq.methods.registry import Method, register


@register(paper="arXiv:2302.02210")
def statsq(w_bits: int = 2, a_bits: int = 2, *, activation: str = "lsq") -> Method:
    r"""Scale by twice the mean absolute value of an output channel, a statistic instead of a learned step.

    Forward, :math:`s = 2\,\mathrm{mean}|w|` of each output channel, :math:`n = 2^{k-1}`:
    :math:`w_q = s\,(\mathrm{round}(n\,\mathrm{clip}(w/s, -1, 1) - 1/2) + 1/2)/n`, the levels :math:`\pm s/(2n), \pm 3s/(2n),
    \dots`, half a step away from zero and from ±s; at one bit ±mean|w|, as BWN.
    Gradient: dw_q/dw = 1, also outside the clip; s under stop-gradient.

    The authors argue that a learned step makes weights oscillate between levels, and a statistic does not. In closed form the
    values equal those of ``n2uq``: levels and thresholds are whole multiples of :math:`\mathrm{mean}|w|/2^{k-1}` in both.

    Args:
        w_bits: width of the weights, 1 to 8 (the paper: 2 to 4), or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"lsq"``, a learned step, is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        S.-Y. Liu, Z. Liu and K.-T. Cheng, Oscillation-free Quantization for Low-bit Vision Transformers, arXiv:2302.02210,
        ICML 2023.

    Differences from the paper: the weight rule only, without confidence-guided annealing and the query-key
    reparametrization. The rows of a convolution are its output channels. A weight halfway between two levels goes up, where the
    authors' code rounds to the even one.
    """
    return Method(weight=lambda _, axis: MeanClipped(w_bits, axis), input=input_builder(activation, a_bits))
