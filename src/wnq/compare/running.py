"""Running a comparison: every cell that is not finished, here or in workers, and the results after each."""

import contextlib
import dataclasses
import json
import logging
import os
import queue
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch

from wnq.compare.cells import ANCHOR, Cell, CellState, cells_of, job_of, outcome_of, recipe_of
from wnq.compare.definition import Comparison, comparison_from, merged
from wnq.compare.jobs import Images, Job, Outcome, fail, part_of, run_job
from wnq.compare.workers import Worker, progress_from
from wnq.compare.writing import Writer
from wnq.data import Dataset
from wnq.files import write_text
from wnq.models import build_model
from wnq.recipe import data_of, plan_of, resolve
from wnq.train import Interrupted, Progress

logger = logging.getLogger(__name__)

GRACE_SECONDS = 60.0
"""What a worker has to end its step and to write its checkpoint."""

Watch = Callable[[CellState], None]


def compare(
    comparison: Comparison,
    out: str | Path,
    *,
    workers: int = 1,
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
    out = Path(out)
    data = data or data_of(comparison.recipe.data)
    check(comparison, data)
    with _alone(out):
        whole = _remembered(comparison, out)
        schedule = _Schedule(comparison, whole, out, watch or (lambda _: None), data)
        try:
            if workers == 1:
                _run_here(schedule, data, threads)
            else:
                _run_in_workers(schedule, workers, threads)
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


class _Schedule:
    """Which cells are to be run, in what order, and what has become of them."""

    def __init__(self, asked: Comparison, whole: Comparison, out: Path, watch: Watch, data: Dataset) -> None:
        self.whole, self.out, self.watch = whole, out, watch
        self.writer = Writer(out, data)
        self.outcomes: dict[str, Outcome] = {}
        self.waiting: list[Cell] = []
        widths = {(c.label, c.width(width)) for c in asked.contenders for width in asked.widths}
        cells = cells_of(whole)
        self.cells = {cell.name: cell for cell in cells}
        wanted = [c for c in cells if c.kind == "method" and c.seed in asked.seeds and (c.label, c.width) in widths]
        names = {cell.name for cell in wanted}
        for cell in reversed(cells):  # what a cell needs stands before it
            if cell.name in names:
                names.update(cell.needs)
        for cell in cells:
            outcome = outcome_of(cell, out)
            if cell.name not in names:
                continue
            if outcome.final:
                self.outcomes[cell.name] = outcome
                watch(CellState(cell, outcome.state, outcome))
            else:
                self.outcomes[cell.name] = Outcome("not run")
                self.waiting.append(cell)
                watch(CellState(cell, "waiting"))
        self.writer.write(whole)

    def ready(self) -> Iterator[tuple[Cell, Job]]:
        """Yield the cells that can be run now, each once; one that cannot be run at all is done with."""
        for cell in list(self.waiting):
            if any(self.outcomes[need].state == "not run" for need in cell.needs):
                continue
            self.waiting.remove(cell)
            try:
                self._require(cell)
                job = job_of(cell, self.whole, self.out, self.outcomes)
            except ValueError as error:
                fail(self.out / cell.name, "failed", str(error))
                self.end(cell)
                continue
            self.watch(CellState(cell, "running"))
            yield cell, job

    def _require(self, cell: Cell) -> None:
        for need in cell.needs:
            outcome = self.outcomes[need]
            # A value of the sweep that diverges has lost; a start that does leaves nothing to start from.
            if not outcome.final or (self.cells[need].label == ANCHOR and outcome.state != "done"):
                raise ValueError(f"it needs {need}, which {outcome.state}: {outcome.reason}")

    def step(self, cell: Cell, progress: Progress) -> None:
        """Note how the training of a cell goes."""
        self.watch(CellState(cell, "running", progress=progress))

    def end(self, cell: Cell) -> None:
        """Note that a cell is done with, and write the results."""
        outcome = self.outcomes[cell.name] = outcome_of(cell, self.out)
        self.watch(CellState(cell, outcome.state, outcome))
        self.writer.write(self.whole)


def _run_here(schedule: _Schedule, data: Dataset, threads: int) -> None:
    images, before = Images(data), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        while schedule.waiting:
            for cell, job in schedule.ready():
                run_job(job, images, lambda progress, cell=cell: schedule.step(cell, progress))
                schedule.end(cell)
    finally:
        torch.set_num_threads(before)


def _run_in_workers(schedule: _Schedule, count: int, threads: int) -> None:
    events: queue.SimpleQueue[tuple[Worker, dict[str, Any]]] = queue.SimpleQueue()
    idle = list(range(count))
    spare: list[Worker] = []
    busy: dict[Worker, Cell] = {}
    try:
        while schedule.waiting or busy:
            free = len(idle) + len(spare)
            for cell, job in schedule.ready() if free else ():
                worker = spare.pop() if spare else Worker(idle.pop(0), threads, schedule.out, events)
                busy[worker] = cell
                worker.start(job)
                free -= 1
                if not free:
                    break
            if busy:
                worker, event = events.get()
                cell = busy.get(worker)
                if event["event"] == "step" and cell is not None:
                    schedule.step(cell, progress_from(event["progress"]))
                elif event["event"] == "end" and cell is not None:
                    del busy[worker]
                    spare.append(worker)
                    schedule.end(cell)
                elif event["event"] == "broken":
                    raise OSError(event["reason"])
                elif event["event"] == "gone":
                    spare = [other for other in spare if other is not worker]
                    idle.append(worker.number)
                    if cell is not None:
                        del busy[worker]
                        fail(schedule.out / cell.name, "failed", worker.why_gone(event["code"]))
                        schedule.end(cell)
    finally:
        _stop([*busy, *spare])


def _stop(workers: list[Worker]) -> None:
    """Let the workers write their checkpoints; a second Ctrl-C ends them at once."""
    for worker in workers:
        worker.interrupt()
    try:
        for worker in workers:
            worker.end(GRACE_SECONDS)
    except KeyboardInterrupt:
        for worker in workers:
            worker.end(0)


_CONTENTS = """\
results.md, .csv, .json   the table, a row a cell, everything
accuracy.png, .svg        accuracy against bits
compare.json              what is compared; wnq compare continues from it
NAME-wXaY-sSEED           a run each; failure.json says what went wrong in one
sweep-*                   runs in which settings were tried
"""
