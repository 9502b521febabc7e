"""The examples of the README and the guide run; so do the docstrings'."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import wnq

ROOT = Path(__file__).resolve().parent.parent


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md"])
def test_the_first_example_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page)[0], page, "exec"), {})


def test_the_readme_example_is_short():
    code = [line for line in blocks("README.md")[0].splitlines() if line.strip()]
    assert len(code) <= 12


def test_the_guides_exceptions_run():
    code = blocks("docs/guide.md")[1].replace('"head.*"', '"*.0.conv1"').replace('"layer3.*"', '"*.1.conv2"')
    names = {"wnq": wnq, "model": wnq.build_model("resnet20")}
    exec(compile(code.rsplit("\n", 2)[0], "guide", "exec"), names)
    assert {layer.method.w_bits for layer in names["plan"].layers} == {2, 4, 8}


def test_the_guides_methods_and_folding_run():
    names = {"wnq": wnq, "torch": torch}
    for code in blocks("docs/guide.md")[2:4]:
        exec(compile(code, "guide", "exec"), names)
    assert names["pairs"] and not any(isinstance(m, torch.nn.BatchNorm2d) for m in names["model"].modules())


def modules():
    return [m.name for m in pkgutil.walk_packages(wnq.__path__, "wnq.") if "__main__" not in m.name]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples(name):
    if name.startswith("wnq.kernels."):
        pytest.importorskip("triton")
    module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_the_methods_page_has_an_example():
    finder = doctest.DocTestFinder()
    assert any(test.examples for test in finder.find(sys.modules["wnq.methods.wnq"]))


def test_the_contributing_guides_quantizer_is_a_method_that_keeps_the_laws(tmp_path):
    # In a process of its own: a registry forgets nothing.
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = textwrap.dedent(re.findall(r"^   ```python\n(.*?)^   ```", page, re.M | re.S)[0])
    (tmp_path / "mine.py").write_text(code)
    check = (
        "import mine; from wnq.methods import get_method, list_methods; from wnq.testing import LAWS, METHOD_LAWS\n"
        "assert 'mine' in [info.name for info in list_methods()]\n"
        "[law(lambda x: get_method('mine', w_bits=2).weight(x, 0)) for law in LAWS[:-1]]\n"
        "[law(get_method('mine')) for law in METHOD_LAWS]\n"
    )
    done = subprocess.run([sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
