"""Draw the figures of docs/theory.md and refresh its tables (a minute or two).

    python docs/theory_figures.py

Every number on that page comes from a function here or from ``benchmarks/results/ternary_*.json``; ``tests/test_theory_claims.py``
compares them.
"""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from wnq.files import write_text
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform
from wnq.tails import error_stats, predicted_error, tensor_stats
from wnq.theory import (
    Density,
    Gaussian,
    Laplace,
    StudentT,
    UniformDensity,
    error_curve,
    error_parts,
    expected_crest,
    expected_error,
    optimal_clip,
)

DOCS = Path(__file__).resolve().parent
PAGE = DOCS / "theory.md"
IMAGES = DOCS / "images"
RESULTS = DOCS.parent / "benchmarks" / "results"

DENSITIES: tuple[Density, ...] = (UniformDensity(), Gaussian(), Laplace(), StudentT(5))
WIDTHS = ((2, "symmetric"), (2, "full"), (3, "symmetric"), (3, "full"), (4, "symmetric"), (4, "full"))
STEPS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LAYER = 36_864
"""Weights of a 3x3 convolution from 64 to 64 channels."""
SCALES = (0.01, 0.05, 0.2, 0.5, 1.0)
SIMULATED = ((2, "symmetric"), (2, "full"), (3, "symmetric"))


def width_name(bits: int, grid: str) -> str:
    return "ternary" if (bits, grid) == (2, "symmetric") else f"{bits} bits, {grid}"


def short(density: Density) -> str:
    return "Student-t, 5" if isinstance(density, StudentT) else density.name


# The law


def granular_ratio(density: Density, step: float, grid: str) -> float:
    """Return the exact error over the law's, step^2 / 12, on a grid that ends far beyond the density."""
    clip = 127 * step if grid == "symmetric" else 255 * step / 2
    return expected_error(density, 8, clip, grid=grid) * density.second / (step**2 / 12)


# The equilibrium of the gradient through the maximum, for the loss |w_q - t|^2 / 2


def push(density: Density, clip: float) -> float:
    """Return 2 times the integral of (t - c) p(t) beyond c: what draws the clipped weights outwards."""
    mass, first, _ = density.moments(np.inf) - density.moments(clip)
    return float(2 * (first - clip * mass))


def pull_resting(density: Density, bits: int, grid: str, clip: float) -> float:
    """Return c E (Q - u)^2 within the clip: the gradient through the maximum if every other weight sits at its target."""
    return error_parts(density, bits, clip, grid=grid)[0] * density.second / clip


def pull_moving(density: Density, bits: int, grid: str, clip: float) -> float:
    """Return the same if every other weight alternates between the levels a and b around its target: E (t - a)(b - t) / c."""
    levels = (
        clip * Uniform(bits, grid).levels(torch.zeros(0, dtype=torch.float64)).numpy() / Uniform(bits, grid).divisor
    )
    mass, first, second = np.diff(density.moments(levels), axis=1)
    low, high = levels[:-1], levels[1:]
    return float((-second + (low + high) * first - low * high * mass).sum()) / clip


def equilibrium(density: Density, bits: int, grid: str, *, gain: float = 1.0, moving: bool = True) -> float:
    """Return the clip at which gain times the pull equals the push, by bisection."""
    pull = pull_moving if moving else pull_resting
    low, high = 0.1, density.peak if math.isfinite(density.peak) else 50.0
    for _ in range(40):
        clip = (low + high) / 2
        low, high = (clip, high) if gain * pull(density, bits, grid, clip) < push(density, clip) else (low, clip)
    return clip


