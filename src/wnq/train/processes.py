"""The processes of one job: which there are, and what they share."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator


def plain_accelerator() -> "Accelerator":
    """Return an ``accelerate.Accelerator`` with its defaults, which knows the processes of this job."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('training needs accelerate: pip install "wnq[train]"') from error
    # Without being told that there is no device, accelerate ignores the other processes of a job on CPUs.
    return Accelerator(cpu=not torch.accelerator.is_available())


def share_buffers(models: Iterable[nn.Module | None]) -> None:
    """Give all processes the main one's buffers: BatchNorm statistics follow each one's own share."""
    for model in models:
        for buffer in () if model is None else model.buffers():
            dist.broadcast(buffer, src=0)


def sum_up(loss: float, correct: int, seen: int, stop: bool, device: torch.device) -> tuple[float, int, int, bool]:
    """Return mean loss and counts over all processes, and whether any has seen Ctrl-C: they must stop together."""
    totals = torch.tensor([loss * seen, correct, seen, stop], dtype=torch.float64, device=device)
    dist.all_reduce(totals)
    loss_sum, correct_sum, seen_sum, stops = totals.tolist()
    return loss_sum / seen_sum, int(correct_sum), int(seen_sum), stops > 0
