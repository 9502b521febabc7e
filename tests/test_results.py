"""The committed results are whole, follow from the runs they hold, and say what the docs say of them."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from wnq.settle import LayerMeasure, RunMeasure, hold

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*_methods_*.json"))
VERDICTS = sorted(RESULTS.glob("settle-*.json"))


def test_there_are_some():
    assert FILES
    assert {path.stem.split("_")[0] for path in VERDICTS} == {"settle-digits", "settle-cifar100-resnet20"}


def plain(value: Any) -> float:
    return math.nan if value is None else value


def measured(run: dict[str, Any]) -> RunMeasure:
    layers = tuple(LayerMeasure(**{key: plain(value) for key, value in layer.items()}) for layer in run["layers"])
    return RunMeasure(run["label"], tuple(run["width"]), run["seed"], run["accuracy"], layers, ())


@pytest.mark.parametrize("path", VERDICTS, ids=lambda path: path.stem)
def test_a_published_verdict_follows_from_its_runs_and_its_texts_say_it(path):
    verdict = json.loads(path.read_text(encoding="utf-8"))
    summary = path.with_name(f"{path.stem}_summary.md").read_text(encoding="utf-8")
    whole = path.with_suffix(".md").read_text(encoding="utf-8")
    assert len(verdict["comparison"]["seeds"]) >= 3
    assert {width["bits"] for width in verdict["widths"] if not width["control"]} == {"W2A2", "W3A3", "W4A4"}
    for width in verdict["widths"]:
        runs: dict[str, dict[int, RunMeasure]] = {}
        for run in width["runs"]:
            runs.setdefault(run["label"], {})[run["seed"]] = measured(run)
        claims = [dataclasses.asdict(claim) for claim in hold(runs, 100 / verdict["images"]["evaluation"])]
        for claim, stored in zip(claims, width["claims"], strict=True):
            assert claim["verdict"] == stored["verdict"]
            for test, kept in zip(claim["tests"], stored["tests"], strict=True):
                numbers = [test[key] for key in ("estimate", "low", "high")]
                assert numbers == pytest.approx([kept[key] for key in ("estimate", "low", "high")], rel=1e-9)
        if not width["control"]:
            assert all(f"**{width['bits']}, {claim['verdict']}:**" in whole for claim in claims)
    for row in verdict["overall"]:
        assert f"{row['letter']} ({row['claim']})" in summary
    assert not [text for text in texts(verdict) if text.startswith("/")]


def texts(value):
    if isinstance(value, dict):
        for item in value.values():
            yield from texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, str):
        yield value


@pytest.mark.parametrize("path", sorted(RESULTS.glob("digits_methods_*.json")), ids=lambda path: path.stem)
def test_no_method_collapses_at_its_natural_width(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    natural = [row for row in results["table"] if row["bits"] == "natural"]
    assert len(natural) >= 30
    for row in natural:
        assert (row["done"], row["diverged"], row["failed"], row["not_run"]) == (3, 0, 0, 0), row["label"]
        # Ten classes: chance is 10 %.
        assert min(row["accuracies"].values()) > 90, row["label"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_published_comparison_is_whole_and_names_no_local_folder(path):
    results = json.loads(path.read_text(encoding="utf-8"))
    assert results["environment"]["torch"] and results["cells"] and results["comparison"]["recipe"]
    assert path.with_suffix(".md").exists() and path.with_suffix(".svg").exists()
    for cell in results["cells"]:
        if cell["state"] == "done":
            assert cell["environment"]["cpu"] and cell["recipe"]["data"]["folder"] is None
    assert not [text for text in texts(results) if text.startswith("/")]
