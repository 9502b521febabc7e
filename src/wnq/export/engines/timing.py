"""How fast two engines are beside each other, and on what processor."""

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wnq.export.engines.engine import Engine


def latency(engine: Engine, other: Engine, inputs: Sequence[Any], *, seconds: float) -> tuple[float, float, int]:
    """Return median milliseconds of one run in each of two engines, taken in turn, and the number of runs."""
    times: tuple[list[float], list[float]] = ([], [])
    for one in (engine, other):
        one.run(inputs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for one, taken in zip((engine, other), times, strict=True):
            start = time.perf_counter()
            one.run(inputs)
            taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[0])), float(np.median(times[1])), len(times[0])


def processor() -> dict[str, Any]:
    """Return the CPU's name, and which of the instructions that decide here it has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "avx2": "avx2" in flags,
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
    }
