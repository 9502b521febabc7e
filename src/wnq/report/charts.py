"""Charts of whole models: tails, errors by layer, by width and by clip rule, and the law."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wnq.analysis import LayerStats, ModelEvidence
from wnq.analysis.causes import gaussian_crest, gaussian_error
from wnq.drawing import WIDTH, Chart, Key, Palette, log_ticks, median, new_figure, number, percent, short_name
from wnq.report.subject import OWN_KEY, RULE_KEYS, Subject

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = 40
"""Layers in a chart that has a line for each: those with the largest error."""

DASHED = (0, (4, 3))

SHOWN = ("max", "mse", "channel")
"""Rules that a chart of layers compares."""


def model_charts(subject: Subject) -> dict[str, Chart]:
    """Return the charts of whole models that there is something to draw for, by name."""
    charts = [remedies(subject), crests(subject), prediction(subject)]
    charts += [widths(subject, model, f"widths-{place}") for place, model in enumerate(subject.models)]
    return {chart.name: chart for chart in charts if chart is not None}


def charted(subject: Subject) -> list[str]:
    """Return the layers of charts that have a line for each."""
    if len(subject.layers) <= ROWS:
        return list(subject.layers)
    worst = [cause.layer for cause, _, _ in subject.causes[:ROWS]]
    return worst or list(subject.layers[:ROWS])


def remedies(subject: Subject) -> Chart | None:
    """Each layer's error at the width in question, under the plain range and under what could mend it."""
    chosen = set(charted(subject))
    rows = [
        (cause.layer, {rule: found.measured(cause.bits, rule) for rule in SHOWN})
        for cause, _, found in subject.causes
        if cause.layer in chosen
    ]
    rows = [(layer, {rule: e for rule, e in errors.items() if e is not None and e > 0}) for layer, errors in rows]
    rows = [(layer, errors) for layer, errors in rows if errors]
    judged = subject.judged
    if not rows or judged is None:
        return None
    floor = gaussian_error(subject.focus, subject.grid)

    def draw(paint: Palette) -> "Figure":
        figure, axes = _lines(paint, [layer for layer, _ in rows])
        for place, (_, errors) in enumerate(rows):
            axes.plot([min(errors.values()), max(errors.values())], [place] * 2, color=paint["line"], linewidth=1.5)
        for rule in SHOWN:
            points = [(errors[rule], place) for place, (_, errors) in enumerate(rows) if rule in errors]
            _dots(axes, paint, RULE_KEYS[rule], points)
        axes.axvline(floor, color=paint["muted"], linewidth=0.9, linestyle=DASHED, zorder=1)
        _log_x(axes, [floor, *(e for _, errors in rows for e in errors.values())])
        axes.set_xlabel(f"error at {subject.focus} bits; dashed: Gaussian, best clip")
        return figure

    worst = "; ".join(
        f"{layer}: " + ", ".join(f"{RULE_KEYS[rule].name} {percent(e)}" for rule, e in errors.items())
        for layer, errors in rows[:5]
    )
    title = f"Error per layer of {judged.name} at {subject.focus} bits, by what sets the range"
    return Chart("remedies", title, f"Worst first. {worst}.", draw, [RULE_KEYS[rule] for rule in SHOWN])


