"""What the record of tails costs: one record against one training step of the same network, at 3 bits on one thread.

    python benchmarks/recorder.py [--rounds 11] [--only resnet20]

Each round takes a step without and a step with a record, in alternating order, the record in its place between the backward pass
and the optimizer's step; ratios are taken round by round. CPU time of the process is what is compared, since the machine may be
shared; wall time is in the JSON beside it. The cost of a period is the ratio divided by it. Then a plain loop runs under
the recorder's default, which passes over records where they would take more than 0.8 % of the wall time.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import wnq
from wnq.environment import environment
from wnq.integrations import to_tensorboard
from wnq.recorder import TailRecorder

PERIODS = (100, 50, 20)


@dataclass(frozen=True)
class Net:
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int
    loop: int
    """Steps of the loop under the default; 0: too long to run."""


def wide() -> nn.Module:
    """Weights that the batch hardly uses: as dear a record, against a step, as a network of large layers has."""
    widths = (1024, 4096, 4096, 4096, 3072)
    hidden = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(widths[-1], 100))


def resnet20() -> nn.Module:
    return wnq.build_model("resnet20", num_classes=100)


NETS = {
    "resnet20, batch 128": Net(resnet20, (128, 3, 32, 32), 100, 0),
    "resnet20, batch 16": Net(resnet20, (16, 3, 32, 32), 100, 300),
    "mlp of 50 M weights, batch 8": Net(wide, (8, 1024), 100, 0),
    "digits_mlp, batch 32": Net(lambda: wnq.build_model("digits_mlp"), (32, 1, 8, 8), 10, 4000),
}


class Clock:
    """CPU and wall seconds of what ran under a name."""

    def __init__(self) -> None:
        self.cpu: dict[str, float] = {}
        self.wall: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu[name] = self.cpu.get(name, 0.0) + time.process_time() - cpu
        self.wall[name] = self.wall.get(name, 0.0) + time.perf_counter() - wall


class Training:
    def __init__(self, net: Net, bits: int) -> None:
        torch.manual_seed(0)
        model = net.build()
        method = wnq.get_method("wnq", w_bits=bits, a_bits=bits)
        self.model = wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None)).train()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(net.shape, generator=generator)
        self.labels: Tensor = torch.randint(0, net.classes, net.shape[:1], generator=generator)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)

    def step(self, hook: Callable[[], Any] = lambda: None) -> None:
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.model(self.images), self.labels).backward()
        hook()
        self.optimizer.step()


def round_of(training: Training, number: int, writer: SummaryWriter) -> Clock:
    clock, found = Clock(), []
    recorder = TailRecorder(training.model, every=1)

    def record() -> None:
        with clock.timed("record"):
            found.extend(recorder.after_backward(1))

    def without() -> None:
        with clock.timed("without"):
            training.step()

    def together() -> None:
        with clock.timed("with"):
            training.step(record)

    for arm in (without, together) if number % 2 else (together, without):
        arm()
    with clock.timed("scalars"):
        to_tensorboard(writer)(number, found)
    with clock.timed("scalars and histograms"):
        to_tensorboard(writer, training.model)(number, found)
    return clock


def loop(training: Training, steps: int) -> dict[str, Any]:
    """Train under the recorder's default; return what it recorded and which share of the time that took."""
    recorder, clock, recorded, spent = TailRecorder(training.model), Clock(), [], 0.0

    def hook(step: int) -> None:
        nonlocal spent
        begin = time.process_time()
        if recorder.after_backward(step):
            # The first record also pays for what every first call pays for.
            spent += time.process_time() - begin if recorded else 0.0
            recorded.append(step)

    training.step(lambda: hook(1))
    with clock.timed("steps"):
        for step in range(2, steps + 1):
            training.step(lambda step=step: hook(step))
    return {
        "steps": steps,
        "recorded": recorded,
        "cpu_share": spent / (clock.cpu["steps"] - spent),
        "own_share": recorder.share,
    }


