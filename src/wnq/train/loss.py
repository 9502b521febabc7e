"""What training minimises: cross-entropy, and the distance to the float twin."""

import torch.nn.functional as F
from torch import Tensor

from wnq.train.config import TrainConfig


def training_loss(logits: Tensor, labels: Tensor, config: TrainConfig, teacher_logits: Tensor | None = None) -> Tensor:
    r"""Return the mean loss of a batch.

    :math:`(1 - \lambda) \, CE(y, p) + \lambda \, T^2 \, KL(p_t^{1/T} \| p^{1/T})`: ``distill_weight`` is lambda,
    ``distill_temperature`` T, and the labels y are smoothed by ``label_smoothing``.

    Args:
        logits: ``(B, classes)``.
        labels: int64, ``(B,)``.
        config: the settings.
        teacher_logits: ``(B, classes)`` of the float twin, without gradient; needed where ``distill_weight`` > 0.

    References:
        G. Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
    if not config.distill_weight:
        return loss
    assert teacher_logits is not None
    target = F.log_softmax(teacher_logits / config.distill_temperature, dim=1)
    student = F.log_softmax(logits / config.distill_temperature, dim=1)
    distance = F.kl_div(student, target, reduction="batchmean", log_target=True) * config.distill_temperature**2
    return (1 - config.distill_weight) * loss + config.distill_weight * distance