def crests(subject: Subject) -> Chart | None:
    """The crest factor of every layer in every model, with what as many Gaussian weights would have."""
    tables: list[Mapping[str, LayerStats]] = [{row.name: row for row in model.stats} for model in subject.models]
    layers = [
        layer
        for layer in charted(subject)
        if any(layer in rows and math.isfinite(rows[layer].crest) for rows in tables)
    ]
    if not layers:
        return None

    def draw(paint: Palette) -> "Figure":
        figure, axes = _lines(paint, layers)
        seen = [1.7]
        for place, layer in enumerate(layers):
            rows = [rows[layer] for rows in tables if layer in rows]
            values = [row.crest for row in rows if math.isfinite(row.crest)]
            gaussian = gaussian_crest(rows[0].parameters)
            axes.plot([min(values), max(values)], [place] * 2, color=paint["line"], linewidth=1.5, zorder=1)
            axes.plot([gaussian], [place], "|", color=paint["muted"], markersize=9, markeredgewidth=0.9, zorder=2)
            seen += [*values, gaussian]
        for key, rows in zip(subject.keys.values(), tables, strict=True):
            points = [(rows[layer].crest, place) for place, layer in enumerate(layers) if layer in rows]
            _dots(axes, paint, key, [point for point in points if math.isfinite(point[0])])
        _log_x(axes, seen)
        axes.set_xlabel("crest factor max|w| / rms; tick: Gaussian weights")
        return figure

    medians = "; ".join(f"{m.name} {number(median(row.crest for row in m.stats))}" for m in subject.models)
    keys = list(subject.keys.values())
    return Chart("crest", "Crest factor per layer", f"One line a layer. Medians: {medians}.", draw, keys)


def prediction(subject: Subject) -> Chart | None:
    """Measured against predicted error: one point a layer and width, and one for each layer's own quantizer."""
    groups = _predicted(subject)
    if not groups:
        return None
    every = [value for _, points in groups for point in points for value in point]
    low, high = min(every) / 1.6, max(every) * 1.6

    def draw(paint: Palette) -> "Figure":
        figure = new_figure(WIDTH, 290)
        axes = figure.add_subplot()
        for key, points in groups:
            _dots(axes, paint, key, points, size=4.5)
        axes.plot([low, high], [low, high], color=paint["muted"], linewidth=0.9, linestyle=DASHED, zorder=1)
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high), aspect="equal")
        log_ticks(axes.xaxis, low, high)
        log_ticks(axes.yaxis, low, high)
        axes.grid(alpha=0.6)
        axes.set_xlabel("error predicted by the law")
        axes.set_ylabel("error measured")
        return figure

    ratios = [measured / predicted for _, points in groups for predicted, measured in points]
    said = f"{len(ratios)} points; measured over predicted is {number(median(ratios))} in the median"
    return Chart(
        "prediction",
        "Measured against predicted error",
        f"{said}, from {number(min(ratios))} to {number(max(ratios))}. The dashed line is equality.",
        draw,
        [key for key, _ in groups],
    )


def _predicted(subject: Subject) -> list[tuple[Key, list[tuple[float, float]]]]:
    """Return legend entries and (predicted, measured) points: a width each for one model, else a model each."""
    if len(subject.models) == 1:
        model = subject.models[0]
        groups = [
            (Key(f"{bits} bits", f"arm{place % 6}", place), scaled_points(model, [bits]))
            for place, bits in enumerate(subject.bits)
        ]
        groups.append((OWN_KEY._replace(place=len(subject.bits)), law_points(model)))
    else:
        # A trained model is judged by its own quantizer, a float one by the widths that were compared.
        groups = [
            (key, law_points(model) or scaled_points(model, subject.bits))
            for key, model in zip(subject.keys.values(), subject.models, strict=True)
        ]
    return [(key, points) for key, points in groups if points]


def scaled_points(model: ModelEvidence, bits: Sequence[int]) -> list[tuple[float, float]]:
    """Return (predicted, measured) error of each layer under max scaling at these widths."""
    found = [profile.error(width, "max") for profile in model.profiles.values() for width in bits]
    return _positive((error.predicted, error.measured) for error in found if error is not None)


def law_points(model: ModelEvidence) -> list[tuple[float, float]]:
    """Return (predicted, measured) error of each layer's own quantizer, both after the best single rescale."""
    return _positive(
        (row.law_error * row.rescale**2, row.rescaled_error)
        for row in model.stats
        if row.law_error is not None and row.rescale is not None and row.rescaled_error is not None
        if not model.values_only
    )


def _positive(points: Iterable[tuple[float | None, float]]) -> list[tuple[float, float]]:
    # A grid of two levels rounds symmetric pairs without error, and logarithms know no zero.
    return [(a, b) for a, b in points if a is not None and math.isfinite(a) and math.isfinite(b) and min(a, b) > 1e-15]


