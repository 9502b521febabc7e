"""The report's charts: evidence in, inline SVG out, the same bytes every time.

Colours are written as placeholders and become CSS variables (``--ink``, ``--arm0``, …): one SVG serves light and dark.
Text stays text, set in the page's font. Ids are unique within a page and nothing refers outside it.
"""

import io
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import escape

from wnq.analysis import LayerStats, ModelEvidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

ARMS = 6
"""Number of arm colours in the page's style sheet; further arms start over with other dashes."""

MARKERS = "osD^vP"
SIGNS = "●■◆▲▼✚"
"""What a legend in text shows for each marker."""

INK, MUTED, LINE, PAPER, START = "#010101", "#010102", "#010103", "#010104", "#010105"
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    LINE: "--line",
    PAPER: "--card",
    START: "--start",
    **{f"#0102{index:02x}": f"--arm{index}" for index in range(ARMS)},
}

WIDE, NARROW = 310, 290
"""Widths in SVG units, which are pixels on a phone: 9-unit text is legible there and grows with the chart elsewhere."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 9,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "axes.facecolor": "none",
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 3,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
}


def arm_color(index: int) -> str:
    """Return the placeholder of model ``index``: 0 is the start that the others are compared with."""
    return START if index == 0 else f"#0102{(index - 1) % ARMS:02x}"


def _plain(value: float, _: int | None = None) -> str:
    """Label a tick without mathematical markup: 0.01, 2, 10⁻⁵."""
    if value <= 0 or 1e-3 <= value < 1e4:
        return f"{value:g}"
    power = str(round(math.log10(value)))
    return "10" + power.translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _log_ticks(axis: "Axis", subs: Sequence[float] = (1.0,)) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_formatter(NullFormatter())


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width / 72, height / 72), facecolor="none", layout="constrained")


def _render(figure: "Figure", uid: str, title: str, description: str) -> str:
    """Return a figure as an ``<svg>`` element to stand in an HTML page."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": uid}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
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


def short_name(name: str, length: int = 22) -> str:
    """Return the end of a long layer name, where the difference lies, from a dot on if possible."""
    if len(name) <= length:
        return name
    end = name[-length + 1 :]
    return "…" + (end[end.index(".") + 1 :] if "." in end[:-1] else end)


def number(value: float | None) -> str:
    """Return three significant digits, without exponent where that reads well; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if isinstance(value, int) or not value or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def median(values: Iterable[float | None]) -> float | None:
    """Return the median of the finite values, None if there is none."""
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return statistics.median(finite) if finite else None


def histogram_chart(uid: str, layer: str, models: Sequence[ModelEvidence]) -> str:
    """Draw one layer's density of w / rms on a logarithmic scale, the first model filled, levels as ticks beneath."""
    import matplotlib as mpl

    drawn = [(i, m) for i, m in enumerate(models) if layer in m.histograms]
    ruled = [(i, m) for i, m in drawn if 0 < len(m.levels.get(layer, ())) <= 33]
    with mpl.rc_context(_STYLE):
        strip = 9 * max(1, len(ruled))
        figure = _figure(NARROW, 165 + strip)
        axes, rug = figure.subplots(2, 1, sharex=True, height_ratios=[165, strip])
        found = [d for _, model in drawn for d in model.histograms[layer].density() if d > 0] or [0.5]
        base = min(found) / 2
        for index, model in drawn:
            edges, density = model.histograms[layer].edges, model.histograms[layer].density()
            if index == 0:
                filled = [max(d, base) for d in density]
                axes.stairs(filled, edges, baseline=base, fill=True, color=START, alpha=0.28, linewidth=0)
            heights = [d or math.nan for d in density]
            style = "-" if index <= ARMS else "--"
            axes.stairs(heights, edges, color=arm_color(index), linewidth=1.3 if index else 0.9, linestyle=style)
        axes.set_yscale("log")
        _log_ticks(axes.yaxis)
        axes.set_ylim(base, max(found) * 2)
        for row, (index, model) in enumerate(ruled):
            rug.vlines(model.levels[layer], -row - 0.36, -row + 0.36, color=arm_color(index), linewidth=1.2)
        axes.set_ylabel("density")
        axes.tick_params(labelbottom=False, bottom=False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="y", alpha=0.6)
        rug.set_ylim(-max(1, len(ruled)) + 0.4, 0.6)
        rug.set_yticks([])
        rug.spines["left"].set_visible(False)
        rug.set_xlabel("weight / rms")
        reach = max([abs(m.histograms[layer].edges[-1]) for _, m in drawn], default=1.0)
        rug.set_xlim(-reach * 1.03, reach * 1.03)
        rows = [(model.name, row) for _, model in drawn for row in model.stats if row.name == layer]
        spoken = "; ".join(f"{name}: crest factor {number(row.crest)}" for name, row in rows)
        return _render(figure, uid, f"Weight histogram of {layer}", f"Density of weight / rms, log scale. {spoken}.")


