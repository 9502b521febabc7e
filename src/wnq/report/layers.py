"""Charts of one layer: the histogram with the levels in it, and the tail."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from wnq.analysis import ModelEvidence, Profile
from wnq.drawing import Chart, Key, Palette, log_ticks, new_figure, number, percent
from wnq.report.charts import DASHED
from wnq.report.subject import RULE_KEYS, RULE_NAMES, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 290
"""In SVG units, which are pixels on a phone."""

MOST_LEVELS = 33
"""Beyond, ticks run together."""

RULED = {rule: RULE_KEYS[rule]._replace(name=f"levels: {RULE_NAMES[rule]}") for rule in ("max", "mse")}
"""Rules whose levels are drawn."""

LEAST_SHARE = 0.5
"""The tail's axis begins at this many weights' share."""


def layer_charts(subject: Subject) -> dict[str, list[Chart]]:
    """Return the charts of every layer that is drawn, by layer."""
    place = {layer: number for number, layer in enumerate(subject.layers)}
    return {layer: _charts(subject, layer, f"l{place[layer]}-{slug(layer)}") for layer in subject.drawn}


def slug(name: str) -> str:
    """Return a name as part of a file's name and of ids."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-60:].lower()


def _charts(subject: Subject, layer: str, name: str) -> list[Chart]:
    return [chart for chart in (_histogram(subject, layer, name), _tail(subject, layer, name)) if chart is not None]


def _histogram(subject: Subject, layer: str, name: str) -> Chart | None:
    """The density of w / rms on a logarithmic scale, the first model filled, levels as ticks beneath."""
    drawn = [
        (key, model.histograms[layer])
        for key, model in zip(subject.keys.values(), subject.models, strict=True)
        if layer in model.histograms
    ]
    if not drawn:
        return None
    rows = _ruled(subject, layer)

    def draw(paint: Palette) -> "Figure":
        strip = 9 * max(1, len(rows)) + 4
        figure = new_figure(WIDTH, 165 + strip)
        axes, rug = figure.subplots(2, 1, sharex=True, height_ratios=[165, strip])
        found = [d for _, histogram in drawn for d in histogram.density() if d > 0] or [0.5]
        base = min(found) / 2
        for place, (key, histogram) in enumerate(drawn):
            density, edges = histogram.density(), histogram.edges
            if place == 0:
                heights = [max(d, base) for d in density]
                axes.stairs(heights, edges, baseline=base, fill=True, color=paint[key.color], alpha=0.28, linewidth=0)
            heights = [d or math.nan for d in density]
            width = 0.9 if place == 0 else 1.3
            axes.stairs(heights, edges, color=paint[key.color], linewidth=width)
        axes.set_yscale("log")
        axes.set_ylim(base, max(found) * 2)
        log_ticks(axes.yaxis, base, max(found) * 2)
        axes.set_ylabel("density")
        axes.tick_params(labelbottom=False, bottom=False)
        axes.spines["bottom"].set_visible(False)
        axes.grid(axis="y", alpha=0.6)
        places: dict[str, list[int]] = {}
        for row, (label, levels, color) in enumerate(rows):
            rug.vlines(levels, -row - 0.36, -row + 0.36, color=paint[color], linewidth=1.2)
            places.setdefault(label, []).append(-row)
        rug.set_ylim(-max(1, len(rows)) + 0.4, 0.6)
        rug.set_yticks([sum(own) / len(own) for own in places.values()], list(places), fontsize=7)
        rug.tick_params(axis="y", length=0)
        rug.spines["left"].set_visible(False)
        rug.set_xlabel("weight / rms")
        reach = max(abs(histogram.edges[-1]) for _, histogram in drawn)
        rug.set_xlim(-reach * 1.03, reach * 1.03)
        return figure

    said = "; ".join(f"{m.name}: crest factor {number(row.crest)}" for m in subject.models if (row := m.row(layer)))
    labels = dict.fromkeys(label for label, _, _ in rows)
    levels = f" Ticks beneath are levels: {', '.join(labels)}." if rows else ""
    keys = [key for key, _ in drawn] + ruled_keys(subject)
    text = f"Density of weight / rms, log scale. {said}.{levels}"
    return Chart(f"{name}-histogram", f"Weight histogram of {layer}", text, draw, keys)


def ruled_keys(subject: Subject) -> list[Key]:
    """Return the legend of the levels in a histogram: of one model alone, where the rules have colours of their own."""
    return list(RULED.values()) if subject.causes and len(subject.models) == 1 else []


