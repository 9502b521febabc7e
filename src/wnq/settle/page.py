"""The verdict as one HTML file that needs nothing else.

The file loads nothing from the network, works from disk, in light and dark, on a phone and on a wide screen, and is the same
bytes for the same verdict.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from wnq.drawing import ARMS, Key, arm_name, number, render_page, require_page
from wnq.files import write_text
from wnq.settle import charts
from wnq.settle.charts import percent
from wnq.settle.experiment import ATTACHED, DETACHED, NONE
from wnq.settle.forest import forest_chart
from wnq.settle.markdown import markdown
from wnq.settle.wording import (
    ASKS,
    LOST,
    Json,
    accuracy_rows,
    amount,
    answer,
    control_note,
    interval,
    mean_of,
    notes,
    provenance,
    question,
    reason,
    rule,
    runs_text,
    title,
    trouble,
    value_of,
    wanted,
)
from wnq.settle.wording import SIGNS as VERDICT_SIGNS

__all__ = ["markdown", "require_page", "write_page"]

TEMPLATE = "verdict.html.j2"

TRACKS = {
    "crest": ("Crest factor", "max|w| / rms", "The tail: max|w| / rms.", 1.0),
    "relative_error": ("Relative error", "|w − w_q|² / |w|²", "|w − w_q|² / |w|²; dashed: what the law predicts.", 1.0),
    "tail_mass": ("Tail mass", "weights beyond 3 rms (%)", "Share of weights beyond 3 rms; Gaussian 0.27 %.", 100.0),
    "kurtosis": ("Kurtosis", "kurtosis", "Fourth over squared second central moment; Gaussian 3.", 1.0),
    "pull": (
        "Pull on the largest weight",
        "in rms of the gradient",
        "Above zero, descent shrinks that weight.",
        1.0,
    ),
}
"""Column of the tracks -> title, label of the axis, caption, factor."""

LAYER_COLUMNS = {
    "peak": "largest weight",
    "crest": "crest factor",
    "kurtosis": "kurtosis",
    "tail_mass": "tail mass",
    "error": "relative error",
    "law": "predicted error",
}


def write_page(verdict: Mapping[str, Any], path: str | Path) -> Path:
    """Write the page of a verdict and return its path.

    Args:
        verdict: what :func:`wnq.settle.judge` returned, or what ``verdict.json`` holds.
        path: the HTML file; folders on the way are made, a file in its place is replaced whole or not at all.

    Raises:
        OSError: the file cannot be written: path, cause and remedy.
        ImportError: matplotlib or jinja2 is missing.
    """
    write_text(path, _render(verdict))
    return Path(path)


def _render(verdict: Json) -> str:
    require_page()
    places = _places(verdict)
    keys = {arm: _key(arm, place) for arm, place in places.items()}
    counted = [width for width in verdict["widths"] if not width["control"]]
    beside = [width for width in verdict["widths"] if width["control"]]
    group = _group(verdict, counted, places, keys, "")
    controls = _group(verdict, beside, places, keys, "control-") if beside else None
    return render_page(
        "wnq.settle",
        TEMPLATE,
        title=title(verdict),
        question=question(verdict),
        answer=answer(verdict),
        facts=f"{runs_text(verdict)} {sum(len(claim['tests']) for w in counted for claim in w['claims'])} tests. "
        f"Written {verdict['written'][:10]}.",
        rule=rule(),
        signs=VERDICT_SIGNS,
        keys=list(keys.values()),
        arms=[(key, verdict["arms"][arm]) for arm, key in keys.items()],
        other_arms=", ".join(arm for arm in places if arm not in (ATTACHED, DETACHED, NONE)),
        seeds=verdict["comparison"]["seeds"],
        images=f"{verdict['images']['evaluation']:,}",
        overall=[
            {
                "letter": row["letter"],
                "text": row["claim"],
                "href": f"claim-{row['letter']}",
                "cells": [
                    ("all that count", row["verdict"]),
                    *((width["bits"], row["by_width"].get(width["bits"], "–")) for width in counted),
                ],
            }
            for row in verdict["overall"]
        ],
        counted=group,
        controls=controls,
        control_note=control_note(beside),
        track_note=_track_note(verdict),
        layer_columns=list(LAYER_COLUMNS.values()),
        troubles=[trouble(run) for run in verdict["unfinished"]],
        lost=LOST,
        notes=notes(verdict),
        provenance=provenance(verdict),
        comparison=json.dumps(verdict["comparison"], indent=2),
    )


def _track_note(verdict: Json) -> str:
    every = verdict["comparison"]["recipe"]["train"]["record_every"]
    return (
        f"Medians over the layers, recorded at the first step and every {every} steps before the weights move; lines are means "
        "over the seeds that finished, bands reach from the least to the greatest. Each width has axes of its own. The law knows "
        "no clipping: it can fall short where weights leave the range, which only the arm without normalization lets them."
    )


def _places(verdict: Json) -> dict[str, int]:
    """Return each arm's place among colours and markers: the three main arms always have the same."""
    main = {ATTACHED: 0, DETACHED: 1, NONE: 2}
    others = [arm for arm in verdict["arms"] if arm not in main]
    return {arm: main[arm] if arm in main else 3 + others.index(arm) % (ARMS - 3) for arm in verdict["arms"]}