def crest_chart(uid: str, layers: Sequence[str], models: Sequence[ModelEvidence]) -> str:
    """Draw the crest factor of every layer in every model, one line a layer, with what a Gaussian sample would have."""
    import matplotlib as mpl

    table: list[Mapping[str, LayerStats]] = [{row.name: row for row in model.stats} for model in models]
    with mpl.rc_context(_STYLE):
        pitch, size = (15, 9) if len(layers) <= 40 else (9, 7)
        figure = _figure(WIDE, 60 + pitch * len(layers))
        axes = figure.add_subplot()
        seen: list[float] = [1.7]
        for place, layer in enumerate(layers):
            rows = [rows[layer] for rows in table if layer in rows]
            crests = [row.crest for row in rows if math.isfinite(row.crest)]
            if not crests:
                continue
            gaussian = math.sqrt(2 * math.log(max(2, rows[0].parameters)))
            axes.plot([min(crests), max(crests)], [place, place], color=LINE, linewidth=1.5, zorder=1)
            axes.plot([gaussian], [place], "|", color=MUTED, markersize=9, markeredgewidth=0.9, zorder=2)
            seen += [*crests, gaussian]
        for index, rows in enumerate(table):
            points = [(rows[layer].crest, place) for place, layer in enumerate(layers) if layer in rows]
            _dots(axes, index, points)
        axes.set_xscale("log")
        axes.set_xlim(min(seen) / 1.12, max(seen) * 1.12)
        _log_ticks(axes.xaxis, (1, 2, 3, 5, 7) if max(seen) < 30 else (1, 2, 5))
        axes.set_yticks(range(len(layers)), [short_name(layer) for layer in layers], fontsize=size)
        axes.set_ylim(len(layers) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", alpha=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("crest factor max|w| / rms")
        medians = "; ".join(f"{m.name} {number(median(row.crest for row in m.stats))}" for m in models)
        return _render(figure, uid, "Crest factor per layer", f"One line a layer. Medians: {medians}.")


def law_chart(uid: str, models: Sequence[ModelEvidence]) -> str:
    """Draw measured against predicted relative error, both after the least-squares rescale, one point a layer."""
    import matplotlib as mpl

    with mpl.rc_context(_STYLE):
        figure = _figure(WIDE, 290)
        axes = figure.add_subplot()
        everything: list[float] = []
        for index, model in enumerate(models):
            points = law_points(model)
            everything += [value for point in points for value in point]
            _dots(axes, index, points)
        low, high = (min(everything) / 1.6, max(everything) * 1.6) if everything else (0.01, 1.0)
        axes.plot([low, high], [low, high], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        _log_ticks(axes.xaxis)
        _log_ticks(axes.yaxis)
        axes.grid(alpha=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel("error predicted from step and rms")
        axes.set_ylabel("error measured")
        count = len(everything) // 2
        return _render(figure, uid, "Measured against predicted error", f"{count} layers; the dashed line is equality.")


def law_points(model: ModelEvidence) -> list[tuple[float, float]]:
    """Return (predicted, measured) relative error of the layers that have both, above zero."""
    points: list[tuple[float, float]] = []
    for row in model.stats:
        if row.law_error is not None and row.rescale is not None and row.rescaled_error is not None:
            point = (row.law_error * row.rescale**2, row.rescaled_error)
            if all(math.isfinite(value) and value > 0 for value in point):
                points.append(point)
    return points


def _dots(axes: "Axes", index: int, points: Sequence[tuple[float, float]]) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(
            x,
            y,
            MARKERS[index % len(MARKERS)],
            color=arm_color(index),
            # The start is larger, to show around an arm that left it where it was.
            markersize=5.5 if index else 8.5,
            markeredgecolor=PAPER,
            markeredgewidth=0.7,
            zorder=3 + index,
        )
