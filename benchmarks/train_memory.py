"""What quantized training costs in memory: peak of a training step, float and quantized, with and without compact activations.

    python benchmarks/train_memory.py [--networks resnet20 resnet18] [--batch20 128] [--batch18 16] [--rounds 9]

Memory: each arm in a fresh process of its own. ``tensors``: the largest sum of the bytes that torch's allocator has given out at
one time during a step, beyond what there was before it (the weights and their momenta are not in it, their gradients are);
``process``: the growth of the process's resident memory to its peak over the first three steps. Time: all arms of a network in
one process, a step each in turn, in an order drawn anew each round; ``--clock processor`` takes the processor time of the process,
which on a busy machine and one thread leaves the waiting out. Random images and weights; needs no data.

On a CUDA device ``tensors`` is the peak of its allocator beyond what was allocated when the step began, without gradients, and
``process`` is the growth, over the first three steps, of what that allocator took from the device.

    python benchmarks/train_memory.py --networks resnet18 --batch18 128 --rounds 50   # on a GPU
"""

import argparse
import gc
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results
from sizes import ResNet18
from torch import nn
from torch.profiler import ProfilerActivity, profile

import wnq
from wnq.allocator import keep_freed_memory
from wnq.compact import compact_activations_
from wnq.environment import environment
from wnq.models import build_model
from wnq.speed import median_ratio

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ARMS = {"float": (None, False)} | {
    f"wnq W{bits}A{bits}{', compact' * compact}": (bits, compact) for bits in (3, 2) for compact in (False, True)
}


def built(network: str, arm: str) -> nn.Module:
    torch.manual_seed(0)
    model = ResNet18() if network == "resnet18" else build_model("resnet20", num_classes=100)
    bits, compact = ARMS[arm]
    if bits is not None:
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    if compact and (left := compact_activations_(model)):
        raise SystemExit(f"kept as before: {left}")
    return model


def stepper(network: str, arm: str, batch: int) -> tuple[Callable[[], float], torch.optim.Optimizer]:
    model = built(network, arm)
    generator = torch.Generator().manual_seed(0)
    size, classes = (224, 1000) if network == "resnet18" else (32, 100)
    images = torch.randn(batch, 3, size, size, generator=generator).to(DEVICE, memory_format=torch.channels_last)
    labels = torch.randint(0, classes, (batch,), generator=generator).to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=CUDA or None)

    def step() -> float:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.item()  # on a CUDA device the host waits here for the whole step

    return step, optimizer


