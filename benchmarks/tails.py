"""Speed and memory of the statistics of a checkpoint: 100 million float32 parameters in a safetensors file.

    python benchmarks/tails.py [--rounds 15] [--parameters 100000000]

Not called ``statistics.py``: scripts beside it import the standard library's module of that name.

The checkpoint is made in a temporary folder: a transformer with one large embedding, weights of Student's t. Four jobs go over it
tensor by tensor, each in a process of its own that waits between its turns: *statistics* (``tensor_stats`` and a histogram of each
tensor); *and channels* (also peak and rms of each channel); *and clip rules* (also the error at 2, 3, 4 and 8 bits under each of
them: what a report of a float checkpoint needs); *and codes* (also quantized to 3 bits, with the error of that). Yardsticks: a sum,
which only reads; and the statistics written plainly in NumPy, in float64. Rates are bytes of float32 a second, 4 a parameter; a
bfloat16 checkpoint counts 4 as well.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import hardware_tag, write_results
from safetensors.torch import save_file
from torch import Tensor

from wnq.checkpoints import open_checkpoint
from wnq.clipping import clip_errors
from wnq.environment import environment
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import Quantized, Uniform
from wnq.tails import channel_stats, describe, error_stats

ROOT = Path(__file__).resolve().parent.parent
WIDTH, CONTEXT, BLOCK = 768, 1024, 12 * 768**2
VOCABULARY = 36_864
CLIP_WIDTHS = (2, 3, 4, 8)
SPEED = 0.5e9
"""The bar: bytes of float32 a second, file to numbers, on two cores."""


def memory_bar(largest: int) -> int:
    """Return the other bar: three times the largest tensor and 300 MB."""
    return 3 * largest + 300 * 10**6


# The checkpoint


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Return a transformer of about this many parameters: an embedding, positions, as many blocks as fit."""
    table: dict[str, tuple[int, ...]] = {"wte.weight": (VOCABULARY, WIDTH), "wpe.weight": (CONTEXT, WIDTH)}
    for i in range(max(1, round((parameters - (VOCABULARY + CONTEXT) * WIDTH) / BLOCK))):
        for name, out, inputs in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.out", WIDTH, WIDTH),
            ("mlp.up", 4 * WIDTH, WIDTH),
            ("mlp.down", WIDTH, 4 * WIDTH),
        ):
            table |= {f"h.{i}.{name}.weight": (out, inputs), f"h.{i}.{name}.bias": (out,)}
        for norm in ("ln_1", "ln_2"):
            table |= {f"h.{i}.{norm}.{part}": (WIDTH,) for part in ("weight", "bias")}
    return table


def checkpoint(parameters: int, seed: int) -> dict[str, Tensor]:
    generator = np.random.default_rng(seed)
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes(parameters).items():
        size = math.prod(shape)
        # Student's t with 6 degrees of freedom, as a Gaussian over a chi.
        spread = np.sqrt(generator.standard_gamma(3.0, size, dtype=np.float32) / 3)
        values = generator.standard_normal(size, dtype=np.float32) / spread * np.float32(0.02)
        tensors[name] = torch.from_numpy(values).reshape(shape)
    return tensors


# Jobs: what is done with each tensor, by the name under which its time is counted


def quantized(weight: Tensor) -> Quantized:
    return Normalized(max_abs, Uniform(3)).quantize(weight)


def plain_numpy(weight: Tensor) -> object:
    """The same numbers as `describe`, as one writes them down: float64, whole arrays."""
    w = weight.double().numpy().ravel()
    w = w[np.isfinite(w)]
    rms, centred = np.sqrt(np.mean(w**2)), w - w.mean()
    kurtosis = np.mean(centred**4) / np.mean(centred**2) ** 2
    tail = np.abs(w) > 3 * rms
    energy = (w[tail] ** 2).sum() / (w**2).sum()
    return np.abs(w).max(), rms, kurtosis, tail.mean(), energy, np.histogram(w / rms, 401)


