"""What a step of training costs, float beside quantized: time, memory, and the share of it that is not the model.

The steps are those of :func:`wnq.fit`: its own batches, step and account, taken in turn with those of the other arms.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from wnq.data import Dataset
from wnq.environment import environment
from wnq.speed.measuring import in_turn
from wnq.speed.memory import how_memory, peak
from wnq.speed.summary import median_ratio
from wnq.speed.training_arm import RunningArm, TrainArm, batches_for
from wnq.train import TrainConfig, plain_accelerator

PARTS = ("step", "model", "data", "optimizer", "accounting")
"""What is timed: the whole step; forward, loss and backward on a batch that is there; the next batch with its augmentation; the
optimizer; and noting loss and right answers."""


def training_arms(
    float_model: nn.Module, quantized: nn.Module, *, compiled: bool = False, captured: bool = False
) -> list[TrainArm]:
    """Return the float and the quantized network as arms: eager; compiled or captured, if asked for; both, if both are."""
    modes = [(False, False)]
    if captured:
        modes.append((False, True))
    if compiled:
        modes.append((True, captured))
    return [
        TrainArm(", ".join([name, *["compiled"] * compile_it, *["graph"] * capture_it]), model, compile_it, capture_it)
        for compile_it, capture_it in modes
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
        arms: the first float one that is compiled and captured as an arm is (or not, like it) is what that arm is compared with;
            such an arm's name begins with ``float``.
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
    measured: dict[str, RunningArm] = {}
    for number, arm in enumerate(arms):
        own = _own(config, arm)
        if memory:
            peaks[arm.name] = peak(
                arm.model, own, next(batches_for(data, own, torch.device("cpu")).epoch(0)), accelerator.device
            )
        if on_arm is not None:
            on_arm(number + 1, len(arms))
    for arm in arms:
        measured[arm.name] = RunningArm(arm.model, data, _own(config, arm), accelerator)
    runs = {f"{name}/{part}": getattr(arm, part) for name, arm in measured.items() for part in PARTS}
    taken = in_turn(runs, seconds=seconds, seed=seed, on_second=on_second)
    accelerator.free_memory()
    return {
        "rows": [_row(arm, arms, taken, config.batch_size, peaks[arm.name]) for arm in arms],
        "batch_size": config.batch_size,
        "memory": how_memory(accelerator.device) if memory else None,
        "seconds": seconds,
        "seed": seed,
        "train": dataclasses.asdict(config),
        "environment": environment(),
    }


def _own(config: TrainConfig, arm: TrainArm) -> TrainConfig:
    """Return the settings of an arm; a compiled one decides by itself which activations to keep."""
    compact = config.compact_activations and not arm.compiled
    return dataclasses.replace(config, compile=arm.compiled, cuda_graph=arm.captured, compact_activations=compact)


def _row(
    arm: TrainArm, arms: Sequence[TrainArm], taken: dict[str, list[float]], batch_size: int, peak: float | None
) -> dict[str, Any]:
    times = taken[f"{arm.name}/step"]
    low, middle, high = (1000 * float(x) for x in np.percentile(times, (5, 50, 95)))
    kind = arm.compiled, arm.captured
    base = next((x.name for x in arms if x.name.startswith("float") and (x.compiled, x.captured) == kind), arm.name)
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
