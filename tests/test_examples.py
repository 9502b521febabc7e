"""The examples run, and their numbers make sense."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LINE = re.compile(
    r"(?P<label>.+): accuracy (?P<accuracy>[\d.]+) %, crest factor (?P<before>[\d.]+) -> (?P<after>[\d.]+)"
)


def run(name):
    """Return (label, accuracy, crest before, crest after) of every line but the float start's."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert re.fullmatch(r"float: accuracy 9[89]\.\d\d %, crest factor [34]\.\d\d", first)
    rows = [LINE.match(line) for line in rest]
    assert all(rows), done.stdout
    rows = [(row["label"], *(float(row[key]) for key in ("accuracy", "before", "after"))) for row in rows]
    assert all(accuracy > 98 for _, accuracy, _, _ in rows)
    return rows, done.stdout


def installed(module, package):
    pytest.importorskip(module, exc_type=ImportError, reason=f"{package} is not installed")


@pytest.mark.slow
def test_pruned_weights_stay_zero_behind_the_normalizer():
    rows, text = run("normalize_then_prune")
    assert [label for label, *_ in rows] == ["95.0% zeros, torch's pruning alone", "95.0% zeros, with the normalizer"]
    left = [float(number) for number in re.findall(r"weights left ([\d.]+)", text)]
    assert len(left) == 2 and all(1 < number < 2.5 for number in left)
    assert abs(rows[0][3] - rows[1][3]) < 1  # nothing is rounded: the normalizer changes little


@pytest.mark.slow
def test_the_normalizer_shortens_the_tail_that_torchao_leaves():
    installed("torchao.quantization.qat", "torchao")
    ((_, _, start, alone), (label, _, _, normalized)), _ = run("normalize_then_torchao")
    assert label == "2 bits, with the normalizer"
    assert alone > 0.9 * start
    assert normalized < 0.85 * start


@pytest.mark.slow
def test_brevitas_default_needs_no_normalizer():
    installed("brevitas.nn", "brevitas")
    rows, _ = run("normalize_then_brevitas")
    default, normalized, learned, both = (after for _, _, _, after in rows)
    start = rows[0][2]
    assert default < 0.85 * start
    assert abs(default - normalized) < 0.1
    assert learned > 0.9 * start and both > 0.9 * start


@pytest.mark.parametrize("package", ["torchao", "brevitas"])
def test_a_missing_package_is_named_in_one_sentence(package):
    hidden = f"import runpy, sys; sys.modules[{package!r}] = None; runpy.run_path(sys.argv[1])"
    example = EXAMPLES / f"normalize_then_{package}.py"
    done = subprocess.run([sys.executable, "-c", hidden, example], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [f"This example needs {package}: pip install {package}"]
    assert done.stdout == ""
