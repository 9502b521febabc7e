"""LR-Net's regularizer as a term of the loss."""

from torch import Tensor, nn

from wnq.methods.lrnet import probability_decay as term
from wnq.procedures.procedure import Procedure
from wnq.procedures.registry import check_number, register_procedure


class ProbabilityDecay(Procedure):
    """Adds :func:`wnq.methods.lrnet.probability_decay`."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def start_(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Check that some layer has probabilities to train.

        Raises:
            ValueError: none has.
        """
        term(model)

    def loss(self, loss: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Add the weighted term."""
        return loss + self.weight * term(model).to(loss.dtype)


@register_procedure(paper="arXiv:1710.07739")
def probability_decay(*, weight: float = 1e-11) -> Procedure:
    r"""Add LR-Net's regularizer of the weights' probabilities, for the method ``lrnet``.

    Loss: :math:`f + \lambda R`; ternary layers have half the sum of squares of their logits in R, which keeps their weights random,
    binary ones :math:`\sum p (1 - p)`, which makes them certain.

    Args:
        weight: lambda, >= 0; the authors' CIFAR-10 code has 1e-11 for ternary and 1e-6 for binary weights.

    Returns:
        The procedure.

    Raises:
        ValueError: a negative weight; at the start, a model without a layer of the method ``lrnet``.

    References:
        O. Shayer et al., Learning Discrete Weights Using the Local Reparameterization Trick, arXiv:1710.07739, ICLR 2018, and the
        authors' code, which lambda is from.

    Differences from the paper: see :func:`wnq.methods.lrnet.lrnet`.
    """
    return ProbabilityDecay(check_number(weight, "probability_decay: weight"))