def simulate(
    bits: int, grid: str, gain: float, *, weights: int = 256, rows: int = 8, steps: int = 2000, rate: float = 3e-3
) -> list[float]:
    """Descend |w_q - t|^2 / 2 from w = t, and return max|w| / rms(t), averaged over rows and the last 40 % of the steps.

    One number for a Gaussian t and one for a Laplace t; each row has its own maximum.
    """
    generator = np.random.default_rng(0)
    target = torch.tensor(
        np.stack([d.sample(weights, generator) for d in (Gaussian(), Laplace()) for _ in range(rows)])
    )
    target /= target.square().mean(1, keepdim=True).sqrt()
    weight = target.clone().requires_grad_()
    per_row = partial(max_abs, granularity="channel", max_gain=gain)
    quantizer = Normalized(per_row, Uniform(bits, grid), granularity="channel")
    peaks = torch.zeros(2 * rows, dtype=torch.float64)
    first = int(0.6 * steps)
    for step in range(steps):
        (gradient,) = torch.autograd.grad((quantizer(weight) - target).square().sum() / 2, weight)
        with torch.no_grad():
            weight -= rate * gradient
            if step >= first:
                peaks += weight.abs().amax(1)
    return (peaks / (steps - first)).view(2, rows).mean(1).tolist()


# tanh


def tanh_crests(rms: float) -> tuple[float, float, float]:
    """Return the crest factor of a layer of Laplace weights of this rms, that of their tanh, and what the expansion says it is."""
    w = Laplace(rms).sample(LAYER, np.random.default_rng(0))
    before, after = (tensor_stats(torch.tensor(x)).crest for x in (w, np.tanh(w)))
    second, fourth = (float(np.mean(w**k)) for k in (2, 4))
    return before, after, before * (1 - (before**2 - fourth / second**2) * second / 3)


# The ternary study


def ternary_rows() -> list[dict[str, Any]]:
    """Return the rows of the newest results of benchmarks/ternary.py."""
    newest = max(RESULTS.glob("ternary_*.json"), key=lambda path: path.stem[-6:])
    return json.loads(newest.read_text(encoding="utf-8"))["rows"]


def spread(values: Sequence[float | None], digits: int) -> str:
    known = [x for x in values if x is not None]
    if len(known) < len(values) or max(known) > 1e3:
        return "diverges"
    return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"


# Tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def law_table() -> list[str]:
    pairs = [(density, grid) for density in DENSITIES[1:] for grid in ("symmetric", "full")]
    rows = [[f"{step:g}", *(f"{granular_ratio(d, step, grid):.3f}" for d, grid in pairs)] for step in STEPS]
    return _table(["step / rms", *(f"{short(d)}, {grid}" for d, grid in pairs)], rows)


def clip_table() -> list[str]:
    rows = []
    for density in DENSITIES:
        best = [optimal_clip(density, bits, grid=grid) for bits, grid in WIDTHS]
        rows.append([short(density), *(f"{clip:.3f}: {error:.4f}" for clip, error in best)])
    return _table(["density", *(width_name(*width) for width in WIDTHS)], rows)


def crest_table() -> list[str]:
    rows = []
    for density in DENSITIES:
        crests = [expected_crest(density, n) for n in (1_000, LAYER, 1_000_000)]
        ratios = [
            expected_error(density, bits, crests[1], grid="symmetric")
            / optimal_clip(density, bits, grid="symmetric")[1]
            for bits in (2, 3, 4, 8)
        ]
        rows.append([short(density), *(f"{c:.2f}" for c in crests), *(f"{r:.2f}" for r in ratios)])
    head = ["density", *(f"n = {n:,}" for n in (1_000, LAYER, 1_000_000)), *(f"{b} bits" for b in (2, 3, 4, 8))]
    return _table(head, rows)


def equilibrium_table(runs: Callable[..., list[float]] = simulate) -> list[str]:
    rows = []
    found = {(width, gain): runs(*width, gain) for width in SIMULATED for gain in (1.0, 0.5)}
    for place, density in enumerate((Gaussian(), Laplace())):
        for width in SIMULATED:
            clips = (
                optimal_clip(density, width[0], grid=width[1])[0],
                equilibrium(density, *width, moving=False),
                equilibrium(density, *width),
                found[width, 1.0][place],
                equilibrium(density, *width, gain=0.5),
                found[width, 0.5][place],
            )
            rows.append([density.name, width_name(*width), *(f"{clip:.2f}" for clip in clips)])
    head = ["t", "width", "MSE-optimal", "at rest", "moving", "descent", "moving, gain 1/2", "descent, gain 1/2"]
    return _table(head, rows)


