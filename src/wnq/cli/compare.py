"""``wnq compare``."""

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.board import Board
from wnq.cli.command import FailureError, Json, StoppedError, command, existing
from wnq.cli.options import pairs, parse, set_keys
from wnq.cli.screen import Screen

if TYPE_CHECKING:
    from wnq.compare import Comparison, Contender, Width
    from wnq.recipe import Recipe
    from wnq.train import TrainConfig


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(
        app,
        "wnq compare recipe.toml --methods wnq,dorefa,lsq --bits 2/2,3/3,2/32 --seeds 3 --out runs/compare",
        "wnq compare recipe.toml --methods wnq,detached=wnq:max_gain=0 --bits 2/2 --sweep train.lr=0.02,0.05",
        "wnq compare recipe.toml --methods lsq,dorefa --bits natural --normalize max_abs --workers 4",
    )(compare)


def compare(
    screen: Screen,
    recipe: Annotated[Path, typer.Argument(help="TOML file, as for wnq train. [model] start may hold {seed}.")],
    methods: Annotated[
        str,
        typer.Option(
            metavar="[LABEL=]NAME[:KEY=VALUE…],…", help="What is compared, separated by commas; see wnq methods."
        ),
    ],
    bits: Annotated[
        str,
        typer.Option(
            metavar="W/A,…", help="Bits of weights and inputs (32: float); natural: each method at its defaults."
        ),
    ],
    seeds: Annotated[
        int, typer.Option(min=1, help="How many seeds, counted from --seed (default 0) on: 3 means 0, 1 and 2.")
    ] = 3,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of all runs and results; one that holds the same comparison is continued. "
            "Default: runs/compare- and the recipe's name.",
            show_default=False,
        ),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe. Can be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Runs side by side, each a process of its own.")] = 1,
    streams: Annotated[
        int, typer.Option(min=1, help="Runs side by side on one GPU, each a CUDA stream of this process.")
    ] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of the processor, for each run.")] = 1,
    normalize: Annotated[
        str | None,
        typer.Option(metavar="NAME[:GAIN]", help="Put this normalizer in front of every method.", show_default=False),
    ] = None,
    no_recommended: Annotated[
        bool, typer.Option("--no-recommended", help="Do not apply the methods' recommended training settings.")
    ] = False,
    sweep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="train.KEY=V1,V2,…",
            help="Try these for every method at every width, on the first seed and held-out training images. Several: a grid.",
        ),
    ] = None,
    held_out: Annotated[float, typer.Option(help="Share of the training images that the sweep is judged by.")] = 0.1,
    float_recipe: Annotated[
        Path | None, typer.Option(help="Train the float starts by the [train] of this recipe.", show_default=False)
    ] = None,
    epochs_float: Annotated[
        int | None, typer.Option(min=1, help="Train the float starts this many epochs.", show_default=False)
    ] = None,
) -> Json:
    """Compare methods: the same float starts, recipe and seeds for all, a ranked table with intervals, a picture.

    Every run has a folder of its own in --out. The same command continues a stopped comparison; more methods, widths or seeds
    add to it. A run that diverges is a result like any other: it is shown, and only if nothing finishes is it an error.
    """
    from wnq.compare import Comparison, check
    from wnq.compare import compare as run
    from wnq.recipe import data_of, load_recipe, recipe_from
    from wnq.train import Interrupted

    tables = load_recipe(existing(recipe)).to_json()
    set_keys(tables, assign)
    base = recipe_from(tables, where=str(recipe))
    asked = Comparison(
        recipe=base,
        contenders=contenders_of(methods, normalize),
        widths=widths_of(bits),
        seeds=tuple(range(screen.seed or 0, (screen.seed or 0) + seeds)),
        float_train=float_train_of(base, float_recipe, epochs_float),
        recommended=not no_recommended,
        sweep=sweep_of(sweep),
        held_out=held_out,
    )
    out = out or Path("runs") / f"compare-{recipe.stem}"
    if base.data.folder is not None:
        existing(Path(base.data.folder).expanduser())
    with screen.bar("reading images") as on_image:
        data = data_of(base.data, on_image)
    check(asked, data)
    screen.work()
    try:
        with Board(screen).shown() as watch:
            results = run(asked, out, workers=workers, streams=streams, threads=threads, data=data, watch=watch)
    except Interrupted:
        own = {
            "--methods": methods,
            "--bits": bits,
            "--seeds": seeds,
            "--out": out,
            "--normalize": normalize,
            "--held-out": None if held_out == 0.1 else held_out,
            "--float-recipe": float_recipe,
            "--epochs-float": epochs_float,
            "--workers": None if workers == 1 else workers,
            "--streams": None if streams == 1 else streams,
            "--threads": None if threads == 1 else threads,
            "--seed": screen.seed,
        }
        again = [word for key, value in own.items() if value is not None for word in (key, str(value))]
        again += [word for text in assign or () for word in ("--set", text)]
        again += [word for text in sweep or () for word in ("--sweep", text)]
        again += ["--no-recommended"] if no_recommended else []
        raise StoppedError(
            f"stopped; the finished runs and the state of the others are saved in {out}. Continue with: "
            f"{shlex.join(['wnq', 'compare', str(recipe), *again])}"
        ) from None
    _show(screen, results, asked, out)
    return {"out": out, **results}


