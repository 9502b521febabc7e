"""Digits: widths chosen by measured sensitivity against uniform widths of the same size, before and after a short training.

    python benchmarks/sensitivity.py [--seeds 0 1 2 3 4]

Two to three minutes on one processor core. The table goes to ``benchmarks/results/sensitivity_<hardware>_<yyyymm>.{json,md}``.
"""

import argparse
import copy
import dataclasses
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import nn

import wnq
from wnq.allocation import BudgetedPlan, plan_for_budget
from wnq.budget import parse_budget
from wnq.data import Batches, Dataset, load_data
from wnq.environment import environment
from wnq.metrics import Metrics, evaluate
from wnq.plan import Plan
from wnq.recipe import build, load_recipe, resolve
from wnq.sensitivity import Prober, Sensitivity, Settings, measure_sensitivity
from wnq.train import fit

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/digits-float.toml"
BITS = (1, 2, 3, 4, 5, 6, 8)
BUDGETS = ("2.0bits", "2.5bits", "3.0bits", "3.5bits", "4.0bits")
SAMPLES = 1024
RATE = 0.5
"""Of the float recipe's: from a trained start, as in recipes/digits-compare.toml."""
ARMS = ("planned", "planned, all normalized", "uniform")
PAIRS = (("planned", "uniform"), ("planned", "planned, all normalized"))
COMPARED = {"start_loss": 3, "start_accuracy": 2, "loss": 4, "accuracy": 2}


def float_start(data: Dataset, seed: int) -> nn.Module:
    """Train the float network as the recipe says."""
    recipe = resolve(load_recipe(ROOT / RECIPE), data)
    recipe = dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, seed=seed))
    model, _ = build(recipe)
    fit(model, data, recipe.train)
    return model.eval()


def measured(model: nn.Module, data: Dataset, seed: int) -> Prober:
    """Return a prober on a subset of the training images, as ``wnq sensitivity`` draws it."""
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:SAMPLES].sort().values
    batches = Batches(data.train.select(chosen), 256, mean=data.mean, std=data.std)
    return Prober(model, batches.epoch(0), Settings(bits=BITS))


def all_normalized(plan: Plan) -> Plan:
    """Return the same widths, with the gradient through the maximum everywhere."""
    return Plan(
        tuple(dataclasses.replace(e, method=e.method.with_options(max_gain=1.0)) for e in plan.layers), plan.floats
    )


def uniform_plan(model: nn.Module, made: BudgetedPlan) -> Plan:
    method = wnq.get_method("wnq", w_bits=made.uniform_bits, a_bits=32)
    return wnq.make_plan(model, method, first_last_bits=None)


def trained(start: nn.Module, plan: Plan, data: Dataset, seed: int, epochs: int) -> tuple[Metrics, Metrics]:
    """Return the validation metrics of the quantized start and after training."""
    model = wnq.quantize_(copy.deepcopy(start), plan)
    batches = Batches(data.val, 256, mean=data.mean, std=data.std)
    before = evaluate(model, batches.epoch(0))
    train = load_recipe(ROOT / RECIPE).train
    train = dataclasses.replace(train, epochs=epochs, lr=train.lr * RATE, seed=seed, eval_every=1000)
    return before, fit(model, data, train).val


def additivity(prober: Prober, sensitivity: Sensitivity, choices: dict[str, tuple[int, str]]) -> dict[str, float]:
    """Return the sum of the single changes and the change of all together, of the same variants on the same images."""
    single = [getattr(sensitivity.row("alone", name, bits), variant) for name, (bits, variant) in choices.items()]
    whole = prober.change(prober.run(choices))
    return {
        "sum": sum(change.loss_change for change in single),
        "whole": whole.loss_change,
        "whole_error": whole.loss_error,
    }


def run_seed(seed: int, data: Dataset, epochs: int) -> list[dict[str, Any]]:
    start = float_start(data, seed)
    prober = measured(start, data, seed)
    sensitivity: Sensitivity = measure_sensitivity(prober)
    reference = evaluate(start, Batches(data.val, 256, mean=data.mean, std=data.std).epoch(0))
    rows: list[dict[str, Any]] = []
    known: dict[str, tuple[Metrics, Metrics]] = {}
    for budget in BUDGETS:
        made = plan_for_budget(start, sensitivity, parse_budget(budget), first_last_bits=None)
        assert made.uniform_bits is not None
        plans = dict(zip(ARMS, (made.plan, all_normalized(made.plan), uniform_plan(start, made)), strict=True))
        costs = [made.found.cost, made.found.cost, made.uniform[made.uniform_bits].cost]
        for (arm, plan), cost in zip(plans.items(), costs, strict=True):
            key = str(plan.to_json())
            if key not in known:
                known[key] = trained(start, plan, data, seed, epochs)
            before, after = known[key]
            widths = [entry.method.w_bits for entry in plan.layers]
            variants = {c.layer: "clip" if c.normalized and arm == "planned" else "max" for c in made.choices}
            choices = {e.name: (e.method.w_bits, variants[e.name]) for e in plan.layers}
            rows.append(
                {
                    "budget": budget,
                    "arm": arm,
                    "seed": seed,
                    "widths": widths,
                    "normalized": [entry.method.options["max_gain"] > 0 for entry in plan.layers],
                    "bits": sum(e.parameters * e.method.w_bits for e in plan.layers) / made.parameters,
                    "metric": cost,
                    "start_loss": before.loss,
                    "start_accuracy": before.accuracy,
                    "loss": after.loss,
                    "accuracy": after.accuracy,
                    "float_loss": reference.loss,
                    "float_accuracy": reference.accuracy,
                    "additivity": additivity(prober, sensitivity, choices),
                }
            )
            print(f"seed {seed} {budget} {arm}: {widths} {after.loss:.4f}", file=sys.stderr, flush=True)
    return rows


