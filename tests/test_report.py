"""The page of a report: whole, self-contained, the same bytes, and names are data."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from helpers_report import EVIL, Page, evidence, tailed
from wnq.analysis import Histogram, LayerStats, ModelEvidence, collect_evidence
from wnq.attach import freeze_, quantize_
from wnq.methods import get_method
from wnq.models import build_model
from wnq.plan import make_plan
from wnq.report import write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

LAYERS = ["conv1", "layer1.0.conv1", EVIL]
MODEL_CHARTS = 3  # remedies, crest factors, prediction; and one of widths for each model
LAYER_CHARTS = 2  # histogram, tail


def weights(seed: int, df: float = 3.0) -> dict[str, torch.Tensor]:
    return {layer: tailed(8, 4, 3, 3, seed=10 * seed + place, df=df) for place, layer in enumerate(LAYERS)}


@pytest.fixture(scope="module")
def models() -> list[ModelEvidence]:
    return [
        evidence("start", weights(0), summary={"accuracy": 0.5, "bytes": 1234567}),
        evidence("attached", weights(1, df=30), own=3),
        evidence("8 & more", weights(2), own=8),
    ]


@pytest.fixture(scope="module")
def page_path(models: list[ModelEvidence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    return write_report(path, models, title="Tails & <error>", lead=["A <b>question</b>."], provenance={"seed": 0})


def test_page_is_well_formed_and_complete(page_path: Path):
    page = Page(page_path.read_text(encoding="utf-8"))
    assert len(page.named("svg")) == MODEL_CHARTS + 3 + LAYER_CHARTS * len(LAYERS)
    assert sum("layer" in str(attrs.get("class")) for attrs in page.named("details")) == len(LAYERS)
    for wanted in [*LAYERS, "start", "attached", "8 & more", "Tails & <error>", "A <b>question</b>.", "1,234,567"]:
        assert wanted in page.text
    assert len(page_path.read_bytes()) < 500_000
    assert list(page_path.parent.iterdir()) == [page_path]


def test_the_page_leads_with_the_answer(page_path: Path):
    page = Page(page_path.read_text(encoding="utf-8"))
    headings = re.findall(r"<h2[^>]*>([^<]+)</h2>", page_path.read_text(encoding="utf-8"))
    assert headings[0] == "What 3 bits cost, where, and what would help"
    assert headings[1] == "Results"
    assert page.words.index("Most in") < page.words.index("Results")


def test_names_are_data_not_markup(page_path: Path):
    assert len(Page(page_path.read_text(encoding="utf-8")).named("script")) == 1


def test_page_refers_to_nothing_outside(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|@import|@font-face", text)
    for tag, attrs in Page(text).tags:
        for key in ("src", "href", "xlink:href"):
            assert attrs.get(key, "#") in ("data:,",) or str(attrs.get(key, "#")).startswith("#"), (tag, attrs)


def test_ids_are_unique_and_references_resolve(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {str(a["xlink:href"])[1:] for a in page.named("use")}
    used |= {str(a["href"])[1:] for a in page.named("a")}
    for _, attrs in page.tags:
        used |= set(str(attrs.get("aria-labelledby") or "").split())
    assert used <= set(ids)


def test_every_chart_has_a_text_alternative_with_its_numbers(page_path: Path, models: list[ModelEvidence]):
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert len(str(svg["aria-labelledby"]).split()) == 2
    assert f"Weight histogram of {EVIL}" in page.text
    assert f"Tail of {EVIL}" in page.text
    assert f"attached: crest factor {models[1].stats[0].crest:.3g}" in page.text


def test_charts_take_their_colours_from_the_page(page_path: Path):
    svgs = re.findall(r"<svg.*?</svg>", page_path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for svg in svgs:
        colours = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", svg))
        assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours


def test_same_input_same_bytes(models: list[ModelEvidence], tmp_path: Path):
    first = write_report(tmp_path / "a.html", models, title="t", drawn=LAYERS[:1]).read_bytes()
    assert write_report(tmp_path / "b.html", models, title="t", drawn=LAYERS[:1]).read_bytes() == first


def test_results_table_shows_the_given_rows(models: list[ModelEvidence], tmp_path: Path):
    rows = [{"name": "attached", "w_bits": 3}, {"name": "<other>", "top.1": 0.25, "w_bits": None, "note": math.nan}]
    text = write_report(tmp_path / "r.html", models[:1], title="t", table=rows, drawn=[]).read_text(encoding="utf-8")
    page = Page(text)
    for wanted in ("w\u00a0bits", "top.1", "0.2500", "<other>"):
        assert wanted in page.text


def test_one_model_alone_is_drawn_with_the_levels_of_every_width(tmp_path: Path):
    model = evidence("alone", {"a": tailed(20, 30), "b": tailed(30, 30, seed=1)})
    text = write_report(tmp_path / "r.html", [model], title="t").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.named("svg")) == MODEL_CHARTS + 1 + LAYER_CHARTS * 2
    assert "What changed against" not in page.text
    histogram = next(
        svg for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL) if "Weight histogram of a" in svg
    )
    ticks = re.findall(r"(\d) bits</text>", histogram)
    assert ticks == ["2", "3", "4"]  # 256 levels would run together


def test_only_the_worst_of_many_layers_are_drawn_and_the_page_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnq.report.subject.DRAWN", 3)
    monkeypatch.setattr("wnq.report.charts.ROWS", 5)
    monkeypatch.setattr("wnq.report.page.ROWS", 5)
    sizes = {f"block.{k}.weight": tailed(6, 6 + k % 7, seed=k, df=3 + k % 5) for k in range(12)}
    model = evidence("many", sizes, bits=(4,))
    text = write_report(tmp_path / "r.html", [model], title="t").read_text(encoding="utf-8")
    page = Page(text)
    drawn = re.findall(r"<summary><code>([^<]+)</code>", text)
    errors = {layer: model.profiles[layer].measured(4, "max") or 0.0 for layer in sizes}
    assert drawn == sorted(sizes, key=lambda layer: -errors[layer])[:3]
    assert "3 of 12 layers have plots here, the largest error first" in page.words
    assert "show the 5 with the largest error, of 12" in page.words
    table = text[text.index('id="stats"') :]
    assert all(f">{layer}</th>" in table for layer in sizes)
    chosen = write_report(tmp_path / "c.html", [model], title="t", drawn=["block.3.weight"])
    assert re.findall(r"<summary><code>([^<]+)</code>", chosen.read_text(encoding="utf-8")) == ["block.3.weight"]


def test_a_width_that_was_not_compared_is_refused(models: list[ModelEvidence], tmp_path: Path):
    with pytest.raises(ValueError, match="focus must be one of the widths compared, 2, 3, 4, 8, got 5"):
        write_report(tmp_path / "r.html", models, title="t", focus=5)
    assert not list(tmp_path.iterdir())


def test_edges_of_the_evidence(tmp_path: Path):
    nothing = math.nan
    zero = LayerStats("zero", "Linear", (2, 2), 4, 0, 0.0, *(nothing,) * 4, "wnq", 3, *(nothing,) * 4)
    blank = ModelEvidence("blank", [zero], {"zero": Histogram((-1.0, 0.0, 1.0), (0, 0))}, {})
    zeros = evidence("zeros", {"zero": torch.zeros(3, 3)})
    spoilt = evidence("spoilt", {"a": torch.full((3, 4), nothing), "b": tailed(4, 5)})
    for index, models in enumerate(
        (
            [ModelEvidence("empty", [])],
            [blank],
            [zeros],
            [spoilt],
            [blank, evidence("one", {"zero": tailed(3, 3), "b": tailed(4, 4)}, own=2), spoilt],
            [evidence("dot", {"a": torch.ones(1, 1)})],
        )
    ):
        text = write_report(tmp_path / f"{index}.html", models, title="t").read_text(encoding="utf-8")
        spoken = Page(text).text.lower()
        for allowed in ("nan and infinite", "nan or infinite"):
            spoken = spoken.replace(allowed, "")
        assert "nan" not in spoken and "inf " not in spoken, index


def test_a_frozen_model_alone_says_that_its_error_cannot_be_told(tmp_path: Path):
    model = build_model("digits_mlp")
    freeze_(quantize_(model, make_plan(model, get_method("wnq", w_bits=2))))
    frozen = collect_evidence(model, "frozen")
    text = write_report(tmp_path / "r.html", [frozen], title="t").read_text(encoding="utf-8")
    page = Page(text)
    assert "frozen holds quantized values only: what their rounding cost cannot be told" in page.words
    assert "Error by width and clip rule" not in page.words
    assert len(page.named("svg")) == 1 + LAYER_CHARTS * len(frozen.stats)  # crest factors, and the layers


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_models_need_distinct_names(names: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match="name of its own"):
        write_report(tmp_path / "r.html", [ModelEvidence(name, []) for name in names], title="t")


def test_a_path_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/r\.html.*folder"):
        write_report(tmp_path / "file" / "r.html", [ModelEvidence("a", [])], title="t")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "wnq\[report\]"'):
        write_report(tmp_path / "r.html", [ModelEvidence("a", [])], title="t")
