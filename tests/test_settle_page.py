import copy
import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wnq.drawing import round_values
from wnq.recipe import DataSection, ModelSection, Recipe
from wnq.settle import ARMS, CLAIMS, LayerMeasure, RunMeasure, experiment, hold, settle
from wnq.settle.claims import combined
from wnq.settle.page import markdown, write_page
from wnq.settle.wording import amount
from wnq.train import TrainConfig

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")

VOID = {"meta", "link", "input", "br", "hr", "img"}
EVIL = "<script>alert('x')</script>$x_{1}$|`*"
CHARTS = 5 + 1  # a forest a claim, the accuracy
CHARTS_A_WIDTH = 5 + 1 + 1  # tracks, direction of the pull, layers

EFFECTS = {
    "attached": {"toward": 0.95, "peak": 0.5, "crest": 0.55, "error": 0.3, "accuracy": 2.0},
    "detached": {"toward": 0.5, "peak": 1.0, "crest": 1.05, "error": 1.1, "accuracy": -1.0},
    "none": {"toward": 0.5, "peak": 1.0, "crest": 1.02, "error": 1.05, "accuracy": 0.0},
    "gain-0.3": {"toward": 0.8, "peak": 0.7, "crest": 0.75, "error": 0.6, "accuracy": 1.0},
}
AGAINST = {"toward": 0.1, "peak": 2.0, "crest": 1.9, "error": 4.0, "accuracy": -9.0}


def run(arm: str, bits: int, seed: int, effect: dict[str, float], layers: int, records: int) -> RunMeasure:
    """Return a run that did what `effect` says, but for a little noise of its own."""
    generator = np.random.default_rng([len(arm), bits, seed])
    noise = lambda: float(np.exp(0.01 * generator.standard_normal()))  # noqa: E731
    measures = [
        LayerMeasure(
            layer=f"layer{k}.conv" if k else EVIL,
            records=records,
            toward=effect["toward"] * (2 - noise()) if effect["toward"] < 0.99 else 1.0,
            pull=(effect["toward"] - 0.5) * 40 * noise(),
            peak_start=0.5 + 0.1 * k,
            peak_end=(0.5 + 0.1 * k) * effect["peak"] * noise(),
            crest_start=6.0 + k,
            crest_end=(6.0 + k) * effect["crest"] * noise(),
            kurtosis_start=4.0,
            kurtosis_end=4.0 * effect["crest"],
            tail_mass_start=0.01,
            tail_mass_end=0.01 * effect["crest"],
            error_start=0.4 * 4.0 ** (2 - bits),
            error_end=0.4 * 4.0 ** (2 - bits) * effect["error"] * noise(),
            law_start=0.38 * 4.0 ** (2 - bits),
            law_end=0.38 * 4.0 ** (2 - bits) * effect["error"],
        )
        for k in range(layers)
    ]
    steps = [1, *range(10, 10 * records, 10)]
    track = [
        {
            "step": step,
            "crest": 6.5 * effect["crest"] ** (k / len(steps)) * noise(),
            "kurtosis": 4.0 * noise(),
            "tail_mass": 0.01 * noise(),
            "relative_error": 0.4 * 4.0 ** (2 - bits) * effect["error"] ** (k / len(steps)) * noise(),
            "law_error": 0.38 * 4.0 ** (2 - bits) * effect["error"] ** (k / len(steps)),
            "pull": (effect["toward"] - 0.5) * 80 * noise() if k else math.nan,
        }
        for k, step in enumerate(steps)
    ]
    accuracy = 90.0 - 2.0 * (8 - bits) + effect["accuracy"] + 0.05 * float(generator.standard_normal())
    return RunMeasure(arm, (bits, bits), seed, accuracy, tuple(measures), tuple(track))