def plan(job: str, weight: Tensor) -> Iterator[tuple[str, Callable[[], object]]]:
    if job == "sum":
        yield "sum", weight.sum
    elif job == "plain NumPy":
        yield "plain NumPy", lambda: plain_numpy(weight)
    else:
        yield "describe", lambda: describe(weight)
        depth = JOBS.index(job) if weight.ndim > 1 else 0
        if depth >= 1:
            yield "channel_stats", lambda: channel_stats(weight)
        if depth >= 2:
            yield "clip_errors", lambda: clip_errors(weight, bits=CLIP_WIDTHS)
        if depth >= 3:
            codes: list[Quantized] = []
            yield "quantize", lambda: codes.append(quantized(weight))
            yield "error_stats", lambda: error_stats(weight, codes[0])


LONG_ROUNDS = 3
JOBS = ("statistics", "and channels", "and clip rules", "and codes")
"""Each does what those before it do, and more."""


def once(path: Path, job: str) -> tuple[float, float, dict[str, float]]:
    """Return the seconds of one pass over a file: by the clock, of processors, and by the clock for each part."""
    parts: dict[str, float] = {}
    begin, busy = time.perf_counter(), time.process_time()
    opened = open_checkpoint(path)
    for info in opened.tensors:
        tensor = opened.read(info.name)
        for name, work in plan(job, tensor):
            start = time.perf_counter()
            work()
            parts[name] = parts.get(name, 0.0) + time.perf_counter() - start
        del tensor
    return time.perf_counter() - begin, time.process_time() - busy, parts


# One process a job: its memory is its own


