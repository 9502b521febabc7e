"""Measuring in turn.

Every round times every arm once, in an order that is drawn anew, so that whatever else the machine does meets all of them alike.
Networks run once untimed before each timed run, which fills the caches again, as in a program that runs one network all the time.
"""

import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wnq.environment import environment
from wnq.export.engines import processor
from wnq.names import check_choice
from wnq.speed.arms import arms_of
from wnq.speed.summary import median_ratio

BASE = ("onnxruntime float", "openvino float", "torch compiled float", "torch eager float")
"""What the others are compared with: the first of these that was measured."""


def in_turn(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    least: int = 7,
    untimed: int = 0,
    seed: int = 0,
    on_second: Callable[[float, float], None] | None = None,
) -> dict[str, list[float]]:
    """Time each of ``runs`` once a round until the time is up, and return the seconds of every run.

    Args:
        runs: name -> what to time. Each runs twice before the first round.
        seconds: for all rounds together.
        least: rounds, however long they take.
        untimed: runs before each timed one.
        seed: of the order within the rounds.
        on_second: called after each round with (seconds that are over, ``seconds``).
    """
    for run in runs.values():
        run()
        run()
    order, draw = list(runs), random.Random(seed)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    while (over := time.perf_counter() - begin) < seconds or len(taken[order[0]]) < least:
        draw.shuffle(order)
        for name in order:
            for _ in range(untimed):
                runs[name]()
            start = time.perf_counter()
            runs[name]()
            taken[name].append(time.perf_counter() - start)
        if on_second is not None:
            on_second(min(over, seconds), seconds)
    return taken


def measure_speed(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    *,
    batches: Sequence[int] = (1, 32),
    float_model: nn.Module | None = None,
    engines: Iterable[str] | None = None,
    base: str | None = None,
    vnni: bool | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    on_arm: Callable[[int, int], None] | None = None,
    on_second: Callable[[float, float], None] | None = None,
) -> dict[str, Any]:
    """Measure the latency of a quantized network and of its float version, in every engine, on one thread.

    Args:
        model: quantized and calibrated; it is only read.
        inputs: what its forward takes, the batch first; repeated to the batch sizes. The first 64 calibrate what needs it.
        batches: sizes.
        float_model: the same network in float, for PyTorch.
        engines: see :func:`wnq.speed.arms_of`.
        base: name of the arm that the others are compared with; by default the first measured one of :data:`BASE`.
        vnni: see :func:`wnq.speed.arms_of`.
        seconds: for each batch size, all arms together.
        seed: of the order in each round.
        on_arm: called with (done, in all) while files are written.
        on_second: called with (seconds, of) while a batch size is measured.

    Returns:
        As JSON types: ``rows`` with one entry for each batch size and arm (milliseconds of one run: median, 5th and 95th
        percentile; how many times faster than the base, with the 95 % interval of the median over paired rounds), ``left_out``,
        ``processor``, ``environment``.

    Raises:
        ValueError: nothing can be measured, or ``base`` was not.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            arms, left = arms_of(
                model, tuple(x[:2] for x in inputs), Path(folder), float_model=float_model, engines=engines,
                calibration=[tuple(x[:64] for x in inputs)], vnni=vnni, on_arm=on_arm,
            )  # fmt: skip
            if not arms:
                raise ValueError(f"nothing can be measured: {'; '.join(f'{x.name}: {x.why}' for x in left)}.")
            names = [arm.name for arm in arms]
            reference = (
                check_choice(base, names, where="base") if base else next(n for n in [*BASE, *names] if n in names)
            )
            for batch in batches:
                arrays = [np.concatenate([x.numpy()] * -(-batch // len(x)))[:batch] for x in inputs]
                runs = {arm.name: _bound(arm.run, arrays) for arm in arms}
                taken = in_turn(runs, seconds=seconds, untimed=1, seed=seed, on_second=on_second)
                for arm in arms:
                    times = taken[arm.name]
                    low, middle, high = (1000 * float(x) for x in np.percentile(times, (5, 50, 95)))
                    ratio = median_ratio(taken[reference], times)
                    rows.append(
                        {
                            "batch": batch,
                            "arm": arm.name,
                            "engine": arm.engine,
                            "integer": arm.integer,
                            "median_ms": middle,
                            "p5_ms": low,
                            "p95_ms": high,
                            "times_faster": ratio.median,
                            "times_faster_low": ratio.low,
                            "times_faster_high": ratio.high,
                            "rounds": len(times),
                        }
                    )
    finally:
        torch.set_num_threads(threads)
    return {
        "base": reference,
        "rows": rows,
        "for_vnni_alone": processor()["vnni"] if vnni is None else vnni,
        "left_out": [vars(x) for x in left],
        "threads": 1,
        "seconds": seconds,
        "seed": seed,
        "processor": processor(),
        "environment": environment(),
    }


def _bound(run: Callable[[Sequence[Any]], object], arrays: Sequence[Any]) -> Callable[[], object]:
    return lambda: run(arrays)