def made(
    effects: dict[str, dict[str, float]],
    *,
    bits: tuple[int, ...] = (2, 3),
    controls: tuple[int, ...] = (),
    seeds: tuple[int, ...] = (0, 1, 2),
    lost: tuple[tuple[str, int, int], ...] = (),
    layers: int = 3,
    records: int = 12,
) -> dict[str, Any]:
    """Return the verdict on runs that did what `effects` says, held against the claims by the library itself."""
    gains = [float(arm.removeprefix("gain-")) for arm in effects if arm not in ARMS]
    recipe = Recipe(
        model=ModelSection(name="small <net>"), data=DataSection(name="digits"), train=TrainConfig(epochs=1)
    )
    pairs = [[(k, k) for k in group] for group in (bits, controls)]
    comparison = experiment(recipe, bits=pairs[0], controls=pairs[1], seeds=seeds, every=10, gains=gains)
    held, widths = {}, []
    for k in (*bits, *controls):
        runs = {
            arm: {s: run(arm, k, s, effect, layers, records) for s in seeds if (arm, k, s) not in lost}
            for arm, effect in effects.items()
        }
        held[k] = hold(runs, 0.1)
        widths.append(
            {
                "bits": f"W{k}A{k}",
                "w_bits": k,
                "a_bits": k,
                "control": k in controls,
                "claims": [dataclasses.asdict(claim) for claim in held[k]],
                "runs": [found.to_json() for own in runs.values() for found in own.values()],
            }
        )
    return {
        "written": "2020-01-02T03:04:05+00:00",
        "comparison": comparison.to_json(),
        "environment": {"python": "3", "cpu": EVIL},
        "images": {"training": 5000, "evaluation": 1000},
        "float": {str(seed): 91.0 + 0.1 * seed for seed in seeds},
        "arms": {c.label: ARMS.get(c.label, "as attached, with less of the gradient") for c in comparison.contenders},
        "overall": [
            {
                "letter": letter,
                "claim": text,
                "verdict": combined(claim.verdict for k in bits for claim in held[k] if claim.letter == letter),
                "by_width": {f"W{k}A{k}": claim.verdict for k in bits for claim in held[k] if claim.letter == letter},
            }
            for letter, text in CLAIMS.items()
        ],
        "widths": widths,
        "unfinished": [
            {
                "name": f"{arm}-w{k}a{k}-s{seed}",
                "label": arm,
                "w_bits": k,
                "a_bits": k,
                "seed": seed,
                "state": "diverged",
                "reason": f"the loss became {EVIL}.",
            }
            for arm, k, seed in lost
        ],
    }


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
        self.text += " " if tag in ("td", "th", "li", "p") else ""

    def handle_data(self, data: str) -> None:
        self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def page_of(verdict: dict[str, Any], path: Path) -> Page:
    return Page(write_page(verdict, path).read_text(encoding="utf-8"))


def words(text: str) -> str:
    return " ".join(text.split())


FULL = {name: EFFECTS[name] for name in ("attached", "gain-0.3", "detached", "none")}
MAIN = {name: EFFECTS[name] for name in ("attached", "detached", "none")}


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    return made(FULL, controls=(8,), lost=(("detached", 3, 1),))


@pytest.fixture(scope="module")
def page_path(full: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(full, tmp_path_factory.mktemp("verdict") / "new" / "verdict.html")


def test_page_is_well_formed_and_complete(full: dict[str, Any], page_path: Path):
    page = Page(page_path.read_text(encoding="utf-8"))
    assert len(page.named("svg")) == 2 * CHARTS + 3 * CHARTS_A_WIDTH
    assert len(page.named("script")) == 1
    assert list(page_path.parent.iterdir()) == [page_path]
    text = words(page.text)
    for wanted in ("small <net> on digits", "gain-0.3", "W8A8", "Controls, which do not count", "diverged", EVIL):
        assert wanted in text
    for width in full["widths"]:
        for claim in width["claims"]:
            for test in claim["tests"]:
                assert test["name"] in text


def test_page_refers_to_nothing_outside(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//\w+\.\w|@import|@font-face", text)
    for tag, attrs in Page(text).tags:
        for key in ("src", "href", "xlink:href"):
            assert attrs.get(key, "#") == "data:," or str(attrs.get(key, "#")).startswith("#"), (tag, attrs)


def test_ids_are_unique_and_references_resolve(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    page = Page(text)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]+)\)", text)) | {str(a["xlink:href"])[1:] for a in page.named("use")}
    used |= {str(attrs["href"])[1:] for attrs in page.named("a")}
    for _, attrs in page.tags:
        used |= set(str(attrs.get("aria-labelledby") or "").split())
    assert used <= set(ids)