def widths(subject: Subject, model: ModelEvidence, name: str) -> Chart | None:
    """The median error over the layers of one model against the width, a line for each clip rule."""
    lines = {
        rule: [(bits, e) for bits in subject.bits if (e := median_error(model, bits, rule)) is not None and e > 0]
        for rule in RULE_KEYS
    }
    lines = {rule: points for rule, points in lines.items() if points}
    if not lines:
        return None
    own = own_errors(model)

    def draw(paint: Palette) -> "Figure":
        figure = new_figure(WIDTH, 220)
        axes = figure.add_subplot()
        for rule, points in lines.items():
            key = RULE_KEYS[rule]
            x, y = zip(*points, strict=True)
            style: dict[str, Any] = {
                "markersize": 5,
                "markeredgecolor": paint["card"],
                "markeredgewidth": 0.6,
                "linewidth": 1.2,
            }
            axes.plot(x, y, marker=key.marker, color=paint[key.color], **style)
        _dots(axes, paint, OWN_KEY, list(own.items()), size=8)
        values = [e for points in lines.values() for _, e in points] + list(own.values())
        low, high = min(values) / 1.4, max(values) * 1.4
        axes.set_yscale("log")
        axes.set_ylim(low, high)
        log_ticks(axes.yaxis, low, high)
        axes.set_xticks(sorted({*subject.bits, *own}))
        axes.margins(x=0.06)
        axes.grid(axis="y", alpha=0.6)
        axes.set_xlabel("bits a weight")
        axes.set_ylabel("median of |w − w_q|² / |w|²")
        return figure

    said = [
        f"{RULE_KEYS[rule].name}: {', '.join(f'{percent(e)} at {bits} bits' for bits, e in points)}"
        for rule, points in lines.items()
    ] + [f"{OWN_KEY.name}: {percent(e)} at {bits} bits" for bits, e in own.items()]
    title = f"Error of {model.name} by width and clip rule"
    keys = [RULE_KEYS[rule] for rule in lines] + ([OWN_KEY] if own else [])
    return Chart(name, title, f"Medians over the layers. {'; '.join(said)}.", draw, keys)


def median_error(model: ModelEvidence, bits: int, rule: str) -> float | None:
    """Return the median over a model's layers of the error under a rule."""
    return median(profile.measured(bits, rule) for profile in model.profiles.values())


def own_errors(model: ModelEvidence) -> dict[int, float]:
    """Return the median error of the layers' own quantizers, by their width."""
    found: dict[int, list[float]] = {}
    for row in model.stats:
        error = model.own_error(row)
        if row.bits is not None and error:
            found.setdefault(row.bits, []).append(error)
    return {bits: value for bits in sorted(found) if (value := median(found[bits])) is not None}


def _lines(paint: Palette, layers: Sequence[str]) -> tuple["Figure", "Axes"]:
    """Return axes with one line for each layer, the first at the top."""
    pitch, size = (15, 9) if len(layers) <= 40 else (9, 7)
    figure = new_figure(WIDTH, 60 + pitch * len(layers))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(layers)), [short_name(layer) for layer in layers], fontsize=size)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", alpha=0.6)
    return figure, axes


def _log_x(axes: "Axes", values: Sequence[float]) -> None:
    low, high = min(values) / 1.12, max(values) * 1.12
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high)


def _dots(axes: "Axes", paint: Palette, key: Key, points: Sequence[tuple[float, float]], *, size: float = 5.5) -> None:
    if points:
        x, y = zip(*points, strict=True)
        # The first is larger, to show around one that lies on it.
        larger = size + (2 if key.place == 0 else 0)
        style: dict[str, Any] = {"markersize": larger, "markeredgecolor": paint["card"], "markeredgewidth": 0.7}
        axes.plot(x, y, key.marker, color=paint[key.color], zorder=3 + key.place, **style)
