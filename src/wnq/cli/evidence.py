"""``wnq stats`` and ``wnq report``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import Json, command
from wnq.cli.opening import layers_of, left_out, names_of, open_any, start_of
from wnq.cli.options import InChannels, ModelName, ModelOption, NumClasses
from wnq.cli.screen import Screen
from wnq.cli.targets import Target

if TYPE_CHECKING:
    from wnq.analysis import LayerStats, ModelEvidence
    from wnq.checkpoints import Checkpoint

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

TARGETS = "A run's folder, a packed file, or any checkpoint: .safetensors, .pt, .pth, .bin, .ckpt, an index of shards, a folder."


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(
        app,
        "wnq stats runs/first",
        "wnq stats model.safetensors --csv layers.csv",
        "wnq stats resnet20.pt --model resnet20 --num-classes 100",
    )(stats)
    command(
        app,
        "wnq report model.safetensors",
        "wnq report before.pt after.pt --bits 3,4,6 --focus 3 --csv layers.csv",
        "wnq report llm-folder --layers 'model.layers.0.*' --plots plots",
        "wnq report runs/float runs/attached runs/detached --out report.html",
    )(report)


def stats(
    screen: Screen,
    target: Annotated[Path, typer.Argument(help=TARGETS)],
    csv: Annotated[Path | None, typer.Option(help="Write the table to this file as well.")] = None,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Show the tails and quantization errors of the layers.

    crest is max|w| / rms(w) (a Gaussian sample of n weights has about sqrt(2 ln n)), tail_mass the share of weights beyond
    3 rms (Gaussian: 0.0027), relative_error is |w - w_q|^2 / |w|^2 and law_error what its step size predicts. Any checkpoint
    will do, one tensor at a time; with --model, the layers of that network are shown instead of tensors.
    """
    from wnq.analysis import checkpoint_stats, stats_rows
    from wnq.files import write_text
    from wnq.report import csv_text

    opened = open_any(target, model, num_classes, in_channels, model_option)
    if isinstance(opened, Target):
        screen.work()
        rows = stats_rows(layer_rows(opened))
    else:
        layers_of(opened)
        screen.work()
        with screen.bar(f"reading {target}") as step:
            rows = stats_rows(checkpoint_stats(opened, on_step=step))
    columns = [column for column in SHOWN if any(row[column] is not None for row in rows)]
    if any(row["nonfinite"] for row in rows):
        columns.append("nonfinite")
    screen.table(rows, columns)
    if isinstance(opened, Target) and opened.kind == "packed":
        screen.note("A packed file holds quantized values only: these are their statistics, and their error is 0.")
    if csv is not None:
        write_text(csv, csv_text([{**row, "shape": "x".join(map(str, _list(row["shape"])))} for row in rows]))
        screen.say(f"\nTable written to {csv}.")
    return rows


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def layer_rows(target: Target) -> "list[LayerStats]":
    """Return the rows of a quantized or a float model."""
    from wnq.analysis import layer_stats, weight_stats

    return layer_stats(target.model) or weight_stats(target.model)


