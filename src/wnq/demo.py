"""The demonstration: real 8x8 digits, one float start, the same budget for every arm, the evidence and the proof.

A small network is trained in floating point. From that start, and by one recipe, it is trained on in seven ways: float; and
at 3 and at 2 bits by WNQ, by WNQ without its gradient through the maximum (``detached``, which isolates that gradient), and
by plain min-max. Each result is written to a file, read into a fresh network and compared, logit by logit.
"""

import copy
import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wnq.analysis import LayerStats, ModelEvidence, collect_evidence, layer_stats, weight_stats
from wnq.artifact import load, save
from wnq.attach import quantize_
from wnq.data import Dataset, batches_of, load_data
from wnq.environment import environment
from wnq.files import replacing, write_text
from wnq.methods import get_method
from wnq.models import build_model
from wnq.plan import make_plan
from wnq.quantizer import FLOAT_BITS
from wnq.report import write_report
from wnq.train import Progress, TrainConfig, fit

MODEL = "digits_cnn"

START = TrainConfig(epochs=20, batch_size=64, lr=0.1, weight_decay=1e-3, eval_every=1000)
"""The float start."""

TRAINING = dataclasses.replace(START, epochs=80, lr=0.05, weight_decay=2e-3)
"""What every arm gets, from the start on: half the rate, at which 2 bits end nearer to the float accuracy, and twice the
decay, so that weights are renewed as fast as before. Chosen once, on seeds 0 to 2, for all arms alike."""

OnStep = Callable[[str, Progress], None]
"""Called with the arm's name after every step."""


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train on from the start. Without a method: in floating point."""

    name: str
    method: str | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    @property
    def bits(self) -> tuple[int, int]:
        """Width of weights and inputs."""
        if self.method is None:
            return FLOAT_BITS, FLOAT_BITS
        method = get_method(self.method, **self.options)
        return method.w_bits, method.a_bits


def arm(label: str, method: str, bits: int, **options: Any) -> Arm:
    """Return an arm whose weights and inputs have the same width."""
    return Arm(f"{label}-w{bits}a{bits}", method, {"w_bits": bits, "a_bits": bits, **options})


ARMS = (
    Arm("float"),
    *(
        made
        for bits in (3, 2)
        for made in (
            arm("wnq", "wnq", bits),
            arm("detached", "wnq", bits, max_gain=0.0),
            arm("minmax", "minmax", bits),
        )
    ),
)


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demonstration came to.

    Attributes:
        rows: one a model: name, method, w_bits, a_bits, accuracy (%), crest_before, crest_after, relative_error (medians
            over the layers between the first and the last), bytes (of its file).
        proofs: one a file: name, file, sha256, images, equal (every logit of the file's model has the same bits),
            max_difference.
        claims: what was expected, what was measured, whether it holds.
        seconds: wall time.
    """

    rows: list[dict[str, Any]]
    proofs: list[dict[str, Any]]
    claims: list[dict[str, Any]]
    seconds: float


def run_demo(out: str | Path, *, seed: int = 0, fast: bool = False, on_step: OnStep | None = None) -> DemoResult:
    """Train, measure, write ``results.json``, ``report.html`` and one ``.safetensors`` file a model.

    Args:
        out: the folder, made if missing; files of an earlier demonstration are replaced.
        seed: of the start and of the order of the images.
        fast: a few epochs, to see that everything works; the numbers then mean nothing.
        on_step: for a progress bar.

    Raises:
        OSError: the folder cannot be written.
        ModuleNotFoundError: an extra is not installed.
        Interrupted: Ctrl-C.
    """
    begin = time.perf_counter()
    out = Path(out)
    started = dataclasses.replace(START, seed=seed, epochs=2 if fast else START.epochs)
    training = dataclasses.replace(TRAINING, seed=seed, epochs=2 if fast else TRAINING.epochs)
    write_text(out / "README.txt", _CONTENTS)  # an unwritable folder is found before the training
    data = load_data("digits")
    start = float_start(data, started, on_step)
    evidence = [collect_evidence(start, "start")]
    rows: list[dict[str, Any]] = []
    proofs: list[dict[str, Any]] = []
    for entry in ARMS:
        model, row = train_arm(entry, start, data, training, on_step)
        proof = pack_and_prove(entry, model, data, out)
        row["bytes"] = (out / proof["file"]).stat().st_size
        rows.append(row)
        proofs.append(proof)
        if entry.method is not None:
            evidence.append(collect_evidence(model, entry.name, summary={"accuracy": row["accuracy"]}))
    result = DemoResult(rows, proofs, check_claims(rows, proofs), time.perf_counter() - begin)
    images = {"training": len(data.train), "validation": len(data.val)}
    config: dict[str, Any] = {
        "model": MODEL,
        "data": "digits",
        "images": images,
        "start": dataclasses.asdict(started),
        "training": dataclasses.asdict(training),
    }
    _write(out, result, evidence, {"seed": seed, "fast": fast, "config": config, "environment": environment()})
    return result