def tensor_peak(step: Callable[[], float]) -> int:
    """Bytes that a step adds to what is allocated, at its peak."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def device_peak(step: Callable[[], float], optimizer: torch.optim.Optimizer) -> int:
    """The same on a CUDA device."""
    optimizer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text()).group(1))


def measure_here(network: str, arm: str, batch: int) -> None:
    """In a process of its own: print what was measured as JSON."""
    if CUDA:
        torch.backends.cudnn.deterministic = True  # for the comparison of the losses
    step, optimizer = stepper(network, arm, batch)
    gc.collect()
    if CUDA:
        before = torch.cuda.memory_reserved()
        losses = [step() for _ in range(3)]
        process = torch.cuda.max_memory_reserved() - before
        print(json.dumps({"process": process, "tensors": device_peak(step, optimizer), "losses": losses}))
        return
    before = resident("VmRSS")
    losses = [step() for _ in range(3)]
    process = resident("VmHWM") - before
    print(json.dumps({"process": process, "tensors": tensor_peak(step), "losses": losses}))


def memory(network: str, arm: str, batch: int, threads: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--here", network, arm, str(batch), "--threads", str(threads)]
    # Every large block is mapped by itself and returned when it is freed: resident memory is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


def timed(runs: dict[str, Callable[[], float]], rounds: int, clock: str) -> dict[str, list[float]]:
    """Seconds of each run in every round."""
    now = time.perf_counter if clock == "wall" else time.process_time
    order, draw = list(runs), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + rounds):
        draw.shuffle(order)
        for name in order:
            start = now()
            runs[name]()
            taken[name].append(now() - start)
    return {name: seconds[2:] for name, seconds in taken.items()}


def told_losses(rows: list[dict[str, Any]]) -> str:
    """Say how far the losses with the option are those without; that the first one is was checked."""
    losses = {(row["network"], row["arm"]): row["losses"] for row in rows}
    same = all(found == losses[network, arm.removesuffix(", compact")] for (network, arm), found in losses.items())
    return f"of {'three steps' if same else 'the first step'} with and without the option: equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet18"], choices=["resnet20", "resnet18"])
    parser.add_argument("--batch20", type=int, default=128)
    parser.add_argument("--batch18", type=int, default=16)
    parser.add_argument("--time-batch18", type=int, default=None, help="of resnet18's timing; by default --batch18")
    parser.add_argument("--rounds", type=int, default=9, help="of the timing, after two that do not count")
    parser.add_argument("--clock", choices=["wall", "processor"], default="wall")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.here:
        network, arm, batch = options.here
        measure_here(network, arm, int(batch))
        return
    rows: list[dict[str, Any]] = []
    for network in options.networks:
        batch = options.batch18 if network == "resnet18" else options.batch20
        found = {arm: memory(network, arm, batch, options.threads) for arm in ARMS}
        for bits in (3, 2):
            plain, compact = found[f"wnq W{bits}A{bits}"], found[f"wnq W{bits}A{bits}, compact"]
            # On a CUDA device the pooling adds up its gradient in no fixed order: the first loss alone must be equal.
            same = plain["losses"][:1] == compact["losses"][:1] if CUDA else plain["losses"] == compact["losses"]
            if not same:
                raise SystemExit(f"{network} at {bits} bits: the option changed the losses: {plain} {compact}")
        rows += [{"network": network, "batch": batch, "arm": arm, **found[arm]} for arm in ARMS]
        print(f"{network}: memory measured", file=sys.stderr, flush=True)
    keeps = keep_freed_memory()
    for network in options.networks:
        mine = {row["arm"]: row for row in rows if row["network"] == network}
        batch = options.time_batch18 or options.batch18 if network == "resnet18" else options.batch20
        taken = timed({arm: stepper(network, arm, batch)[0] for arm in mine}, options.rounds, options.clock)
        for arm, row in mine.items():
            bits, compact = ARMS[arm]
            row["seconds"], row["time_batch"] = taken[arm], batch
            row["to_float"] = median_ratio(taken[arm], taken["float"])._asdict()
            row["to_plain"] = median_ratio(taken[arm], taken[f"wnq W{bits}A{bits}"])._asdict() if compact else None
    lines = [
        "| network | batch | arm | tensors, MB | to float | process, MB | to float | batch of the time | ms a step | time to float "
        "| time to the same without the option |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        base = next(r for r in rows if r["network"] == row["network"] and r["arm"] == "float")

        def ratio(key: str, row: dict[str, Any] = row) -> str:
            r = row[key]
            return "–" if r is None else f"{r['median']:.2f} ({r['low']:.2f} – {r['high']:.2f})"

        lines.append(
            f"| {row['network']} | {row['batch']} | {row['arm']} | {row['tensors'] / 1e6:,.1f} "
            f"| {row['tensors'] / base['tensors']:.2f} | {row['process'] / 1e6:,.1f} | {row['process'] / base['process']:.2f} "
            f"| {row['time_batch']} | {1e3 * statistics.median(row['seconds']):,.1f} | {ratio('to_float')} | {ratio('to_plain')} |"
        )
    config = {
        "networks": "resnet20 (32x32 images, 100 classes), resnet18 (224x224, 1000 classes); channels-last, float32, eager; SGD"
        + " (fused; convolutions in TF32)" * (CUDA and torch.backends.cudnn.allow_tf32),
        "first and last layer": "8 bits",
        "threads": options.threads,
        "time": f"{options.clock} clock, median over {options.rounds} paired rounds, with its 95 % interval",
        "freed memory kept in the process": f"{keeps}, for the time; not for the memory",
        "losses": told_losses(rows),
    }
    path = write_results("train_memory", hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