def _ruled(subject: Subject, layer: str) -> list[tuple[str, Sequence[float], str]]:
    """Return label, levels in units of rms and colour of each row of ticks."""
    alone = len(subject.models) == 1
    rows: list[tuple[str, Sequence[float], str]] = []
    judged = subject.judged
    profile = None if judged is None else judged.profiles.get(layer)
    if judged is not None and profile is not None:
        # Next to the colours of other models, those of the rules would mislead.
        for bits in subject.bits if alone else [subject.focus]:
            for rule in RULED:
                label = f"{bits} bits" if alone else f"{bits} bits, {RULE_NAMES[rule]}"
                color = RULE_KEYS[rule].color if alone else subject.keys[judged.name].color
                rows.append((label, _levels(profile, bits, rule), color))
    for key, model in zip(subject.keys.values(), subject.models, strict=True):
        rows.append(("own levels", model.levels.get(layer, ()), "ink" if alone else key.color))
    return [row for row in rows if 0 < len(row[1]) <= MOST_LEVELS]


def _levels(profile: Profile, bits: int, rule: str) -> Sequence[float]:
    found = profile.error(bits, rule)
    if found is None or not found.clip:
        return ()
    return (np.linspace(-1, 1, 2**bits - (profile.grid == "symmetric")) * found.clip).tolist()


def _tail(subject: Subject, layer: str, name: str) -> Chart | None:
    """The share of weights beyond each multiple of rms, with what Gaussian and Laplace weights have there."""
    drawn = [
        (key, model, model.profiles[layer])
        for key, model in zip(subject.keys.values(), subject.models, strict=True)
        if layer in model.profiles and model.profiles[layer].tail.reach
    ]
    counts = [row.parameters - row.nonfinite for _, model, _ in drawn if (row := model.row(layer)) is not None]
    if not drawn or not any(counts):
        return None
    low = LEAST_SHARE / max(counts)
    clip = _best_clip(subject, layer)

    def draw(paint: Palette) -> "Figure":
        figure = new_figure(WIDTH, 175)
        axes = figure.add_subplot()
        right = max(4.0, *(profile.tail.reach[-1] for _, _, profile in drawn)) * 1.15
        x = np.geomspace(0.3, right, 120)
        references = {"Gaussian": (_gaussian(x), "right"), "Laplace": (np.exp(-math.sqrt(2) * x), "left")}
        for label, (y, side) in references.items():
            shown = y >= low
            axes.plot(x[shown], y[shown], color=paint["muted"], linewidth=0.8, linestyle=DASHED, zorder=1)
            _label(axes, paint, label, float(x[shown][-1]), float(y[shown][-1]), side)
        if clip is not None:
            axes.axvline(clip, color=paint[RULE_KEYS["mse"].color], linewidth=1, linestyle=(0, (1, 1.5)), zorder=1)
        for place, (key, _, profile) in enumerate(drawn):
            reach, share = np.array(profile.tail.reach), np.array(profile.tail.share)
            share[share <= 0] = low  # ends at the largest weight
            axes.plot(reach, share, color=paint[key.color], linewidth=1.6 if place else 1.3, zorder=3 + place)
        axes.set(xscale="log", yscale="log", xlim=(0.3, right), ylim=(low, 1.6))
        log_ticks(axes.xaxis, 0.3, right)
        log_ticks(axes.yaxis, low, 1.6)
        axes.grid(axis="y", alpha=0.6)
        axes.set_xlabel("x, in rms" + (f"; dotted: best clip at {subject.focus} bits" if clip is not None else ""))
        axes.set_ylabel("share with |w| > x")
        return figure

    said = "; ".join(
        f"{model.name}: {percent(row.tail_mass)} beyond 3 rms, the largest at {number(row.crest)}"
        for _, model, _ in drawn
        if (row := model.row(layer)) is not None
    )
    text = (
        f"Share of weights beyond x rms, both axes logarithmic. {said}. Gaussian: 0.27 % beyond 3 rms; Laplace: 1.4 %."
    )
    return Chart(f"{name}-tail", f"Tail of {layer}", text, draw, [key for key, _, _ in drawn])


def _gaussian(x: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.array([math.erfc(value / math.sqrt(2)) for value in x])


def _label(axes: "Axes", paint: Palette, text: str, x: float, y: float, side: str) -> None:
    """Name a line at its end, on the side where it does not cross the other."""
    away = 3 if side == "left" else -4
    settings: dict[str, Any] = {"ha": side, "color": paint["muted"], "fontsize": 7, "annotation_clip": False}
    axes.annotate(text, (x, y), xytext=(away, 4), textcoords="offset points", **settings)


def _best_clip(subject: Subject, layer: str) -> float | None:
    judged: ModelEvidence | None = subject.judged
    profile = None if judged is None else judged.profiles.get(layer)
    found = None if profile is None else profile.error(subject.focus, "mse")
    return None if found is None else found.clip
