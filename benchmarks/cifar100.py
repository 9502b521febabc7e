"""CIFAR-100, ResNet-20, the short CPU protocol: one float run, then every method from it under the same recipe.

    python benchmarks/cifar100.py --data FOLDER_OF_PARQUET [--seeds 0] [--workers 2]

Each cell of the table is a run of its own in ``runs/cifar100``; finished cells are not run again, a stopped one resumes,
so the script can be stopped and started at will. The table goes to
``benchmarks/results/cifar100_resnet20_short_<hardware>_<yyyymm>.{json,md}``.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from results import hardware_tag, write_results

import wnq
from wnq.data import load_data
from wnq.environment import environment
from wnq.recipe import QuantizeSection, Recipe, load_recipe, load_run, run_recipe

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "cifar100"
# The weight rules differ; input quantizers (learned step) and first and last layers (8 bits) are the same for all.
ARMS = {
    "wnq": ("wnq", {}),
    "detached": ("wnq", {"max_gain": 0.0}),
    "minmax": ("minmax", {}),
    "dorefa": ("dorefa", {"activation": "lsq"}),
    "lsq": ("lsq", {}),
}


def cell_recipe(arm: str, bits: int, seed: int, data: str, epochs: int | None) -> Recipe:
    """Return the recipe of one cell: the committed one with method, seed and data folder filled in."""
    if arm == "float":
        recipe = load_recipe(ROOT / "recipes" / "cifar100-resnet20-float-24ep.toml")
        quantize, start = None, None
    else:
        recipe = load_recipe(ROOT / "recipes" / f"cifar100-resnet20-wnq-w{bits}a{bits}-6ep.toml")
        method, options = ARMS[arm]
        quantize = QuantizeSection(method=method, options={"w_bits": bits, "a_bits": bits, **options})
        start = f"runs/cifar100/float-s{seed}"
    train = dataclasses.replace(recipe.train, seed=seed, **({} if epochs is None else {"epochs": epochs}))
    return dataclasses.replace(
        recipe,
        model=dataclasses.replace(recipe.model, start=start),
        data=dataclasses.replace(recipe.data, folder=data),
        quantize=quantize,
        train=train,
    )


def cell_name(arm: str, bits: int, seed: int) -> str:
    return f"float-s{seed}" if arm == "float" else f"{arm}-w{bits}a{bits}-s{seed}"


def run_cell(arm: str, bits: int, seed: int, data: str, epochs: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    os.chdir(ROOT)  # the recipes' start folders are relative to the repository
    out = RUNS / cell_name(arm, bits, seed)
    if (out / "result.json").exists():
        return
    recipe = cell_recipe(arm, bits, seed, data, epochs)
    start = time.time()

    def report(progress: object) -> None:
        p = progress
        if p.step % 50 == 0:  # type: ignore[attr-defined]
            print(f"{out.name} epoch {p.epoch}/{p.epochs} step {p.step}/{p.steps} loss {p.loss:.3f} acc {p.accuracy:.1f} "
                  f"{p.images_per_second:.0f} img/s, left {p.seconds_left / 60:.1f} min", flush=True)  # fmt: skip

    _, result = run_recipe(recipe, out, resume=True, on_step=report)
    print(f"{out.name}: {result.val.accuracy:.2f} % in {(time.time() - start) / 60:.1f} min", flush=True)


def tails(folder: Path) -> dict[str, float]:
    """Return the median crest factor and kurtosis and the relative error over the inner layers of a finished run."""
    _, model = load_run(folder)
    plan = getattr(model, "wnq_plan", None)
    crests, errors = [], []
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    for _, layer in convs[1:-1]:
        weight = wnq.prepared.float_weight(layer).detach().double()
        crests.append((weight.abs().max() / weight.square().mean().sqrt()).item())
        if plan is not None:
            quantized = (
                wnq.prepared.weight_quantizer(layer).quantize(wnq.prepared.float_weight(layer)).dequantize().double()
            )
            # DoReFa's values live on a scale of their own: compare shapes, after the best common factor.
            gain = (weight * quantized).sum() / quantized.square().sum()
            errors.append(((weight - gain * quantized).square().sum() / weight.square().sum()).item())
    return {
        "crest_median": statistics.median(crests),
        "relative_error_median": statistics.median(errors) if errors else float("nan"),
    }


def table(seeds: list[int], data: str, hardware: str) -> None:
    rows = []
    for bits, arm in [(32, "float")] + [(bits, arm) for bits in (3, 2) for arm in ARMS]:
        folders = [RUNS / cell_name(arm, bits, seed) for seed in seeds]
        done = [folder for folder in folders if (folder / "result.json").exists()]
        if not done:
            continue
        results = [json.loads((folder / "result.json").read_text()) for folder in done]
        for result in results:
            result["recipe"]["data"]["folder"] = None
        accuracies = [result["val_accuracy"] for result in results]
        statistics_of = [tails(folder) for folder in done]
        rows.append(
            {
                "arm": arm,
                "method": "float" if arm == "float" else ARMS[arm][0],
                "options": {} if arm == "float" else ARMS[arm][1],
                "w_bits": bits,
                "a_bits": bits,
                "epochs": results[0]["recipe"]["train"]["epochs"],
                "accuracy": statistics.mean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                "accuracies": accuracies,
                "crest_median": statistics.mean(s["crest_median"] for s in statistics_of),
                "relative_error_median": None
                if arm == "float"
                else statistics.mean(s["relative_error_median"] for s in statistics_of),
                "seconds": [result["seconds"] for result in results],
                "seeds": seeds[: len(done)],
                "recipes": [result["recipe"] for result in results],
                "environments": [result["environment"] for result in results],
            }
        )
    lines = [
        "| method | W/A | epochs | accuracy, last epoch (%) | drop | median crest | median relative error |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    base = rows[0]["accuracy"]
    for row in rows:
        spread = "" if row["accuracy_std"] is None else f" ± {row['accuracy_std']:.2f}"
        error = "" if row["relative_error_median"] is None else f"{row['relative_error_median']:.3f}"
        lines.append(
            f"| {row['arm']} | {row['w_bits']}/{row['a_bits']} | {row['epochs']} | {row['accuracy']:.2f}{spread} | "
            f"{base - row['accuracy']:+.2f} | {row['crest_median']:.2f} | {error} |"
        )
    config = {
        "command": " ".join(["python", "benchmarks/cifar100.py", "--seeds", *map(str, seeds)]),
        "seeds": seeds,
        "note": "Real CIFAR-100, 50,000 training and 10,000 test images; test accuracy after the last epoch; tails of the "
        "inner layers; relative error after the best common factor.",
    }
    path = write_results("cifar100_resnet20_short", hardware, config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with train-*.parquet and test-*.parquet of CIFAR-100")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="cells side by side, one thread each")
    parser.add_argument("--epochs", type=int, help="override the recipes' epochs (for a trial)")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    parser.add_argument("--cell", nargs=3, metavar=("ARM", "BITS", "SEED"), help="run one cell and stop")
    parser.add_argument("--threads", type=int, default=1, help="threads of one cell")
    parser.add_argument("--table-only", action="store_true", help="write the table of the finished cells")
    options = parser.parse_args()
    if options.cell:
        arm, bits, seed = options.cell
        run_cell(arm, int(bits), int(seed), options.data, options.epochs, options.threads)
        return
    if not options.table_only:
        load_data("cifar100", folder=options.data)  # decode once, before the workers need it

        def spawn(cell: tuple[str, int, int], threads: int) -> None:
            command = [
                sys.executable,
                __file__,
                "--data",
                options.data,
                "--threads",
                str(threads),
                "--cell",
                *map(str, cell),
            ]
            if options.epochs is not None:
                command += ["--epochs", str(options.epochs)]
            subprocess.run(command, check=True, cwd=ROOT)

        for seed in options.seeds:
            spawn(("float", 32, seed), options.workers)
        cells = [(arm, bits, seed) for seed in options.seeds for bits in (3, 2) for arm in ARMS]
        with ThreadPoolExecutor(options.workers) as pool:
            list(pool.map(lambda cell: spawn(cell, 1), cells))
    table(options.seeds, options.data, options.hardware or hardware_tag())


if __name__ == "__main__":
    main()
