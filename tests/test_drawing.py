"""What the pages share: charts as files, numbers as text."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from wnq.drawing import (
    CSS,
    DARK,
    LIGHT,
    Chart,
    Key,
    arm_color,
    counted,
    listed,
    median,
    new_figure,
    number,
    percent,
    short_name,
)

pytest.importorskip("matplotlib")
EVIL = "<b>$x_{1}$ & more"


def chart(name: str = "one") -> Chart:
    def draw(paint):
        figure = new_figure(200, 120)
        axes = figure.add_subplot()
        axes.plot([1, 2], [3, 4], "o", color=paint["arm1"])
        axes.set_ylabel(EVIL)
        return figure

    return Chart(name, EVIL, "Two points.", draw, [Key("first", "arm1", 0), Key("second", "start", 1)])


def test_a_chart_for_a_page_has_the_page_s_colours_and_ids_of_its_own():
    svg = chart().svg()
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    assert (root.get("role"), root.get("aria-labelledby")) == ("img", "one-title one-desc")
    assert "var(--arm1)" in svg and not re.search("#0101", svg)
    assert all(name.startswith("one-") for name in re.findall(r' id="([^"]+)"', svg))
    assert svg == chart().svg()


def test_a_chart_in_a_file_stands_by_itself(tmp_path: Path):
    paths = chart().save(tmp_path / "new")
    assert [path.name for path in paths] == ["one.svg", "one.png"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["one.png", "one.svg"]
    text = paths[0].read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    spoken = " ".join(root.itertext())
    assert EVIL in spoken and "first" in spoken and "second" in spoken
    assert "var(--" not in text and LIGHT["arm1"] in text and "#0101" not in text
    data = paths[1].read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width == 200 * 200 // 72 and height > 120 * 200 // 72  # a title and a legend more
    again = chart().save(tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_both_palettes_name_the_same_colours_and_no_placeholder_is_used_twice():
    assert LIGHT.keys() == DARK.keys() == CSS.keys()
    assert len(set(CSS.values())) == len(CSS)
    assert arm_color(7) == CSS["arm1"]


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (math.nan, "–"),
        (0.0, "0"),
        (3, "3"),
        (3.0, "3.00"),
        (-0.1234, "−0.123"),
        (0.00001234, "1.2e−05"),
        (123456.7, "123,457"),
        (999.9, "1,000"),
        (999.4, "999"),
    ],
)
def test_numbers(value: float | None, text: str):
    assert number(value) == text


@pytest.mark.parametrize(
    "value, text", [(0.5, "50.0 %"), (1, "100 %"), (None, "–"), (math.inf, "–"), (12.5, "1,250 %")]
)
def test_shares(value: float | None, text: str):
    assert percent(value).replace("\N{NO-BREAK SPACE}", " ") == text


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


def test_words():
    assert (counted(1, "layer"), counted(3, "layer"), counted(1200, "layer")) == (
        "one layer",
        "three layers",
        "1,200 layers",
    )
    assert (listed(["a"]), listed("ab"), listed("abc"), listed([])) == ("a", "a and b", "a, b and c", "")
    assert (median([1, None, math.nan, 4]), median([None])) == (2.5, None)
