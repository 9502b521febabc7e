"""``wnq settle``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.board import Board
from wnq.cli.command import FailureError, Json, StoppedError, command, existing
from wnq.cli.compare import float_train_of, widths_of
from wnq.cli.options import parse, set_keys
from wnq.cli.screen import Screen

if TYPE_CHECKING:
    from wnq.compare import Width

UNITS = {"factor": "{:.3g}x", "points": "{:+.2f} points", "share": "{:.1%}"}


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(
        app,
        "wnq settle recipes/digits-settle.toml --float-recipe recipes/digits-float.toml --workers 2",
        "wnq settle recipe.toml --bits 2,3 --controls none --seeds 5 --gains 0.3,0.1",
        "wnq settle recipe.toml --bits 2/32,3/32 --out runs/weights-only",
    )(settle)


def settle(
    screen: Screen,
    recipe: Annotated[Path, typer.Argument(help="TOML file: model, data, training. [model] start may hold {seed}.")],
    bits: Annotated[
        str, typer.Option(metavar="BITS,…", help="Widths the claims are held against: 3, or W/A such as 3/32.")
    ] = "2,3,4",
    controls: Annotated[
        str, typer.Option(metavar="BITS,…", help="Further widths, reported beside and not counted; or none.")
    ] = "1,8",
    seeds: Annotated[int, typer.Option(min=2, help="How many seeds, counted from --seed (default 0) on.")] = 3,
    every: Annotated[int, typer.Option(min=1, help="Steps between two records of the tails.")] = 20,
    gains: Annotated[
        str | None,
        typer.Option(
            metavar="GAIN,…",
            help="Further arms that keep this share of the gradient: dose and response.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the runs and the verdict; the same experiment is continued there. "
            "Default: runs/settle- and the recipe's name.",
            show_default=False,
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe. Can be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, each a process of its own.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor, for each run.")] = 1,
    float_recipe: Annotated[
        Path | None, typer.Option(help="Train the float starts by the [train] of this recipe.", show_default=False)
    ] = None,
) -> Json:
    """Settle whether normalization does what the paper claims, on your model and data.

    Three arms from the same float starts, with the same data order: attached (WNQ), detached (without the gradient through the
    maximum) and none (the start's grid, kept). verdict.json and verdict.html state each claim, the numbers for or against it and
    their intervals; a verdict can come out either way.
    """
    from wnq.compare import check
    from wnq.recipe import data_of, load_recipe, recipe_from
    from wnq.settle import experiment
    from wnq.settle import settle as run
    from wnq.train import Interrupted

    tables = load_recipe(existing(recipe)).to_json()
    set_keys(tables, assign)
    base = recipe_from(tables, where=str(recipe))
    first = screen.seed or 0
    beside = () if controls == "none" else _widths(controls)
    asked = experiment(
        base,
        bits=_widths(bits),
        controls=beside,
        seeds=range(first, first + seeds),
        every=every,
        gains=[_gain(text) for text in gains.split(",")] if gains else (),
        float_train=float_train_of(base, float_recipe, None),
    )
    out = out or Path("runs") / f"settle-{recipe.stem.removesuffix('-settle')}"
    if base.data.folder is not None:
        existing(Path(base.data.folder).expanduser())
    with screen.bar("reading images") as on_image:
        data = data_of(base.data, on_image)
    check(asked, data)
    screen.work()
    try:
        with Board(screen).shown() as watch:
            verdict = run(asked, out, controls=beside, workers=workers, threads=threads, data=data, watch=watch)
    except Interrupted:
        own = {
            "--bits": bits,
            "--controls": controls,
            "--seeds": seeds,
            "--every": every,
            "--gains": gains,
            "--out": out,
            "--float-recipe": float_recipe,
            "--workers": workers,
            "--threads": threads,
            "--seed": screen.seed,
        }
        again = [word for key, value in own.items() if value is not None for word in (key, str(value))]
        again += [word for text in assign or () for word in ("--set", text)]
        raise StoppedError(
            f"stopped; the finished runs and the state of the others are saved in {out}. Continue with: "
            f"{shlex.join(['wnq', 'settle', str(recipe), *again])}"
        ) from None
    _show(screen, verdict, out)
    return {"out": out, **verdict}


def _widths(text: str) -> "tuple[Width, ...]":
    """Return what ``--bits`` means: one number stands for weights and inputs."""
    texts = [entry.strip() for entry in text.split(",")]
    found = widths_of(",".join(f"{entry}/{entry}" if entry.isdecimal() else entry for entry in texts))
    if None in found:
        raise ValueError("natural is no width here: give bits, such as 3 or 3/32.")
    return tuple(width for width in found if width is not None)


def _gain(text: str) -> float:
    value = parse(text.strip())
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"--gains must be numbers separated by commas, got {text!r}.")
    return float(value)


def _show(screen: Screen, verdict: dict[str, Any], out: Path) -> None:
    """Print the verdict.

    Raises:
        FailureError: no run of an arm has finished.
    """
    if not any(width["runs"] for width in verdict["widths"]):
        first = next(iter(verdict["unfinished"]), None)
        reason = "" if first is None else f" {first['name']} {first['state']}: {first['reason']}"
        raise FailureError(f"nothing finished; the runs are in {out}.{reason}")
    for width in verdict["widths"]:
        rows = [
            {
                "claim": f"{claim['letter']}  {claim['text']}" if place == 0 else "",
                "held against": test["name"],
                "found": _number(test["unit"], test["estimate"]),
                "95 % interval": _interval(test),
                "verdict": test["verdict"],
            }
            for claim in width["claims"]
            for place, test in enumerate(claim["tests"])
        ]
        screen.table(rows, title=f"{width['bits']}{' (control, not counted)' if width['control'] else ''}")
        screen.say("")
    for claim in verdict["overall"]:
        widths = ", ".join(f"{bits} {word}" for bits, word in claim["by_width"].items())
        screen.say(f"({claim['letter']}) {claim['claim']}: {claim['verdict']} ({widths})")
    for run in verdict["unfinished"]:
        screen.note(f"{run['name']} {run['state']}: {run['reason']}")
    screen.say(f"\nEverything is in {out}: verdict.html, verdict.md, verdict.json.")


def _number(unit: str, value: float | None) -> str:
    return "–" if value is None else UNITS[unit].format(value)


def _interval(test: dict[str, Any]) -> str:
    if test["low"] is None:
        return "–"
    return f"[{_number(test['unit'], test['low'])}, {_number(test['unit'], test['high'])}]"
