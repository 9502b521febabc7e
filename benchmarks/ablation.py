"""What lifts accuracy without changing what is deployed: one switch of the recipe a row, beside the plain recipe.

    python benchmarks/ablation.py --data PARQUET_FOLDER --start FLOAT_RUN --runs FOLDER [--bits 2] [--seeds 3]

ResNet-20 on CIFAR-100, WNQ, from one float network; every row trains as many epochs. Switches that change during training (bits,
share of the gradient through the maximum) do so at half time, by two stages of a recipe, each with a learning-rate schedule of its
own; the row ``two stages`` does that and nothing else, and is what they are compared with. Each run is a folder in ``--runs``; the
same command continues. Writes ``benchmarks/results/ablation_<hardware>_<yyyymm>.{json,md}``, beside the rows of other widths.
"""

import argparse
import dataclasses
import datetime
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from results import FOLDER, hardware_tag, write_results

from wnq.compare import paired_interval
from wnq.environment import environment
from wnq.recipe import data_of, recipe_from, run_recipe

PLAIN, STAGED = "plain", "two stages"


def switches(bits: int) -> dict[str, tuple[dict[str, Any], tuple[dict[str, Any], dict[str, Any]] | None]]:
    """Return name -> changes of the plain recipe's tables, and of its two stages if it has any."""

    def options(**given: object) -> dict[str, Any]:
        return {"quantize": {"options": given}}

    wide = {"w_bits": bits + 1, "a_bits": bits + 1}
    narrow = {"w_bits": bits, "a_bits": bits}
    return {
        PLAIN: ({}, None),
        "distillation, half of the loss": ({"train": {"distill_weight": 0.5}}, None),
        "distillation, all of the loss": ({"train": {"distill_weight": 1.0}}, None),
        "EWGS, 0.01": (options(ewgs=0.01), None),
        "EWGS, 0.2": (options(ewgs=0.2), None),
        "EMA, 0.99": ({"train": {"ema_decay": 0.99}}, None),
        "BatchNorm estimated anew": ({"train": {"bn_batches": 50}}, None),
        "EMA, 0.99, and BatchNorm estimated anew": ({"train": {"ema_decay": 0.99, "bn_batches": 50}}, None),
        "weight decay, a tenth": ({"train": {"weight_decay": 1e-5}}, None),
        "weight decay, five times": ({"train": {"weight_decay": 5e-4}}, None),
        STAGED: ({}, ({}, {})),
        f"{bits + 1} bits, then {bits}": ({}, (options(**wide), options(**narrow))),
        "gain 1, then 0": ({}, (options(max_gain=1.0), options(max_gain=0.0))),
        "gain 0, then 1": ({}, (options(max_gain=0.0), options(max_gain=1.0))),
    }


def tables(args: argparse.Namespace, bits: int, seed: int, changes: dict[str, Any], stages: Any) -> dict[str, Any]:
    """Return a recipe's tables."""
    train = {
        "epochs": args.epochs // 2 if stages else args.epochs, "batch_size": 128, "lr": 0.04, "weight_decay": 1e-4,
        "warmup_epochs": 0.25, "crop_padding": 4, "flip": True, "channels_last": True, "eval_every": args.epochs, "seed": seed,
    }  # fmt: skip
    quantize = {
        "method": "wnq",
        "options": {"w_bits": bits, "a_bits": bits, **changes.get("quantize", {}).get("options", {})},
    }
    made = {
        "model": {"name": "resnet20", "start": str(args.start)},
        "data": {"name": "cifar100", "folder": str(args.data), "limit": args.limit},
        "train": {**train, **changes.get("train", {})},
        "quantize": quantize,
    }
    return {**made, "stages": list(stages)} if stages else made


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Difference: to the plain recipe, or for two-stage rows to `two stages`, seed by seed, with its 95 % interval (Student).",
        "",
        "| width | switch | accuracy | difference | 95 % interval |",
        "|---|---|---:|---:|---|",
    ]
    for row in rows:
        spread = f" ± {statistics.stdev(row['accuracies']):.2f}" if len(row["accuracies"]) > 1 else ""
        gap = row["difference"]
        interval = "one seed" if gap is None or gap["low"] is None else f"{gap['low']:+.2f} to {gap['high']:+.2f}"
        beside = "– | –" if gap is None else f"{gap['difference']:+.2f} | {interval}"
        mean = statistics.fmean(row["accuracies"])
        lines.append(f"| W{row['bits']}A{row['bits']} | {row['switch']} | {mean:.2f}{spread} | {beside} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-100's parquet files")
    parser.add_argument("--start", type=Path, required=True, help="folder of a float run of resnet20 on CIFAR-100")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=2, help="even")
    parser.add_argument("--limit", type=int, default=12_500, help="training images, the same for all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, found = None, {}
    arms = switches(args.bits)
    for seed in range(args.seeds):
        for name, (changes, stages) in arms.items():
            recipe = recipe_from(tables(args, args.bits, seed, changes, stages))
            out = args.runs / f"w{args.bits}a{args.bits}" / name.replace(" ", "-").replace(",", "") / f"s{seed}"
            if not (out / "result.json").exists():
                data = data or data_of(recipe.data)
                run_recipe(recipe, out, resume=True, data=data)
            found[name, seed] = float(json.loads((out / "result.json").read_text())["val_accuracy"])
            print(
                f"W{args.bits}A{args.bits} seed {seed} {name}: {found[name, seed]:.2f} %", file=sys.stderr, flush=True
            )
    rows: list[dict[str, Any]] = []
    for name, (_, stages) in arms.items():
        reached = [found[name, seed] for seed in range(args.seeds)]
        beside = STAGED if stages and name != STAGED else PLAIN
        gap = None
        base = [found[beside, seed] for seed in range(args.seeds)]
        if name != PLAIN and args.seeds > 1:
            gap = dataclasses.asdict(paired_interval(reached, base, resolution=0.01))
        elif name != PLAIN:
            gap = {"difference": reached[0] - base[0], "low": None, "high": None}
        rows.append({"bits": args.bits, "switch": name, "beside": beside, "accuracies": reached, "difference": gap})
    before = FOLDER / f"ablation_{hardware_tag()}_{datetime.datetime.now(datetime.UTC):%Y%m}.json"
    if before.exists():
        rows += [row for row in json.loads(before.read_text())["rows"] if row["bits"] != args.bits]
    rows.sort(key=lambda row: row["bits"])
    start = json.loads((args.start / "result.json").read_text())["val_accuracy"]
    config = {
        "network": f"resnet20 on CIFAR-100, from one float network of {start:.2f} %, first and last layer 8 bits",
        "training": f"{args.epochs} epochs of {args.limit:,} images, lr 0.04, weight decay 1e-4, seeds 0 to {args.seeds - 1} "
        "(order and crops); a protocol of minutes, which says nothing of long trainings",
        "command": f"python benchmarks/ablation.py --bits {args.bits} --seeds {args.seeds} --epochs {args.epochs}",
    }
    path = write_results("ablation", hardware_tag(), config, environment(), rows, markdown(rows))
    print("\n".join(markdown(rows)))
    print(f"written to {path.name}")


if __name__ == "__main__":
    main()
