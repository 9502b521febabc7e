"""What quantized training costs: a training step of a network, float and quantized by several libraries.

    python benchmarks/step_time.py [--rounds 15] [--bits 3]
    python benchmarks/step_time.py --network resnet18 --bf16 --compile --graph --memory --rounds 50   # on a GPU

The arms take turns, one step each a round in an order drawn anew, so that a drifting machine drifts for all; the ratio to the float
step is taken round by round and its median reported. Peers: brevitas' ``QuantConv2d`` (``pip install brevitas``), torchao's fake
quantizers (``pip install torchao``; either is left out if missing) and torch's own fused fake-quantization kernels, put in the same
places. torchao's quantization-aware training covers linear layers and embeddings only: its quantizers stand here in front of the
convolutions in the cheapest way that they allow, symmetric and one scale a channel for weights, asymmetric and one scale an
image for inputs, computed from each batch as they do.

Freed memory stays in the process for all arms (``wnq.allocator``), as a trainer wants it; ``--system-allocator`` leaves that to
the C library, and the time then depends on how each arm happens to fragment the heap. ``--clock processor`` takes the processor
time of the process instead of the time on the wall: with one thread on a busy machine the two differ by the waiting.

``--compile`` adds ``torch.compile`` of some arms, ``--graph`` (CUDA) every arm's whole step as one recorded graph, which leaves the
time that the host takes to start operations out. An arm that cannot is left out, with its reason in the results.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from random import Random
from typing import Any

import torch
from results import hardware_tag, write_results
from step_arms import ARMS, COMPILED, CUDA, DEVICE, WNQ, Arm, builders, recorder, settle

from wnq.allocator import keep_freed_memory
from wnq.environment import environment
from wnq.models import build_model
from wnq.speed import median_ratio

SHAPES = {"resnet20": (32, 100), "resnet18": (224, 1000)}
"""Image size in pixels and classes."""


def reason(error: BaseException) -> str:
    """The error in a line, with what it came from: a recording that breaks raises once more as it ends."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    return told if error.__context__ is None else f"{told} (from {reason(error.__context__)})"


class Arms:
    """The arms that work, and why the others do not."""

    def __init__(self, options: argparse.Namespace, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        self.options, self.batch = options, batch
        torch.manual_seed(0)
        base = build_model(options.network, num_classes=SHAPES[options.network][1])
        self.builders = builders(base, options.bits)
        self.ready: dict[str, Arm] = {}
        self.left: dict[str, str] = {}
        wanted = [name for name in ARMS if name == "float" or name in (options.arms or ARMS)]
        for name in wanted:
            self.add(name)
        compiled = [name for name in wanted if name in COMPILED and name in self.ready and options.compile]
        for name in compiled:
            self.add(f"{name}, compiled", name, Arm.compile)
        for name in list(self.ready) if options.graph else ():
            self.add(f"{name}, graph", name.removesuffix(", compiled"), recorder(compiled=name.endswith(", compiled")))

    def add(self, name: str, kind: str | None = None, prepare: Callable[[Arm], None] | None = None) -> None:
        """Build an arm and take a step or two with it; leave it out if that fails."""
        try:
            arm = Arm(self.builders[kind or name](), self.batch, bf16=self.options.bf16)
            if prepare is not None:
                prepare(arm)
                arm.step()
                settle()
            elif CUDA:
                arm.step()
                settle()
        except ModuleNotFoundError as error:
            print(f"{error.name} is not installed: its arm is left out (pip install {error.name})")
            self.left[name] = f"{error.name} is not installed"
        except Exception as error:  # whatever a library raises on a device that it was not written for
            self.leave(name, error)
        else:
            self.ready[name] = arm

    def leave(self, name: str, error: Exception) -> None:
        self.ready.pop(name, None)
        self.left[name] = reason(error)
        print(f"{name} is left out: {self.left[name]}", flush=True)
        if name == "float":
            sys.exit("nothing to compare with")

    def seconds(self, name: str, now: Callable[[], float]) -> float | None:
        """Take a step; None, and the arm is left out from now on, if it fails."""
        settle()
        start = now()
        try:
            self.ready[name].step()
            settle()
        except Exception as error:
            self.leave(name, error)
            return None
        return now() - start

    def peak(self, name: str) -> int | None:
        """Bytes that a step needs at its peak beyond what was allocated before it, its gradients included (CUDA)."""
        arm = self.ready[name]
        if arm.graph is not None:
            return None  # its memory was taken when it was recorded
        arm.optimizer.zero_grad()
        settle()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        if self.seconds(name, time.perf_counter) is None:
            return None
        return torch.cuda.max_memory_allocated() - before


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hardware", default=None)
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--system-allocator", action="store_true", help="let the C library return freed memory at once")
    parser.add_argument("--network", choices=list(SHAPES), default="resnet20", help="resnet18 is ImageNet's")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="NAME", help=f"of: {'; '.join(ARMS)}")
    parser.add_argument("--compile", action="store_true", help="add compiled arms")
    parser.add_argument("--graph", action="store_true", help="add every arm as a recorded graph (CUDA)")
    parser.add_argument("--bf16", action="store_true", help="run the networks under bfloat16 autocast")
    parser.add_argument("--memory", action="store_true", help="measure the peak of a step (CUDA)")
    options = parser.parse_args()
    if not CUDA and (options.graph or options.memory):
        parser.error("--graph and --memory need a CUDA device (benchmarks/train_memory.py measures memory on the CPU)")
    return options


