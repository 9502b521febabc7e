"""Running a comparison: every cell that is not finished, here or in workers, and the results after each."""

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch

from wnq.compare.cells import cells_of, recipe_of
from wnq.compare.definition import Comparison, comparison_from, merged
from wnq.compare.jobs import Images, part_of, run_job
from wnq.compare.schedule import Schedule, Watch
from wnq.compare.side_by_side import run_side_by_side
from wnq.compare.workers import StreamWorker, Worker
from wnq.data import Dataset
from wnq.files import write_text
from wnq.models import build_model
from wnq.recipe import data_of, plan_of, resolve
from wnq.train import Interrupted

logger = logging.getLogger(__name__)


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    workers: int = 1,
    streams: int = 1,
    threads: int = 1,
    data: Dataset | None = None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    """Run what is not finished of a comparison in its folder, and return its results.

    Every cell is an ordinary run in a folder of its own, so the comparison can be stopped at any moment and started again: it
    then goes on where it was. After every cell the folder has valid results of what is finished: ``results.json``,
    ``results.csv``, ``results.md``, ``accuracy.png`` and ``accuracy.svg``.

    Args:
        comparison: what is compared. In a folder that holds a comparison already, methods, widths and seeds may be new; the
            cells of the older ones stay in the results.
        out: the folder, made if missing.
        workers: processes that run cells side by side; 1 runs them in this process, one after the other.
        streams: threads of this process that run cells side by side, each on a CUDA stream of its own: with ``cuda_graph`` in the
            recipe, small networks fill a GPU. Methods that draw random numbers while they train share one generator then.
        threads: of the processor for each of them.
        data: the images, if they are loaded already.
        watch: called with every cell's state at the beginning and whenever it changes, in this thread.

    Returns:
        What ``results.json`` holds.

    Raises:
        ValueError: something in the comparison does not fit, or the folder holds another one.
        Interrupted: Ctrl-C; the state is saved.
        OSError: the folder cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a comparison starts its own processes: run it without a launcher, with workers.")
    if workers > 1 and streams > 1:
        raise ValueError(
            f"{workers} workers and {streams} streams: cells run side by side in processes or on streams, not both."
        )
    out = Path(out)
    data = data or data_of(comparison.recipe.data)
    check(comparison, data)
    with _alone(out):
        whole = _remembered(comparison, out)
        schedule = Schedule(comparison, whole, out, watch or (lambda _: None), data)
        try:
            if workers > 1:
                run_side_by_side(schedule, workers, lambda number, events: Worker(number, threads, out, events))
            elif streams > 1:
                images = Images(data)
                run_side_by_side(schedule, streams, lambda number, events: StreamWorker(number, images, events))
            else:
                _run_here(schedule, data, threads)
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            results = schedule.writer.write(whole, plots=True)
    return results


def check(comparison: Comparison, data: Dataset) -> None:
    """Find what is wrong with a comparison before anything is written.

    Raises:
        ValueError: a method's options fit at no width, or the recipe does not fit the model or the data.
        FileNotFoundError: a start that the recipe names is not there.
    """
    cells = [cell for cell in cells_of(comparison) if cell.kind == "method"]
    for contender in comparison.contenders:
        own = [cell for cell in cells if cell.label == contender.label]
        mistake = all(cell.undefined for cell in own) and contender.undefined(contender.width(None))
        if mistake and not contender.takes_no_normalizer:
            raise ValueError(f"{contender.label}: {mistake}")
    if all(cell.undefined for cell in cells):
        reasons = {f"{cell.label}: {cell.undefined}": None for cell in cells}
        raise ValueError(f"no method is defined at any of the widths. {' '.join(reasons)}")
    if (given := comparison.recipe.model.start) is not None:
        for path in {given.replace("{seed}", str(seed)): None for seed in comparison.seeds}:
            if not Path(path).exists():
                raise FileNotFoundError(f"the start {path} does not exist.")
    if comparison.sweep:
        part_of(data, comparison.held_out)
    if ":" in comparison.recipe.model.name:
        return  # may be large, or on a hub: let the runs build it
    first = dataclasses.replace(comparison, sweep={})
    recipe = resolve(comparison.recipe, data)
    with torch.random.fork_rng(devices=[]):
        model = build_model(recipe.model.name, **recipe.model.options)
    wrong: list[ValueError] = []
    defined = [cell for cell in cells if not cell.undefined and cell.seed == comparison.seeds[0]]
    for cell in defined:
        section = recipe_of(cell, first, Path(), {}).quantize
        assert section is not None
        try:
            plan_of(section, model)
        except ValueError as error:
            wrong.append(error)
    if wrong and len(wrong) == len(defined):
        raise wrong[0]


def _remembered(comparison: Comparison, out: Path) -> Comparison:
    """Return the comparison together with what the folder holds already, and let the folder remember both."""
    path = out / "compare.json"
    whole = comparison
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if (out / "recipe.json").exists():
            raise ValueError(f"{out} holds a run already. Choose another output folder.") from None
    else:
        try:
            whole = merged(comparison_from(json.loads(text)), comparison)
        except ValueError as error:
            raise ValueError(f"cannot continue {path}: {error}") from None
    write_text(path, json.dumps(whole.to_json(), indent=2) + "\n")
    return whole


@contextlib.contextmanager
def _alone(out: Path) -> Generator[None]:
    """Keep a second comparison out of the folder while the block runs; a killed process keeps nobody out."""
    write_text(out / "README.txt", _CONTENTS)  # an unwritable folder is found before the training
    with (out / "lock").open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"another process runs a comparison in {out}. Wait for it, or use another folder."
            ) from None
        except (OSError, ImportError):
            logger.info("%s cannot be locked; see that no second comparison runs there", out)
        for leftover in out.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        yield


def _run_here(schedule: Schedule, data: Dataset, threads: int) -> None:
    images, before = Images(data), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while schedule.waiting:
            for cell, job in schedule.ready():
                run_job(job, images, lambda progress, cell=cell: schedule.step(cell, progress))
                schedule.end(cell)
    finally:
        torch.set_num_threads(before)


_CONTENTS = """\
results.md, .csv, .json   the table, a row a cell, everything
accuracy.png, .svg        accuracy against bits
compare.json              what is compared; wnq compare continues from it
NAME-wXaY-sSEED           a run each; failure.json says what went wrong in one
sweep-*                   runs in which settings were tried
"""
