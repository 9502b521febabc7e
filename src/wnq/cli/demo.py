"""``wnq demo``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wnq.cli.command import Json, StoppedError, command
from wnq.cli.screen import Screen

if TYPE_CHECKING:
    from wnq.train import Progress


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(app, "wnq demo --out demo", "wnq demo --out demo --seed 1 --json")(demo)


def demo(
    screen: Screen,
    out: Annotated[Path, typer.Option(help="Folder for results.json, report.html and the packed files.")] = Path(
        "demo"
    ),
    fast: Annotated[bool, typer.Option("--fast", help="A few epochs only, to see that all works.")] = False,
    threads: Annotated[
        int, typer.Option(min=1, help="Of the processor; the network is too small to gain from more.")
    ] = 1,
) -> Json:
    """Show it all on real 8x8 digits: train at 3 and 2 bits with and without the method, report, pack, prove.

    Takes one to two minutes on two processor cores.
    """
    import torch

    from wnq.demo import ARMS, run_demo, sentences
    from wnq.train import Interrupted

    screen.work()
    torch.set_num_threads(threads)
    names = ["start", *(arm.name for arm in ARMS)]
    with screen.training_bar() as show:

        def on_step(name: str, now: "Progress") -> None:
            show(now, f"{names.index(name) + 1}/{len(names)} {name}")

        try:
            result = run_demo(out, seed=screen.seed or 0, fast=fast, on_step=on_step)
        except Interrupted:
            raise StoppedError("stopped; the demo keeps no state: start it again.") from None
    screen.table(result.rows)
    screen.say("\nEach file, read into a fresh network, against the trained one, all logits of the validation images:")
    columns = ["name", "file", "images", "equal", "max_difference"]
    screen.table([{**proof, "equal": "bit for bit" if proof["equal"] else "NO"} for proof in result.proofs], columns)
    screen.say("")
    for sentence in sentences(result.claims):
        screen.say(sentence)
    screen.say(f"\n{result.seconds:.0f} s. Evidence: {out / 'report.html'}, numbers: {out / 'results.json'}")
    return {"out": out, "files": sorted(path.name for path in out.iterdir()), **dataclasses.asdict(result)}