def main() -> None:
    options = parsed()
    torch.set_num_threads(options.threads)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # the arms share their code, and with it one limit
    now = time.perf_counter if options.clock == "wall" else time.process_time
    keeps = not options.system_allocator and keep_freed_memory()
    generator = torch.Generator().manual_seed(0)
    size, classes = SHAPES[options.network]
    images = torch.randn(options.batch, 3, size, size, generator=generator)
    labels = torch.randint(0, classes, (options.batch,), generator=generator)
    arms = Arms(options, (images.to(DEVICE, memory_format=torch.channels_last), labels.to(DEVICE)))
    for _ in range(3):
        for name in list(arms.ready):
            arms.seconds(name, now)
    peaks = {name: arms.peak(name) for name in list(arms.ready)} if options.memory else {}
    peaks = {name: peak for name, peak in peaks.items() if name in arms.ready}
    times: dict[str, list[float]] = {name: [] for name in arms.ready}
    order, draw = list(arms.ready), Random(0)
    for _ in range(options.rounds):
        draw.shuffle(order)
        for name in [n for n in order if n in arms.ready]:
            if (taken := arms.seconds(name, now)) is not None:
                times[name].append(taken)
    times = {name: seconds for name, seconds in times.items() if name in arms.ready}
    rows, lines = table(times, peaks)
    env = environment()
    for package in ("brevitas", "torchao"):
        if any(name.startswith(package) for name in arms.ready):
            env[package] = version(package)
    theme = "step_time" if options.network == "resnet20" else f"step_time_{options.network}"
    theme += "_bf16" * options.bf16
    path = write_results(
        theme, options.hardware or hardware_tag(), settings(options, keeps, arms.left), env, rows, lines
    )
    print("\n".join(lines))
    print(f"written to {path.name}")


def settings(options: argparse.Namespace, keeps: bool, left: dict[str, str]) -> dict[str, Any]:
    """What was measured: the options but for those that add something and were not asked for, and what follows from them."""
    added = ("arms", "compile", "graph", "bf16", "memory")
    given = {key: value for key, value in vars(options).items() if key not in added or value}
    numbers = "bfloat16 autocast" if options.bf16 else "float32"
    if CUDA and not options.bf16 and torch.backends.cudnn.allow_tf32:
        numbers += " (convolutions in TF32)"
    ways = "eager" + ", compiled" * options.compile + ", recorded graphs" * options.graph
    config = {
        **given,
        "network": f"{options.network}, {SHAPES[options.network][1]} classes, channels-last, {numbers}, {ways}",
        "optimizer": "SGD, momentum 0.9" + ", fused" * CUDA,
        "freed memory kept in the process": keeps,
    }
    failed = {name: why for name, why in left.items() if not why.endswith("is not installed")}
    return {**config, "left out": failed} if failed else config


def table(times: dict[str, list[float]], peaks: dict[str, int | None]) -> tuple[list[dict[str, Any]], list[str]]:
    rows: list[dict[str, Any]] = []
    lines = [
        "| arm | ms a step, median | ratio to float, median (95 %) | min – max of the ratio | times as long as wnq (95 %) |",
        "| --- | --- | --- | --- | --- |",
    ]
    if peaks:
        lines = [lines[0] + " peak of a step, MB | to float |", lines[1] + " --- | --- |"]
    for name, seconds in times.items():
        ratios = [a / b for a, b in zip(seconds, times["float"], strict=True)]
        to_float = median_ratio(seconds, times["float"])
        to_wnq = median_ratio(seconds, times[WNQ]) if WNQ in times else None
        row = {
            "arm": name,
            "ms": [1e3 * s for s in seconds],
            "ratio_median": to_float.median,
            "ratio_interval": [to_float.low, to_float.high],
            "ratio_to_wnq": to_wnq._asdict() if to_wnq else None,
            "ratios": ratios,
        }
        line = (
            f"| {name} | {1e3 * statistics.median(seconds):.{2 if CUDA else 1}f} "
            f"| {to_float.median:.2f} ({to_float.low:.2f} – {to_float.high:.2f}) | {min(ratios):.2f} – {max(ratios):.2f} "
            + (f"| {to_wnq.median:.2f} ({to_wnq.low:.2f} – {to_wnq.high:.2f}) |" if to_wnq else "| – |")
        )
        if peaks:
            peak, base = peaks.get(name), peaks["float"]
            row["peak_bytes"], row["peak_to_float"] = peak, peak / base if peak else None
            line += f" {peak / 1e6:,.1f} | {peak / base:.2f} |" if peak else " – | – |"
        rows.append(row)
        lines.append(line)
    return rows, lines


if __name__ == "__main__":
    main()
