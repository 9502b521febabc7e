"""What a step of training costs, float beside quantized: time, memory, and the share of it that is not the model.

The steps are those of :func:`wnq.fit`: its own batches, step and account, taken in turn with those of the other arms.
"""

import copy
import dataclasses
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from wnq.compact import compact_activations_
from wnq.data import Augment, Dataset, batches_of
from wnq.environment import environment
from wnq.procedures import Procedure
from wnq.speed.measuring import in_turn
from wnq.speed.summary import median_ratio
from wnq.train import TrainConfig, plain_accelerator
from wnq.train.account import Account
from wnq.train.optimizer import make_optimizer
from wnq.train.step import TrainStep

if TYPE_CHECKING:
    from accelerate import Accelerator

PARTS = ("step", "model", "data", "optimizer", "accounting")
"""What is timed: the whole step; forward, loss and backward on a batch that is there; the next batch with its augmentation; the
optimizer; and noting loss and right answers."""
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class TrainArm:
    """One way to train.

    Attributes:
        name: such as ``quantized, compiled``.
        model: what is trained; it is copied.
        compiled: whether it is compiled.
    """

    name: str
    model: nn.Module
    compiled: bool = False


def training_arms(float_model: nn.Module, quantized: nn.Module, *, compiled: bool = False) -> list[TrainArm]:
    """Return the float and the quantized network as arms, and both compiled, if asked for."""
    modes = (False, True) if compiled else (False,)
    return [
        TrainArm(f"{name}, compiled" if mode else name, model, mode)
        for mode in modes
        for name, model in (("float", float_model), ("quantized", quantized))
    ]


