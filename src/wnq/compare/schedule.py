"""Which cells of a comparison are to be run, in what order, and what has become of them."""

from collections.abc import Callable, Iterator
from pathlib import Path

from wnq.compare.cells import ANCHOR, Cell, CellState, cells_of, job_of, outcome_of
from wnq.compare.definition import Comparison
from wnq.compare.jobs import Job, Outcome, fail
from wnq.compare.writing import Writer
from wnq.data import Dataset
from wnq.train import Progress

Watch = Callable[[CellState], None]


class Schedule:
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
