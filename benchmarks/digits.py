"""Digits: every method from one float start by one recipe, over several seeds. The arms of ``wnq demo`` and the rivals.

    python benchmarks/digits.py [--seeds 0 1 2] [--workers 1]

Takes a few minutes on two processor cores. The table goes to ``benchmarks/results/digits_<hardware>_<yyyymm>.{json,md}``.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results

from wnq.analysis import layer_stats
from wnq.data import load_data
from wnq.demo import ARMS, START, TRAINING, Arm, arm, float_start, pack_and_prove, train_arm
from wnq.environment import environment

ROOT = Path(__file__).resolve().parent.parent
# The weight rules differ; input quantizers (learned step) and first and last layers (8 bits) are the same for all. TWN and BWN
# have a width of their own and get the 2-bit inputs.
RIVALS = (
    *(made for bits in (3, 2) for made in (arm("lsq", "lsq", bits), arm("dorefa", "dorefa", bits, activation="lsq"))),
    Arm("twn-w2a2", "twn", {"a_bits": 2, "activation": "lsq"}),
    Arm("bwn-w1a2", "bwn", {"a_bits": 2, "activation": "lsq"}),
)
MEASURED = ("accuracy", "crest_before", "crest_after", "relative_error", "rescaled_error", "bytes")


def run_seed(seed: int, epochs: int | None) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    changes = {"seed": seed} | ({} if epochs is None else {"epochs": epochs})
    started, training = dataclasses.replace(START, **changes), dataclasses.replace(TRAINING, **changes)
    data = load_data("digits")
    start = float_start(data, started)
    rows = []
    for entry in (*ARMS, *RIVALS):
        begin = time.perf_counter()
        model, row = train_arm(entry, start, data, training)
        inner = layer_stats(model)[1:-1]
        row["rescaled_error"] = statistics.median(layer.rescaled_error for layer in inner) if inner else 0.0
        with tempfile.TemporaryDirectory() as folder:
            proof = pack_and_prove(entry, model, data, Path(folder))
            row["bytes"] = (Path(folder) / proof["file"]).stat().st_size
        seconds = time.perf_counter() - begin
        rows.append(
            {**row, "options": dict(entry.options), "seed": seed, "seconds": round(seconds, 2), "equal": proof["equal"]}
        )
        print(f"seed {seed} {entry.name}: {row['accuracy']:.2f} % in {seconds:.1f} s", file=sys.stderr, flush=True)
    return rows


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for name in dict.fromkeys(run["name"] for run in runs):
        own = [run for run in runs if run["name"] == name]
        row = {key: own[0][key] for key in ("name", "method", "options", "w_bits", "a_bits")}
        for key in MEASURED:
            values = [run[key] for run in own]
            row[key] = statistics.mean(values)
            row[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append({**row, "runs": own, "all_files_equal": all(run["equal"] for run in own)})
    return rows


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    def text(row: dict[str, Any], key: str, digits: int) -> str:
        spread = row[f"{key}_std"]
        return f"{row[key]:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")

    lines = [
        "| arm | W/A | accuracy (%) | drop | crest before | crest after | relative error | bytes |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['w_bits']}/{row['a_bits']} | {text(row, 'accuracy', 2)} | "
            f"{rows[0]['accuracy'] - row['accuracy']:+.2f} | {text(row, 'crest_before', 2)} | {text(row, 'crest_after', 2)} | "
            f"{'' if row['method'] == 'float' else text(row, 'rescaled_error', 3)} | {row['bytes']:,.0f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=1, help="seeds side by side, one thread each")
    parser.add_argument("--epochs", type=int, help="override all epochs (for a trial)")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    parser.add_argument("--one", type=int, metavar="SEED", help="run one seed, print its rows as JSON and stop")
    options = parser.parse_args()
    if options.one is not None:
        print(json.dumps(run_seed(options.one, options.epochs)))
        return

    def spawn(seed: int) -> list[dict[str, Any]]:
        command = [sys.executable, __file__, "--one", str(seed)]
        command += [] if options.epochs is None else ["--epochs", str(options.epochs)]
        return json.loads(subprocess.run(command, check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True).stdout)

    with ThreadPoolExecutor(options.workers) as pool:
        runs = [row for rows in pool.map(spawn, options.seeds) for row in rows]
    rows = summary(runs)
    changes = {} if options.epochs is None else {"epochs": options.epochs}
    config = {
        "command": " ".join(["python", "benchmarks/digits.py", "--seeds", *map(str, options.seeds)]),
        "seeds": options.seeds,
        "start": dataclasses.asdict(dataclasses.replace(START, **changes)),
        "training": dataclasses.asdict(dataclasses.replace(TRAINING, **changes)),
        "note": "scikit-learn digits, 1,438 training and 359 validation images, one image is 0.28 points. Mean ± standard "
        "deviation over the seeds, accuracy after the last epoch. Crest factor and relative error: median over the layers "
        "between the first and the last. Every arm starts from the float network of its seed. Relative errors are after "
        "the best common factor, because DoReFa's values live on a scale of their own. The training settings were chosen among "
        "about a dozen, for all arms alike, on seeds 0 to 2 and these same validation images; seeds from 3 on were first run "
        "afterwards. Higher weight decay widens the gap in crest factor between attached and detached.",
    }
    lines = markdown(rows)
    path = write_results("digits", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