def measure_training(
    arms: Sequence[TrainArm],
    data: Dataset,
    config: TrainConfig,
    *,
    seconds: float = 20.0,
    memory: bool = True,
    seed: int = 0,
    on_arm: Callable[[int, int], None] | None = None,
    on_second: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Measure training steps of several arms, in turn, on the device that :func:`wnq.fit` would use.

    The learning rate is small, so that weights stay where they are; distillation, procedures and records are left out.

    Args:
        arms: the first float one that is compiled as an arm is (or not, like it) is what that arm is compared with; such an arm's
            name begins with ``float``.
        data: what the batches are made from.
        config: batch size, augmentation, number formats.
        seconds: for all arms and parts together.
        memory: measure memory too; on the CPU this starts a process for each arm.
        seed: of the order in each round.
        on_arm: called with (done, in all) while arms are made ready.
        on_second: called with (seconds, of) while they are measured.

    Returns:
        As JSON types: ``rows`` with one entry an arm: ``step_ms`` (median, ``p5_ms``, ``p95_ms``), ``images_per_second``,
        ``times_float`` with the 95 % interval of the median over paired rounds, ``not_model`` (1 minus the part of a step that
        the model alone takes, with its interval), ``parts_ms`` and ``peak_mib``, what a step needs on top of the images: on CUDA
        by PyTorch's allocator, on Linux's CPU, uncompiled, by the resident memory of a fresh process, elsewhere None.

    Raises:
        ValueError: fewer training images than a batch.
    """
    if len(data.train) < config.batch_size:
        raise ValueError(f"batch_size {config.batch_size} is more than the {len(data.train)} training images.")
    config = dataclasses.replace(config, lr=min(config.lr, 1e-4), warmup_epochs=0.0, distill_weight=0.0, record_every=0)
    accelerator = plain_accelerator()
    peaks: dict[str, float | None] = {arm.name: None for arm in arms}
    measured: dict[str, _Arm] = {}
    for number, arm in enumerate(arms):
        own = _own(config, arm)
        if memory:
            peaks[arm.name] = _peak(arm.model, own, _first_batch(data, own), accelerator.device)
        if on_arm is not None:
            on_arm(number + 1, len(arms))
    for arm in arms:
        measured[arm.name] = _Arm(arm.model, data, _own(config, arm), accelerator)
    runs = {f"{name}/{part}": getattr(arm, part) for name, arm in measured.items() for part in PARTS}
    taken = in_turn(runs, seconds=seconds, seed=seed, on_second=on_second)
    accelerator.free_memory()
    return {
        "rows": [_row(arm, arms, taken, config.batch_size, peaks[arm.name]) for arm in arms],
        "batch_size": config.batch_size,
        "memory": _how_memory(accelerator.device) if memory else None,
        "seconds": seconds,
        "seed": seed,
        "train": dataclasses.asdict(config),
        "environment": environment(),
    }


def _own(config: TrainConfig, arm: TrainArm) -> TrainConfig:
    """Return the settings of an arm; a compiled one decides by itself which activations to keep."""
    compact = config.compact_activations and not arm.compiled
    return dataclasses.replace(config, compile=arm.compiled, compact_activations=compact)


def _row(
    arm: TrainArm, arms: Sequence[TrainArm], taken: dict[str, list[float]], batch_size: int, peak: float | None
) -> dict[str, Any]:
    times = taken[f"{arm.name}/step"]
    low, middle, high = (1000 * float(x) for x in np.percentile(times, (5, 50, 95)))
    base = next((x.name for x in arms if x.name.startswith("float") and x.compiled == arm.compiled), arm.name)
    ratio = median_ratio(times, taken[f"{base}/step"])
    model = median_ratio(taken[f"{arm.name}/model"], times)
    return {
        "arm": arm.name,
        "step_ms": middle,
        "p5_ms": low,
        "p95_ms": high,
        "images_per_second": 1000 * batch_size / middle,
        "base": base,
        "times_float": ratio.median,
        "times_float_low": ratio.low,
        "times_float_high": ratio.high,
        "not_model": 1 - model.median,
        "not_model_low": 1 - model.high,
        "not_model_high": 1 - model.low,
        "parts_ms": {part: 1000 * float(np.median(taken[f"{arm.name}/{part}"])) for part in PARTS if part != "step"},
        "peak_mib": peak,
        "rounds": len(times),
    }


class _Arm:
    """A network in training, one part of the step at a time. Every part waits for the device."""

    def __init__(self, model: nn.Module, data: Dataset, config: TrainConfig, accelerator: "Accelerator") -> None:
        self.device: torch.device = accelerator.device
        self.batches = _batches(data, config, self.device)
        self.train_step, self.account = _prepared(model, config, accelerator)
        self.fixed = next(self.batches)
        self.noted = self.train_step.gradients(*self.fixed)

    def step(self) -> None:
        images, labels = next(self.batches)
        self.account.add(*self.train_step.take(images, labels, 0), labels)
        self._read()

    def model(self) -> None:
        self.noted = self.train_step.gradients(*self.fixed)
        self._wait()

    def data(self) -> None:
        next(self.batches)
        self._wait()

    def optimizer(self) -> None:
        self.train_step.set_rate(0)
        self.train_step.update()
        self._wait()

    def accounting(self) -> None:
        self.account.add(*self.noted, self.fixed[1])
        self._read()

    def _read(self) -> None:
        if self.account.due:
            self.account.read()
        self._wait()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def _prepared(model: nn.Module, config: TrainConfig, accelerator: "Accelerator") -> tuple[TrainStep, Account]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    own: Any = copy.deepcopy(model)
    own = own.to(accelerator.device, memory_format=layout).train()
    if config.compact_activations:
        compact_activations_(own)

    optimizer = make_optimizer(own, Procedure(), config)
    step = TrainStep(own, optimizer, config, steps_per_epoch=1000, accelerator=accelerator)
    return step, Account(accelerator.device)


def _batches(data: Dataset, config: TrainConfig, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    batches = batches_of(
        data.train, config.batch_size, mean=data.mean, std=data.std, augment=Augment(config.crop_padding, config.flip),
        shuffle=True, seed=config.seed, drop_last=True, device=device, channels_last=config.channels_last,
    )  # fmt: skip
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


def _first_batch(data: Dataset, config: TrainConfig) -> tuple[Tensor, Tensor]:
    return next(_batches(data, config, torch.device("cpu")))


def _peak(model: nn.Module, config: TrainConfig, batch: tuple[Tensor, Tensor], device: torch.device) -> float | None:
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
    step, _ = _prepared(model, config, accelerator)
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


def _how_memory(device: torch.device) -> str | None:
    if device.type == "cuda":
        return "by PyTorch's allocator, without the images of the data set"
    if device.type == "cpu" and Path("/proc/self/clear_refs").exists():
        return "resident memory of a fresh process above what it has before the network is there"
    return None
