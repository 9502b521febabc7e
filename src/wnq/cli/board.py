"""How the cells of a comparison stand, while it runs."""

import contextlib
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table

from wnq.cli.screen import QUIET_SECONDS, Screen, describe

if TYPE_CHECKING:
    from wnq.compare import CellState

SIGNS = {"waiting": "·", "running": "▸", "done": "✓", "diverged": "✗", "failed": "✗", "not defined": "–"}


class Board:
    """How all cells stand: a live table on a terminal, lines elsewhere.

    Args:
        screen: whose notes it is shown among.
    """

    def __init__(self, screen: Screen) -> None:
        self.screen = screen
        self.states: dict[str, CellState] = {}
        self.told: dict[str, float] = {}

    @contextlib.contextmanager
    def shown(self) -> "Generator[Any]":
        """Show it while the block runs; pass what is yielded as ``watch``."""
        if not self.screen.notes.is_terminal:
            yield self._tell
            return
        with Live(console=self.screen.notes, get_renderable=self.table, refresh_per_second=4, transient=True):
            yield self._keep

    def _keep(self, state: "CellState") -> None:
        self.states[state.cell.name] = state

    def _tell(self, state: "CellState") -> None:
        """Say what changes, and how training goes, but not too often."""
        name, now = state.cell.name, time.monotonic()
        if state.progress is not None and now - self.told.get(name, now) < QUIET_SECONDS:
            return
        self.told[name] = now
        if state.state != "waiting":
            self.screen.note(f"{name}  {state_text(state)}")

    def table(self) -> Table:
        """Return the table, no longer than the terminal: what runs comes first where not all has room."""
        states = list(self.states.values())
        room = max(3, self.screen.notes.height - 3)
        if len(states) > room:
            order = ["running", "failed", "diverged", "waiting", "not defined", "done"]
            states.sort(key=lambda state: order.index(state.state))
        done = sum(state.state not in ("waiting", "running") for state in states)
        shown, rest = states[:room], states[room:]
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True, overflow="ellipsis")
        for state in shown:
            table.add_row(f"{SIGNS[state.state]} {state.cell.name}", state_text(state))
        table.add_row("", f"{done} of {len(states)} runs" + (f", {len(rest)} not shown" if rest else ""))
        return table


def state_text(state: "CellState") -> str:
    """Return a cell's state in one line."""
    if state.progress is not None:
        return describe(state.progress)
    if state.outcome is None:
        return state.state
    if state.outcome.accuracy is not None:
        return f"done  {state.outcome.accuracy:.2f} %"
    return f"{state.state}: {state.outcome.reason}"
