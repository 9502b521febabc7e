"""Draw the README's picture: one layer's weights before, after plain max scaling, and after WNQ (half a minute).

python docs/figures.py
"""

from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from wnq.analysis import collect_evidence
from wnq.data import load_data
from wnq.demo import ARMS, START, TRAINING, float_start, train_arm

LAYER = "6"
STYLE = {
    "start": ("#8a8f98", "float start"),
    "detached-w3a3": ("#c24e00", "3 bits, detached"),
    "wnq-w3a3": ("#0b72b5", "3 bits, wnq"),
}


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    start = float_start(data, START)
    evidence = {"start": collect_evidence(start, "start", bins=60)}
    for arm in ARMS:
        if arm.name in STYLE:
            model, _ = train_arm(arm, start, data, TRAINING)
            evidence[arm.name] = collect_evidence(model, arm.name, bins=60)
    figure = Figure(figsize=(8, 3.2), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, (color, label) in STYLE.items():
        histogram = evidence[name].histograms[LAYER]
        crest = next(row.crest for row in evidence[name].stats if row.name == LAYER)
        axes.stairs(
            histogram.density(),
            histogram.edges,
            fill=name == "start",
            alpha=0.35 if name == "start" else 1,
            color=color,
            linewidth=1.8,
            label=f"{label}: crest factor {crest:.2f}",
        )
    for row, name in enumerate(("detached-w3a3", "wnq-w3a3")):
        levels = evidence[name].levels[LAYER]
        axes.plot(levels, [4e-4 * 0.6**row] * len(levels), "|", color=STYLE[name][0], markersize=7, markeredgewidth=1.8)
    axes.set_yscale("log")
    axes.set_ylim(top=6)
    axes.set_xlabel("weight / rms (ticks: the eight quantization levels)")
    axes.set_ylabel("density")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right", fontsize=8)
    figure.savefig(Path(__file__).parent / "images" / "tail.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
