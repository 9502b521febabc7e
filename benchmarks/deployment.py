"""A trained ResNet-20 in the engines: agreement, accuracy, integer products, bytes and speed at 2, 3, 4 and 8 bits.

    python benchmarks/deployment.py --data PARQUET_FOLDER --runs FOLDER [--start FLOAT_RUN] [--images 10000] [--widths 2 3 4 8]

``--data`` is the folder of CIFAR-100's parquet files. ``--runs`` holds finished runs of ``wnq train``, ``plain-w2a2-s0`` and
``rounded-w2a2-s0`` for each width (rounded: ``residual_bits = 8``); those that are missing are trained there, from ``--start``, by
the recipe below: one epoch of 12,500 images. Proofs are kept there too, so that a stopped benchmark goes on. Every file is written
small (where its dialect can), for this processor, and proven by ``wnq.export.export_model``. ExecuTorch is left out where it is not
installed. Writes ``benchmarks/results/deployment_<hardware>_<yyyymm>.{json,md}``. On one processor core a training takes 1 to 4
minutes, an export with 10,000 images 1 to 3.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import Tensor

from wnq.attach import freeze_
from wnq.data import Batches, Dataset
from wnq.environment import environment
from wnq.export import DIALECTS, export_model
from wnq.export.engines import processor
from wnq.export.proof import accuracy, differences, outputs_of
from wnq.files import write_text
from wnq.recipe import data_of, load_recipe, load_run, recipe_from, run_recipe
from wnq.train import TrainConfig

# As the runs of the CIFAR-100 verdict, so that both can be compared.
TRAINING = TrainConfig(
    epochs=1,
    batch_size=128,
    lr=0.04,
    weight_decay=1e-4,
    warmup_epochs=0.25,
    crop_padding=4,
    flip=True,
    channels_last=True,
)
IMAGES, SEED = 12_500, 0

# Name -> which run, the dialect, and the 8-bit values that the export itself may add.
CASES = {
    "ONNX Runtime, trained with residual_bits=8": ("rounded", "onnx", 8),
    "ONNX Runtime, 8 bits calibrated at export": ("plain", "onnx", 8),
    "ONNX Runtime, residual branches float": ("plain", "onnx", 32),
    "OpenVINO": ("plain", "openvino", 32),
    "OpenVINO, trained with residual_bits=8": ("rounded", "openvino", 32),
    "torch, compiled": ("plain", "torch", 32),
    "torch, compiled, trained with residual_bits=8": ("rounded", "torch", 32),
    "ExecuTorch, trained with residual_bits=8": ("rounded", "executorch", 8),
    "ExecuTorch, 8 bits calibrated at export": ("plain", "executorch", 8),
}
AGREEMENT = {"onnx": 99.5, "openvino": 99.9, "torch": 99.9, "executorch": 99.5}
POINTS = 0.1
FACTOR, BYTES = 1.15, 30_000
NOISE_IMAGES = 2_000


def train_missing(runs: Path, kind: str, bits: int, start: Path | None, data: Dataset, folder: Path) -> Path:
    """Return the folder of a run, trained if it is not there."""
    out = runs / f"{kind}-w{bits}a{bits}-s{SEED}"
    if (out / "result.json").exists():
        return out
    if start is None:
        raise SystemExit(f"{out} is missing: pass --start, the folder of a float run of resnet20 on CIFAR-100.")
    tables = {
        "model": {"name": "resnet20", "start": str(start)},
        "data": {"name": "cifar100", "folder": str(folder), "limit": IMAGES},
        "train": {**dataclasses.asdict(TRAINING), "seed": SEED},
        "quantize": {
            "method": "wnq",
            # The full grid at 8 bits would need 9.
            "options": {"w_bits": bits, "a_bits": bits, **({"grid": "symmetric"} if bits == 8 else {})},
            "residual_bits": 8 if kind == "rounded" else 32,
        },
    }
    print(f"training {out.name}", file=sys.stderr, flush=True)
    run_recipe(recipe_from(tables), out, resume=True, data=data)
    return out


def first(split: Any, count: int, data: Dataset) -> tuple[Tensor, Tensor]:
    batch = min(count, len(split))
    return next(iter(Batches(split, batch, mean=data.mean, std=data.std).epoch(0)))


def own_noise(run: Path, x: Tensor) -> dict[str, float]:
    """Return how the trained network, its weights rounded once, differs in float32 from itself in float64."""
    model = freeze_(load_run(run)[1])
    single = outputs_of(model, (x,))
    return differences(single, outputs_of(model.double(), (x.double(),)))


def row_of(
    case: str, bits: int, run: Path, proof: dict[str, Any], floats: float | None, noise: dict[str, float]
) -> dict[str, Any]:
    to, size = proof["to"], proof["bytes"]
    limit = FACTOR * bits / 32 * size["weights_float32"] + BYTES
    found = proof["accuracy"]
    drop = found["engine"] - found["trained"]
    return {
        "case": case, "bits": bits, "run": run.name, "agreement": proof["engine_vs_trained"]["agreement"],
        "engine_vs_trained": proof["engine_vs_trained"], "engine_vs_reference": proof["engine_vs_reference"],
        "reference_vs_trained": proof["reference_vs_trained"], "trained_float32_vs_float64": noise,
        "accuracy": {**found, "float": floats},
        "images": proof["inputs"], "operators": proof["operators"], "bytes": size, "limit": limit,
        "latency": proof["latency"], "seconds": proof["seconds"], "notes": proof["notes"], "engine": proof["engine"],
        "processor": proof["processor"],
        "goals": {
            f"agreement >= {AGREEMENT[to]} %": proof["engine_vs_trained"]["agreement"] >= AGREEMENT[to],
            # One image more or less than a tenth of a point is no difference.
            f"accuracy within {POINTS} point": abs(drop) <= POINTS + 1e-9,
            # ExecuTorch has no small flavour.
            "file <= 1.15 x k/32 of the float weights + 30 kB": size["file"] <= limit or "small" not in DIALECTS[to].flavours,
            "all products in integers": proof["operators"]["integer"] == proof["operators"]["products"],
        },
    }  # fmt: skip


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "Agreement: share of equal arg-max with the trained (fake-quantized) network. Difference of logits: largest, mean. Bytes: "
        "of the small file (ExecuTorch: of the only one, which is not judged), beside the limit. Batch 1 and 32: how many times "
        "faster than the float network in the same engine, taken in turn; below 1 it is slower. Own noise: agreement of the "
        f"trained network in float32 with itself in float64, on {NOISE_IMAGES:,} images at most: how far the order of float "
        "operations carries by itself.",
        "",
        "| width | engine | agreement | own noise | accuracy float / trained / reference / engine | difference of logits "
        "| integer products | bytes / limit | batch 1 | batch 32 | export | goals missed |",
        "|---|---|---:|---:|---|---|---|---|---:|---:|---:|---|",
    ]
    for row in rows:
        found, gap = row["accuracy"], row["engine_vs_trained"]
        four = " / ".join(
            "–" if found[k] is None else f"{found[k]:.2f}" for k in ("float", "trained", "reference", "engine")
        )
        speed = {entry["batch"]: entry["float_ms"] / entry["integer_ms"] for entry in row["latency"]}
        missed = [goal for goal, met in row["goals"].items() if not met]
        lines.append(
            f"| W{row['bits']}A{row['bits']} | {row['case']} | {row['agreement']:.2f} % "
            f"| {row['trained_float32_vs_float64']['agreement']:.2f} % | {four} "
            f"| {gap['max']:.2g}, {gap['mean']:.2g} | {row['operators']['integer']} of {row['operators']['products']} "
            f"| {row['bytes']['file']:,} / {row['limit']:,.0f} "
            f"| {speed[1]:.2f} | {speed[32]:.2f} | {row['seconds']:.0f} s | {'; '.join(missed) or 'none'} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-100's parquet files")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument(
        "--start", type=Path, help="float run that missing runs start from, and whose accuracy is reported"
    )
    parser.add_argument("--images", type=int, default=10_000, help="test images of each proof (default: all)")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 8])
    parser.add_argument("--seconds", type=float, default=3.0, help="of each comparison of speed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    section = recipe_from({"data": {"name": "cifar100", "folder": str(args.data), "limit": IMAGES}}).data
    data = data_of(section)
    (x, labels), (calibration, _) = first(data.val, args.images, data), first(data.train, 256, data)
    floats = None
    if args.start is not None:
        floats = accuracy(outputs_of(load_run(args.start)[1], (x,)), labels.numpy())
    rows: list[dict[str, Any]] = []
    noise: dict[Path, dict[str, float]] = {}
    cases = {name: case for name, case in CASES.items() if case[1] != "executorch" or find_spec("executorch")}
    cpu = processor()
    with tempfile.TemporaryDirectory() as folder:
        for bits in args.widths:
            for case, (kind, to, residual) in cases.items():
                kept = args.runs / "rows" / f"w{bits}a{bits}-{kind}-{to}-{residual}-{len(x)}.json"
                if kept.exists():
                    rows.append(json.loads(kept.read_text()))
                    continue
                run = train_missing(args.runs, kind, bits, args.start, data, args.data)
                proof = export_model(
                    load_run(run)[1], (x,), Path(folder) / f"model{DIALECTS[to].ending}", to=to,
                    flavour=DIALECTS[to].flavours[-1], labels=labels, calibration=(calibration,), vnni=cpu["vnni"],
                    residual_bits=residual, seconds=args.seconds,
                )  # fmt: skip
                if run not in noise:
                    noise[run] = own_noise(run, x[:NOISE_IMAGES])
                rows.append(row_of(case, bits, run, proof, floats, noise[run]))
                kept.parent.mkdir(exist_ok=True)
                write_text(kept, json.dumps(rows[-1]))
                print(f"W{bits}A{bits} {case}: {rows[-1]['agreement']:.2f} %", file=sys.stderr, flush=True)
    vnni = "with VNNI, files for such processors" if cpu["vnni"] else "without VNNI"
    recipe = load_recipe(args.runs / rows[0]["run"] / "recipe.json")
    config = {
        "network": f"resnet20 on CIFAR-100, {len(x):,} test images, seed {SEED}",
        "training": f"method wnq, first and last layer 8 bits, {recipe.train.epochs} epoch of {recipe.data.limit:,} images from a "
        f"float network, lr {recipe.train.lr}; at 8 bits the symmetric grid; a short training, so many logits are close",
        "goals": f"agreement >= {AGREEMENT['openvino']} % in OpenVINO and torch, {AGREEMENT['onnx']} % in the others, accuracy "
        f"within {POINTS} point of the trained network, file <= 1.15 x k/32 of the float weights + 30 kB, all products in integers",
        "speed": f"median of paired runs in turn, one thread, {cpu['name']} {vnni}; benchmarks/infer.py judges the goals of speed",
        "engines": ", ".join(sorted({row["engine"] for row in rows})),
    }
    path = write_results("deployment", hardware_tag(), config, environment(), rows, markdown(rows))
    print(f"{path} and {path.with_suffix('.md').name}")
    if missed := [(r["bits"], r["case"], [g for g, met in r["goals"].items() if not met]) for r in rows]:
        print("\n".join(f"W{b}A{b} {case}: missed {goals}" for b, case, goals in missed if goals))


if __name__ == "__main__":
    main()
