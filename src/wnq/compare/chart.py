"""The picture of a comparison: accuracy against bits, one line a method, the float networks as a band."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnq.compare.definition import Width, width_name
from wnq.files import replacing
from wnq.quantizer import FLOAT_BITS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which the colour-blind tell apart; further methods repeat them with other lines and marks.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>"
LINES = ("-", "--", ":", "-.")


def draw(content: dict[str, Any], out: Path) -> None:
    """Write ``accuracy.png`` and ``accuracy.svg``.

    Args:
        content: what ``results.json`` holds.
        out: the comparison's folder.
    """
    import matplotlib as mpl

    style: dict[Any, Any] = {"svg.hashsalt": "wnq", "text.parse_math": False, "font.size": 9}
    with mpl.rc_context(style):
        figure = figure_of(content)
        for suffix, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            with replacing(out / f"accuracy.{suffix}") as temporary:
                figure.savefig(temporary, format=suffix, dpi=160, metadata=metadata)


def figure_of(content: dict[str, Any]) -> "Figure":
    """Return the picture of a comparison's results."""
    from matplotlib.figure import Figure

    points = points_of(content["table"])
    places = places_of([width for line in points.values() for width in line])
    labels = [contender["label"] for contender in content["comparison"]["contenders"]]
    entries = len(labels) + 1
    columns = 1 + entries // 26
    figure = Figure(
        figsize=(5 + 0.7 * len(places) + 1.6 * columns, max(4.2, 0.24 * min(entries, 26))), layout="constrained"
    )
    axes = figure.add_subplot()
    anchor = content["float"]
    if anchor["mean"] is not None:
        spread = anchor["std"] or 0.0
        axes.axhspan(anchor["mean"] - spread, anchor["mean"] + spread, color="0.5", alpha=0.2, linewidth=0)
        axes.axhline(anchor["mean"], color="0.35", linewidth=1, label="float")
    pitch = 0.5 / max(1, len(labels))
    for index, label in enumerate(labels):
        line = points.get(label, {})
        shift = pitch * (index - (len(labels) - 1) / 2)
        look: dict[str, Any] = {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}
        look |= {
            "markersize": 4.5,
            "linewidth": 1.2,
            "capsize": 2.5,
            "linestyle": LINES[index // len(COLORS) % len(LINES)],
        }
        named: dict[str, Any] = {"label": label}
        for family in dict.fromkeys(family_of(width) for width in places):
            widths = [width for width in places if width in line and family_of(width) == family]
            if widths:
                errors = [line[width][1] or 0.0 for width in widths]
                axes.errorbar(
                    [places[w] + shift for w in widths], [line[w][0] for w in widths], errors, **look, **named
                )
                named = {}  # one entry in the legend
    axes.set_xticks(list(places.values()), [width_name(width) for width in places])
    axes.set_xlim(-0.6, max(0, len(places) - 1) + 0.6)
    axes.set_xlabel("bits of weights (W) and inputs (A)")
    axes.set_ylabel("accuracy after the last epoch (%)")
    recipe = content["comparison"]["recipe"]
    seeds = len(content["comparison"]["seeds"])
    spread_text = f"mean ± std over {seeds} seeds" if seeds > 1 else "one seed"
    axes.set_title(f"{recipe['model']['name']} on {recipe['data']['name']}, {spread_text}", fontsize=10)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", ncols=columns, frameon=False, fontsize=8)
    return figure


def points_of(rows: Sequence[dict[str, Any]]) -> dict[str, dict[Width, tuple[float, float | None]]]:
    """Return label -> width -> (mean, standard deviation); a width that was asked for in two ways stands once."""
    points: dict[str, dict[Width, tuple[float, float | None]]] = {}
    for row in rows:
        if row["mean"] is not None and math.isfinite(row["mean"]):
            points.setdefault(row["label"], {})[row["w_bits"], row["a_bits"]] = (row["mean"], row["std"])
    return points


def family_of(width: Width) -> int:
    """Return what a line may connect: 0 where inputs have the bits of the weights, 1 where they are float, else 2."""
    return 0 if width[0] == width[1] else 1 if width[1] == FLOAT_BITS else 2


def places_of(widths: Sequence[Width]) -> dict[Width, int]:
    """Return width -> place on the axis, family by family."""
    return {
        width: place for place, width in enumerate(sorted(set(widths), key=lambda width: (family_of(width), width)))
    }
