"""A chart by itself: what it is called, what it says to those who do not see it, and how it is drawn in any colours."""

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from wnq.drawing.palette import CSS, LIGHT, MARKERS, SIGNS, Palette
from wnq.drawing.svg import chart_style, to_svg
from wnq.files import replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 200

LETTERS = 11
"""Letters of a title on an inch."""


class Key(NamedTuple):
    """One entry of a legend: told apart by colour and by marker."""

    name: str
    color: str
    """A name of the palette."""
    place: int
    """Among the markers."""

    @property
    def marker(self) -> str:
        """What stands for it in a chart."""
        return MARKERS[self.place % len(MARKERS)]

    @property
    def sign(self) -> str:
        """What stands for it in text."""
        return SIGNS[self.place % len(SIGNS)]


@dataclass(frozen=True)
class Chart:
    """A figure that is drawn when it is needed: for a page, with its colours, or for a file of its own."""

    name: str
    """Prefix of the ids within a page, and name of the files."""
    title: str
    """For those who hear it, and above it in a file of its own."""
    description: str
    """What it shows, in numbers."""
    draw: Callable[[Palette], "Figure"]
    """Draws it in given colours."""
    keys: Sequence[Key] = ()
    """What the page's legend says; a file of its own has it beneath."""

    def svg(self) -> str:
        """Return it as an ``<svg>`` element for an HTML page."""
        import matplotlib as mpl

        with mpl.rc_context(chart_style(CSS)):
            return to_svg(self.draw(CSS), self.name, self.title, self.description)

    def save(self, folder: str | Path) -> list[Path]:
        """Write ``NAME.svg`` and ``NAME.png`` into a folder, each by itself: light colours, title and legend; return the paths.

        Raises:
            OSError: they cannot be written.
        """
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        paths = [Path(folder) / f"{self.name}.{ending}" for ending in ("svg", "png")]
        settings: dict[Any, Any] = {**chart_style(LIGHT), "svg.hashsalt": self.name}
        with mpl.rc_context(settings):
            figure = self.draw(LIGHT)
            self._complete(figure)
            text = io.StringIO()
            said = {"Title": self.title, "Description": self.description}
            FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None, "Creator": None, **said})
            write_text(paths[0], text.getvalue())
            figure.set_dpi(DPI)
            with replacing(paths[1]) as temporary, temporary.open("wb") as file:
                FigureCanvasAgg(figure).print_png(file, metadata={"Software": None, **said})
        return paths

    def _complete(self, figure: "Figure") -> None:
        figure.set_facecolor(LIGHT["card"])
        shown: list[Any] = [draw_key(key, LIGHT) for key in self.keys]
        width, height = figure.get_size_inches()
        title = textwrap.wrap(self.title, max(20, int(LETTERS * width)))
        figure.set_size_inches(width, height + 0.15 + 0.17 * len(title) + 0.2 * -(-len(shown) // 2))
        figure.suptitle("\n".join(title), fontsize=9.5, color=LIGHT["ink"])
        if shown:
            figure.legend(handles=shown, loc="outside lower center", ncols=min(2, len(shown)), fontsize=8)


def draw_key(key: Key, palette: Palette) -> Any:
    """Return the handle of a key for a legend within a figure."""
    from matplotlib.lines import Line2D

    color = palette[key.color]
    return Line2D([], [], color=color, marker=key.marker, markersize=5, linewidth=1.2, label=key.name)
