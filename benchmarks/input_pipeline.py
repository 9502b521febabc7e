"""Images a second of the streamed input pipeline, against what a training step of ResNet-18 takes.

    python benchmarks/input_pipeline.py [--workers 0 1 2] [--images 384] [--rounds 5]

JPEGs of ImageNet-like size (500x375 and 375x500, quality 90, smooth content and noise) are made in a temporary folder. The arms
take turns, one epoch or one step each a round, so that a drifting machine drifts for all; medians are reported, with their spread.
Files come from the page cache, so reading them costs next to nothing here. Rates are of wall time and fall with what else the
machine does; images a second of processor time, measured on the arm without workers, does so little. From it follow the last lines:
cores that a step of so many images/s needs, as of a GPU.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from results import hardware_tag, write_results
from torch import nn

import wnq
from wnq.data import Augment, Dataset, batches_of, load_data
from wnq.environment import environment
from wnq.models import build_model

GPU_NEEDS = (1_000, 2_500, 5_000)
CORE = "training, a second of processor time"


def make_images(folder: Path, count: int) -> float:
    """Write the images, in two classes and splits; return the mean size of a file in bytes."""
    generator = np.random.default_rng(0)
    sizes = []
    for split, number in (("train", count), ("val", count // 2)):
        for index in range(number):
            width, height = (500, 375) if index % 4 else (375, 500)
            y, x = np.mgrid[:height, :width]
            waves = [
                np.sin(x / generator.uniform(20, 90) + generator.uniform(0, 6)) * np.cos(y / generator.uniform(20, 90))
                for _ in range(3)
            ]
            pixels = 127 + 90 * np.stack(waves, axis=-1) + generator.normal(0, 20, (height, width, 3))
            path = folder / split / f"class{index % 2}" / f"{index:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
            sizes.append(path.stat().st_size)
    return statistics.mean(sizes)


def pipeline(
    folder: Path, workers: int, batch: int, training: bool, clock: Callable[[], float] = time.perf_counter
) -> Callable[[int], float]:
    """Return an arm: images a second of an epoch, from its first batch on, without the start of the workers."""
    data: Dataset = load_data(str(folder), stream=True, workers=workers)
    split = data.train if training else data.val
    augment = Augment(flip=True) if training else None
    batches = batches_of(split, batch, mean=data.mean, std=data.std, augment=augment, shuffle=training, drop_last=True)

    def measure(round_: int) -> float:
        steps = batches.epoch(round_)
        if workers:
            next(steps)
        start, seen = clock(), 0
        for images, _ in steps:
            seen += len(images)
        return seen / (clock() - start)

    return measure


def step(bits: int | None, batch: int) -> Callable[[int], float]:
    """Return an arm: images a second of a training step."""
    torch.manual_seed(0)
    model = build_model("resnet18").to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    if bits is not None:
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))

    def measure(_: int) -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return batch / (time.perf_counter() - start)

    measure(0)
    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=384, help="in the training split")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--step-batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--hardware", default=None)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as place:
        mean_bytes = make_images(Path(place), options.images)
        arms = {
            f"training, {workers} workers": pipeline(Path(place), workers, options.batch, True)
            for workers in options.workers
        }
        arms[CORE] = pipeline(Path(place), 0, options.batch, True, time.process_time)
        most = max(options.workers)
        arms[f"evaluation, {most} workers"] = pipeline(Path(place), most, options.batch, False)
        arms |= {
            "step of ResNet-18, float": step(None, options.step_batch),
            "step of ResNet-18, W3A3": step(3, options.step_batch),
        }
        found: dict[str, list[float]] = {name: [] for name in arms}
        for round_ in range(options.rounds):
            for name, measure in arms.items():
                found[name].append(measure(round_))
    rows = [{"arm": name, "images_per_second": values} for name, values in found.items()]
    median = {name: statistics.median(values) for name, values in found.items()}
    lines = ["| arm | images/s, median | min – max | by the float step's |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {name} | {median[name]:,.1f} | {min(values):,.1f} – {max(values):,.1f} | "
        f"{statistics.median(a / b for a, b in zip(values, found['step of ResNet-18, float'], strict=True)):.1f} |"
        for name, values in found.items()
    ]
    lines += ["", "| a step that takes | needs cores like these |", "| --- | --- |"]
    lines += [f"| {need:,} images/s | {need / median[CORE]:.1f} |" for need in GPU_NEEDS]
    config = {
        **vars(options),
        "load_average": " ".join(f"{value:.1f}" for value in os.getloadavg()),
        "mean_bytes": round(mean_bytes),
        "network": "resnet18, 224x224, float32, channels-last, eager",
    }
    path = write_results("input_pipeline", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