def tanh_table() -> list[str]:
    rows = []
    for rms in SCALES:
        before, after, expansion = tanh_crests(rms)
        # Beyond max|w| = 1/2 the expansion is no longer one.
        rows.append([f"{rms:g}", f"{before:.2f}", f"{after:.2f}", f"{expansion:.2f}" if before * rms < 0.5 else "none"])
    return _table(["rms of w", "C of w", "C of tanh w", "expansion"], rows)


def toy_table() -> list[str]:
    rows = [row for row in ternary_rows() if row["study"] == "toy"]
    settings = list(dict.fromkeys((row["bits"], row["rate"]) for row in rows))
    gains = sorted({row["gain"] for row in rows}, reverse=True)
    by = {(row["bits"], row["rate"], row["gain"]): row for row in rows}
    lines = [[f"{gain:g}", *(spread(by[*setting, gain]["risk"], 3) for setting in settings)] for gain in gains]
    heads = [f"{'ternary' if bits == 2 else f'{bits} bits'}, rate {rate:g}" for bits, rate in settings]
    return _table(["gain", *heads], lines)


def digits_table() -> list[str]:
    lines = []
    for row in ternary_rows():
        if row["study"] == "digits":
            runs = row["runs"]
            columns = (("zeros_start", 2), ("accuracy", 2), ("crest", 2), ("relative_error", 3))
            cells = [spread([run[key] for run in runs], digits) for key, digits in columns]
            cells.insert(2, f"{min(run['accuracy'] for run in runs):.1f}")
            jumps = [run["jump"] for run in runs if run["jump"] is not None]
            cells.insert(1, f"{min(jumps):.2f} to {max(jumps):.2f}" if jumps else "")
            lines.append([row["name"], *cells])
    return _table(
        ["arm", "zeros at the start", "farthest jump", "accuracy (%)", "worst seed", "crest", "relative error"], lines
    )


TABLES: Mapping[str, Callable[[], list[str]]] = {
    "law": law_table,
    "clip": clip_table,
    "crest": crest_table,
    "equilibrium": equilibrium_table,
    "tanh": tanh_table,
    "toy": toy_table,
    "digits": digits_table,
}


def _place(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- table: {name} -->\n)(.*?)(<!-- end -->)", re.S)


def page_table(name: str, text: str) -> list[str]:
    """Return the lines of a table on the page; it stands between ``<!-- table: name -->`` and ``<!-- end -->``."""
    ((_, found, _),) = _place(name).findall(text)
    return found.strip().splitlines()


def with_table(name: str, lines: Sequence[str], text: str) -> str:
    """Return the page with other lines in that place."""
    body = "\n".join(lines)
    return _place(name).sub(lambda place: f"{place[1]}\n{body}\n\n{place[3]}", text)


# Figures

INK = "#111111"
BLUE, ORANGE, GREEN, PURPLE = "#2b8fc9", "#dd7024", "#26a078", "#a86fd0"
COLORS = {"uniform": GREEN, "Gaussian": BLUE, "Laplace": ORANGE, StudentT(5).name: PURPLE}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "wnq",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 8,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
THEME = "<style>svg{color:#24292f}@media (prefers-color-scheme: dark){svg{color:#d6dae0}}</style>"