def peak_memory() -> int:
    """Return the most memory this process has had, in bytes; rusage would count the parent's, which is inherited, too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def dropped(path: Path) -> bool:
    """Put a file out of the page cache, if the system knows how."""
    if not hasattr(os, "posix_fadvise"):
        return False
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def serve(path: Path, job: str, threads: int) -> None:
    """Do the job once for each line on standard input; a line ``cold`` reads the file from the disk."""
    torch.set_num_threads(threads)
    start = peak_memory()
    for line in sys.stdin:
        cold = line.strip() == "cold" and dropped(path)
        wall, processor, parts = once(path, job)
        answer = {"cold": cold, "wall": wall, "cpu": processor, "parts": parts}
        print(json.dumps(answer | {"memory_start": start, "memory": peak_memory()}), flush=True)


class Arm:
    """A job on a file at a number of threads, in its own process, which waits between rounds."""

    def __init__(self, path: Path, kind: str, job: str, threads: int, cold: bool = False) -> None:
        self.kind, self.job, self.threads, self.cold = kind, job, threads, cold
        command = [sys.executable, __file__, "--serve", str(path), job, str(threads)]
        # What takes long is repeated less often.
        self.limit = LONG_ROUNDS if job in (*JOBS[2:], "plain NumPy") else None
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.rounds: list[dict[str, Any]] = []

    def run(self) -> None:
        assert self.process.stdin and self.process.stdout
        load = os.getloadavg()[0]
        self.process.stdin.write("cold\n" if self.cold else "warm\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.job!r} ended: {self.process.wait()}")
        self.rounds.append(json.loads(line) | {"load": load})

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()

    def row(self, parameters: int, largest: int) -> dict[str, Any]:
        """Return every round and what follows from them; rates in GB/s of float32."""
        size = 4 * parameters / 1e9
        wall, cpu = ([r[key] for r in self.rounds] for key in ("wall", "cpu"))
        names = self.rounds[0]["parts"]
        return {
            "checkpoint": self.kind,
            "job": self.job,
            "threads": self.threads,
            "cold": all(r["cold"] for r in self.rounds),
            "best": size / min(wall),
            "median": size / statistics.median(wall),
            "per_cpu_second": size / min(cpu),
            "parts_best": {name: size / min(r["parts"][name] for r in self.rounds) for name in names},
            "memory": max(r["memory"] for r in self.rounds),
            "memory_start": self.rounds[0]["memory_start"],
            "largest_tensor": largest,
            "load": [round(r["load"], 1) for r in self.rounds],
            "wall": wall,
            "cpu": cpu,
        }


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| checkpoint | job | threads | page cache | best GB/s | median GB/s | GB a processor second | peak MB | of which at start "
        "| allowed MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        cells = [r["checkpoint"], r["job"], str(r["threads"]), "cold" if r["cold"] else "warm"]
        cells += [f"{r[key]:.2f}" for key in ("best", "median", "per_cpu_second")]
        cells += [f"{x / 1e6:.0f}" for x in (r["memory"], r["memory_start"], memory_bar(r["largest_tensor"]))]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Parts of the last job, best GB/s by the clock:", ""]
    parts = [r for r in rows if r["job"] == JOBS[-1]]
    names = list(parts[0]["parts_best"])
    lines += [f"| checkpoint | threads | {' | '.join(names)} |", "| --- " * (len(names) + 2) + "|"]
    for r in parts:
        cells = [f"{r['parts_best'][name]:.2f}" for name in names]
        lines.append(f"| {r['checkpoint']} | {r['threads']} | {' | '.join(cells)} |")
    loads = [x for r in rows for x in r["load"]]
    bars = [r for r in rows if r["job"] == "statistics" and r["threads"] == 2 and r["checkpoint"] == "float32"]
    speed = min(r["best"] for r in bars if not r["cold"])
    # The last job's memory is the quantizer's, which makes whole tensors in float32.
    heavy = [r for r in rows if r["memory"] > memory_bar(r["largest_tensor"]) and r["job"] in JOBS[:-1]]
    return [
        *lines,
        "",
        f"Bars: statistics of the float32 checkpoint at 2 threads, {SPEED / 1e9:g} GB/s: "
        f"{'met' if speed >= SPEED / 1e9 else 'missed'} ({speed:.2f}). Memory: "
        f"{'missed by ' + ', '.join(r['job'] for r in heavy) if heavy else 'met by every job but the one that quantizes'}.",
        f"Load average of the machine before the rounds: {min(loads):.1f} to {max(loads):.1f}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=15, help=f"passes of each job; of those that take long {LONG_ROUNDS}"
    )
    parser.add_argument("--parameters", type=int, default=100_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    parser.add_argument("--serve", nargs=3, metavar=("FILE", "JOB", "THREADS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve[0]), options.serve[1], int(options.serve[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        tensors = checkpoint(options.parameters, options.seed)
        count, most = sum(t.numel() for t in tensors.values()), max(t.numel() for t in tensors.values())
        number = len(tensors)
        paths = {"float32": Path(folder) / "float32.safetensors", "bfloat16": Path(folder) / "bfloat16.safetensors"}
        save_file(tensors, paths["float32"])
        save_file({name: t.bfloat16() for name, t in tensors.items()}, paths["bfloat16"])
        del tensors
        arms = [Arm(paths["float32"], "float32", job, threads) for job in JOBS for threads in (1, 2)]
        arms += [Arm(paths["bfloat16"], "bfloat16", job, 2) for job in JOBS[:-1]]
        arms += [Arm(paths["float32"], "float32", job, 2) for job in ("sum", "plain NumPy")]
        arms.append(Arm(paths["float32"], "float32", "statistics", 2, cold=True))
        try:
            for i in range(options.rounds):
                for arm in arms:
                    if arm.limit is None or i < arm.limit:
                        arm.run()
                print(f"round {i + 1} of {options.rounds}", file=sys.stderr, flush=True)
        finally:
            for arm in arms:
                arm.close()
    rows = [arm.row(count, most * (2 if arm.kind == "bfloat16" else 4)) for arm in arms]
    config = {
        "command": f"python benchmarks/tails.py --rounds {options.rounds} --parameters {options.parameters}",
        "checkpoint": f"{count:,} parameters in {number} tensors, the largest {most:,}; Student's t with 6 degrees of freedom, "
        f"seed {options.seed}",
        "rates": f"GB of float32 a second, 4 bytes a parameter, whatever the file's type; {options.rounds} rounds of the jobs "
        f"that are short, {LONG_ROUNDS} of the others (clip rules, codes, plain NumPy), each process in turn; best and median by "
        "the clock. 'GB a processor second' depends less on who else uses the machine: best, over user and system time.",
        "page cache": "warm: the file was just written or read, and the system holds it in memory; cold: it was dropped before "
        "each pass",
        "memory": "most resident memory of the process, its mapped file included; at start: after the imports",
        "jobs": "statistics: open, read, describe (tensor_stats and histogram) each tensor. And channels: also channel_stats of "
        "each matrix. And clip rules: also clip_errors at 2, 3, 4, 8 bits. And codes: also quantize at 3 bits, error_stats.",
    }
    lines = table(rows)
    path = write_results("statistics", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
