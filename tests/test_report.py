import dataclasses
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from wnq.analysis import Histogram, LayerStats, ModelEvidence, error_stats, histogram, tensor_stats
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import Uniform
from wnq.report import write_report
from wnq.report.plots import short_name

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "link", "input", "br", "hr", "img"}
EVIL = "<script>alert('x')</script>$x_{1}$"


class Page(HTMLParser):
    """Checks nesting while it collects tags, ids and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def evidence(name: str, layers: list[str], *, bits: int | None, df: float = 4.0) -> ModelEvidence:
    stats: list[LayerStats] = []
    histograms: dict[str, Histogram] = {}
    levels: dict[str, list[float]] = {}
    generator = torch.Generator().manual_seed(len(name))
    for layer in layers:
        weight = torch.randn(8, 4, 3, 3, generator=generator)
        weight = weight / torch.rand(weight.shape, generator=generator).clamp(min=1 / df)
        values = dataclasses.asdict(tensor_stats(weight))
        del values["peak"]
        if bits is not None:
            quantized = Normalized(max_abs, Uniform(bits)).quantize(weight)
            values |= {"method": "wnq", "bits": bits, **dataclasses.asdict(error_stats(weight, quantized))}
            levels[layer] = (quantized.codebook / values["rms"]).tolist()
        stats.append(LayerStats(layer, "Conv2d", tuple(weight.shape), **values))
        histograms[layer] = histogram(weight)
    return ModelEvidence(name, stats, histograms, levels, {"accuracy": 0.5, "bytes": 1234567})


LAYERS = ["conv1", "layer1.0.conv1", EVIL]


@pytest.fixture(scope="module")
def models() -> list[ModelEvidence]:
    return [
        evidence("start", LAYERS, bits=None),
        evidence("attached", LAYERS, bits=3, df=2),
        evidence("8 & more", LAYERS, bits=8),
    ]


@pytest.fixture(scope="module")
def page_path(models: list[ModelEvidence], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "new" / "report.html"
    return write_report(path, models, title="Tails & <error>", lead=["A <b>question</b>."], provenance={"seed": 0})


def test_page_is_well_formed_and_complete(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.named("svg")) == 2 + len(LAYERS)
    assert len(page.named("details")) == len(LAYERS)
    for wanted in [*LAYERS, "start", "attached", "8 & more", "Tails & <error>", "A <b>question</b>.", "1,234,567"]:
        assert wanted in page.text
    assert len(page_path.read_bytes()) < 300_000
    assert list(page_path.parent.iterdir()) == [page_path]


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
    for _, attrs in page.tags:
        used |= set(str(attrs.get("aria-labelledby") or "").split())
    assert used <= set(ids)


def test_every_chart_has_a_text_alternative(page_path: Path):
    page = Page(page_path.read_text(encoding="utf-8"))
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert len(str(svg["aria-labelledby"]).split()) == 2
    assert f"Weight histogram of {EVIL}" in page.text


def test_charts_take_their_colours_from_the_page(page_path: Path):
    svgs = re.findall(r"<svg.*?</svg>", page_path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for svg in svgs:
        colours = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", svg))
        assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours


def test_same_input_same_bytes(models: list[ModelEvidence], tmp_path: Path):
    first = write_report(tmp_path / "a.html", models, title="t").read_bytes()
    assert write_report(tmp_path / "b.html", models, title="t").read_bytes() == first


def test_results_table_shows_the_given_rows(models: list[ModelEvidence], tmp_path: Path):
    rows = [{"name": "attached", "w_bits": 3}, {"name": "<other>", "top.1": 0.25, "w_bits": None, "note": math.nan}]
    page = Page(write_report(tmp_path / "r.html", models, title="t", table=rows).read_text(encoding="utf-8"))
    for wanted in ("w\u00a0bits", "top.1", "0.2500", "<other>"):
        assert wanted in page.text


def test_edges_of_the_evidence(tmp_path: Path):
    nothing = math.nan
    zero = LayerStats(
        "zero",
        "Linear",
        (2, 2),
        4,
        0,
        0.0,
        nothing,
        nothing,
        nothing,
        nothing,
        "wnq",
        3,
        nothing,
        nothing,
        nothing,
        nothing,
    )
    blank = ModelEvidence("blank", [zero], {"zero": Histogram((-1.0, 0.0, 1.0), (0, 0))}, {})
    for index, models in enumerate(
        ([ModelEvidence("empty", [])], [blank], [blank, evidence("one", ["zero", "b"], bits=2)])
    ):
        text = write_report(tmp_path / f"{index}.html", models, title="t").read_text(encoding="utf-8")
        assert "nan" not in Page(text).text.lower().replace("nan and infinite", "")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("transformer.h.11.attn.c_proj", "…h.11.attn.c_proj"),
        ("a" * 30 + "b", "…" + "a" * 20 + "b"),
    ],
)
def test_long_names_keep_their_end(name: str, expected: str):
    assert short_name(name) == expected


@pytest.mark.parametrize("names", [[], ["a", "a"]])
def test_models_need_distinct_names(names: list[str], tmp_path: Path):
    with pytest.raises(ValueError, match="name of its own"):
        write_report(tmp_path / "r.html", [ModelEvidence(name, []) for name in names], title="t")


def test_a_path_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/r\.html.*folder"):
        write_report(tmp_path / "file" / "r.html", [ModelEvidence("a", [])], title="t")


def browse(page: Path, profile: Path, width: int = 1200) -> tuple[str, str]:
    """Return the document after its scripts ran, and the browser's log."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --enable-logging=stderr --dump-dom --window-size={width},800"
    command = [chromium, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


def test_browser_runs_the_page_without_complaint(page_path: Path, tmp_path: Path):
    document, log = browse(page_path, tmp_path / "profile")
    assert 'data-ready="1"' in document
    assert "CONSOLE" not in log


def test_page_fits_a_phone_sorts_filters_and_switches_theme(page_path: Path, tmp_path: Path):
    probe = """<script>
    const root = document.documentElement, every = (query) => [...document.querySelectorAll(query)];
    const click = (name) => every("#stats thead button").find((button) => button.textContent === name).click();
    const bits = () => every("#stats tbody tr:not([hidden])").map((row) => row.cells[6].dataset.value || "none").join();
    const found = [Math.max(0, root.scrollWidth - innerWidth)];
    click("bits"); found.push(bits());
    click("bits"); found.push(bits());
    const filter = document.getElementById("filter");
    filter.value = "ATTACHED"; filter.dispatchEvent(new Event("input")); found.push(bits());
    document.getElementById("theme").click();
    root.dataset.probe = [...found, root.dataset.theme].join("|");
    </script>"""
    probed = tmp_path / "probed.html"
    probed.write_text(page_path.read_text(encoding="utf-8").replace("</body>", probe + "</body>"), encoding="utf-8")
    document, log = browse(probed, tmp_path / "profile", width=360)
    assert "CONSOLE" not in log
    found = re.search('data-probe="([^"]*)"', document)
    assert found is not None
    none = ",none,none,none"
    assert found[1] == f"0|8,8,8,3,3,3{none}|3,3,3,8,8,8{none}|3,3,3|dark"


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'matplotlib: pip install "wnq\[report\]"'):
        write_report(tmp_path / "r.html", [ModelEvidence("a", [])], title="t")
