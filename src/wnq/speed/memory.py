"""What training steps need of memory."""

import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wnq.speed.training_arm import prepared
from wnq.train import TrainConfig, plain_accelerator

MIB = 2**20


def peak(model: nn.Module, config: TrainConfig, batch: tuple[Tensor, Tensor], device: torch.device) -> float | None:
    """Return what training steps on one batch need at most, in MiB."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        _steps(model, config, batch)
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if device.type != "cpu" or config.compile or not Path("/proc/self/clear_refs").exists():
        return None  # a compiler's own memory would count
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "arm.pt"
        torch.save((model, config, batch, torch.get_num_threads()), path)
        process = multiprocessing.get_context("spawn")
        receiving, sending = process.Pipe(duplex=False)
        child = process.Process(target=_peak_alone, args=(path, sending), daemon=True)
        child.start()
        sending.close()
        try:
            return receiving.recv()
        except EOFError:
            return None
        finally:
            child.join()


def _peak_alone(path: Path, sending: Any) -> None:
    """Measure in a process of its own, and send the MiB."""
    torch.zeros(1)
    plain_accelerator()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    # Written by the process that started this one, a moment ago, into a folder that only its user can read.
    model, config, batch, threads = torch.load(path, weights_only=False)
    torch.set_num_threads(threads)
    _steps(model, config, batch)
    sending.send((_resident("VmHWM") - before) / 1024)


def _steps(model: nn.Module, config: TrainConfig, batch: tuple[Tensor, Tensor]) -> None:
    accelerator = plain_accelerator()
    images, labels = (x.to(accelerator.device) for x in batch)
    step, _ = prepared(model, config, accelerator)
    for number in range(3):
        if number == 2 and accelerator.device.type == "cuda":  # not what a first step needs to choose its kernels
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        step.take(images, labels, 0)
    if accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    accelerator.free_memory()


def _resident(key: str) -> int:
    """Return a line of the process's status in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def how_memory(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "by PyTorch's allocator, without the images of the data set"
    if device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        return "resident memory of a fresh process above what it has before the network is there"
    return None
