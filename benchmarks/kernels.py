"""The fused kernels against the plain operations that they stand for, on a GPU.

    python benchmarks/kernels.py [--rounds 200]

Both arms take turns, one call each a round. ``launched`` is a call as eager training makes it, from an idle GPU to its end, with
Python and launches; ``device`` is the GPU's own time, from a CUDA graph of ten calls. The GB/s are of the bytes that must move
(forward: in and out; backward: gradient and input in, gradient out), in that time; a small tensor comes from the L2 cache.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import torch
from results import hardware_tag, write_results

import wnq
from wnq import kernels
from wnq.environment import environment
from wnq.learned_step import LearnedStep

INPUTS, WEIGHTS = [(128, 16, 32, 32), (128, 64, 56, 56)], [(64, 64, 3, 3), (512, 512, 3, 3)]
CALLS, BITS = 10, 3


def cases() -> list[tuple[str, torch.nn.Module, torch.Tensor]]:
    """Return a name, a quantizer and what it rounds."""
    found = []
    for shape in INPUTS:
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(shape, device="cuda").relu().to(dtype=dtype, memory_format=torch.channels_last)
            quantizer = LearnedStep(BITS, is_weight=False).cuda()
            quantizer.observe_(x.float())
            found.append((f"input {'x'.join(map(str, shape))} {str(dtype)[6:]}", quantizer, x))
    for shape in WEIGHTS:
        w = torch.randn(shape, device="cuda")
        found.append((f"weight {'x'.join(map(str, shape))}", wnq.get_method("wnq", w_bits=BITS).weight(w, 0), w))
    return found


def calls(quantizer: torch.nn.Module, x: torch.Tensor) -> dict[str, Callable[[], Any]]:
    """Return what is timed: the forward pass, and both passes."""
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)
    leaves = [leaf, *quantizer.parameters()]
    return {"forward": partial(quantizer, leaf), "both": lambda: torch.autograd.grad(quantizer(leaf), leaves, grad)}


def graph_of(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the replay of a CUDA graph of :data:`CALLS` calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            call()
    return graph.replay


def microseconds(call: Callable[[], Any]) -> float:
    """Return the time of one call from an idle GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def paired(arms: dict[str, Callable[[], Any]], rounds: int, divide: int) -> dict[str, float]:
    """Return the median time of each arm, and the median of their ratio round by round; five rounds warm up."""
    random, times = Random(0), {name: [] for name in arms}
    for _ in range(rounds + 5):
        for name in random.sample(list(arms), 2):
            with kernels.disabled() if name == "plain" else contextlib.nullcontext():
                times[name].append(microseconds(arms[name]) / divide)
    times = {name: found[5:] for name, found in times.items()}
    ratios = [p / f for p, f in zip(times["plain"], times["fused"], strict=True)]
    return {**{name: statistics.median(t) for name, t in times.items()}, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=200)
    rows, rounds = [], parser.parse_args().rounds
    if not torch.cuda.is_available() or not kernels.available():
        sys.exit("This benchmark needs a CUDA GPU and Triton: the kernels do not run here.")
    for name, quantizer, x in cases():
        for what, call in calls(quantizer, x).items():
            launched = paired({"plain": call, "fused": call}, rounds, 1)
            with kernels.disabled():
                plain = graph_of(call)
            device = paired({"plain": plain, "fused": graph_of(call)}, rounds // 4, CALLS)
            moved = x.numel() * x.element_size() * (2 if what == "forward" else 5)
            rate = {arm: moved / device[arm] / 1000 for arm in ("plain", "fused")}
            rows.append({"tensor": name, "pass": what, "launched": launched, "device": device, "GB/s": rate})
    table = [
        "| tensor | pass | launched µs, plain | fused | ratio | device µs, plain | fused | ratio | GB/s, plain | fused |"
    ]
    table.append("| --- | --- |" + " ---: |" * 8)
    for row in rows:
        numbers = [row[kind][arm] for kind in ("launched", "device") for arm in ("plain", "fused", "ratio")]
        cells = [f"{n:.3g}" if i % 3 == 2 else f"{n:.1f}" for i, n in enumerate(numbers)]
        cells += [f"{row['GB/s'][arm]:.0f}" for arm in ("plain", "fused")]
        table.append(f"| {row['tensor']} | {row['pass']} | " + " | ".join(cells) + " |")
    write_results("kernels", hardware_tag(), {"rounds": rounds, "bits": BITS}, environment(), rows, table)
    print("\n".join(table))


if __name__ == "__main__":
    main()
