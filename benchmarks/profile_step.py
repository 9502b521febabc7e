"""Where the time of a training step goes: operations, launches and bytes of a ResNet-20 step, float and quantized.

    python benchmarks/profile_step.py [--bits 3] [--batch 128] [--no-compiled]

Counts are of one step (forward, backward, SGD). ``calls``: operations that the framework dispatches, views among them.
``launches``: those that run code over elements; on a GPU, kernels. ``GB moved``: what they read and write if nothing stays in
a cache, from the sizes of their tensors. Kernels of a compiler, and on a GPU this library's own, do not tell their sizes, and those
of a compiler on the CPU not their number. Times are self times under ``torch.profiler``, of each operation the least over seven
steps: they say what is large, not how long a step is (for that, ``step_time.py``).
"""

import argparse
import copy
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import wnq
from wnq.allocator import keep_freed_memory
from wnq.environment import environment
from wnq.models import build_model

NO_LAUNCH = {"view", "_unsafe_view", "as_strided", "permute", "t", "transpose", "detach", "alias", "expand", "split", "slice",
             "select", "squeeze", "unsqueeze", "empty_like", "empty", "empty_strided", "new_empty", "_local_scalar_dense",
             "lift_fresh"}  # fmt: skip
"""Operations that only make a tensor or look at one differently."""


class Traffic(TorchDispatchMode):
    """Counts, operation by operation, calls and the bytes of every tensor that comes in or out."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        if name not in NO_LAUNCH:
            written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
            # An expanded tensor is as large as its memory.
            touched = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)] + written
            self.bytes[name] += sum(_memory(x) for x in touched)
        return result


def _memory(x: Tensor) -> int:
    return x.element_size() * math.prod(n for n, stride in zip(x.shape, x.stride(), strict=True) if stride)


def arms(bits: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    base = build_model("resnet20", num_classes=100)

    def ours(name: str) -> nn.Module:
        model, method = copy.deepcopy(base), wnq.get_method(name, w_bits=bits, a_bits=bits)
        return wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))

    return {"float": base, "wnq": ours("wnq"), "lsq": ours("lsq")}


def stepper(model: nn.Module, run: Callable[..., Tensor], images: Tensor, labels: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(run(images), labels).backward()
        optimizer.step()

    for _ in range(3):
        step()
    return step


def profiled(step: Callable[[], None], device: str, repeats: int = 7) -> dict[str, Any]:
    """Counts of one step, and of each operation the least self time over several: a busy machine only adds to it."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    rows: dict[str, dict[str, Any]] = {}
    kernels = 0
    for _ in range(repeats):
        with profile(activities=activities) as found:
            step()
            if device == "cuda":
                torch.cuda.synchronize()
        events = found.key_averages()
        kernels = sum(e.count for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
        for e in events:
            times = {"self_ms": e.self_cpu_time_total / 1e3, "device_ms": e.self_device_time_total / 1e3}
            known = rows.get(e.key, times)
            rows[e.key] = {"calls": e.count, **{key: min(known[key], time) for key, time in times.items()}}
    sums = {key: sum(row[key] for row in rows.values()) for key in ("self_ms", "device_ms")}
    return {"operations": rows, **sums, "kernels": kernels}


def measure(model: nn.Module, images: Tensor, labels: Tensor, *, compiled: bool) -> dict[str, Any]:
    run = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    step = stepper(model, run, images, labels)
    row = profiled(step, images.device.type)
    if compiled:
        row["calls"] = sum(r["calls"] for r in row["operations"].values())
        row["launches"], row["bytes"] = row["kernels"] or None, None
        return row
    with Traffic() as traffic:
        step()
    row["calls"] = sum(traffic.calls.values())
    row["launches"] = row["kernels"] or sum(n for name, n in traffic.calls.items() if name not in NO_LAUNCH)
    row["bytes"] = sum(traffic.bytes.values())
    row["traffic"] = {name: {"calls": n, "bytes": traffic.bytes[name]} for name, n in traffic.calls.most_common()}
    return row


def beyond_float(rows: list[dict[str, Any]], most: int = 14) -> list[str]:
    base = rows[0]["traffic"]
    lines = [
        "",
        "Beyond the float step, eager, by bytes:",
        "",
        "| arm | operation | calls | MB | ms by the profiler |",
        "|---|---|---:|---:|---:|",
    ]
    for row in [r for r in rows[1:] if r["bytes"] is not None]:
        extra = {}
        for name, entry in row["traffic"].items():
            before = base.get(name, {"calls": 0, "bytes": 0})
            extra[name] = (entry["bytes"] - before["bytes"], entry["calls"] - before["calls"])
        for name, (size, calls) in sorted(extra.items(), key=lambda item: -item[1][0])[:most]:
            time = row["operations"].get(f"aten::{name}", {"self_ms": 0.0})["self_ms"]
            time -= rows[0]["operations"].get(f"aten::{name}", {"self_ms": 0.0})["self_ms"]
            lines.append(f"| {row['arm']} | {name} | {calls:+d} | {size / 1e6:+,.1f} | {time:+.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    keeps = keep_freed_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, 32, 32, generator=generator).to(device, memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (options.batch,), generator=generator).to(device)
    rows: list[dict[str, Any]] = []
    for compiled in (False, True) if options.compiled else (False,):
        for name, model in arms(options.bits).items():
            model = model.to(device, memory_format=torch.channels_last).train()
            model(images)
            rows.append({"arm": name, "compiled": compiled} | measure(model, images, labels, compiled=compiled))
    lines = [
        "| arm | step | calls | launches | GB moved | self time of the processor, ms | of the GPU, ms |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        moved = "–" if row["bytes"] is None else f"{row['bytes'] / 1e9:.2f}"
        kind = "compiled" if row["compiled"] else "eager"
        launches = "–" if row["launches"] is None else f"{row['launches']:,}"
        busy = f"{row['device_ms']:.2f}" if device == "cuda" else "–"
        lines.append(
            f"| {row['arm']} | {kind} | {row['calls']:,} | {launches} | {moved} | {row['self_ms']:.1f} | {busy} |"
        )
    lines += beyond_float(rows)
    config = {
        "network": "resnet20, 100 classes, channels-last, float32, all layers quantized",
        "bits": options.bits,
        "batch": options.batch,
        "threads": options.threads,
        "freed memory kept in the process": keeps,
    }
    path = write_results("profile_step", hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