def measure(name: str, rounds: int, bits: int) -> dict[str, Any]:
    net = NETS[name]
    training = Training(net, bits)
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        round_of(training, 0, writer)
        clocks = [round_of(training, number, writer) for number in range(1, rounds + 1)]
    cpu = {key: [clock.cpu[key] for clock in clocks] for key in clocks[0].cpu}
    ratios = [a / b for a, b in zip(cpu["record"], cpu["without"], strict=True)]
    return {
        "net": name,
        "quantized_weights": sum(
            wnq.prepared.float_weight(layer).numel() for _, layer, _ in wnq.quantized_layers(training.model)
        ),
        "layers": len(list(wnq.quantized_layers(training.model))),
        "cpu_seconds": cpu,
        "wall_seconds": {key: [clock.wall[key] for clock in clocks] for key in clocks[0].wall},
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "difference": statistics.median((a - b) / b for a, b in zip(cpu["with"], cpu["without"], strict=True)),
        "scalars": statistics.median(a / b for a, b in zip(cpu["scalars"], cpu["without"], strict=True)),
        "histograms": statistics.median(
            (a - b) / c for a, b, c in zip(cpu["scalars and histograms"], cpu["scalars"], cpu["without"], strict=True)
        ),
        "default": loop(training, net.loop) if net.loop else None,
    }


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| network | weights | step, ms | record, ms | record / step | min – max | "
        + " | ".join(f"every {every}" for every in PERIODS)
        + " |",
        "| --- | --- | --- | --- | --- | --- |" + " --- |" * len(PERIODS),
    ]
    for row in rows:
        step, record = (1e3 * statistics.median(row["cpu_seconds"][key]) for key in ("without", "record"))
        shares = " | ".join(f"{100 * row['ratio'] / every:.2f} %" for every in PERIODS)
        lines.append(
            f"| {row['net']} | {row['quantized_weights']:,} | {step:.1f} | {record:.1f} | {row['ratio']:.3f} | "
            f"{min(row['ratios']):.3f} – {max(row['ratios']):.3f} | {shares} |"
        )
    lines += [
        "",
        "| in steps, median | with – without | TensorBoard scalars | TensorBoard histograms |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(f"| {row['net']} | {row['difference']:+.3f} | {row['scalars']:.3f} | {row['histograms']:.3f} |")
    lines += [
        "",
        "| under the default | steps | records | share of the steps' CPU time | of the wall time |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if (run := row["default"]) is not None:
            lines.append(
                f"| {row['net']} | {run['steps']:,} | {len(run['recorded'])} | {100 * run['cpu_share']:.2f} % | "
                f"{100 * run['own_share']:.2f} % |"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--bits", type=int, default=3)
    parser.add_argument("--only", metavar="WORD", help="networks whose name holds this; nothing is written")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = [name for name in NETS if options.only is None or options.only in name]
    rows = []
    for name in names:
        rows.append(measure(name, options.rounds, options.bits))
        print(f"{name}: a record is {rows[-1]['ratio']:.3f} steps", flush=True)
    lines = markdown(rows)
    print("\n".join(lines))
    if options.only is not None:
        return
    config = {
        "command": f"python benchmarks/recorder.py --rounds {options.rounds} --bits {options.bits}",
        "rounds": options.rounds,
        "bits": f"{options.bits}, weights and inputs, every layer",
        "threads": 1,
        "optimizer": "SGD, momentum 0.9",
        "note": "One record of all layers against one training step, median over the rounds. Milliseconds are CPU time of the "
        "process (the machine was shared; wall times are in the JSON). 'every N' is the ratio divided by N: the share of the step "
        "time at that period. 'with – without' is the whole step with a record minus the step without: it also holds what the "
        "record does to the caches of what follows. The last table is a plain loop with TailRecorder(model): its records but the "
        "first, each 100 steps and passed over where they would take more than 0.8 % of the wall time.",
    }
    path = write_results("recorder", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