def contenders_of(text: str, normalize: str | None = None) -> "tuple[Contender, ...]":
    """Return what ``--methods`` means: ``[label=]name[:key=value…]``, separated by commas.

    A normalizer for all goes into the options of those that name none, and into their labels.

    Raises:
        ValueError: it has another form, or an unknown method, option or normalizer.
    """
    from wnq.compare import Contender
    from wnq.normalizers import named_normalizer

    common: dict[str, Any] = {}
    if normalize is not None:
        name, colon, gain = normalize.partition(":")
        named_normalizer(name)
        common = {"normalize": name, **({"normalize_gain": parse(gain)} if colon else {})}
        if colon and not isinstance(common["normalize_gain"], int | float):
            raise ValueError(f"--normalize must be NAME or NAME:GAIN, such as max_abs:0.5, got {normalize!r}.")
    found: list[Contender] = []
    for entry in text.split(","):
        head, *texts = entry.strip().split(":")
        label, equals, method = head.partition("=")
        if not head or (equals and not (label and method)):
            raise ValueError(
                f"--methods must be [LABEL=]NAME[:KEY=VALUE…] separated by commas, got {entry!r} in {text!r}."
            )
        options = pairs(texts, f"--methods {head}:")
        if not equals:
            label, method = entry.strip(), head
        if common and "normalize" not in options:
            label, options = f"{label}+{normalize}", {**options, **common}
        found.append(Contender(label, method, options))
    return tuple(found)


def widths_of(text: str) -> "tuple[Width | None, ...]":
    """Return what ``--bits`` means; None for ``natural``.

    Raises:
        ValueError: it is not ``W/A``, separated by commas.
    """
    found: list[Width | None] = []
    for entry in (part.strip() for part in text.split(",")):
        w_bits, _, a_bits = entry.partition("/")
        if entry != "natural" and not (w_bits.isdecimal() and a_bits.isdecimal()):
            raise ValueError(f"--bits must be W/A such as 2/2 or 2/32, or natural, separated by commas; got {entry!r}.")
        found.append(None if entry == "natural" else (int(w_bits), int(a_bits)))
    return tuple(found)


def sweep_of(texts: Sequence[str] | None) -> dict[str, tuple[Any, ...]]:
    """Return what ``--sweep`` means.

    Raises:
        ValueError: it is not ``train.KEY=VALUE,VALUE``.
    """
    found: dict[str, tuple[Any, ...]] = {}
    for text in texts or ():
        key, _, values = text.partition("=")
        section, dot, name = key.strip().partition(".")
        if section != "train" or not dot or not all(values.split(",")):
            raise ValueError(f"--sweep must be train.KEY=VALUE,VALUE,… such as train.lr=0.02,0.05; got {text!r}.")
        if name in found:
            raise ValueError(f"--sweep train.{name} is given twice.")
        found[name] = tuple(parse(value.strip()) for value in values.split(","))
    return found


def float_train_of(base: "Recipe", path: Path | None, epochs: int | None) -> "TrainConfig | None":
    """Return how the float starts are trained, or None for the recipe's own way."""
    from wnq.recipe import load_recipe

    train = base.train
    if path is not None:
        other = load_recipe(existing(path))
        for what, here, there in (
            ("[model] name", base.model.name, other.model.name),
            ("[model] options", base.model.options, other.model.options),
            ("[data]", dataclasses.replace(base.data, folder=None), dataclasses.replace(other.data, folder=None)),
        ):
            if here != there:
                raise ValueError(f"{path}: {what} must be that of the compared recipe, {here}, got {there}.")
        train = other.train
    if epochs is not None:
        train = dataclasses.replace(train, epochs=epochs)
    return None if path is None and epochs is None else train


def _show(screen: Screen, results: dict[str, Any], asked: "Comparison", out: Path) -> None:
    """Print the tables and their footer.

    Raises:
        FailureError: none of what was asked for has finished.
    """
    from wnq.compare.writing import shown_row

    labels = [contender.label for contender in asked.contenders]
    if not any(row["done"] for row in results["table"] if row["label"] in labels):
        failed = [cell for cell in results["cells"] if cell["state"] in ("diverged", "failed")]
        others = f" ({len(failed) - 1} more did not finish.)" if failed[1:] else ""
        reason = f" {failed[0]['name']} {failed[0]['state']}: {failed[0]['reason']}{others}" if failed else ""
        raise FailureError(f"nothing finished; the runs are in {out}.{reason}")
    for bits in dict.fromkeys(row["bits"] for row in results["table"]):
        screen.table([shown_row(row) for row in results["table"] if row["bits"] == bits], title=f"{bits}")
        screen.say("")
    anchor = results["float"]
    spread = "" if anchor["std"] is None else f" ± {anchor['std']:.2f}"
    screen.say(f"Float: {anchor['mean']:.2f}{spread} %, of {results['images']['evaluation']:,} evaluation images.")
    for note in results["notes"]:
        screen.say(f"- {note}")
    screen.say(f"\nEverything is in {out}: results.md, results.csv, results.json, accuracy.png, accuracy.svg.")