def report(
    screen: Screen,
    targets: Annotated[
        list[Path],
        typer.Argument(help=f"{TARGETS} Several stand side by side; the first is the reference."),
    ],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.", show_default=False)] = None,
    bits: Annotated[str, typer.Option(help="Widths at which clip rules are compared, 1 to 8.")] = "2,3,4,8",
    focus: Annotated[
        int | None,
        typer.Option(
            help="The width that the answer is given for. Default: that of a trained run, or else 4, or the nearest.",
            show_default=False,
        ),
    ] = None,
    grid: Annotated[
        str, typer.Option(help="Levels of that comparison: full (no zero) or symmetric (with zero).")
    ] = "full",
    layers: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Draw these layers, by shell wildcards, instead of the 24 with the largest error. Can be repeated.",
        ),
    ] = None,
    all_plots: Annotated[bool, typer.Option("--all-plots", help="Draw all layers; the page grows with them.")] = False,
    csv: Annotated[Path | None, typer.Option(help="Write the table of layers to this file.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write each chart as PNG and SVG into this folder.", show_default=False)
    ] = None,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Say why a model loses accuracy at few bits, in which layers, and what would help, on one HTML page.

    The page starts with the answer and shows each layer's tail, its error by width and clip rule, what the law predicts, channels
    that stand out and the entropy of the codes. A checkpoint needs no network and is read one tensor at a time. A single run that
    has a start of its own is compared with that start; layers are matched by name.
    """
    from wnq.drawing import require_page
    from wnq.environment import environment
    from wnq.report import as_json, save_plots, subject_of, write_csv, write_report

    compared = widths_of(bits, grid)
    if focus is not None and focus not in compared:
        raise ValueError(f"--focus must be one of --bits {bits}, got {focus}.")
    if layers and all_plots:
        raise ValueError("--layers and --all-plots exclude each other: give one of them.")
    require_page()
    opened = [open_any(path, model, num_classes, in_channels, model_option) for path in targets]
    if len(opened) == 1 and isinstance(opened[0], Target):
        opened = [*start_of(screen, opened[0]), *opened]
    drawn = _drawn(opened, layers, all_plots)
    names = names_of(opened)
    screen.work()
    evidence = [_evidence(screen, one, name, compared, grid) for one, name in zip(opened, names, strict=True)]
    subject = subject_of(evidence, focus=focus, drawn=drawn)
    provenance: dict[str, object] = {
        "targets": ", ".join(str(path) for path in targets),
        **{name: said for one, name in zip(opened, names, strict=True) if (said := left_out(one))},
        "compared": f"{bits} bits on the {grid} grid",
        **environment(),
    }
    trained = any(one.levels for one in evidence)
    heading = title or ("Weights before and after quantization" if trained else f"{', '.join(names)} at few bits")
    asked: dict[str, Any] = {"focus": focus, "drawn": drawn}
    with screen.bar("drawing the page") as step:
        path = write_report(out, evidence, title=heading, provenance=provenance, on_chart=step, **asked)
    drawings: list[Path] = []
    if plots is not None:
        with screen.bar("writing the plots") as step:
            drawings = save_plots(plots, evidence, on_chart=step, **asked)
    table = None if csv is None else write_csv(csv, subject)
    result = as_json(subject)
    for paragraph in result["answer"]:
        screen.say(f"{paragraph['topic']}: {paragraph['text']}\n")
    screen.say(f"Report on {', '.join(names)} written to {path}.")
    if table is not None:
        screen.say(f"Table of layers written to {table}.")
    if plots is not None:
        screen.say(f"{len(drawings)} plots written to {plots}.")
    return {
        "out": path,
        "models": names,
        "bytes": path.stat().st_size,
        "csv": table,
        "plots": [str(drawing) for drawing in drawings],
        **result,
    }


def widths_of(text: str, grid: str) -> tuple[int, ...]:
    """Return what ``--bits`` means, ascending.

    Raises:
        ValueError: it is not widths separated by commas that the grid has, or the grid is unknown.
    """
    from wnq.names import check_choice
    from wnq.quantizer import GRIDS

    check_choice(grid, GRIDS, where="--grid")
    low = 2 if grid == "symmetric" else 1
    entries = [entry.strip() for entry in text.split(",")]
    if not all(entry.isdecimal() and low <= int(entry) <= 8 for entry in entries):
        raise ValueError(f"--bits must be widths from {low} to 8, separated by commas, such as 2,3,4,8, got {text!r}.")
    return tuple(sorted({int(entry) for entry in entries}))


def _drawn(opened: "Sequence[Target | Checkpoint]", patterns: Sequence[str] | None, every: bool) -> list[str] | None:
    from wnq.report import matching

    names = list(dict.fromkeys(name for one in opened for name in layers_of(one)))
    return names if every else matching(names, patterns) if patterns else None


def _evidence(
    screen: Screen, opened: "Target | Checkpoint", name: str, bits: Sequence[int], grid: str
) -> "ModelEvidence":
    from wnq.analysis import checkpoint_evidence, collect_evidence

    with screen.bar(f"reading {name}") as step:
        if isinstance(opened, Target):
            summary: dict[str, Any] = {} if opened.accuracy is None else {"accuracy": opened.accuracy}
            return collect_evidence(opened.model, name, summary=summary, bits=bits, grid=grid, on_step=step)
        return checkpoint_evidence(opened, name, bits=bits, grid=grid, on_step=step)
