"""The committed comparison of all methods on digits says what the docs say of it."""

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*_methods_*.json"))


def test_there_is_one():
    assert FILES


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

    def texts(value):
        if isinstance(value, dict):
            for item in value.values():
                yield from texts(item)
        elif isinstance(value, list):
            for item in value:
                yield from texts(item)
        elif isinstance(value, str):
            yield value

    assert not [text for text in texts(results) if text.startswith("/")]