def draw_error(panels: Sequence[Axes]) -> None:
    crests = np.geomspace(1.8, 40, 120)
    points = digits_points()
    for axes, grid in zip(panels, ("symmetric", "full"), strict=True):
        for bits, color in ((2, ORANGE), (3, BLUE), (4, GREEN), (6, PURPLE)):
            axes.plot(crests, [predicted_error(bits, c, grid) for c in crests], "--", color=color, linewidth=1)
            axes.plot(crests, error_curve(Gaussian(), bits, crests, grid=grid), color=color, label=f"{bits} bits")
            axes.plot(crests, error_curve(Laplace(), bits, crests, grid=grid), ":", color=color)
            dots = [(c, e) for b, g, c, e in points if (b, g) == (bits, grid)]
            axes.plot(*zip(*dots, strict=True), ".", color=color)
        axes.set(xscale="log", yscale="log", ylim=(1e-5, 30), xlabel="clip / rms (crest factor)", title=f"{grid} grid")
        axes.set_xticks([2, 5, 10, 20, 40], ["2", "5", "10", "20", "40"])
        axes.minorticks_off()
    panels[0].set_ylabel("relative error")
    title = "solid Gaussian, dotted Laplace,\ndashed law, dots a network"
    panels[0].legend(loc="lower right", ncols=2, title=title, title_fontsize=8)


def digits_points() -> list[tuple[int, str, float, float]]:
    """Return (bits, grid, crest, measured error) of max scaling on the layers of the digits network, trained in floating point."""
    from wnq.data import load_data
    from wnq.demo import START, float_start
    from wnq.methods import get_method
    from wnq.plan import make_plan
    from wnq.prepared import float_weight

    model = float_start(load_data("digits"), START)
    found = []
    for layer in make_plan(model, get_method("wnq")).layers:
        weight = float_weight(model.get_submodule(layer.name)).detach()
        for bits in (2, 3, 4, 6):
            for grid in ("symmetric", "full"):
                quantizer = Normalized(max_abs, Uniform(bits, grid))
                error = error_stats(weight, quantizer.quantize(weight)).relative_error
                found.append((bits, grid, tensor_stats(weight).crest, error))
    return found


def draw_clip(panels: Sequence[Axes]) -> None:
    clips = np.linspace(0.4, 6, 200)
    for axes, bits in zip(panels, (2, 3, 4), strict=True):
        for density in DENSITIES:
            inside = clips[clips <= density.peak]
            axes.plot(
                inside,
                error_curve(density, bits, inside, grid="symmetric"),
                color=COLORS[density.name],
                label=short(density),
            )
            axes.plot(*optimal_clip(density, bits, grid="symmetric"), "o", color=COLORS[density.name], markersize=4)
        axes.set(yscale="log", xlabel="clip / rms", title=width_name(bits, "symmetric"), ylim=(3e-3, 1.2))
    panels[0].set_ylabel("relative error")
    panels[2].legend()


def draw_crest(panels: Sequence[Axes]) -> None:
    counts = np.unique(np.geomspace(10, 1e8, 24).astype(int))
    for density in DENSITIES:
        crests = [expected_crest(density, int(n)) for n in counts]
        panels[0].plot(counts, crests, color=COLORS[density.name], label=short(density))
        best = optimal_clip(density, 4, grid="symmetric")[0]
        panels[0].plot(counts[[0, -1]], [best, best], ":", color=COLORS[density.name], linewidth=1)
    panels[0].set(
        xscale="log",
        yscale="log",
        xlabel="number of weights",
        ylabel="E max|t| / rms",
        ylim=(1.5, 200),
        title="solid: what max scaling meets; dotted: the best clip at 4 bits, symmetric grid",
    )
    panels[0].set_yticks([2, 5, 10, 20, 50, 100], ["2", "5", "10", "20", "50", "100"])
    panels[0].minorticks_off()
    panels[0].legend()


