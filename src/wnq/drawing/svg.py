"""Figures as SVG: inline, with the colours of the page, or by themselves.

Inline, the placeholders of :data:`wnq.drawing.palette.CSS` become CSS variables. Text stays text, set in the page's font; ids are
unique within a page and nothing refers outside it; the same figure gives the same bytes.
"""

import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from wnq.drawing.palette import CSS, Palette

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

WIDTH = 310
"""In SVG units, which are pixels on a phone: 9-unit text is legible there and grows with the chart elsewhere."""


def chart_style(palette: Palette = CSS) -> dict[Any, Any]:
    """Return matplotlib's settings for a chart in these colours; draw and save it within ``matplotlib.rc_context``."""
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,
        "axes.unicode_minus": True,
        "font.size": 9,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "axes.facecolor": "none",
        "axes.edgecolor": palette["line"],
        "axes.labelcolor": palette["muted"],
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "text.color": palette["ink"],
        "xtick.color": palette["line"],
        "ytick.color": palette["line"],
        "xtick.labelcolor": palette["muted"],
        "ytick.labelcolor": palette["muted"],
        "xtick.major.size": 3,
        "ytick.major.size": 3,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "grid.color": palette["line"],
        "grid.linewidth": 0.5,
        "legend.frameon": False,
    }


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in SVG units."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), facecolor="none", layout="constrained")


def few_ticks(axis: "Axis") -> None:
    """Label a linear axis at no more than six round values."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def log_ticks(axis: "Axis", low: float, high: float, sign: str = "") -> None:
    """Label a logarithmic axis at a few round values, however short it is."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

    def label(value: float, _: int | None = None) -> str:
        return sign + _plain(value)

    axis.set_major_locator(FixedLocator(round_values(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(label))
    axis.set_minor_formatter(NullFormatter())


def round_values(low: float, high: float) -> list[float]:
    """Return three to seven round values within a range above 0, as far as there are."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ladders: list[Sequence[float]] = [(1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)]
    found: list[float] = []
    stride = max(1, len(decades) // 6)
    for ladder in ladders:
        chosen = decades[::stride] if len(ladder) == 1 else decades
        found = [v for d in chosen for step in ladder if low <= (v := step * 10.0**d) <= high]
        if len(found) >= 3:
            return found
    for places in range(-decades[-1], 9 - decades[0]):
        for step in (0.5, 0.2, 0.1):
            pitch = step * 10.0**-places
            values = [k * pitch for k in range(math.ceil(low / pitch), math.floor(high / pitch) + 1)]
            if len(values) >= 3:
                return values[:: 1 + len(values) // 8]
    return found


def _plain(value: float) -> str:
    """Label a tick without mathematical markup: 0.01, 2, 10⁻⁵."""
    if value <= 0 or 1e-3 <= value < 1e4:
        return f"{value:.4g}"
    power = math.floor(math.log10(value) + 1e-9)
    times = f"{value / 10.0**power:.3g}"
    return (
        ("" if times == "1" else f"{times}·") + "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )


def to_svg(figure: "Figure", uid: str, title: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element to stand in an HTML page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": uid}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for name, placeholder in CSS.items():
        text = text.replace(placeholder, f"var(--{name})")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{uid}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{uid}-", text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(?<![\w#-])(-?\d+\.\d{2})\d+", r"\1", tag[0]), text)
    view = re.search(r'viewBox="([^"]+)"', text)
    assert view is not None
    head = (
        f'<svg viewBox="{view[1]}" role="img" aria-labelledby="{uid}-title {uid}-desc">'
        f'<title id="{uid}-title">{escape(title)}</title><desc id="{uid}-desc">{escape(description)}</desc>'
    )
    return head + text[text.index(">") + 1 :].strip()
