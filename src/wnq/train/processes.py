"""The processes of one job: which there are, and what they share."""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn

if TYPE_CHECKING:
    from accelerate import Accelerator

_making = threading.Lock()


def plain_accelerator() -> "Accelerator":
    """Return an ``accelerate.Accelerator`` with its defaults, which knows the processes of this job."""
    try:
        from accelerate import Accelerator
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('training needs accelerate: pip install "wnq[train]"') from error
    # Without being told that there is no device, accelerate ignores the other processes of a job on CPUs.
    with _making:  # its state is the process's, and half-made while another thread makes it
        return Accelerator(cpu=not torch.accelerator.is_available())


def share_buffers(models: Iterable[nn.Module | None], device: torch.device) -> None:
    """Give all processes the main one's buffers: BatchNorm statistics follow each one's own share.

    Args:
        models: the same in all processes.
        device: what the processes share by; a counter that lives on the host travels over it.
    """
    for model in models:
        for buffer in () if model is None else model.buffers():
            shared = buffer.to(device)
            dist.broadcast(shared, src=0)
            if shared is not buffer:
                buffer.copy_(shared)


def all_of(able: bool, device: torch.device) -> bool:
    """Return whether it holds in every process."""
    if not (dist.is_available() and dist.is_initialized()):
        return able
    answers = torch.tensor(int(able), device=device)
    dist.all_reduce(answers, op=dist.ReduceOp.MIN)
    return bool(answers)


def check_engine(accelerator: "Accelerator") -> None:
    """Raise ``ValueError`` where the processes divide the model among them instead of the images."""
    engine = str(accelerator.distributed_type).rpartition(".")[2]
    if engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ValueError(
            f"fit trains by DistributedDataParallel, every process with the whole model, but accelerate is set to {engine}: use "
            "accelerate launch --multi_gpu or torchrun, or shard the model in a loop of your own (docs/distributed.md)."
        )
