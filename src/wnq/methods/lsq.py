"""LSQ: a learned step for weights and inputs."""

from wnq.activations import input_builder
from wnq.learned_step import LearnedStep
from wnq.methods.registry import Method, Recommended, register
from wnq.starting import started


@register(
    paper="arXiv:1902.08153",
    widths=range(2, 9),
    recommended=Recommended(
        weight_decay_at={2: 0.25, 3: 0.5}, source="Sec. 3: weight decay of 4 bits halved at 3 and quartered at 2"
    ),
)
def lsq(w_bits: int = 3, a_bits: int = 3, *, activation: str = "lsq") -> Method:
    r"""Learn the step of every layer's weights and inputs along with the weights.

    Forward: :math:`\hat v = s\,\mathrm{round}(\mathrm{clip}(v/s, -Q_n, Q_p))`, signed for weights.
    Gradient: :math:`d\hat v/dv = 1` inside the clip range; :math:`d\hat v/ds = \bar v - v/s` inside, the bound outside,
    multiplied by :math:`1/\sqrt{N Q_p}`.

    Args:
        w_bits: width of the weights, 2 to 8 (one signed bit has no positive level), or 32.
        a_bits: width of the inputs, 1 to 8, or 32.
        activation: ``"lsq"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        S. K. Esser et al., Learned Step Size Quantization, arXiv:1902.08153, ICLR 2020.

    Differences from the paper: see :class:`wnq.learned_step.LearnedStep`.
    """
    return Method(weight=started(lambda: LearnedStep(w_bits, is_weight=True)), input=input_builder(activation, a_bits))
