"""What the user sees: tables on stdout, bars and notes on stderr."""

import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from wnq.train import Progress as TrainProgress

PLAIN_WIDTH = 240
"""Columns of a table that is not shown on a terminal: wide enough not to break any."""


UNBROKEN = 20
"""Cells up to this width are not broken, however narrow the terminal."""


class OnStep(Protocol):
    """What a bar of training is moved by: the progress, and a new name for what is going on."""

    def __call__(self, now: "TrainProgress", what: str = "") -> None:
        """Show the progress."""


QUIET_SECONDS = 10.0
"""Without a terminal, progress is one line in this time at most."""


def is_main_process() -> bool:
    """Return whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class Screen:
    """Output of one command. Under ``--json`` nothing goes to stdout but what the command returns."""

    def __init__(self, *, json_only: bool = False, seed: int | None = None) -> None:
        self.seed = seed
        self.working = False
        """Whether what was typed has been read, and the work begun."""
        self.console = self._console(stderr=False, quiet=json_only or not is_main_process())
        self.notes = self._console(stderr=True, quiet=not is_main_process())

    @staticmethod
    def _console(*, stderr: bool, quiet: bool) -> Console:
        console = Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)
        if not console.is_terminal:
            console.width = PLAIN_WIDTH
        return console

    def work(self) -> None:
        """Mark the end of reading what was typed: errors from here on are failures, not mistakes of usage."""
        self.working = True

    def say(self, text: str) -> None:
        """Print a line of the result."""
        self.console.print(text, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line that is not part of the result."""
        self.notes.print(text, soft_wrap=True)

    def table(
        self, rows: Iterable[Mapping[str, object]], columns: Sequence[str] | None = None, title: str = ""
    ) -> None:
        """Print rows; numbers stand right. None and NaN show as a dash.

        Args:
            rows: with the same keys each.
            columns: keys to show, in order; by default those of the first row.
            title: a line above.
        """
        rows = list(rows)
        if not rows:
            return
        columns = list(rows[0]) if columns is None else columns
        plain = not self.console.is_terminal
        style = None if plain else box.SIMPLE_HEAD
        table = Table(box=style, pad_edge=False, show_edge=False, padding=(0, 2 if plain else 1, 0, 0))
        for column in columns:
            cells = [cell(row[column]) for row in rows]
            heading = column if plain else column.replace("_", " ")  # breaks where a terminal is narrow
            longest = max(map(len, [*heading.split(), *cells]))
            numeric = all(isinstance(row[column], int | float | None) for row in rows)
            justify = "right" if numeric else "left"
            table.add_column(heading, justify=justify, overflow="fold", min_width=min(longest, UNBROKEN))
        for row in rows:
            table.add_row(*(cell(row[column]) for column in columns))
        if title:
            self.say(title)
        self.console.print(table)

    @contextlib.contextmanager
    def bar(self, what: str) -> Generator[Callable[[int, int], None]]:
        """Show a bar while the block runs; call what is yielded with (done, in all)."""
        with self._progress(TextColumn("{task.percentage:>3.0f} %"), TimeRemainingColumn()) as progress:
            task: TaskID | None = None

            def update(done: int, total: int) -> None:
                nonlocal task
                if task is None:
                    task = progress.add_task(what, total=total)
                progress.update(task, completed=done, total=total)

            yield update

    @contextlib.contextmanager
    def training_bar(self, what: str = "") -> Generator["OnStep"]:
        """Show how training goes while the block runs; pass what is yielded as ``on_step``."""
        plain = not self.notes.is_terminal
        last = time.monotonic()
        wide = plain or self.notes.width >= 120
        with self._progress(TextColumn("{task.fields[state]}"), bar=wide) as progress:
            task = progress.add_task(what, total=None, state="")

            def on_step(now: "TrainProgress", what: str = what) -> None:
                nonlocal last
                if not plain:
                    done, total = (now.epoch - 1) * now.steps + now.step, now.epochs * now.steps
                    progress.update(task, description=what, completed=done, total=total, state=describe(now))
                elif (now.epoch == now.epochs and now.val) or time.monotonic() - last > QUIET_SECONDS:
                    last = time.monotonic()
                    self.note(f"{what}  {describe(now)}".strip())

            yield on_step

    def _progress(self, *columns: ProgressColumn, bar: bool = True) -> Progress:
        shown = [TextColumn("{task.description}"), *([BarColumn(bar_width=16)] if bar else []), *columns]
        return Progress(*shown, console=self.notes, disable=not self.notes.is_terminal, transient=True)


def describe(now: "TrainProgress") -> str:
    """Return the state of training in one line."""
    minutes, seconds = divmod(int(now.seconds_left), 60)
    left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    val = "" if now.val is None else f"  val {now.val.accuracy:.2f} %"
    return (
        f"epoch {now.epoch}/{now.epochs}  loss {now.loss:.4f}  acc {now.accuracy:.2f} %  "
        f"{now.images_per_second:,.0f} images/s  {left} left{val}"
    )


def cell(value: object) -> str:
    """Return the text of a table cell."""
    if value is None or value != value:  # NaN differs from itself
        return "–"
    if isinstance(value, float):
        return f"{value:,.2f}" if abs(value) >= 10 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple | list):
        return "x".join(map(str, value))  # pyright: ignore[reportUnknownArgumentType]
    return str(value)


class NotesHandler(logging.Handler):
    """The library's log lines, shown above the bar."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.INFO)
        self.screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        self.screen.note(f"wnq: {record.getMessage()}")


def strict(value: Any) -> Any:
    """Return ``value`` as JSON can say it: NaN and infinity become null, paths text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): strict(entry) for key, entry in value.items()}  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, list | tuple):
        return [strict(entry) for entry in value]  # pyright: ignore[reportUnknownArgumentType]
    if isinstance(value, float):
        return value if value - value == 0 else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