def float_start(data: Dataset, config: TrainConfig, on_step: OnStep | None = None) -> nn.Module:
    """Train the float network that every arm starts from."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(MODEL)
    fit(model, data, config, on_step=_named(on_step, "start"))
    return model.cpu().eval()


def train_arm(
    entry: Arm, start: nn.Module, data: Dataset, config: TrainConfig, on_step: OnStep | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Train one arm from the start and return the model, in eval mode, with its row but for the bytes."""
    model = copy.deepcopy(start)
    before = _median(weight_stats(model), "crest")
    if entry.method is not None:
        quantize_(model, make_plan(model, get_method(entry.method, **entry.options)))
    result = fit(model, data, config, on_step=_named(on_step, entry.name))
    model.cpu().eval()
    stats = weight_stats(model) if entry.method is None else layer_stats(model)
    w_bits, a_bits = entry.bits
    row = {
        "name": entry.name,
        "method": entry.method or "float",
        "w_bits": w_bits,
        "a_bits": a_bits,
        "accuracy": result.val.accuracy,
        "crest_before": before,
        "crest_after": _median(stats, "crest"),
        "relative_error": 0.0 if entry.method is None else _median(stats, "relative_error"),
    }
    return model, row


def pack_and_prove(entry: Arm, model: nn.Module, data: Dataset, out: Path) -> dict[str, Any]:
    """Write a model's file, read it into a fresh network, and compare the logits of all validation images."""
    if entry.method is None:
        from safetensors.torch import load_model, save_model

        path = out / f"{entry.name}.safetensors"
        with replacing(path) as temporary:
            save_model(model, str(temporary))
        fresh = build_model(MODEL).eval()
        load_model(fresh, path)
    else:
        path = out / f"{entry.name}.wnq.safetensors"
        save(model, path)
        fresh = load(path)
    expected, got = logits(model, data), logits(fresh, data)
    return {
        "name": entry.name,
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "images": len(expected),
        "equal": torch.equal(expected, got),
        "max_difference": (expected - got).abs().max().item(),
    }


@torch.inference_mode()
def logits(model: nn.Module, data: Dataset) -> Tensor:
    """Return the logits of all validation images, on the CPU."""
    batches = batches_of(data.val, 256, mean=data.mean, std=data.std)
    return torch.cat([model(images) for images, _ in batches.epoch(0)])


def check_claims(rows: Sequence[Mapping[str, Any]], proofs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold the rows against what the method promises; a claim that fails is reported like one that holds."""
    by_name = {row["name"]: row for row in rows}
    claims: list[dict[str, Any]] = []

    def claim(text: str, measured: float, bound: float) -> None:
        claims.append({"claim": text, "measured": round(measured, 4), "bound": bound, "holds": measured <= bound})

    for bits, drop in ((3, 0.5), (2, 1.0)):
        attached, detached, minmax = (by_name[f"{label}-w{bits}a{bits}"] for label in ("wnq", "detached", "minmax"))
        claim(
            f"W{bits}A{bits}: wnq loses at most {drop} points of the float accuracy",
            by_name["float"]["accuracy"] - attached["accuracy"],
            drop,
        )
        for other, label in ((detached, "detached"), (minmax, "minmax")):
            claim(
                f"W{bits}A{bits}: the tail goes, wnq's crest factor is at most 0.6 of {label}'s",
                attached["crest_after"] / other["crest_after"],
                0.6,
            )
            claim(
                f"W{bits}A{bits}: so does the error, wnq's relative error is at most half of {label}'s",
                attached["relative_error"] / other["relative_error"],
                0.5,
            )
    claim(
        "files whose network differs from the trained one in any bit of a logit", sum(not p["equal"] for p in proofs), 0
    )
    return claims


def sentences(claims: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the verdict in words."""
    return [
        f"{'Holds' if claim['holds'] else 'Does not hold'}: {claim['claim']}: {claim['measured']:g} (bound {claim['bound']:g})."
        for claim in claims
    ]


def _median(stats: Sequence[LayerStats], column: str) -> float:
    """Return the median over the layers between the first and the last."""
    return statistics.median(getattr(row, column) for row in stats[1:-1])


def _named(on_step: OnStep | None, name: str) -> Callable[[Progress], None] | None:
    return None if on_step is None else lambda progress: on_step(name, progress)


def _write(out: Path, result: DemoResult, evidence: Sequence[ModelEvidence], setting: Mapping[str, Any]) -> None:
    content = {**dataclasses.asdict(result), **setting}
    write_text(out / "results.json", json.dumps(content, indent=2, allow_nan=False) + "\n")
    write_report(
        out / "report.html",
        evidence,
        title="Digits: what the gradient through the maximum does",
        lead=[
            "One float start, one recipe, one budget. “wnq” differentiates through max|w|; “detached” is the same "
            "quantizer without that gradient; “minmax” is plain min-max. Crest factor and error are medians over the "
            "layers between the first and the last.",
            f"{sum(claim['holds'] for claim in result.claims)} of {len(result.claims)} checks hold.",
        ],
        checks=sentences(result.claims),
        table=result.rows,
        provenance={
            "command": f"wnq demo --seed {setting['seed']}{' --fast' if setting['fast'] else ''}",
            "data": "scikit-learn digits, 8x8 pixels, real handwriting",
            **{f"{split} images": count for split, count in setting["config"]["images"].items()},
            **setting["environment"],
        },
    )


_CONTENTS = """\
results.json          every number, the settings, and the proofs
report.html           histograms, tails and errors, layer by layer
float.safetensors     the float network, trained on
*.wnq.safetensors     the quantized networks, packed; wnq inspect FILE shows what is inside
"""