def _key(arm: str, place: int) -> Key:
    return Key(arm, arm_name(place), place)


def _group(
    verdict: Json, widths: Sequence[Json], places: Mapping[str, int], keys: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return what the page shows of the widths that count, or of the controls."""
    from markupsafe import Markup

    floats = [value_of(value) for value in verdict["float"].values()]
    overall = {row["letter"]: row["verdict"] for row in verdict["overall"]}
    claims: list[dict[str, Any]] = []
    for index, claim in enumerate(widths[0]["claims"] if widths else []):
        own = [(width["bits"], width["claims"][index]) for width in widths]
        rows = [(bits, test) for bits, found in own for test in found["tests"]]
        uid = f"{prefix}claim-{claim['letter']}"
        claims.append(
            {
                "id": uid,
                "letter": claim["letter"],
                "text": claim["text"],
                "asks": ASKS.get(claim["letter"], ""),
                "verdict": "" if prefix else overall.get(claim["letter"], ""),
                "reasons": [(bits, found["verdict"], reason(found)) for bits, found in own],
                "svg": Markup(
                    forest_chart(f"{uid}-forest", f"Tests of claim {claim['letter']}: {claim['text']}", rows)
                ),
                "tests": [
                    {
                        "name": test["name"],
                        "rows": [_test(bits, found["tests"][place], verdict) for bits, found in own],
                    }
                    for place, test in enumerate(claim["tests"])
                ],
            }
        )
    drawn = charts.accuracy_chart(f"{prefix}accuracy-chart", f"Accuracy{_suffix(prefix)}", widths, floats, places)
    accuracies = [
        {"width": bits, "key": keys.get(arm), "cells": cells} for bits, arm, cells in accuracy_rows(verdict, widths)
    ]
    return {
        "names": [width["bits"] for width in widths],
        "suffix": _suffix(prefix),
        "claims": claims,
        "overview": [
            {
                "letter": claim["letter"],
                "text": claim["text"],
                "href": claim["id"],
                "cells": [(bits, word) for bits, word, _ in claim["reasons"]],
            }
            for claim in claims
        ],
        "accuracy": {"svg": Markup(drawn), "rows": accuracies},
        "widths": [_width(width, places, keys) for width in widths],
        "pulls": [
            {"width": width["bits"], "key": keys[arm], "cells": _pull(_runs(width, arm))}
            for width in widths
            for arm in places
        ],
    }


def _suffix(prefix: str) -> str:
    return " at the controls" if prefix else ""


def _runs(width: Json, arm: str) -> list[Json]:
    return [run for run in width["runs"] if run["label"] == arm]


def _test(bits: str, test: Json, verdict: Json) -> dict[str, Any]:
    seeds, values = len(verdict["comparison"]["seeds"]), test["values"]
    return {
        "width": bits,
        "verdict": test["verdict"],
        "estimate": amount(test, test["estimate"]),
        "interval": interval(test),
        "seeds": [amount(test, value, unit=False) for value in values],
        "lacking": f"({len(values)} of {seeds} seeds)" if len(values) < seeds else "",
        "wanted": wanted(test),
    }


def _pull(runs: Sequence[Json]) -> list[str]:
    shares = [mean_of(layer["toward"] for layer in run["layers"]) for run in runs]
    sizes = [mean_of(layer["pull"] for layer in run["layers"]) for run in runs]
    return [
        percent(mean_of(shares)),
        ", ".join(map(percent, shares)) or "–",
        number(mean_of(sizes)),
        ", ".join(map(number, sizes)) or "–",
    ]


def _width(width: Json, places: Mapping[str, int], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return the charts and the table of layers of one width."""
    from markupsafe import Markup

    name, uid = width["bits"], width["bits"].lower()
    arms = {arm: runs for arm in places if (runs := _runs(width, arm))}
    layers = list(dict.fromkeys(layer["layer"] for runs in arms.values() for run in runs for layer in run["layers"]))
    if not arms:
        return {"name": name, "tracks": [], "layers": None}
    tracks = [
        {
            "title": title,
            "note": note,
            "svg": Markup(
                charts.track_chart(f"{uid}-{column}", f"{title} at {name}", label, column, arms, places, factor=factor)
            ),
        }
        for column, (title, label, note, factor) in TRACKS.items()
    ]
    share = charts.share_chart(f"{uid}-share", f"Records toward zero at {name}", arms, places)
    tracks.append(
        {"title": "Direction of that pull", "note": "Mark: a seed. Thin tick: a layer of a seed.", "svg": Markup(share)}
    )
    drawn = charts.layer_chart(f"{uid}-layers", f"Crest factor of every layer at {name}", layers, arms, places)
    rows = [
        {"layer": layer, "key": keys[arm], "cells": _layer(runs, layer)}
        for layer in layers
        for arm, runs in arms.items()
    ]
    return {"name": name, "tracks": tracks, "layers": {"svg": Markup(drawn), "rows": rows} if layers else None}


def _layer(runs: Sequence[Json], layer: str) -> list[str]:
    own = [found for run in runs for found in run["layers"] if found["layer"] == layer]
    return [
        " → ".join(number(mean_of(found[f"{column}_{when}"] for found in own)) for when in ("start", "end"))
        for column in LAYER_COLUMNS
    ]
