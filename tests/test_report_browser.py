"""The page of a report in headless Chromium, from disk: no complaint, everything fits, the tables sort by mouse and keyboard."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers_report import EVIL, Browser, evidence, tailed
from wnq.report import write_report

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

LONG = "encoder.transformer.blocks.11.self_attention.output_projection"
LAYERS = ["conv1", LONG, EVIL]
CHARTS = 3 + 2 + 2 * len(LAYERS)


def weights(seed: int, df: float) -> dict[str, torch.Tensor]:
    return {layer: tailed(12, 40 + place, seed=seed + place, df=df) for place, layer in enumerate(LAYERS)}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    start = evidence("start", weights(0, 2.5), summary={"accuracy": 61.5})
    after = evidence("trained_with_a_rather_long_name", weights(9, 30), own=3, summary={"accuracy": 60.25})
    return {
        "one": write_report(folder / "one.html", [start], title="One"),
        "two": write_report(
            folder / "two.html", [start, after], title="Before & after", provenance={"file": "x" * 200}
        ),
    }


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


OVERFLOWING = """Array.from(document.querySelectorAll("body *")).filter((element) => !element.closest(".scroll, svg") &&
  element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 0.5).map((e) => e.outerHTML.slice(0, 99))"""

CONTRAST = """(() => {
  const light = (color) => { const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => { for (let e = element; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
    if (!c.endsWith(", 0)")) return c; } return "rgb(255, 255, 255)"; };
  const text = Array.from(document.querySelectorAll("p, dd, dt, td, th, h1, h2, summary, figcaption, svg text")).filter((e) =>
    e.checkVisibility() && e.textContent.trim());
  return Math.min(...text.map((e) => { const style = getComputedStyle(e);
    const pair = [light(e.matches("svg text") ? style.fill : style.color), light(behind(e))].sort((a, b) => b - a);
    return (pair[0] + 0.05) / (pair[1] + 0.05); }));
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1600])
@pytest.mark.parametrize("name", ["one", "two"])
def test_the_page_shows_all_and_fits(browser: Browser, pages: dict[str, Path], name: str, width: int, scheme: str):
    browser.show(pages[name], width=width, scheme=scheme)
    assert browser.run("document.documentElement.dataset.ready") == "1"
    assert browser.run("location.protocol") == "file:"
    browser.run("document.querySelectorAll('details').forEach((element) => { element.open = true; })")
    assert browser.run("innerWidth") == width
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(OVERFLOWING) == []
    charts = """Array.from(document.querySelectorAll("svg")).filter((svg) => {
      const box = svg.getBoundingClientRect(); return box.width > 200 && box.height > 40 && svg.querySelector("path"); }).length"""
    assert browser.run(charts) == CHARTS - (name == "one")
    # 4.5 is the least that WCAG asks of text.
    assert browser.run(CONTRAST) >= 4.5
    page = browser.run("getComputedStyle(document.body).backgroundColor")
    assert (page == "rgb(17, 19, 22)") == (scheme == "dark")
    assert browser.complaints == []
    assert browser.screenshot().startswith(b"\x89PNG")


NAMES = "Array.from(document.querySelectorAll('#stats tbody tr:not([hidden])')).map((row) => row.cells[0].textContent)"


def column(browser: Browser, heading: str) -> list[float | None]:
    script = """(heading) => { const place = Array.from(document.querySelectorAll("#stats thead th"))
      .findIndex((head) => head.textContent === heading);
      return Array.from(document.querySelectorAll("#stats tbody tr")).map((row) => row.cells[place].dataset.value ?? null); }"""
    return [None if text is None else float(text) for text in browser.run(f"({script})({heading!r})")]


def select(browser: Browser, heading: str, action: str) -> str | None:
    script = """(heading, action) => { const button = Array.from(document.querySelectorAll("#stats thead button"))
      .find((button) => button.textContent === heading);
      button[action](); return button.closest("th").getAttribute("aria-sort"); }"""
    return browser.run(f"({script})({heading!r}, {action!r})")


def test_the_table_sorts_by_mouse_and_by_keyboard(browser: Browser, pages: dict[str, Path]):
    browser.show(pages["two"], width=1600)
    names = browser.run(NAMES)
    assert names == [layer for layer in LAYERS for _ in range(2)]
    heading = "largest weight"
    before = column(browser, heading)
    assert select(browser, heading, "click") == "descending"
    assert column(browser, heading) == sorted(before, key=lambda value: -(value or 0.0))
    # The keyboard: Enter and the space bar turn the order round.
    select(browser, heading, "focus")
    browser.press("Enter", 13)
    assert column(browser, heading) == sorted(before, key=lambda value: value or 0.0)
    browser.press(" ", 32)
    assert column(browser, heading) == sorted(before, key=lambda value: -(value or 0.0))
    # Tab reaches the next heading.
    browser.press("Tab", 9)
    assert browser.run("document.activeElement.textContent") == "best\N{NO-BREAK SPACE}clip"
    browser.press("Enter", 13)
    sorted_by = "Array.from(document.querySelectorAll('#stats th[aria-sort]')).map((head) => head.textContent)"
    assert browser.run(sorted_by) == ["best\N{NO-BREAK SPACE}clip"]
    # What has no number stays at the end, whichever way.
    for _ in range(2):
        select(browser, "bits", "click")
        assert column(browser, "bits")[3:] == [None] * 3
    assert select(browser, "layer", "click") == "ascending"
    assert browser.run(NAMES) == [layer for layer in (EVIL, "conv1", LONG) for _ in range(2)]
    assert browser.complaints == []


def test_the_filter_the_theme_and_the_links(browser: Browser, pages: dict[str, Path]):
    browser.show(pages["two"], width=360)
    type_in = "(text) => { filter.value = text; filter.dispatchEvent(new Event('input')); }"
    browser.run(f"({type_in})('SELF_ATT')")
    assert browser.run(NAMES) == [LONG] * 2
    browser.run(f"({type_in})('')")
    assert len(browser.run(NAMES)) == 2 * len(LAYERS)
    assert browser.run("document.getElementById('theme').click(), document.documentElement.dataset.theme") == "dark"
    assert browser.run("document.getElementById('theme').click(), document.documentElement.dataset.theme") == "light"
    browser.run("document.querySelector('[data-fold=close]').click()")
    assert browser.run("document.querySelectorAll('details.layer[open]').length") == 0
    browser.run("document.querySelector('.worst a').click()")
    browser.run("0")
    assert browser.run("document.querySelector(location.hash).open")
    assert browser.complaints == []


def test_the_page_reads_without_scripts(pages: dict[str, Path], browser: Browser):
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.show(pages["one"], width=360)
        assert browser.run("document.querySelectorAll('#stats tbody tr').length") == len(LAYERS)
        # What needs a script is not offered.
        assert (
            browser.run("Array.from(document.querySelectorAll('button, input')).some((e) => e.checkVisibility())")
            is False
        )
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