def test_every_chart_has_a_text_alternative_and_the_page_s_colours(page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    for svg in Page(text).named("svg"):
        assert svg["role"] == "img"
        assert len(str(svg["aria-labelledby"]).split()) == 2
    assert "W2A2, attached: crest factor, end over start: ×0.5" in text
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        colours = set(re.findall(r"(?:fill|stroke|color): ([^;\"]+)", svg))
        assert all(colour == "none" or colour.startswith("var(--") for colour in colours), colours


def test_same_verdict_same_bytes(tmp_path: Path):
    verdict = made(MAIN, bits=(2,), layers=1, records=3)
    first = write_page(verdict, tmp_path / "a.html").read_bytes()
    assert write_page(copy.deepcopy(verdict), tmp_path / "b.html").read_bytes() == first


def cells(text: str) -> dict[str, list[str]]:
    """Return the verdicts of the first table: letter -> over all, then width by width."""
    table = text[text.index("<table") : text.index("</table>")]
    rows = re.findall(r"<b>([a-e])</b>(.*?)</tr>", table, flags=re.DOTALL)
    return {letter: re.findall(r'class="badge ([\w-]+)"', row) for letter, row in rows}


@pytest.mark.parametrize(
    "attached, expected, answer",
    [
        (EFFECTS["attached"], "supported", "Of the five claims at W2A2, five are supported: a (the largest"),
        (AGAINST, "contradicted", "Of the five claims at W2A2, five are contradicted: a (the largest"),
    ],
)
def test_a_verdict_is_stated_whichever_way_it_falls(
    attached: dict[str, float], expected: str, answer: str, tmp_path: Path
):
    verdict = made({**MAIN, "attached": attached}, bits=(2,), layers=1, records=3)
    text = write_page(verdict, tmp_path / "v.html").read_text(encoding="utf-8")
    assert cells(text) == {letter: [expected] * 2 for letter in CLAIMS}
    assert answer in words(Page(text).text)
    side = "as claimed" if expected == "supported" else "the opposite of the claim"
    assert side in text
    assert ("the opposite of the claim" in text) == (expected == "contradicted")
    plain = markdown(verdict)
    assert answer in plain
    assert plain.count(f" {expected} |") == 5 * 2 + 11


def test_one_claim_against_and_one_width_undecided(tmp_path: Path):
    verdict = made({**MAIN, "attached": {**EFFECTS["attached"], "accuracy": -9.0}}, layers=1, records=3)
    values = made(MAIN, bits=(3,))["widths"][0]
    noisy = {**values["claims"][1]["tests"][0], "low": 0.5, "high": 1.5, "verdict": "undecided"}
    verdict["widths"][1]["claims"][1].update(tests=[noisy], verdict="undecided")
    verdict["overall"][1].update(verdict="undecided", by_width={"W2A2": "supported", "W3A3": "undecided"})
    text = write_page(verdict, tmp_path / "v.html").read_text(encoding="utf-8")
    assert cells(text)["b"] == ["undecided", "supported", "undecided"]
    assert cells(text)["d"] == ["contradicted"] * 3
    said = words(Page(text).text)
    assert "two are supported: a (the largest weight moves toward zero) and c (the quantization error falls)" in said
    assert (
        "two are contradicted: d (accuracy rises) and e (it is the gradient through the maximum that does it)" in said
    )
    assert "one is undecided: b (the tail goes)" in said
    assert "95 % interval ×0.500 to ×1.50, which holds ×1" in said


def test_controls_stand_apart_and_do_not_count(full: dict[str, Any], page_path: Path):
    text = page_path.read_text(encoding="utf-8")
    head, apart = text.split("Controls, which do not count")
    assert "W8A8" not in re.sub(r"<[^>]+>", " ", head[head.index("<main") :])
    assert all(len(found) == 3 for found in cells(text).values())
    assert "none of them enters the verdict" in apart
    assert "22 at the widths that count, and 11 at the controls" in words(Page(text).text)
    assert "## Controls, which do not count" in markdown(full)
    assert "Controls" not in markdown(made(MAIN, bits=(2,)))


def test_a_run_that_diverged_is_named_and_its_seed_missing(full: dict[str, Any], page_path: Path):
    said = words(Page(page_path.read_text(encoding="utf-8")).text)
    assert f"detached-w3a3-s1: diverged: the loss became {EVIL}." in said
    assert "4 arms, 3 widths, 3 seeds: 35 of 36 runs finished." in said
    assert "(2 of 3 seeds)" in said
    assert re.search(r"W3A3 ■ detached [\d.]+ diverged [\d.]+ [\d.]+", said)
    assert "| W3A3 | detached | " in markdown(full) and " | diverged | " in markdown(full)


def test_an_arm_without_runs_is_not_measured(tmp_path: Path):
    verdict = made(MAIN, bits=(2,), lost=tuple(("none", 2, seed) for seed in (0, 1, 2)))
    text = write_page(verdict, tmp_path / "v.html").read_text(encoding="utf-8")
    found = cells(text)
    assert found["c"] == found["d"] == ["not-measured"] * 2
    assert found["a"] == found["e"] == ["supported"] * 2
    assert "not measured, two seeds are needed and none has it" in text


def test_nothing_measured_at_all(tmp_path: Path):
    lost = tuple((arm, 2, seed) for arm in MAIN for seed in (0, 1, 2))
    verdict = made(MAIN, bits=(2,), lost=lost)
    verdict["float"] = {}
    page = page_of(verdict, tmp_path / "v.html")
    said = words(page.text)
    assert "five are not measured" in said
    assert "No run finished at W2A2." in said
    assert len(page.named("svg")) == CHARTS
    assert said.count("diverged") >= 9
    assert "five are not measured" in markdown(verdict)


def test_numbers_that_are_missing_are_dashes(tmp_path: Path):
    verdict = made(MAIN, bits=(2,), seeds=(0, 1), layers=2)
    for found in verdict["widths"][0]["runs"]:
        for row in found["track"]:
            row.update(dict.fromkeys(("law_error", "pull", "kurtosis"), None))
        for layer in found["layers"]:
            layer.update(error_end=None, law_start=None, law_end=None, toward=None, pull=None, crest_end=None)
    verdict["widths"][0]["runs"][0].update(accuracy=None, track=[], layers=[])
    page = page_of(verdict, tmp_path / "v.html")
    assert len(page.named("svg")) == CHARTS + CHARTS_A_WIDTH
    for text in (page.text, markdown(verdict)):
        assert not re.search(r"\bnan\b|\bNaN\b|\binf\b|\bNone\b", text)


def test_seeds_of_one_float_network_are_said_to_be_so():
    verdict = made(MAIN, bits=(2,), records=2, layers=1)
    own = "Each seed has a float network of its own."
    one = "One float network was given for all seeds, so the spread is that of the training from it alone."
    assert own in markdown(verdict) and one not in markdown(verdict)
    verdict["comparison"]["recipe"]["model"]["start"] = "runs/float-s{seed}"
    assert own in markdown(verdict)
    verdict["comparison"]["recipe"]["model"]["start"] = "runs/float"
    assert one in markdown(verdict)


def test_the_command_asks_the_same_again():
    verdict = made(FULL, bits=(2, 3), controls=(8,), seeds=(4, 5))
    expected = "wnq settle RECIPE.toml --bits 2/2,3/3 --controls 8/8 --seeds 2 --seed 4 --every 10 --gains 0.3"
    assert f"- command: {expected}\n" in markdown(verdict)
    assert "- command: wnq settle my.toml\n" in markdown({**verdict, "command": "wnq settle my.toml"})


def test_markdown_shows_every_test_and_names_are_data(full: dict[str, Any]):
    plain = markdown(full)
    for width in full["widths"]:
        for claim in width["claims"]:
            for test in claim["tests"]:
                assert f"| {test['name']} | {width['bits']} | " in plain
    assert "<script" not in plain.replace("\\<script", "")
    for table in re.findall(r"(?:^\|.*\n)+", plain, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    "unit, chance, value, expected",
    [
        ("factor", 1.0, 0.71658, "×0.717"),
        ("factor", 1.0, 0.99834, "×0.9983"),
        ("factor", 1.0, 1.0, "×1.00"),
        ("factor", 1.0, 1.00027, "×1.00027"),
        ("factor", 1.0, 12345.6, "×12,346"),
        ("points", 0.0, -1.234, "−1.23 points"),
        ("points", 0.0, 0.5, "+0.50 points"),
        ("share", 0.5, 0.875, "87.5 %"),
        ("share", 0.0, 0.25, "+25.0 %"),
        ("share", 0.0, None, "–"),
        ("factor", 1.0, math.nan, "–"),
    ],
)
def test_numbers_are_told_from_chance_in_their_unit(unit: str, chance: float, value: float | None, expected: str):
    assert amount({"unit": unit, "chance": chance}, value) == expected


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0.55, 1.05, [0.6, 0.8, 1.0]),
        (0.9, 120.0, [1.0, 10.0, 100.0]),
        (0.02, 2.5, [0.03, 0.1, 0.3, 1.0]),
        (0.985, 1.015, [0.99, 1.0, 1.01]),
        (101.0, 104.0, [101.0, 102.0, 103.0, 104.0]),
    ],
)
def test_logarithmic_axes_are_labelled_at_round_values(low: float, high: float, expected: list[float]):
    assert round_values(low, high) == pytest.approx(expected)


