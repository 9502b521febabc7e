"""How much more a GPU trains when several networks train on it side by side, each on a CUDA stream of one process.

    python benchmarks/stacked.py [--counts 1 2 4 8 16] [--seconds 0.5] [--rounds 5]

ResNet-20, 32x32 images, 100 classes, float and WNQ W3A3, batch 128: the steps of ``wnq.fit`` with ``cuda_graph``, as ``wnq compare
--streams`` takes them, and for comparison queued kernel by kernel. Each count of networks takes its turn in an order drawn anew
each round; a turn is the same number of steps for every network, from a common start to the end of the last one. Random images and
weights; needs no data.
"""

import argparse
import math
import random
import statistics
import sys
import threading
import time
from typing import Any

import torch
from results import hardware_tag, write_results

import wnq
from wnq.data import Dataset
from wnq.environment import environment
from wnq.models import build_model
from wnq.speed import median_ratio, random_images
from wnq.speed.training_arm import RunningArm
from wnq.train import TrainConfig, plain_accelerator

KINDS = {"float": None, "wnq W3A3": 3}


class Runner:
    """A network that trains in a thread of its own when it is told to."""

    def __init__(self, kind: str, config: TrainConfig, data: Dataset, seed: int) -> None:
        torch.manual_seed(seed)
        model, bits = build_model("resnet20", num_classes=100), KINDS[kind]
        if bits is not None:
            wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self.arm = RunningArm(model, data, config, plain_accelerator())
            self.take(10)

    def take(self, steps: int) -> None:
        """Take steps, and wait for the last one."""
        with torch.cuda.stream(self.stream):
            for _ in range(steps):
                next(self.arm.steps)
                if self.arm.account.due:
                    self.arm.account.read()
            self.stream.synchronize()


def turn(runners: list[Runner], steps: int) -> float:
    """Return the seconds in which all of them take so many steps each."""
    torch.cuda.synchronize()
    threads = [threading.Thread(target=runner.take, args=(steps,)) for runner in runners]
    begin = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - begin


def measure(kind: str, cuda_graph: bool, options: argparse.Namespace) -> list[dict[str, Any]]:
    config = TrainConfig(
        batch_size=128, lr=1e-4, warmup_epochs=0, crop_padding=4, flip=True, channels_last=True, bf16=options.bf16,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    data = random_images((3, 32, 32), 128 * 390, 100)
    runners = [Runner(kind, config, data, seed) for seed in range(max(options.counts))]
    pace = turn(runners[:1], 50) / 50
    steps = {count: max(20, round(options.seconds / pace / count**0.5)) for count in options.counts}
    rates: dict[int, list[float]] = {count: [] for count in options.counts}
    order, draw = list(options.counts), random.Random(0)
    for _ in range(options.rounds):
        draw.shuffle(order)
        for count in order:
            rates[count].append(128 * count * steps[count] / turn(runners[:count], steps[count]))
    rows: list[dict[str, Any]] = []
    for count in options.counts:
        gain = median_ratio(rates[count], rates[options.counts[0]])
        rows.append(
            {
                "network": kind,
                "steps": "graph" if cuda_graph else "queued",
                "count": count,
                "images_per_second": rates[count],
            }
            | {"gain": gain._asdict()}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="networks at a time; the first is the base"
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="of a turn of one network, about")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--queued", action=argparse.BooleanOptionalAction, default=True, help="without graphs, too")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("stacked.py measures CUDA streams, and PyTorch sees no CUDA device here.")
    rows: list[dict[str, Any]] = []
    for cuda_graph in (True, False) if options.queued else (True,):
        for kind in KINDS:
            rows += measure(kind, cuda_graph, options)
            print(f"{kind}, {'graph' if cuda_graph else 'queued'}: measured", file=sys.stderr, flush=True)
            torch.cuda.empty_cache()
    lines = [
        "| network | steps | networks at a time | images/s, all together | times one at a time (95 %) |",
        "|---|---|---:|---:|---:|",
    ]
    for row in rows:
        gain = row["gain"]
        interval = "no interval" if math.isnan(gain["low"]) else f"{gain['low']:.2f} – {gain['high']:.2f}"
        lines.append(
            f"| {row['network']} | {row['steps']} | {row['count']} | {statistics.median(row['images_per_second']):,.0f} "
            f"| {gain['median']:.2f} ({interval}) |"
        )
    config = {
        "network": "resnet20, 100 classes, 32x32 images, batch 128, crops and flips, channels-last, SGD",
        "numbers": "bfloat16 autocast" if options.bf16 else "float32 (cuDNN may use TF32)",
        "rounds": options.rounds,
        "command": " ".join(["python benchmarks/stacked.py", *sys.argv[1:]]),
    }
    theme = "stacked_bf16" if options.bf16 else "stacked"
    path = write_results(theme, hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
