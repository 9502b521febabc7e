"""Ternary weights and the gradient through the maximum: does it shrink the largest weight too far, and what helps at the start?

    python benchmarks/ternary.py [--seeds 0 1 2 3 4] [--resume FILE]

Two studies, about ten minutes on one processor core. *Toy*: linear regression, the teacher a Student-t vector, the weights on the
symmetric grid at 2 (ternary), 3 and 4 bits, the gain of the gradient through the maximum from 0 to 2, at two learning rates.
*Digits*: the network and the recipe of ``wnq demo``, weights ternary, inputs at 2 bits, gains from 0 to 1, and a start whose tails
were clipped; and how far single steps throw the largest weight of a layer in the first five epochs. With ``--resume`` each finished
run is kept in FILE and not repeated.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from results import hardware_tag, write_results
from torch import Tensor, nn

import wnq
from wnq.analysis import layer_stats, weight_stats
from wnq.data import Dataset, load_data
from wnq.demo import START, TRAINING, float_start
from wnq.environment import environment
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform
from wnq.train import fit

ROOT = Path(__file__).resolve().parent.parent
GAINS = (0.0, 0.03, 0.1, 0.3, 0.5, 1.0, 2.0)
TOY = {"weights": 256, "examples": 2048, "batch": 64, "steps": 2000, "momentum": 0.9, "degrees": 4, "noise": 0.1}
TOY_RATES = {2: (0.05, 0.01), 3: (0.05,), 4: (0.05,)}
TOY_SEEDS = 16


@dataclasses.dataclass(frozen=True)
class DigitsArm:
    """One way to train the digits network on from its float start, with 2-bit weights."""

    name: str
    gain: float
    grid: str = "symmetric"
    clipped: bool = False
    rate: float = 1.0


DIGITS = (
    *(DigitsArm(f"gain {gain:g}", gain) for gain in (1.0, 0.3, 0.1, 0.03, 0.0)),
    *(DigitsArm(f"clipped start, gain {gain:g}", gain, clipped=True) for gain in (1.0, 0.3, 0.0)),
    *(DigitsArm(f"rate x4, gain {gain:g}", gain, rate=4.0) for gain in (1.0, 0.3, 0.0)),
    *(DigitsArm(f"full grid, gain {gain:g}", gain, grid="full") for gain in (1.0, 0.0)),
)

WATCHED = 115
"""Steps, five epochs, in which the largest weights are watched; in the arms below."""
JUMPS = tuple(arm for arm in DIGITS if arm.rate == 1 and arm.gain in {1.0, 0.3} | ({0.0} if not arm.clipped else set()))


# Toy


def teachers(seeds: int, weights: int, degrees: int, generator: torch.Generator) -> Tensor:
    """Return Student-t vectors, one a row, each of mean square 1."""
    normal = torch.randn(seeds, weights, generator=generator)
    spread = torch.randn(seeds, weights, degrees, generator=generator).square().mean(-1).sqrt()
    teacher = normal / spread
    return teacher / teacher.square().mean(1, keepdim=True).sqrt()


def toy(bits: int, gain: float, rate: float, *, seeds: int = TOY_SEEDS, steps: int = TOY["steps"]) -> dict[str, Any]:
    """Train ``seeds`` regressions side by side, one a row, each behind its own maximum, from the teacher's weights."""
    generator = torch.Generator().manual_seed(0)
    d, n = int(TOY["weights"]), int(TOY["examples"])
    teacher = teachers(seeds, d, int(TOY["degrees"]), generator)
    inputs = torch.randn(seeds, n, d, generator=generator)
    targets = torch.einsum("snd,sd->sn", inputs, teacher)
    targets += TOY["noise"] * math.sqrt(d) * torch.randn(targets.shape, generator=generator)
    weight = teacher.clone().requires_grad_()
    rows = partial(max_abs, granularity="channel", max_gain=gain)
    quantizer = Normalized(rows, Uniform(bits, "symmetric"), granularity="channel")
    optimizer = torch.optim.SGD([weight], lr=rate, momentum=TOY["momentum"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        chosen = torch.randint(n, (int(TOY["batch"]),), generator=generator)
        residual = torch.einsum("snd,sd->sn", inputs[:, chosen], quantizer(weight)) - targets[:, chosen]
        optimizer.zero_grad()
        (residual.square().mean(1).sum() / 2).backward()
        optimizer.step()
        schedule.step()
    w = weight.detach()
    values = quantizer(w).detach()
    energy = w.square().sum(1)
    columns = {
        # The inputs are white, so the excess risk is the squared distance of the weights used from the teacher's.
        "risk": (values - teacher).square().sum(1) / teacher.square().sum(1),
        "crest": w.abs().amax(1) / w.square().mean(1).sqrt(),
        "crest_start": teacher.abs().amax(1),
        "relative_error": (w - values).square().sum(1) / energy,
        "zeros": (values == 0).double().mean(1),
    }
    return {key: [finite(x) for x in column.tolist()] for key, column in columns.items()}


def finite(x: float) -> float | None:
    return x if math.isfinite(x) else None


# Digits


@torch.no_grad()
def ternary_clip(weight: Tensor) -> float:
    """Return the clip c that makes ``|w - c round(clip(w / c, -1, 1))|`` least, of 400 from a fifth of an rms to the maximum."""
    w = weight.reshape(-1).double()
    clips = torch.linspace(0.2 * w.square().mean().sqrt().item(), w.abs().max().item(), 400, dtype=torch.float64)
    errors = [(w - c * (w / c).clamp(-1, 1).round()).square().sum().item() for c in clips]
    return clips[min(range(len(errors)), key=errors.__getitem__)].item()


def prepared(arm: DigitsArm, start: nn.Module) -> nn.Module:
    model = copy.deepcopy(start)
    method = wnq.get_method("wnq", w_bits=2, a_bits=2, grid=arm.grid, max_gain=arm.gain)
    plan = wnq.make_plan(model, method)
    if arm.clipped:
        for entry in plan.layers:
            if entry.method.w_bits == 2:
                weight = model.get_submodule(entry.name).weight
                weight.data.clamp_(-(c := ternary_clip(weight)), c)
    return wnq.quantize_(model, plan)


def digits(arm: DigitsArm, seed: int, start: nn.Module, data: Dataset, epochs: int | None) -> dict[str, Any]:
    before = statistics.median(row.crest for row in weight_stats(start)[1:-1])
    model = prepared(arm, start)
    zeros = statistics.median(row.zeros or 0.0 for row in layer_stats(model)[1:-1])
    training = dataclasses.replace(TRAINING, seed=seed, lr=TRAINING.lr * arm.rate, eval_every=1)
    if epochs is not None:
        training = dataclasses.replace(training, epochs=epochs)
    result = fit(model, data, training)
    model.cpu().eval()
    inner = layer_stats(model)[1:-1]
    return {
        "accuracy": result.val.accuracy,
        "val_loss": result.val.loss,
        "train_loss": result.history[-1]["loss"],
        "first_epoch": result.history[0]["val_accuracy"],
        "crest_before": before,
        "zeros_start": zeros,
        **{
            key: statistics.median(getattr(row, key) or 0.0 for row in inner)
            for key in ("crest", "relative_error", "rescaled_error", "zeros")
        },
    }


class EnoughError(Exception):
    """Enough steps were watched."""


def jump(arm: DigitsArm, seed: int, start: nn.Module, data: Dataset) -> float:
    """Return the farthest that one of the first steps moves the largest weight of a ternary layer, over that weight's magnitude."""
    model = prepared(arm, start)
    weights = [
        wnq.prepared.float_weight(layer) for _, layer, quantizer in wnq.quantized_layers(model) if quantizer.bits == 2
    ]
    before = [w.detach().clone().reshape(-1) for w in weights]
    farthest, steps = 0.0, 0

    def watch(_: object) -> None:
        nonlocal farthest, steps
        for place, weight in enumerate(weights):
            now, old = weight.detach().reshape(-1), before[place]
            top = old.abs().argmax()
            farthest = max(farthest, ((now[top] - old[top]).abs() / old[top].abs()).item())
            before[place] = now.clone()
        steps += 1
        if steps == WATCHED:
            raise EnoughError

    with contextlib.suppress(EnoughError):
        fit(
            model,
            data,
            dataclasses.replace(TRAINING, seed=seed, lr=TRAINING.lr * arm.rate, eval_every=1000),
            on_step=watch,
        )
    return farthest


# Both


class Kept:
    """Runs that are finished, in a file of one JSON row a line."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else []
        self.rows = {json.dumps(row["key"]): row["value"] for row in map(json.loads, lines)}

    def run(self, key: Sequence[Any], work: Callable[[], Any]) -> Any:
        name = json.dumps(list(key))
        if name not in self.rows:
            begin = time.perf_counter()
            self.rows[name] = work()
            print(f"{name}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
            if self.path is not None:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": list(key), "value": self.rows[name]}) + "\n")
        return self.rows[name]


def spread(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None]
    if len(known) < len(values) or max(known) > 1e3:
        return "diverges"
    text = f"{statistics.mean(known):.{digits}f}"
    return text + (f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else "")


def between(values: Sequence[float | None]) -> str:
    known = [x for x in values if x is not None]
    return f"{min(known):.3g} to {max(known):.3g}" if known else ""


def toy_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        "| bits | rate | gain | excess risk | crest | relative error | zeros |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        # A run that diverged left a number somewhere, but not one that means anything.
        bad = spread(row["risk"], 3) == "diverges"
        cells = ["" if bad else spread(row[key], n) for key, n in (("crest", 2), ("relative_error", 3), ("zeros", 2))]
        lines.append(
            f"| {row['bits']} | {row['rate']:g} | {row['gain']:g} | {spread(row['risk'], 3)} | {' | '.join(cells)} |"
        )
    return lines


DIGITS_COLUMNS = {
    "zeros_start": ("zeros at the start", 2),
    "jump": ("farthest jump", 2),
    "first_epoch": ("after one epoch (%)", 1),
    "accuracy": ("accuracy (%)", 2),
    "val_loss": ("validation loss", 3),
    "train_loss": ("training loss", 4),
    "crest": ("crest", 2),
    "relative_error": ("relative error", 3),
    "zeros": ("zeros", 2),
}


def digits_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = [head for head, _ in DIGITS_COLUMNS.values()]
    lines = [f"| arm | {' | '.join(heads)} |", "| --- " * (len(heads) + 1) + "|"]
    for row in rows:
        cells = [
            "" if key == "jump" else spread([run[key] for run in row["runs"]], places)
            for key, (_, places) in DIGITS_COLUMNS.items()
        ]
        cells[list(DIGITS_COLUMNS).index("jump")] = between([run["jump"] for run in row["runs"]])
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of the digits study")
    parser.add_argument("--epochs", type=int, help="override the epochs of the digits study (for a trial)")
    parser.add_argument("--resume", type=Path, help="keep finished runs in this file and do not repeat them")
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    kept = Kept(options.resume)
    toys = [
        {
            "bits": bits,
            "rate": rate,
            "gain": gain,
            **kept.run(("toy", bits, rate, gain), partial(toy, bits, gain, rate)),
        }
        for bits, rates in TOY_RATES.items()
        for rate in rates
        for gain in GAINS
    ]
    data = load_data("digits")
    runs: dict[str, list[dict[str, Any]]] = {arm.name: [] for arm in DIGITS}
    for seed in options.seeds:
        start = float_start(data, dataclasses.replace(START, seed=seed))
        for arm in DIGITS:
            work = partial(digits, arm, seed, start, data, options.epochs)
            run = kept.run(("digits", arm.name, seed, options.epochs), work)
            far = kept.run(("jump", arm.name, seed), partial(jump, arm, seed, start, data)) if arm in JUMPS else None
            runs[arm.name].append({**run, "jump": far})
    arms = [{**dataclasses.asdict(arm), "runs": runs[arm.name]} for arm in DIGITS]
    config = {
        "command": f"python benchmarks/ternary.py --seeds {' '.join(map(str, options.seeds))}",
        "toy": f"linear regression by SGD, cosine rate, {TOY}; {TOY_SEEDS} teachers; symmetric grid; every run starts at its "
        "teacher. Excess risk: |w_q - teacher|^2 / |teacher|^2.",
        "digits": "the network, the float start and the training of wnq demo; inner layers at 2 bits, weights ternary unless "
        f"'full grid'; {len(options.seeds)} seeds; accuracy after the last epoch, one image is 0.28 points. Crest factor, error, "
        "zeros: median over the layers between the first and the last. 'Clipped start': the start's inner weights are clipped "
        "once, at the ternary clip of least squared error. 'Rate x4': four times the learning rate. Farthest jump: how far one of "
        "the first 115 steps moved the largest weight of a ternary layer, as a multiple of that weight.",
        "spread": "mean ± standard deviation over the teachers or seeds",
    }
    lines = ["Toy:", "", *toy_table(toys), "", "Digits:", "", *digits_table(arms)]
    rows = [{"study": "toy", **row} for row in toys] + [{"study": "digits", **row} for row in arms]
    path = write_results("ternary", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
