"""Metrics of a model on a split."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from wnq.quantizer import compute_dtype


@dataclass(frozen=True)
class Metrics:
    """Averages over a split.

    Attributes:
        accuracy: share of images whose largest logit is the label's, in percent.
        loss: mean cross-entropy, in nats.
        images: how many were seen.
    """

    accuracy: float
    loss: float
    images: int


NO_IMAGES = "there are no images to evaluate on. The batches are empty, or an iterator was used up before."


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, bf16: bool = False) -> Metrics:
    """Evaluate a classifier in eval mode (and leave it in the mode it was in); all processes of a job sum up.

    Args:
        model: maps images to logits ``(B, classes)``.
        batches: (images, labels) on the model's device, for example ``Batches(...).epoch(0)``.
        bf16: run under bfloat16 autocast.

    Raises:
        ValueError: there are no images.
    """
    was_training = model.training
    model.eval()
    totals: Tensor | None = None
    seen = 0
    try:
        for images, labels in batches:
            if totals is None:
                totals = torch.zeros(2, dtype=torch.float64, device=images.device)
            if not len(labels):
                continue
            with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
                logits = model(images)
            logits = logits.to(compute_dtype(logits))
            correct = (logits.argmax(1) == labels).sum()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals += torch.stack([correct.double(), loss.double()])
            seen += len(labels)
    finally:
        model.train(was_training)
    if totals is None:
        raise ValueError(NO_IMAGES)
    totals = torch.cat([totals, totals.new_tensor([seen])])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    if not totals[2]:
        raise ValueError(NO_IMAGES)
    correct, loss, count = totals.tolist()
    return Metrics(100 * correct / count, loss / count, int(count))
