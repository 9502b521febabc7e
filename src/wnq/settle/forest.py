"""The chart of a claim: the interval of every test behind it, on a common axis, against chance."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wnq.drawing import CSS, WIDTH, chart_style, few_ticks, log_ticks, new_figure, to_svg
from wnq.settle.claims import CONTRADICTED, SUPPORTED, UNDECIDED
from wnq.settle.wording import SIGNS, Json, amount, finding, wanted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLORS = {SUPPORTED: CSS["good"], CONTRADICTED: CSS["bad"], UNDECIDED: CSS["open"]}
_LEAST = {"factor": math.log(1.05), "points": 0.5, "share": 0.1}
"""Least width of an axis, so that noise does not fill it."""


def forest_chart(uid: str, title: str, rows: Sequence[tuple[str, Json]]) -> str:
    """Draw the interval of every test of a claim, one panel a kind of number, the claimed side of chance shaded.

    Args:
        uid: prefix of the ids in the SVG.
        title: of the chart, for those who hear it.
        rows: name of the width and test.
    """
    import matplotlib as mpl

    panels: dict[tuple[Any, ...], dict[str, list[tuple[str, Json]]]] = {}
    for width, test in rows:
        panel = panels.setdefault((test["unit"], test["chance"], test["expected"]), {})
        panel.setdefault(test["name"], []).append((width, test))
    heights = [
        34 + sum(13 * len(textwrap.wrap(name, 50)) + 13 * len(found) + 9 for name, found in panel.items())
        for panel in panels.values()
    ]
    with mpl.rc_context(chart_style()):
        figure = new_figure(WIDTH, sum(heights) + 6)
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], panels.values(), strict=True):
            _panel(axes, panel)
        spoken = " ".join(f"{width}, {finding(test)}." for width, test in rows)
        return to_svg(figure, uid, title, spoken)


def _panel(axes: "Axes", panel: Mapping[str, Sequence[tuple[str, Json]]]) -> None:
    tests = [test for found in panel.values() for _, test in found]
    first, factor = tests[0], tests[0]["unit"] == "factor"
    low, high = _limits(tests)
    axes.set_xscale("log" if factor else "linear")
    axes.set_xlim(low, high)
    side = (first["chance"], high) if first["expected"] == "above" else (low, first["chance"])
    place, ticks = 0.0, dict[float, str]()
    for name, found in panel.items():
        lines = textwrap.wrap(name, 50)
        text = axes.text(0.0, place, "\n".join(lines), transform=axes.get_yaxis_transform(), va="top", fontsize=8.5)
        text.set_in_layout(False)
        place += len(lines)
        span = place + 0.1, place + len(found) + 0.15
        axes.fill_between(side, *span, color=CSS["good"], alpha=0.12, linewidth=0)
        axes.plot([first["chance"]] * 2, span, color=CSS["muted"], linewidth=1, zorder=1)
        for width, test in found:
            place += 1
            ticks[place - 0.4] = width
            _interval(axes, place - 0.4, test, low, high)
        place += 0.7
    axes.set_ylim(place, -0.2)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    if factor:
        log_ticks(axes.xaxis, low, high, "×")
    else:
        few_ticks(axes.xaxis)
        axes.xaxis.set_major_formatter(lambda value, _: amount(first, value, unit=False).replace(".0 %", " %"))
    unit = {"factor": "factor", "share": "share of the records", "points": "points of accuracy"}[first["unit"]]
    axes.set_xlabel(f"{unit}; claimed: {wanted(first)}", fontsize=8.5)


def _limits(tests: Sequence[Json]) -> tuple[float, float]:
    """Return an axis for what was measured and chance; intervals may stretch it to twice that and are cut beyond."""
    factor = tests[0]["unit"] == "factor"
    scale: Callable[[float], float] = math.log if factor else float
    chance = scale(tests[0]["chance"])
    found = [scale(v) for t in tests for v in (t["estimate"], *t["values"]) if v is not None and (not factor or v > 0)]
    ends = [scale(v) for t in tests for v in (t["low"], t["high"]) if v is not None and (not factor or v > 0)]
    low, high = min([chance, *found]), max([chance, *found])
    span = max(high - low, _LEAST[tests[0]["unit"]])
    low, high = max(low - span, min([low, *ends])), min(high + span, max([high, *ends]))
    if tests[0]["unit"] == "share":
        low, high = max(low, -1.0 if tests[0]["chance"] == 0 else 0.0), min(high, 1.0)
    pad = max(0.06 * (high - low), 0.3 * _LEAST[tests[0]["unit"]])
    return (math.exp(low - pad), math.exp(high + pad)) if factor else (low - pad, high + pad)


def _interval(axes: "Axes", y: float, test: Json, low: float, high: float) -> None:
    color = _COLORS.get(test["verdict"], CSS["muted"])
    shown = [value for value in test["values"] if low <= value <= high]
    axes.plot(shown, [y] * len(shown), "|", color=CSS["muted"], markersize=6, markeredgewidth=0.9, zorder=3)
    axes.text(
        1.035, y, SIGNS[test["verdict"]], color=color, transform=axes.get_yaxis_transform(), va="center", weight="bold"
    )
    if test["estimate"] is None:
        return
    ends = max(test["low"], low), min(test["high"], high)
    axes.plot(ends, [y, y], color=color, linewidth=2, solid_capstyle="butt", zorder=2)
    for end, cut, marker in ((ends[0], test["low"] < low, "<"), (ends[1], test["high"] > high, ">")):
        if cut:
            axes.plot([end], [y], marker, color=color, markersize=5, markeredgewidth=0, clip_on=False, zorder=2)
    filled = color if test["verdict"] in (SUPPORTED, CONTRADICTED) else CSS["card"]
    axes.plot([test["estimate"]], [y], "o", markersize=5.5, markerfacecolor=filled, markeredgecolor=color, zorder=4)