def draw_equilibrium(panels: Sequence[Axes]) -> None:
    clips = np.linspace(0.6, 3.2, 120)
    for axes, width in zip(panels, ((2, "symmetric"), (3, "symmetric")), strict=True):
        density = Gaussian()
        axes.plot(clips, [push(density, c) for c in clips], color=ORANGE, label="push of the clipped weights")
        axes.plot(clips, [pull_moving(density, *width, c) for c in clips], color=BLUE, label="pull, weights moving")
        axes.plot(clips, [pull_moving(density, *width, c) / 2 for c in clips], "--", color=BLUE, label="half of it")
        axes.plot(
            clips, [pull_resting(density, *width, c) for c in clips], ":", color=GREEN, label="pull, weights at rest"
        )
        axes.axvline(optimal_clip(density, width[0], grid=width[1])[0], ymax=0.6, color=INK, linewidth=0.8)
        for gain in (1.0, 0.5):
            descent = simulate(*width, gain)[0]
            axes.plot(descent, push(density, descent), "o", color=PURPLE, label="descent" if gain == 1 else None)
        axes.set(yscale="log", ylim=(3e-3, 5), xlabel="max|w| / rms(t)", title=width_name(*width))
    panels[0].set_ylabel("force on the maximum, a weight")
    panels[1].legend(loc="upper right", title="vertical line: MSE-optimal clip", title_fontsize=8)


def draw_gain(panels: Sequence[Axes]) -> None:
    rows = [row for row in ternary_rows() if row["study"] == "toy"]
    styles = {(2, 0.05): (ORANGE, "o-"), (2, 0.01): (ORANGE, "s--"), (3, 0.05): (BLUE, "o-"), (4, 0.05): (GREEN, "o-")}
    for (bits, rate), (color, marks) in styles.items():
        own = sorted((row["gain"], row) for row in rows if (row["bits"], row["rate"]) == (bits, rate))
        own = [(gain, row) for gain, row in own if spread(row["risk"], 3) != "diverges"]
        label = f"{'ternary' if bits == 2 else f'{bits} bits'}, rate {rate:g}"
        for axes, key in zip(panels, ("risk", "crest"), strict=True):
            values = [[x for x in row[key] if x is not None] for _, row in own]
            means = [statistics.mean(v) for v in values]
            errors = [statistics.stdev(v) / math.sqrt(len(v)) for v in values]
            axes.errorbar(
                [max(gain, 0.01) for gain, _ in own], means, errors, fmt=marks, color=color, label=label, markersize=4
            )
    for axes, key in zip(panels, ("excess risk", "final crest factor"), strict=True):
        axes.set(xscale="log", yscale="log", xlabel="gain of the gradient through the maximum", ylabel=key)
        axes.set_xticks([0.01, 0.03, 0.1, 0.3, 1, 2], ["0", "0.03", "0.1", "0.3", "1", "2"])
        axes.minorticks_off()
    panels[0].set(ylim=(0.03, 3))
    panels[0].set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
    panels[1].set_yticks([1.5, 2, 3, 4, 5], ["1.5", "2", "3", "4", "5"])
    panels[1].legend()


FIGURES: Mapping[str, tuple[int, Callable[[Sequence[Axes]], None]]] = {
    "error": (2, draw_error),
    "clip": (3, draw_clip),
    "crest": (1, draw_crest),
    "equilibrium": (2, draw_equilibrium),
    "gain": (2, draw_gain),
}


def figure_svg(name: str) -> str:
    """Return a figure as SVG whose ink follows the reader's light or dark scheme."""
    import io

    panels, draw = FIGURES[name]
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 3.3), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.subplots(1, panels, squeeze=False)[0]
        for each in axes:
            each.patch.set_alpha(0)
            each.grid(alpha=0.25, linewidth=0.5, color="#808080")
            each.title.set_fontsize(9)
        draw(list(axes))
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue().replace(INK, "currentColor")
    svg = "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"
    return svg.replace("<defs>", THEME + "\n <defs>", 1)


def main() -> None:
    torch.set_num_threads(1)
    text = PAGE.read_text(encoding="utf-8")
    for name, table in TABLES.items():
        text = with_table(name, table(), text)
    write_text(PAGE, text)
    for name in FIGURES:
        write_text(IMAGES / f"theory-{name}.svg", figure_svg(name))


if __name__ == "__main__":
    main()
