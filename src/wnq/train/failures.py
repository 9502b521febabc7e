"""Failures of a run that are not its settings' fault, said in one sentence."""

import contextlib
import re
from collections.abc import Callable, Generator

import torch
import torch.distributed as dist

from wnq.train.config import TrainConfig

REMEDIES = ("bf16", "compact_activations", "channels_last")
"""Switches of the settings that take less memory."""


class OutOfMemoryError(RuntimeError):
    """There is too little memory for a step."""


class ProcessLostError(RuntimeError):
    """Another process of the job has ended, or does not answer."""


@contextlib.contextmanager
def explained(config: TrainConfig, processes: int, kept: Callable[[], str]) -> Generator[None]:
    """Say in one sentence that memory ran out or that another process is gone, and what to do.

    Args:
        config: the settings.
        processes: of the job.
        kept: says what state was kept.

    Raises:
        OutOfMemoryError: in place of what torch raises then.
        ProcessLostError: likewise.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if _is_out_of_memory(error, text):
            raise OutOfMemoryError(_too_little(config, processes, text, kept())) from error
        if processes > 1 and _is_lost(error, text):
            raise ProcessLostError(
                f"another of the {processes} processes has ended or does not answer, so this one cannot go on. {kept()} "
                "Look for the first error in the log of the job, and start it again with resume."
            ) from error
        raise


def _is_out_of_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "DefaultCPUAllocator" in text or "out of memory" in text.lower()


def _is_lost(error: BaseException, text: str) -> bool:
    if isinstance(error, dist.DistError):
        return True
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return any(sign in text for sign in signs)


def _too_little(config: TrainConfig, processes: int, text: str, kept: str) -> str:
    share = f" ({config.batch_size // processes} a process)" if processes > 1 else ""
    # A compiled step decides by itself what to keep.
    usable = [name for name in REMEDIES if not (config.compile and name == "compact_activations")]
    off = [name for name in usable if not getattr(config, name)]
    switches = f", or set {' = true, '.join(off)} = true" if off else ""
    asked = re.search(r"tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ \w+)", text)
    size = "" if asked is None else f": {asked[2] or f'{int(asked[1]) / 2**30:.2f} GiB'} more were asked for"
    return f"out of memory in training with batch_size {config.batch_size}{share}{size}. Use a smaller batch_size{switches}. {kept}"
