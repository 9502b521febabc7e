"""Evidence as one HTML file that needs nothing else: results, tails before and after, errors against the law.

The file loads nothing from the network, works from disk, in light and dark, on a phone and on a wide screen, and is the
same bytes for the same input.
"""

import math
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from wnq.analysis import ModelEvidence
from wnq.files import write_text
from wnq.report import plots
from wnq.report.plots import median, number

TEMPLATE = "report.html.j2"

COLUMNS: dict[str, str] = {
    "parameters": "number of weights",
    "method": "how the weight is quantized",
    "bits": "width of a code",
    "crest": "max|w| / rms(w): Gaussian about sqrt(2 ln parameters)",
    "kurtosis": "fourth over squared second central moment: Gaussian 3",
    "tail_mass": "fraction of weights beyond 3 rms: Gaussian 0.0027",
    "outlier_energy": "their share of the squared norm",
    "relative_error": "|w - w_q|² / |w|²",
    "rescaled_error": "the same after the best single rescale, 1 - cos²(w, w_q)",
    "law_error": "step² / 12 / mean(w²)",
    "rescale": "that best factor; 1 where magnitudes are kept",
    "zeros": "fraction of weights that are exactly 0",
    "entropy": "zero-order entropy of the codes, bits a weight",
    "levels_used": "distinct codes that occur",
    "nonfinite": "NaN and infinite weights, left out of all else",
}
"""Columns of the layer table after layer, model, kind and shape, with what each means."""


def write_report(
    path: str | Path,
    models: Sequence[ModelEvidence],
    *,
    title: str,
    lead: Sequence[str] = (),
    checks: Sequence[str] = (),
    table: Sequence[Mapping[str, object]] | None = None,
    provenance: Mapping[str, object] | None = None,
) -> Path:
    """Write the report and return its path.

    Args:
        path: the HTML file; folders on the way are made, a file in its place is replaced whole or not at all.
        models: the evidence; the first is what the others are compared with, usually the float start.
        title: heading of the page.
        lead: paragraphs under the heading, for example the question and the verdict; plain text.
        checks: sentences listed under the results, one a claim that was held against the numbers; plain text.
        table: rows of the results table; their keys become columns in order of appearance. Default: each model's
            summary with the medians of its layers.
        provenance: what the numbers depend on (hardware, versions, seeds, command), shown at the end.

    Raises:
        ValueError: no model, or two of one name.
        OSError: the file cannot be written: path, cause and remedy.
        ImportError: matplotlib or jinja2 is missing.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"a report needs at least one model, each with a name of its own, got {names}.")
    page = _render(models, title=title, lead=lead, checks=checks, table=table, provenance=provenance)
    write_text(path, page)
    return Path(path)


def _render(
    models: Sequence[ModelEvidence],
    *,
    title: str,
    lead: Sequence[str],
    checks: Sequence[str],
    table: Sequence[Mapping[str, object]] | None,
    provenance: Mapping[str, object] | None,
) -> str:
    try:
        import matplotlib as _  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise ImportError(f'reports need {error.name}: pip install "wnq[report]"') from error
    layers = list(dict.fromkeys(row.name for model in models for row in model.stats))
    results = _default_table(models) if table is None else table
    columns = {key: _cell(value)["numeric"] for row in reversed(results) for key, value in row.items()}
    columns = {key: columns[key] for row in results for key in row}
    charts = {"crest": "", "law": ""}
    if layers:
        charts["crest"] = Markup(plots.crest_chart("crest", layers, models))
    if any(plots.law_points(model) for model in models):
        charts["law"] = Markup(plots.law_chart("law", models))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files("wnq.report").joinpath(TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title,
        lead=lead,
        checks=checks,
        legend=[_key(index, model.name) for index, model in enumerate(models)],
        keys={model.name: _key(index, model.name) for index, model in enumerate(models)},
        columns=columns,
        results=[[_cell(row.get(column)) for column in columns] for row in results],
        findings=[_finding(models[0], model) for model in models[1:]],
        charts=charts,
        layers=[
            {
                "name": layer,
                "rows": [(_key(i, m.name), row) for i, m in enumerate(models) for row in m.stats if row.name == layer],
                "svg": Markup(plots.histogram_chart(f"layer{place}", layer, models)) if _drawn(models, layer) else "",
            }
            for place, layer in enumerate(layers)
        ],
        stat_columns=COLUMNS,
        stat_rows=[
            (
                row,
                _key(index, model.name),
                {key: _cell(getattr(row, key)) for key in COLUMNS} | {"method": _cell(row.method or "float")},
            )
            for layer in layers
            for index, model in enumerate(models)
            for row in model.stats
            if row.name == layer
        ],
        provenance=dict(provenance or {}),
        number=number,
    )


def _drawn(models: Sequence[ModelEvidence], layer: str) -> bool:
    return any(layer in model.histograms for model in models)


def _key(index: int, name: str) -> dict[str, str]:
    """Return what a legend shows of a model: its colour variable, its marker, its name."""
    color = "--start" if index == 0 else f"--arm{(index - 1) % plots.ARMS}"
    return {"color": color, "sign": plots.SIGNS[index % len(plots.SIGNS)], "name": name}


def _cell(value: object) -> dict[str, Any]:
    """Return the text of a table cell and, for a number, the value to sort by."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"text": "–" if value is None else str(value), "value": None, "numeric": value is None}
    if not math.isfinite(value):
        return {"text": "–", "value": None, "numeric": True}
    text = (
        f"{value:,.0f}"
        if isinstance(value, int) or not value
        else f"{value:,.0f}"
        if abs(value) >= 1e4
        else f"{value:#.4g}".rstrip(".")
    )
    return {"text": text, "value": value, "numeric": True}


def _default_table(models: Sequence[ModelEvidence]) -> list[Mapping[str, object]]:
    return [
        {
            "name": model.name,
            **model.summary,
            "median crest": median(row.crest for row in model.stats),
            "median kurtosis": median(row.kurtosis for row in model.stats),
            "median rescaled error": median(row.rescaled_error for row in model.stats),
        }
        for model in models
    ]


def _finding(start: ModelEvidence, model: ModelEvidence) -> dict[str, Any]:
    """Return the comparison of one model with the start, over the layers that both have."""
    before = {row.name: row for row in start.stats}
    pairs = [(before[row.name], row) for row in model.stats if row.name in before]
    finite = [(a, b) for a, b in pairs if math.isfinite(a.crest) and math.isfinite(b.crest)]

    def change(column: str) -> tuple[str, str]:
        return tuple(number(median(getattr(pair[side], column) for pair in pairs)) for side in (0, 1))  # pyright: ignore[reportReturnType]

    return {
        "name": model.name,
        "crest": change("crest"),
        "kurtosis": change("kurtosis"),
        "tail_mass": change("tail_mass"),
        "lower": sum(b.crest < a.crest for a, b in finite),
        "layers": len(finite),
        "error": number(median(row.rescaled_error for row in model.stats)),
    }