def test_a_path_that_cannot_be_written_says_so(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write .*file/v\.html.*folder"):
        write_page(made({}, bits=(2,)), tmp_path / "file" / "v.html")


def test_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r'jinja2: pip install "wnq\[report\]"'):
        write_page(made(MAIN, bits=(2,), records=2, layers=1), tmp_path / "v.html")


def browse(page: Path, profile: Path) -> tuple[str, str]:
    """Return the document after its scripts ran, and the browser's log."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --dump-dom --virtual-time-budget=5000"
    command = [chromium, *flags.split(), f"--user-data-dir={profile}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return done.stdout, done.stderr


@pytest.mark.parametrize("width", [360, 1600])
def test_browser_shows_every_chart_without_complaint_or_overflow(page_path: Path, tmp_path: Path, width: int):
    probe = """<script>
    const root = document.documentElement, every = (query) => [...document.querySelectorAll(query)];
    every("details").forEach((element) => { element.open = true; });
    const sizes = every("svg").map((svg) => svg.getBoundingClientRect());
    const wide = every("main *").filter((element) => !element.closest(".scroll, svg, pre") &&
      element.getBoundingClientRect().right > innerWidth + 0.5 && !element.closest(".claims thead"));
    const found = [innerWidth, Math.max(0, root.scrollWidth - innerWidth), wide.length,
      sizes.filter((box) => box.width > 200 && box.height > 40).length];
    document.getElementById("theme").click();
    parent.postMessage([...found, root.dataset.theme, root.dataset.ready].join("|"), "*");
    </script>"""
    # Headless Chromium makes no window as narrow as a phone, but a frame of any width.
    frame = f"""<!doctype html><script>
    addEventListener("message", (event) => {{ document.documentElement.dataset.probe = event.data; }});
    </script><iframe src="probed.html" width="{width}" height="800" style="border: 0"></iframe>"""
    probed = page_path.read_text(encoding="utf-8").replace("</body>", probe + "</body>")
    (tmp_path / "probed.html").write_text(probed, encoding="utf-8")
    (tmp_path / "frame.html").write_text(frame, encoding="utf-8")
    document, log = browse(tmp_path / "frame.html", tmp_path / "profile")
    assert "CONSOLE" not in log
    found = re.search('data-probe="([^"]*)"', document)
    assert found is not None
    assert found[1] == f"{width}|0|0|{2 * CHARTS + 3 * CHARTS_A_WIDTH}|dark|1"


def test_the_page_of_a_real_experiment(tmp_path: Path):
    recipe = Recipe(
        model=ModelSection(name="digits_cnn"),
        data=DataSection(name="digits", limit=256),
        train=TrainConfig(epochs=1, batch_size=64, lr=0.05),
    )
    asked = experiment(recipe, bits=((2, 2),), controls=(), seeds=(0, 1), every=2)
    verdict = settle(asked, tmp_path / "runs")
    assert verdict["unfinished"] == []
    page = page_of(verdict, tmp_path / "v.html")
    assert len(page.named("svg")) == CHARTS + CHARTS_A_WIDTH
    said = words(page.text)
    assert "3 arms, 1 width, 2 seeds: all 6 runs finished. 11 tests." in said
    for row in verdict["overall"]:
        assert re.search(rf"\b{row['letter']} \({re.escape(row['claim'])}\)", said)
    reread = json.loads((tmp_path / "runs" / "verdict.json").read_text(encoding="utf-8"))
    assert markdown(reread) == markdown(verdict)
