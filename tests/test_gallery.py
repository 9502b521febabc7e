"""Every registered method and input quantizer has a whole docstring, and a page with a plot that is made from it."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from wnq.activations import list_inputs
from wnq.methods import COMMON, Recommended, get_method, list_methods

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
gallery, markup = importlib.import_module("gallery"), importlib.import_module("markup")

METHODS = {info.name: info for info in list_methods()}
INPUTS = {info.name: info for info in list_inputs()}
FORMULA = re.compile(r"\\[(\[](.+?)\\[)\]]", re.S)


@pytest.mark.parametrize("info", METHODS.values(), ids=METHODS)
def test_a_methods_docstring_has_the_whole_frame(info):
    frame = gallery.method_frame(info)
    assert frame.summary.endswith(".")
    same = re.match(r"That of `(\w+)`", frame.forward)
    assert FORMULA.search(frame.forward) or (same and same[1] in METHODS), "Forward: needs a formula"
    assert frame.gradient, "Gradient: is missing"
    for section in ("Args", "Returns", "Raises", "References", "Differences from the paper"):
        assert frame.sections.get(section), f"{section}: is missing"
    assert list(frame.sections)[-1] == "Differences from the paper"
    assert list(frame.arguments) == [name for name in info.options if name not in COMMON]
    assert all(frame.arguments.values())
    assert not info.paper or info.paper in frame.sections["References"]


@pytest.mark.parametrize("info", INPUTS.values(), ids=INPUTS)
def test_an_input_quantizers_docstring_says_what_it_does(info):
    """The paper, and what differs from it, may stand with the method in the same file instead."""
    frame, kind = gallery.input_frame(info), gallery.input_class(info.name)
    said = frame.forward + frame.gradient + frame.notes + frame.summary
    assert FORMULA.search(said) and re.search(r"[Gg]radient|Backward|dy/dx|dL/dx", inspect.getdoc(kind))
    own = [n for n, p in inspect.signature(kind).parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    assert list(frame.arguments) == own
    if not gallery.methods_beside(kind):
        for section in ("References", "Differences from the paper"):
            assert frame.sections.get(section), f"{section}: is missing"
    assert info.paper


@pytest.mark.parametrize("info", METHODS.values(), ids=METHODS)
def test_a_method_has_a_page_with_a_plot(info):
    curves = gallery.method_curves(info)
    page = gallery.method_page(info, curves)
    check_plot(curves, gallery.draw(curves, names=gallery.WEIGHT_NAMES))
    check_page(page, info.name, ("Forward", "Gradient", "Arguments", "References", "Recommended training settings"))
    assert page.index("## Differences from the paper") > page.index("## Gradient")


@pytest.mark.parametrize("info", INPUTS.values(), ids=INPUTS)
def test_an_input_quantizer_has_a_page_with_a_plot(info):
    curves = gallery.input_curves(info)
    page = gallery.input_page(info, curves)
    check_plot(curves, gallery.draw(curves, names=gallery.INPUT_NAMES))
    check_page(page, info.name, ())
    assert any(curve.gradient.any() for curve in curves)


def check_plot(curves, svg):
    assert 1 <= len(curves) <= 3
    for curve in curves:
        assert (curve.x.diff() > 0).all()
        assert torch.isfinite(curve.y).all() and torch.isfinite(curve.gradient).all()
        assert 1 < len(curve.y.unique()) <= 2**curve.bits
    ElementTree.fromstring(svg)
    assert "prefers-color-scheme" in svg and "currentColor" in svg and gallery.INK not in svg
    assert all(f">{curve.bits} bit" in svg for curve in curves)


def check_page(page, name, sections):
    alt = re.search(rf"!\[([^\]]+)\]\({name}\.svg\)", page)
    assert alt and "different values, gradient" in alt[1]
    for section in sections:
        assert f"\n## {section}\n\n" in page
    assert not re.search(r":(math|class|func):`|\.\. math::|(?<!`)``(?!`)", page)
    assert page.count(r"\(") == page.count(r"\)")


def test_every_name_has_its_files_and_its_row(monkeypatch):
    monkeypatch.setattr(gallery, "method_curves", lambda info: [])
    monkeypatch.setattr(gallery, "input_curves", lambda info: [])
    monkeypatch.setattr(gallery, "draw", lambda curves, names: "")
    expected = {f"methods/{name}.{end}" for name in METHODS for end in ("md", "svg")}
    assert set(gallery.pages()) == expected | {f"inputs/{name}.{end}" for name in INPUTS for end in ("md", "svg")}
    index = gallery.on_page_markdown((ROOT / "docs" / "methods.md").read_text(encoding="utf-8"))
    rows = [line for line in index.splitlines() if line.startswith("| [")]
    assert [re.match(r"\| \[(\w+)\]", row)[1] for row in rows] == [*METHODS, *INPUTS]
    assert "<!--" not in index
    assert all(len(re.findall(r"(?<!\\)\|", row)) in (5, 7) for row in rows)


def test_the_plot_shows_the_gradient_through_the_maximum():
    (two, *_) = gallery.method_curves(METHODS["wnq"])
    w = gallery.example_weights()
    quantizer = get_method("wnq", w_bits=2).weight(w, 0)
    assert two.bits == 2 and torch.equal(two.y, quantizer(w).reshape(-1))
    m = w.max()
    assert w.abs().max() == m and (w.abs() == m).sum() == 1
    assert (two.gradient[:-1] == 1).all()
    assert two.gradient[-1].item() == pytest.approx(1 + (quantizer(w) - w).sum().item() / m.item(), rel=1e-4)


def test_plots_and_pages_are_the_same_each_time():
    info = METHODS["ttq"]
    first, second = (gallery.method_curves(info) for _ in range(2))
    assert gallery.draw(first, names=gallery.WEIGHT_NAMES) == gallery.draw(second, names=gallery.WEIGHT_NAMES)
    assert gallery.method_page(info, first) == gallery.method_page(info, second)


def luminance(color):
    parts = [int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(share * c for share, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("ground", ["#ffffff", "#1e2129"], ids=["light", "dark"])
def test_curves_stand_out_on_light_and_on_dark(ground):
    for color, *_ in gallery.STYLES:
        low, high = sorted((luminance(color), luminance(ground)))
        assert (high + 0.05) / (low + 0.05) > 3  # WCAG 2.1, graphics


def test_a_docstring_is_split_into_its_parts():
    frame = gallery.parse(
        r"""Do it.

        Forward, with :math:`m = \max|w|`: :math:`w_q = m`. Gradient: dw_q/dw = 1 and

        .. math:: a \\
            b

        More text on :class:`wnq.quantizer.Uniform` and ``bits``.

        Args:
            w_bits: width,
                1 or 2.
            a_bits: width.

        References:
            Someone.

        Differences from the paper: none known.
        """
    )
    assert frame.summary == "Do it."
    assert frame.forward == r"With \(m = \max|w|\): \(w_q = m\)."
    assert frame.gradient.split("\n\n") == ["dw_q/dw = 1 and", r"\[a \\ b\]"]
    assert frame.notes.startswith("More text on <autoref") and frame.notes.endswith("and `bits`.")
    assert frame.arguments == {"w_bits": "width, 1 or 2.", "a_bits": "width."}
    assert frame.sections["Differences from the paper"] == "None known."


def test_settings_are_listed_with_their_source():
    assert gallery.recommended_settings(Recommended()) == "None: the common recipe."
    text = gallery.recommended_settings(Recommended(lr=0.1, weight_decay_at={2: 0.25}, source="Sec. 3"))
    assert "- peak learning rate: × 0.1\n- weight decay at 2 bits: × 0.25\n" in text and text.endswith(
        "Source: Sec. 3."
    )


def formulas():
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    kinds = [gallery.input_class(name) for name in INPUTS]
    texts += [markup.to_markdown(inspect.getdoc(thing)) for thing in (*(m.function for m in METHODS.values()), *kinds)]
    return sorted({tex for text in texts for tex in FORMULA.findall(text)})


def test_every_formula_becomes_mathml():
    pytest.importorskip("latex2mathml")
    found = formulas()
    assert len(found) > 100
    for tex in found:
        mathml = markup.to_mathml(" ".join(tex.split()))
        ElementTree.fromstring(mathml)
        assert "\\" not in "".join(re.findall(r">([^<]*)<", mathml)), tex
    assert "<mi>round</mi>" in markup.to_mathml(r"\mathrm{round}(x)")


def test_formulas_of_a_page_are_replaced():
    pytest.importorskip("latex2mathml")
    page = '<p>a <span class="arithmatex">\\(x &lt; 1\\)</span></p><div class="arithmatex">\\[\ny\n\\]</div>'
    made = markup.on_page_content(page)
    assert "arithmatex" not in made and made.count("<math") == 2
    assert 'display="block"' in made.partition("</math>")[2] and "<mo>&#x0003C;</mo>" in made.partition("</math>")[0]