def spread(values: Sequence[float], places: int) -> str:
    text = f"{statistics.mean(values):.{places}f}"
    return text + (f" ± {statistics.stdev(values):.{places}f}" if len(values) > 1 else "")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| budget | arm | bits a weight | widths | sum of single changes | loss at the start | accuracy at the start (%) | "
        "loss, trained | accuracy, trained (%) |",
        "| --- " * 9 + "|",
    ]
    for budget in BUDGETS:
        for arm in ARMS:
            own = [row for row in rows if (row["budget"], row["arm"]) == (budget, arm)]
            widths = "; ".join(dict.fromkeys(widths_of(row) for row in own))
            columns = (("metric", 4), *COMPARED.items())
            cells = " | ".join(spread([row[key] for row in own], places) for key, places in columns)
            lines.append(f"| {budget} | {arm} | {spread([row['bits'] for row in own], 2)} | {widths} | {cells} |")
    return lines


def widths_of(row: dict[str, Any]) -> str:
    """Return widths in the layers' order, ``8/4d/2/4d``: d where normalization is off (detached)."""
    return "/".join(f"{b}{'' if on else 'd'}" for b, on in zip(row["widths"], row["normalized"], strict=True))


def paired_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return differences over the seeds, with their standard error."""
    heads = ["loss at the start", "accuracy at the start", "loss, trained", "accuracy, trained"]
    lines = [f"| budget | difference | {' | '.join(heads)} |", "| --- " * 6 + "|"]
    for budget in BUDGETS:
        for first, second in PAIRS:
            arms = [[row for row in rows if (row["budget"], row["arm"]) == (budget, arm)] for arm in (first, second)]
            cells = []
            for key, places in COMPARED.items():
                gaps = [a[key] - b[key] for a, b in zip(*arms, strict=True)]
                error = f" ± {statistics.stdev(gaps) / len(gaps) ** 0.5:.{places}f}" if len(gaps) > 1 else ""
                cells.append(f"{statistics.mean(gaps):+.{places}f}{error}")
            lines.append(f"| {budget} | {first} − {second} | {' | '.join(cells)} |")
    return lines


def additivity_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = ["| arm | seed | widths | sum of single changes | change of the whole | whole / sum |", "| --- " * 6 + "|"]
    seen: set[tuple[Any, ...]] = set()
    for row in rows:
        key, found = (row["arm"], row["seed"], widths_of(row)), row["additivity"]
        if row["arm"] not in {"planned", "uniform"} or key in seen:
            continue
        seen.add(key)
        lines.append(
            f"| {row['arm']} | {row['seed']} | {widths_of(row)} | {found['sum']:+.4f} | {found['whole']:+.4f} ± "
            f"{found['whole_error']:.4f} | {found['whole'] / found['sum']:.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=5, help="of the quantized training")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load_data("digits")
    begin = time.perf_counter()
    rows = [row for seed in options.seeds for row in run_seed(seed, data, options.epochs)]
    loss, accuracy = (statistics.mean(row[f"float_{key}"] for row in rows) for key in ("loss", "accuracy"))
    config = {
        "command": f"python benchmarks/sensitivity.py --seeds {' '.join(map(str, options.seeds))} --epochs {options.epochs}",
        "start": f"the float network of {RECIPE}, one a seed; {accuracy:.2f} % and loss {loss:.4f} on the 359 validation images "
        "(one image: 0.28 points)",
        "measured": f"{SAMPLES} of the training images, widths {', '.join(map(str, BITS))}, one range a tensor, inputs float",
        "arms": "planned: wnq plan --budget, first and last layer included, inputs float; d: normalization off (max_gain=0). All "
        "normalized: the same widths without d. Uniform: the largest width that fits the budget, so 2 bits at 2.5 and 3 at 3.5",
        "training": f"{options.epochs} epochs of the float recipe at {RATE:g} of its learning rate",
        "sum": "mean over the seeds of the sum of the sizes of the loss changes, which the plan makes least; the images of the "
        "measurement, each layer alone, the better of its two variants. Everything else: validation images, max scaling",
        "spread": "± standard deviation over the seeds in the first table, standard error of the paired mean in the second; in the "
        "third the standard error over the images",
        "seconds": round(time.perf_counter() - begin),
    }
    lines = [
        *table(rows),
        "",
        "Differences:",
        "",
        *paired_table(rows),
        "",
        "Do single changes add up (images of the measurement)?",
        "",
    ]
    lines += additivity_table(rows)
    path = write_results("sensitivity", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
