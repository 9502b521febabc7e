"""Sizes of packed files: networks of the literature at 1 to 8 bits by every coder, and a trained network.

    python benchmarks/sizes.py [--seeds 0 1 2] [--run RUN_FOLDER ...]

Sizes need no data. Random weights have codes without structure, of which the entropy is the bound; the trained network is that of
``wnq demo`` (real 8x8 digits), trained here; ``--run`` adds finished runs of ``wnq train``. Writes
``benchmarks/results/sizes_<hardware>_<yyyymm>.{json,md}``. About ten minutes on one processor core.
"""

import argparse
import dataclasses
import functools
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import Tensor, nn

import wnq
from wnq.artifact.coders import CODERS
from wnq.artifact.container import read_artifact
from wnq.artifact.content import Content
from wnq.artifact.manifest import Manifest
from wnq.data import load_data
from wnq.demo import START, TRAINING, arm, float_start, train_arm
from wnq.environment import environment

WIDTHS = range(1, 9)
MB = 1e6
# What the plain file of ResNet-18 may take, and every file of ResNet-20 beside k/32 of its weights.
RESNET18_MB = {2: 3.5, 3: 4.9, 4: 6.3}
RESNET20_FACTOR, RESNET20_BYTES = 1.15, 30_000
ENTROPY_FACTOR, TABLE_BYTES = 1.01, 4096


class Block(nn.Module):
    """Basic block of the ImageNet network: the shortcut is a 1x1 convolution where the shape changes."""

    def __init__(self, narrow: int, wide: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, stride, 1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, 1, 1, bias=False), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU()
        if stride != 1 or narrow != wide:
            self.downsample = nn.Sequential(nn.Conv2d(narrow, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))
        else:
            self.downsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 for 224x224 images, 11,689,512 parameters: He et al. 2016, arXiv:1512.03385, table 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64)
        self.relu, self.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        widths = (64, 64, 128, 256, 512)
        for i in range(1, 5):
            stage = nn.Sequential(Block(widths[i - 1], widths[i], 1 if i == 1 else 2), Block(widths[i], widths[i], 1))
            setattr(self, f"layer{i}", stage)
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def untrained(build: Callable[[], nn.Module], bits: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))
    return model.eval()


def measure(network: str, weights: str, bits: int, seed: int, model: nn.Module, folder: Path) -> list[dict[str, Any]]:
    """Write a model by every coder; every file is read back and its codes compared with those of the plain one."""
    rows, codes = [], {}
    for coder in CODERS:
        path = folder / f"{coder}.safetensors"
        report = wnq.save(model, path, coder=coder)
        content = contents(path)
        found = {name: quantized.codes for name, quantized in content.quantized.items()}
        codes = codes or found
        if not all(torch.equal(found[name], codes[name]) for name in codes):
            raise SystemExit(f"{network} at {bits} bits by {coder}: the codes differ")
        facts = {key: value for key, value in dataclasses.asdict(report).items() if key not in ("layers", "sha256")}
        rows.append(
            {
                "network": network,
                "weights": weights,
                "bits": bits,
                "seed": seed,
                **facts,
                "quantized_weights": report.weights,
                "methods": dict(Counter(layer.method for layer in report.layers)),
                "entropy_bits": 8 * report.entropy_bytes / report.weights,
                "packed_bits": 8 * report.packed_bytes / report.weights,
                "layers": [dataclasses.asdict(layer) for layer in report.layers] if network == "digits_cnn" else None,
                "goals": goals(network, bits, report),
                "strict_excess": report.file_bytes / strict_bound(report) - 1,
            }
        )
    return rows


def goals(network: str, bits: int, report: wnq.SizeReport) -> dict[str, bool]:
    found: dict[str, bool] = {}
    if network == "resnet18" and bits in RESNET18_MB:
        found[f"file <= {RESNET18_MB[bits]} MB"] = report.file_bytes <= RESNET18_MB[bits] * MB
    if network.split()[0] == "resnet20":
        share = bits / 32 * 4 * report.weights
        found["file <= 1.15 x k/32 of the float weights + 30 kB"] = (
            report.file_bytes <= RESNET20_FACTOR * share + RESNET20_BYTES
        )
    if report.coder == "ans":
        found["codes <= 1.01 x entropy + 4 KiB"] = (
            report.packed_bytes <= ENTROPY_FACTOR * report.entropy_bytes + TABLE_BYTES
        )
    return found


def strict_bound(report: wnq.SizeReport) -> float:
    """1.02 x (the codes at their widths + everything that is no quantized weight, in float) + 16 KiB."""
    return 1.02 * (report.ideal_bytes + report.float_bytes - 4 * report.weights) + 16 * 1024


