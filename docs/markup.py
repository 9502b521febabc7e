"""From a docstring to a page: reStructuredText roles to Markdown, and TeX to MathML, so that pages need no script to be read.

A hook of mkdocs: it turns the formulas of every page into MathML. ``docstrings.py`` uses it for the reference, ``gallery.py`` for
the pages of the methods.
"""

import functools
import html
import re
from typing import Any

ROLE = re.compile(r":(\w+):`~?([^`]+)`")
BLOCK = re.compile(r"^( *)\.\. math:: *(.*(?:\n(?:\1 +.*| *(?=\n)))*)", re.M)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\s*\\([(\[])(.*?)\\[)\]]\s*</\1>', re.S)
UNKNOWN = {r"\!": r"\hspace{-0.17em}", r"\arg\m": r"\mathrm{arg}\,\m"}
"""Commands that latex2mathml does not know, and what says the same."""
UPRIGHT = re.compile(r'<mrow>((?:<mi mathvariant="normal">\w</mi>)+)</mrow>')


def to_markdown(text: str) -> str:
    r"""Return reStructuredText as Markdown: formulas as ``\(...\)``, roles as references, double backquotes as single ones.

    A reference to something that no page describes stays a plain name.
    """
    text = BLOCK.sub(lambda block: f"\n\n\\[{' '.join(block[2].split())}\\]\n\n", text)
    text = ROLE.sub(_role, text)
    return re.sub(r"``([^`]+)``", r"`\1`", text)


def _role(role: re.Match[str]) -> str:
    kind, content = role.groups()
    if kind == "math":
        return rf"\({' '.join(content.split())}\)"
    name = content.rpartition(".")[2] if kind in {"class", "func", "meth", "data", "attr", "mod"} else content
    return f'<autoref identifier="{content}" optional>`{name}`</autoref>'


@functools.cache
def to_mathml(tex: str, *, block: bool = False) -> str:
    """Return MathML; a run of upright letters becomes one name, so that a screen reader speaks it as a word."""
    from latex2mathml.converter import convert

    for command, known in UNKNOWN.items():
        tex = tex.replace(command, known)
    mathml = convert(tex, display="block" if block else "inline")
    return UPRIGHT.sub(lambda run: f"<mi>{re.sub('<[^>]+>', '', run[1])}</mi>", mathml)


def on_page_content(content: str, **_: Any) -> str:
    """Replace the TeX that arithmatex marked (a hook of mkdocs)."""

    def replaced(formula: re.Match[str]) -> str:
        return to_mathml(html.unescape(formula[3]).strip(), block=formula[2] == "[")

    return FORMULA.sub(replaced, content)
