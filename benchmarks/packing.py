"""Speed of packing and unpacking codes at widths 1 to 8 on one thread, beside a plain memory copy.

    python benchmarks/packing.py [--weights 16777216] [--runs 9] [--seed 0] [--out benchmarks/results]

Writes packing_<hardware>_<yyyymm>.json (every sample and the configuration) and a Markdown table beside it. Rates are
in bytes of the float32 weights that the codes stand for, 4 bytes per code.
"""

import argparse
import datetime
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wnq.packing import pack_codes, packed_size, unpack_codes

WIDTHS = range(1, 9)
GOALS = {"pack": 300.0, "unpack": 500.0}  # MB/s of float32 weights


def cpu_model() -> str:
    """Return the processor's name as the system reports it."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.M) if info.exists() else []
    return names[0].strip() if names else platform.processor() or platform.machine()


def hardware_tag() -> str:
    """Return a short name for file names, such as epyc-2core."""
    known = re.search(r"epyc|ryzen|xeon|core|apple m\d|graviton|neoverse", cpu_model().lower())
    family = known.group().replace(" ", "-") if known else platform.machine().lower()
    return f"{family}-{os.cpu_count()}core"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(n: int, runs: int, seed: int) -> dict[str, list[float]]:
    """Return seconds per call, ``runs`` of each case; every round visits every case once, after an unmeasured round."""
    generator = torch.Generator().manual_seed(seed)
    cases: dict[str, Callable[[], object]] = {}
    for bits in WIDTHS:
        codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8, generator=generator)
        packed = pack_codes(codes, bits)
        if not torch.equal(unpack_codes(packed, bits, (n,)), codes):
            raise SystemExit(f"round trip failed at {bits} bits")
        cases[f"pack {bits}"] = lambda codes=codes, bits=bits: pack_codes(codes, bits)
        cases[f"unpack {bits}"] = lambda packed=packed, bits=bits: unpack_codes(packed, bits, (n,))
    plain = np.zeros(n, np.uint8)
    cases["copy of the codes (uint8)"] = lambda: plain.copy()
    floats = np.zeros(n, np.float32)
    cases["copy of the weights (float32)"] = lambda: floats.copy()
    samples: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs + 1):
        for name, call in cases.items():
            samples[name].append(seconds(call))
    return {name: taken[1:] for name, taken in samples.items()}


def rates(samples: list[float], n: int) -> tuple[float, float, float]:
    """Return (median, slowest, fastest) in MB/s of float32 weights."""
    at = [4 * n / s / 1e6 for s in samples]
    return statistics.median(at), min(at), max(at)


def table(result: dict[str, Any]) -> str:
    n, samples = result["config"]["weights"], result["seconds"]
    lines = [
        f"# Packing, {result['environment']['cpu']}, {result['config']['threads']} thread, {result['date'][:7]}",
        "",
        f"{n:,} weights; MB/s of the float32 weights that the codes stand for, median of {result['config']['runs']} "
        f"interleaved runs (slowest–fastest). Goals: pack {GOALS['pack']:.0f}, unpack {GOALS['unpack']:.0f}. "
        f"Python {result['environment']['python']}, torch {result['environment']['torch']}, "
        f"numpy {result['environment']['numpy']}. Produced by `benchmarks/packing.py`; every sample is in the JSON.",
        "",
        "| bits | packed MB | pack MB/s | pack M codes/s | unpack MB/s | unpack M codes/s |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for bits in WIDTHS:
        cells = [f"{bits}", f"{packed_size(n, bits) / 1e6:.1f}"]
        for what in ("pack", "unpack"):
            median, slowest, fastest = rates(samples[f"{what} {bits}"], n)
            cells += [f"{median:,.0f} ({slowest:,.0f}–{fastest:,.0f})", f"{median / 4:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for name in samples:
        if name.startswith("copy"):
            median, slowest, fastest = rates(samples[name], n)
            lines.append(
                f"Yardstick, numpy {name}: {median:,.0f} ({slowest:,.0f}–{fastest:,.0f}) MB/s on the same scale.  "
            )
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=1 << 24, help="number of weights (default: 16,777,216)")
    parser.add_argument("--runs", type=int, default=9, help="samples per case, at least 7 (default: 9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the results")
    args = parser.parse_args()
    if args.runs < 7 or args.weights < 1:
        parser.error("--runs must be 7 or more and --weights 1 or more")
    torch.set_num_threads(1)
    today = datetime.datetime.now(datetime.UTC).date()
    result = {
        "benchmark": "packing",
        "date": today.isoformat(),
        "config": {"weights": args.weights, "runs": args.runs, "seed": args.seed, "threads": torch.get_num_threads()},
        "environment": {
            "cpu": cpu_model(),
            "cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "unit": "seconds per call",
        "seconds": measure(args.weights, args.runs, args.seed),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"packing_{hardware_tag()}_{today:%Y%m}"
    text = table(result)
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    sys.stdout.write(text + f"\nwritten: {stem}.json, {stem}.md\n")


if __name__ == "__main__":
    main()