def contents(path: Path) -> Content:
    tensors, document = read_artifact(path)
    return Content(str(path), Manifest.from_json(document, where=str(path)), tensors)


def trained_digits(seeds: list[int]) -> list[tuple[int, int, nn.Module]]:
    models = []
    for seed in seeds:
        data = load_data("digits")
        start = float_start(data, dataclasses.replace(START, seed=seed))
        for bits in (2, 3, 4, 8):
            model, row = train_arm(arm("wnq", "wnq", bits), start, data, dataclasses.replace(TRAINING, seed=seed))
            print(f"digits seed {seed}, {bits} bits: {row['accuracy']:.2f} %", file=sys.stderr, flush=True)
            models.append((seed, bits, model))
    return models


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    def names(row: dict[str, Any]) -> str:
        return ", ".join(f"{count} {method}" for method, count in sorted(row["methods"].items()))

    lines = [
        "Bytes of whole files, of the codes in them, and the least for the codes: at exactly their widths, and at the entropy of "
        "each layer's histogram. First and last layers have 8 bits. A megabyte is 10^6 bytes. The strict bound is 1.02 x (codes "
        "at their widths + all else in float) + 16 KiB.",
        "",
        "| network | weights | bits | coder | file | float / file | codes | at width | entropy | codes / entropy | bits a weight | "
        "header | layers by method | goals | beside the strict bound |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---|---|---:|",
    ]
    groups: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["weights"], row["bits"], row["coder"]), []).append(row)
    for (network, weights, bits, coder), group in groups.items():
        row = group[0]

        def mean(key: str, group: list[dict[str, Any]] = group) -> float:
            return statistics.mean(entry[key] for entry in group)

        met = all(value for entry in group for value in entry["goals"].values())
        verdict = "–" if not row["goals"] else ("met" if met else "MISSED")
        lines.append(
            f"| {network} | {weights}{f', {len(group)} seeds' if len(group) > 1 else ''} | {bits} | {coder} "
            f"| {mean('file_bytes'):,.0f} | {mean('float_bytes') / mean('file_bytes'):.2f} | {mean('packed_bytes'):,.0f} "
            f"| {mean('ideal_bytes'):,.0f} | {mean('entropy_bytes'):,.0f} "
            f"| {mean('packed_bytes') / mean('entropy_bytes'):.4f} | {mean('packed_bits'):.3f} | {mean('header_bytes'):,.0f} "
            f"| {names(row)} | {verdict} | {100 * mean('strict_excess'):+.1f} % |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the trained networks (default: 0 1 2)"
    )
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="folders of finished runs to add")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        builders: dict[str, Callable[[], nn.Module]] = {
            "resnet18": ResNet18,
            **{
                name: functools.partial(wnq.build_model, name)
                for name in ("resnet20", "resnet56", "resnet110", "vgg_small")
            },
        }
        for network, build in builders.items():
            for bits in WIDTHS if network in ("resnet18", "resnet20") else (1, 2, 3, 4, 8):
                rows += measure(network, "random", bits, 0, untrained(build, bits, 0), folder)
                print(f"{network} at {bits} bits", file=sys.stderr, flush=True)
        for seed, bits, model in trained_digits(args.seeds):
            rows += measure("digits_cnn", "trained", bits, seed, model, folder)
        for run in args.run:
            from wnq.recipe import load_run

            recipe, model = load_run(run)
            bits = min(layer.method.w_bits for layer in wnq.get_plan(model).layers)
            rows += measure(f"{recipe.model.name} ({run.name})", "trained", bits, recipe.train.seed, model, folder)
    config = {
        "random weights": "Kaiming normal, seed 0, method wnq, full grid, scale by the largest weight; untrained",
        "trained weights": f"wnq demo's digits_cnn, seeds {args.seeds}, method wnq; a small network, for what training does",
        "coders": ", ".join(CODERS),
        "goals": "resnet18: file <= 3.5 / 4.9 / 6.3 MB at 2 / 3 / 4 bits; resnet20: file <= 1.15 x k/32 of the float weights "
        "+ 30 kB; ans: codes with their tables <= 1.01 x entropy + 4 KiB",
    }
    packages = {name: version(name) for name in ("safetensors", "zstandard", "constriction")}
    path = write_results("sizes", hardware_tag(), config, environment() | packages, rows, markdown(rows))
    print(f"{path} and {path.with_suffix('.md').name}")
    if missed := [(r["network"], r["bits"], r["coder"], r["goals"]) for r in rows if not all(r["goals"].values())]:
        print(f"goals missed: {missed}")


if __name__ == "__main__":
    main()
