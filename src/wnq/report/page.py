"""Evidence as one HTML file that needs nothing else: the answer first, then tails, errors, layers, all numbers.

The file loads nothing from the network, works from disk, in light and dark, on a phone and on a wide screen, and is the
same bytes for the same input.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from wnq.analysis import ModelEvidence
from wnq.drawing import Chart, render_page, require_page
from wnq.files import write_text
from wnq.report import parts
from wnq.report.charts import ROWS, model_charts
from wnq.report.layers import layer_charts, ruled_keys
from wnq.report.subject import Subject, subject_of
from wnq.report.tables import cell, default_table, layer_columns, rule_table
from wnq.report.wording import answer, reading

TEMPLATE = "report.html.j2"

OPEN = 4
"""Layers whose plots are unfolded at first."""

T = TypeVar("T")

OnChart = Callable[[int, int], None]
"""Called with how many charts are drawn and how many there are."""


def write_report(
    path: str | Path,
    models: Sequence[ModelEvidence],
    *,
    title: str,
    lead: Sequence[str] = (),
    checks: Sequence[str] = (),
    table: Sequence[Mapping[str, object]] | None = None,
    provenance: Mapping[str, object] | None = None,
    focus: int | None = None,
    drawn: Sequence[str] | None = None,
    on_chart: OnChart | None = None,
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
        focus: the width that the answer is given for; by default that of a trained model, or else 4, or the nearest that was
            compared.
        drawn: names of the layers with plots of their own; by default the 24 with the largest error.
        on_chart: called after each chart, for a progress bar.

    Raises:
        ValueError: no model, or two of one name, or a focus that was not compared.
        OSError: the file cannot be written: path, cause and remedy.
        ImportError: matplotlib or jinja2 is missing.
    """
    subject = subject_of(models, focus=focus, drawn=drawn)
    require_page()
    drawing = _Drawing(subject, on_chart)
    page = _render(subject, drawing, title, lead=lead, checks=checks, table=table, provenance=provenance)
    write_text(path, page)
    return Path(path)


def save_plots(
    folder: str | Path,
    models: Sequence[ModelEvidence],
    *,
    focus: int | None = None,
    drawn: Sequence[str] | None = None,
    on_chart: OnChart | None = None,
) -> list[Path]:
    """Write every chart of the report as ``NAME.svg`` and ``NAME.png``, each by itself, and return the paths.

    Args:
        folder: where to; made if missing.
        models: as for :func:`write_report`.
        focus: as for :func:`write_report`.
        drawn: as for :func:`write_report`.
        on_chart: called after each chart.

    Raises:
        ValueError: as :func:`write_report`.
        OSError: a file cannot be written.
        ImportError: matplotlib or jinja2 is missing.
    """
    require_page()
    drawing = _Drawing(subject_of(models, focus=focus, drawn=drawn), on_chart)
    return [path for chart in drawing.all for path in drawing.done(chart.save(folder))]


class _Drawing:
    """All charts of a report, and how many of them are drawn."""

    def __init__(self, subject: Subject, on_chart: OnChart | None) -> None:
        self.models, self.layers = model_charts(subject), layer_charts(subject)
        self.all = [*self.models.values(), *(chart for own in self.layers.values() for chart in own)]
        self.count, self.on_chart = 0, on_chart

    def done(self, made: T) -> T:
        """Count one chart and return what was made of it."""
        self.count += 1
        if self.on_chart is not None:
            self.on_chart(self.count, len(self.all))
        return made

    def shown(self, chart: Chart) -> dict[str, Any]:
        """Return what the page shows of a chart."""
        from markupsafe import Markup

        return {"title": chart.title, "svg": Markup(self.done(chart.svg())), "keys": chart.keys}


def _render(
    subject: Subject,
    drawing: _Drawing,
    title: str,
    *,
    lead: Sequence[str],
    checks: Sequence[str],
    table: Sequence[Mapping[str, object]] | None,
    provenance: Mapping[str, object] | None,
) -> str:
    results = default_table(subject) if table is None else table
    columns = {key: cell(value)["numeric"] for row in reversed(results) for key, value in row.items()}
    columns = {key: columns[key] for row in results for key in row}
    charts = {name: drawing.shown(chart) for name, chart in drawing.models.items()}
    shown = {layer: [drawing.shown(chart) for chart in own] for layer, own in drawing.layers.items()}
    stat_columns = layer_columns(subject)
    return render_page(
        "wnq.report",
        TEMPLATE,
        title=title,
        lead=lead,
        checks=checks,
        subject=subject,
        several=len(subject.models) > 1,
        keys=subject.keys,
        answer=answer(subject),
        worst=parts.worst(subject),
        columns=columns,
        results=[[cell(row.get(column)) for column in columns] for row in results],
        findings=[parts.finding(subject.models[0], model) for model in subject.models[1:]],
        charts=charts,
        rows=ROWS,
        rules=[
            {
                "key": subject.keys[model.name],
                "rows": parts.rules(subject, model),
                "chart": charts.get(f"widths-{k}"),
            }
            for k, model in enumerate(subject.models)
            if rule_table(subject, model)
        ],
        layers=parts.layers(subject, shown),
        layer_keys=[*(subject.keys.values() if len(subject.models) > 1 else ()), *ruled_keys(subject)],
        open=OPEN,
        stat_columns=stat_columns,
        stat_rows=parts.stat_rows(subject, stat_columns),
        reading=reading(subject) if subject.focus else [],
        provenance=dict(provenance or {}),
    )
