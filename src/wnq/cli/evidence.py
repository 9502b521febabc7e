"""``wnq stats`` and ``wnq report``."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import Json, command
from wnq.cli.options import InChannels, ModelName, ModelOption, NumClasses
from wnq.cli.screen import Screen
from wnq.cli.targets import Target, open_target

if TYPE_CHECKING:
    from wnq.analysis import LayerStats

SHOWN = (
    "name",
    "shape",
    "method",
    "bits",
    "crest",
    "kurtosis",
    "tail_mass",
    "relative_error",
    "law_error",
)


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(
        app,
        "wnq stats runs/first",
        "wnq stats resnet20.pt --model resnet20 --num-classes 100",
    )(stats)
    command(
        app,
        "wnq report runs/first --out report.html",
        "wnq report runs/float runs/attached runs/detached --out report.html",
    )(report)


def stats(
    screen: Screen,
    target: Annotated[Path, typer.Argument(help="A run's folder, a packed file, or float weights with --model.")],
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Show the tails and quantization errors of the layers.

    crest is max|w| / rms(w) (a Gaussian sample of n weights has about sqrt(2 ln n)), tail_mass the share of weights beyond
    3 rms (Gaussian: 0.0027), relative_error is |w - w_q|^2 / |w|^2 and law_error what its step size predicts.
    """
    from wnq.analysis import stats_rows

    opened = open_target(target, model, num_classes, in_channels, model_option)
    screen.work()
    rows = stats_rows(layer_rows(opened))
    columns = [column for column in SHOWN if any(row[column] is not None for row in rows)]
    screen.table(rows, columns)
    if opened.kind == "packed":
        screen.note("A packed file holds quantized values only: these are their statistics, and their error is 0.")
    return rows


def layer_rows(target: Target) -> "list[LayerStats]":
    """Return the rows of a quantized or a float model."""
    from wnq.analysis import layer_stats, weight_stats

    return layer_stats(target.model) or weight_stats(target.model)


def report(
    screen: Screen,
    targets: Annotated[
        list[Path],
        typer.Argument(help="Run folders, packed files, or float weights with --model; the first is the reference."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Weights before and after quantization",
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Write the evidence, histograms, tails and errors, to one HTML file.

    A single run that has a start of its own is compared with that start; several targets stand side by side.
    """
    from wnq.analysis import collect_evidence
    from wnq.environment import environment
    from wnq.report import write_report

    opened = [open_target(path, model, num_classes, in_channels, model_option) for path in targets]
    if len(opened) == 1:
        opened = [*_start_of(screen, opened[0]), *opened]
    screen.work()
    evidence = [
        collect_evidence(target.model, name, summary=_summary(target))
        for target, name in zip(opened, _names(opened), strict=True)
    ]
    provenance: dict[str, object] = {"targets": ", ".join(str(path) for path in targets), **environment()}
    path = write_report(out, evidence, title=title, provenance=provenance)
    screen.say(f"Report on {', '.join(model.name for model in evidence)} written to {path}.")
    return {"out": path, "models": [model.name for model in evidence], "bytes": path.stat().st_size}


def _start_of(screen: Screen, target: Target) -> list[Target]:
    """Return the float model that a run started from, if it did."""
    import dataclasses

    import torch

    from wnq.recipe import build

    recipe = target.recipe
    if recipe is None or recipe.model.start is None:
        return []
    path = Path(recipe.model.start)
    if not path.exists():
        screen.note(f"{path}, where {target.path} started from, does not exist here: the report shows the run alone.")
        return []
    with torch.random.fork_rng(devices=[]):
        train = dataclasses.replace(recipe.train, distill_weight=0.0)
        model, _ = build(dataclasses.replace(recipe, quantize=None, train=train))
    return [Target(path, "float", model.eval())]


def _names(targets: list[Target]) -> list[str]:
    """Return a name for each target: its own, or its path where two have the same."""
    count = Counter(target.name for target in targets)
    return [target.name if count[target.name] == 1 else str(target.path) for target in targets]


def _summary(target: Target) -> dict[str, Any]:
    return {} if target.accuracy is None else {"accuracy": target.accuracy}
