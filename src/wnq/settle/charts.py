"""Charts of what the runs did: what ``verdict.json`` holds in, inline SVG out."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wnq.drawing import CSS, MARKERS, WIDTH, arm_color, chart_style, few_ticks, log_ticks, new_figure, number, to_svg
from wnq.settle.wording import Json, mean_of, value_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 200
"""Records drawn of one line at most, evenly spaced over the run; the first and the last are among them."""

_DASHED = (0, (4, 2.5))

Places = Mapping[str, int]
"""Arm -> its place among the colours and markers."""


def series(runs: Sequence[Json], column: str) -> list[tuple[int, float, float, float]]:
    """Return step, mean, least and largest value over the runs of one arm, of a column of their tracks; gaps are left out."""
    at: dict[int, list[float]] = {}
    for run in runs:
        for row in run["track"]:
            if math.isfinite(value := value_of(row.get(column))):
                at.setdefault(int(row["step"]), []).append(value)
    steps = sorted(at)
    if len(steps) > POINTS:
        steps = [steps[round(k * (len(steps) - 1) / (POINTS - 1))] for k in range(POINTS)]
    return [(step, statistics.fmean(at[step]), min(at[step]), max(at[step])) for step in steps]


def track_chart(
    uid: str,
    title: str,
    label: str,
    column: str,
    arms: Mapping[str, Sequence[Json]],
    places: Places,
    *,
    factor: float = 1.0,
) -> str:
    """Draw a column of the tracks against the step: one line an arm, the mean over seeds, with the band they span.

    Args:
        uid: prefix of the ids in the SVG.
        title: of the chart.
        label: of the axis.
        column: of the tracks; for ``relative_error`` the law's prediction is drawn dashed, for ``pull`` the line at zero.
        arms: the runs of each arm.
        places: of the arms.
        factor: multiplies the values.
    """
    import matplotlib as mpl

    with mpl.rc_context(chart_style()):
        figure = new_figure(WIDTH, 200)
        axes = figure.add_subplot()
        spoken: list[str] = []
        everything: list[float] = []
        for arm, runs in arms.items():
            color, marker = arm_color(places[arm]), MARKERS[places[arm] % len(MARKERS)]
            line = series(runs, column)
            if not line:
                spoken.append(f"{arm}: nothing recorded")
                continue
            steps = [point[0] for point in line]
            mean, least, most = ([factor * point[k] for point in line] for k in (1, 2, 3))
            everything += [*least, *most]
            axes.fill_between(steps, least, most, color=color, alpha=0.18, linewidth=0)
            style: dict[str, Any] = {"markersize": 4.5, "markeredgecolor": CSS["card"], "markeredgewidth": 0.6}
            every = max(1, len(steps) // 5)
            axes.plot(steps, mean, color=color, linewidth=1.5, marker=marker, markevery=every, **style)
            if column == "relative_error" and (law := series(runs, "law_error")):
                everything += [point[1] for point in law]
                axes.plot([p[0] for p in law], [p[1] for p in law], color=color, linewidth=1.1, linestyle=_DASHED)
            spoken.append(f"{arm}: {number(mean[0])} at step {steps[0]:,}, {number(mean[-1])} at step {steps[-1]:,}")
        _scale(axes, everything, signed=column == "pull")
        axes.grid(axis="y", alpha=0.6)
        axes.margins(x=0.02)
        few_ticks(axes.xaxis)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        return to_svg(figure, uid, title, f"Mean over seeds. {'; '.join(spoken)}.")


def _scale(axes: "Axes", values: Sequence[float], *, signed: bool) -> None:
    reach = max((abs(value) for value in values), default=0.0)
    if signed:
        axes.axhline(0, color=CSS["muted"], linewidth=1, zorder=1)
        if reach > 20:
            axes.set_yscale("symlog", linthresh=1.0, linscale=0.5)
            axes.set_ylim(min(1.5 * min(values), -0.4), max(1.5 * max(values), 0.4))
            powers = [10.0**k for k in range(math.floor(math.log10(reach)) + 1)]
            ticks = [*(-v for v in powers if -v >= min(values)), 0.0, *(v for v in powers if v <= max(values))]
            axes.set_yticks(ticks, [f"{tick:,.0f}".replace("-", "−") for tick in ticks])
    elif values and min(values) > 0 and reach > 8 * min(values):
        low, high = min(values) / 1.15, reach * 1.15
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        log_ticks(axes.yaxis, low, high)


def share_chart(uid: str, title: str, arms: Mapping[str, Sequence[Json]], places: Places) -> str:
    """Draw in what share of the records descent moves the largest weight toward zero: each seed, and each layer of it faintly."""
    import matplotlib as mpl

    with mpl.rc_context(chart_style()):
        figure = new_figure(WIDTH, 60 + 34 * len(arms))
        axes = figure.add_subplot()
        axes.axvline(0.5, color=CSS["muted"], linewidth=1)
        spoken: list[str] = []
        for row, (arm, runs) in enumerate(arms.items()):
            color, marker = arm_color(places[arm]), MARKERS[places[arm] % len(MARKERS)]
            layers = [value_of(layer["toward"]) for run in runs for layer in run["layers"]]
            axes.plot(
                layers, [row + 0.22] * len(layers), "|", color=color, markersize=7, markeredgewidth=0.9, alpha=0.6
            )
            seeds = [mean_of(layer["toward"] for layer in run["layers"]) for run in runs]
            axes.plot(seeds, [row - 0.1] * len(seeds), marker, color=color, markersize=6.5, markeredgecolor=CSS["card"])
            spoken.append(f"{arm} {percent(mean_of(seeds))}")
        axes.set_xlim(-0.04, 1.04)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_yticks(range(len(arms)), list(arms))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", alpha=0.6)
        axes.set_xlabel("records with the pull toward zero; chance: 50 %")
        return to_svg(figure, uid, title, f"Mean over seeds and layers: {'; '.join(spoken)}. Chance is 50 %.")


def percent(value: float) -> str:
    """Return a share as ``87.5 %``."""
    return f"{100 * value:.1f} %" if math.isfinite(value) else "–"


def layer_chart(uid: str, title: str, layers: Sequence[str], arms: Mapping[str, Sequence[Json]], places: Places) -> str:
    """Draw the crest factor of every layer from start to end, one line an arm, mean over seeds."""
    import matplotlib as mpl

    pitch = 1 / (len(arms) + 1)
    with mpl.rc_context(chart_style()):
        figure = new_figure(WIDTH, 50 + (7 if len(layers) <= 30 else 5) * (len(arms) + 1) * len(layers))
        axes = figure.add_subplot()
        seen: list[float] = []
        for index, (arm, runs) in enumerate(arms.items()):
            color, marker = arm_color(places[arm]), MARKERS[places[arm] % len(MARKERS)]
            for row, layer in enumerate(layers):
                own = [found for run in runs for found in run["layers"] if found["layer"] == layer]
                start, end = (mean_of(found[f"crest_{when}"] for found in own) for when in ("start", "end"))
                y = row + (index - (len(arms) - 1) / 2) * pitch
                axes.plot([start, end], [y, y], color=color, linewidth=1.2, zorder=2)
                axes.plot([start], [y], "|", color=CSS["start"], markersize=6, markeredgewidth=1.2, zorder=3)
                axes.plot(
                    [end],
                    [y],
                    marker,
                    color=color,
                    markersize=5,
                    markeredgecolor=CSS["card"],
                    markeredgewidth=0.5,
                    zorder=4,
                )
                seen += [value for value in (start, end) if math.isfinite(value) and value > 0]
        for row in range(1, len(layers)):
            axes.axhline(row - 0.5, color=CSS["line"], linewidth=0.5)
        if seen:
            low, high = min(seen) / 1.08, max(seen) * 1.08
            axes.set_xscale("log")
            axes.set_xlim(low, high)
            log_ticks(axes.xaxis, low, high)
        names = [name if len(name) <= 22 else "…" + name[-21:] for name in layers]
        axes.set_yticks(range(len(layers)), names, fontsize=9 if len(layers) <= 30 else 7.5)
        axes.set_ylim(len(layers) - 0.45, -0.55)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", alpha=0.6)
        axes.set_xlabel("crest factor max|w| / rms, start → end")
        return to_svg(figure, uid, title, f"{len(layers)} layers; the numbers are in the table of layers.")


def accuracy_chart(uid: str, title: str, widths: Sequence[Json], floats: Sequence[float], places: Places) -> str:
    """Draw the accuracy of every run, arm by arm at each width, its mean as a bar, the float starts as a line."""
    import matplotlib as mpl

    with mpl.rc_context(chart_style()):
        figure = new_figure(WIDTH, 230)
        axes = figure.add_subplot()
        if floats:
            axes.axhspan(min(floats), max(floats), color=CSS["start"], alpha=0.2, linewidth=0)
            axes.axhline(statistics.fmean(floats), color=CSS["start"], linewidth=1.2, linestyle=_DASHED)
        spoken = [f"Float start: {statistics.fmean(floats):.2f} %"] if floats else []
        pitch = 0.7 / max(1, len(places))
        for x, width in enumerate(widths):
            for index, (arm, place) in enumerate(places.items()):
                found = [
                    a for run in width["runs"] if run["label"] == arm and math.isfinite(a := value_of(run["accuracy"]))
                ]
                if not found:
                    continue
                at = x + (index - (len(places) - 1) / 2) * pitch
                color, marker = arm_color(place), MARKERS[place % len(MARKERS)]
                mean = statistics.fmean(found)
                axes.plot([at - pitch / 2.6, at + pitch / 2.6], [mean, mean], color=color, linewidth=1.8, zorder=2)
                axes.plot(
                    [at] * len(found), found, marker, color=color, markersize=5, markeredgecolor=CSS["card"], zorder=3
                )
                spoken.append(f"{width['bits']} {arm}: {mean:.2f} %")
        axes.set_xticks(range(len(widths)), [width["bits"] for width in widths], color=CSS["ink"])
        axes.set_xlim(-0.55, max(0, len(widths) - 1) + 0.55)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.get_major_formatter().set_useOffset(False)  # pyright: ignore[reportAttributeAccessIssue]
        axes.grid(axis="y", alpha=0.6)
        axes.set_ylabel("accuracy (%)")
        return to_svg(figure, uid, title, "; ".join(spoken) + ".")
