"""One page a method and one an input quantizer, from the registries: docstring, settings and a plot; a hook of mkdocs.

Nothing here names a method: a file in ``src/wnq/methods/`` has its page at the next ``make docs``.
"""

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from io import StringIO
from typing import TYPE_CHECKING, Any

import torch
from markup import to_markdown
from matplotlib import rc_context
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from torch import Tensor

from wnq.activations import InputInfo, list_inputs
from wnq.methods import COMMON, MethodInfo, Recommended, get_method, list_methods
from wnq.quantizer import Quantizer

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

SECTIONS = ("Args", "Returns", "Raises", "Example", "References", "Differences from the paper")
HEADER = re.compile(rf"^({'|'.join(SECTIONS)}):(?: +|$)", re.M)
PART = re.compile(r"(?:^|(?<=[.;] )|(?<=\n))(Forward|Gradient|Backward)s?[,:]\s*")
ARGUMENT = re.compile(r"^(\w+): *", re.M)
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")

PREFERRED = (2, 3, 4)
STYLES = (("#2f86d1", "-", 3.4), ("#d9622b", "-", 2.0), ("#2f9e6e", "-", 0.9))
"""Colour (readable on white and on slate), dash and width: thinner on top, so that curves that coincide can be told."""
INK = "#010203"
"""Stands for the colour of text, which depends on the reader's light or dark setting."""


# Docstrings


@dataclass(frozen=True)
class Frame:
    """A docstring, part by part, as Markdown.

    Attributes:
        summary: its first paragraph.
        forward: what follows "Forward".
        gradient: what follows "Gradient".
        notes: the other paragraphs before the sections.
        sections: name -> text, for the sections of :data:`SECTIONS` that are there.
    """

    summary: str
    forward: str
    gradient: str
    notes: str
    sections: Mapping[str, str]

    @property
    def arguments(self) -> dict[str, str]:
        """Name -> description."""
        parts = ARGUMENT.split(self.sections.get("Args", ""))[1:]
        return {name: " ".join(text.split()) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _capital(text: str) -> str:
    """Start with a capital, unless the text starts with a letter of a formula or with a name in code."""
    return text[:1].upper() + text[1:] if re.match(r"[a-z]{2,}[ ,]", text) else text


def parse(docstring: str) -> Frame:
    """Split a docstring into its parts."""
    head, *rest = HEADER.split(to_markdown(inspect.cleandoc(docstring)))
    sections = {name: _capital(inspect.cleandoc(text)) for name, text in zip(rest[::2], rest[1::2], strict=True)}
    summary, _, body = head.strip().partition("\n\n")
    found: dict[str, list[str]] = {"Forward": [], "Gradient": [], "": []}
    for paragraph in re.split(r"\n\s*\n", body):
        before, *parts = PART.split(paragraph.strip())
        continues = paragraph.lstrip().startswith(r"\[")
        last = next((k for k in ("Gradient", "Forward") if found[k]), "") if continues else ""
        found[last].append(before)
        for name, text in zip(parts[::2], parts[1::2], strict=True):
            found["Forward" if name == "Forward" else "Gradient"].append(_capital(text))
    forward, gradient, notes = ("\n\n".join(filter(None, found[key])).strip() for key in ("Forward", "Gradient", ""))
    return Frame(" ".join(summary.split()), forward, gradient, notes, sections)


def method_frame(info: MethodInfo) -> Frame:
    """Return the frame of a method's docstring."""
    return parse(info.function.__doc__ or "")


@cache
def input_class(name: str) -> type[Quantizer]:
    """Return the class behind an input quantizer."""
    info = next(info for info in list_inputs() if info.name == name)
    return type(info.build(info.widths[-1]))


def input_frame(info: InputInfo) -> Frame:
    """Return the frame of an input quantizer's docstring, which is its class's."""
    return parse(input_class(info.name).__doc__ or "")


# Plots


@dataclass(frozen=True)
class Curve:
    """One width: what goes in, what comes out, and the gradient of the sum of what comes out; all ascending in x."""

    bits: int
    x: Tensor
    y: Tensor
    gradient: Tensor


def drawn_widths(widths: Sequence[int]) -> list[int]:
    """Return the two or three widths to draw."""
    preferred = [bits for bits in PREFERRED if bits in widths]
    return preferred if len(preferred) > 1 else list(widths[:3])


def example_weights(count: int = 301) -> Tensor:
    """Return one filter of fixed weights, ascending: Gaussian quantiles with a tail, and a largest one that is positive."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    gauss = torch.special.ndtri(share)
    tailed = 0.35 * gauss * (1 + 0.06 * gauss.square())
    tailed[-1] *= 1.1
    return tailed.float().reshape(1, -1)


def _curve(quantizer: Quantizer, x: Tensor, bits: int) -> Curve:
    x = x.detach().clone().requires_grad_()
    y = quantizer(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    return Curve(bits, x.detach().reshape(-1), y.detach().reshape(-1), gradient.reshape(-1))


def method_curves(info: MethodInfo) -> list[Curve]:
    """Return w -> w_q and dL/dw for dL/dw_q = 1, as in training, for two or three widths."""
    curves: list[Curve] = []
    for bits in drawn_widths(info.widths):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weight = example_weights()
            build = get_method(info.name, w_bits=bits, a_bits=32).weight
            assert build is not None
            quantizer = build(weight, 0)
            quantizer.observe_(weight.clone())
            curves.append(_curve(quantizer, weight, bits))
    return curves


def input_curves(info: InputInfo) -> list[Curve]:
    """Return x -> y and dy/dx, as in training, for two or three widths; the first batch comes from a ReLU."""
    built: list[tuple[int, Quantizer]] = []
    for bits in drawn_widths(info.widths):
        quantizer = info.build(bits)
        quantizer.observe_(torch.special.ndtri((torch.arange(400) + 0.5) / 400).relu().reshape(1, -1))
        built.append((bits, quantizer))
    last = built[-1][1]

    @torch.no_grad()
    def at(x: float) -> float:
        return last(torch.full((1, 1), x)).item()

    end = next((e for e in (2.0, 4.0, 8.0, 16.0) if at(e) == at(2 * e)), 4.0)
    x = torch.linspace(-1.25 * end if at(-end) < 0 else -end / 2, 1.25 * end, 701).reshape(1, -1)
    curves: list[Curve] = []
    for bits, quantizer in built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            curves.append(_curve(quantizer, x, bits))
    return curves


def draw(curves: Sequence[Curve], *, names: tuple[str, str, str]) -> str:
    """Return an SVG: on the left what comes out, on the right the gradient, over what goes in.

    Args:
        curves: one a width.
        names: of what goes in, of what comes out and of the gradient.
    """
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    with rc_context({"svg.hashsalt": "wnq", "svg.fonttype": "none", "font.size": 9} | dict.fromkeys(ink, INK)):
        figure = Figure(figsize=(7.6, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        left, right = figure.subplots(1, 2)
        for curve, (color, dash, width) in zip(curves, STYLES, strict=False):
            line: dict[str, Any] = {"color": color, "linestyle": dash, "linewidth": width, "drawstyle": "steps-mid"}
            left.plot(curve.x, curve.y, label=f"{curve.bits} bit{'s' if curve.bits > 1 else ''}", **line)
            right.plot(curve.x, curve.gradient, marker="o", markersize=width + 1, markevery=[0, -1], **line)
        largest = max(curve.gradient.abs().max().item() for curve in curves)
        if largest > 5:
            right.set_yscale("symlog", linthresh=2)
        elif largest < 1.5:
            right.set_ylim(min(-0.1, *(1.1 * curve.gradient.min().item() for curve in curves)), 1.6)
        for axes, label in ((left, names[1]), (right, names[2])):
            axes.set_xlabel(names[0])
            axes.set_ylabel(label)
            axes.spines[["top", "right"]].set_visible(False)
            axes.axhline(0, color=INK, linewidth=0.4)
        left.legend(frameon=False, loc="upper left", fontsize=8)
        file = StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    style = "<style>svg{color:#2b2b2b}@media(prefers-color-scheme:dark){svg{color:#dcdce4}}</style>"
    return re.sub(r"(<svg[^>]*>)", rf"\1{style}", file.getvalue().replace(INK, "currentColor"), count=1)


def described(curves: Sequence[Curve], *, names: tuple[str, str, str]) -> str:
    """Return the plot in words, for who cannot see it."""
    facts: list[str] = []
    for curve in curves:
        low, high = curve.gradient.min().item(), curve.gradient.max().item()
        spread = f"{low:.3g}" if high - low < 1e-6 else f"between {low:.3g} and {high:.3g}"
        plural = "s" if curve.bits > 1 else ""
        facts.append(f"at {curve.bits} bit{plural} {len(curve.y.unique())} different values, gradient {spread}")
    return f"{names[1]} and {names[2]} against {names[0]}: {'; '.join(facts)}."


WEIGHT_NAMES = ("w", "quantized w", "dL/dw for g = 1")
INPUT_NAMES = ("x", "y", "dy/dx")


# Pages


def short_widths(widths: Sequence[int]) -> str:
    """Return ``1–8``, ``2, 4, 8`` or ``1``."""
    if len(widths) > 2 and list(widths) == list(range(widths[0], widths[-1] + 1)):
        return f"{widths[0]}–{widths[-1]}"
    return ", ".join(map(str, widths))


def linked(paper: str) -> str:
    """Return the place of publication, arXiv numbers linked."""
    return ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def _cross(page: str, name: str, folder: str = "") -> str:
    """Link the names of other methods that stand in code."""
    others = "|".join(info.name for info in list_methods() if info.name != name)
    return re.sub(rf"(?<![\[*`])`({others})`(?![\]`])", rf"[`\1`]({folder}\1.md)", page)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text.strip()}\n\n" if text.strip() else ""


def _plot(name: str, curves: Sequence[Curve], names: tuple[str, str, str], caption: str) -> str:
    return f"![{described(curves, names=names)}]({name}.svg)\n\n*{caption}*\n\n"


def _arguments(frame: Frame, defaults: Mapping[str, Any]) -> str:
    """Return a list of the arguments; one without a description is a fault of the docstring, which the tests find."""
    return "\n".join(
        f"- **`{name}`**{f' = `{defaults[name]!r}`' if name in defaults else ''}: {text}"
        for name, text in frame.arguments.items()
    )


def recommended_settings(recommended: Recommended) -> str:
    """Return the settings that differ from the recipe's own, with their source."""
    plain = Recommended()
    words = {
        "lr": "peak learning rate",
        "weight_decay": "weight decay",
        "quantizer_lr": "learning rate of the quantizers' parameters, as a share of the model's",
        "quantizer_weight_decay": "weight decay of the quantizers' parameters, as a share of the model's",
    }
    rows = [
        f"- {words[item.name]}: × {getattr(recommended, item.name):g}"
        for item in fields(Recommended)
        if item.name in words and getattr(recommended, item.name) != getattr(plain, item.name)
    ]
    rows += [f"- weight decay at {bits} bits: × {factor:g}" for bits, factor in recommended.weight_decay_at.items()]
    if not rows:
        return "None: the common recipe." + (f" Source: {recommended.source}." if recommended.source else "")
    source = f"Source: {recommended.source}." if recommended.source else "Source: this library's own choice."
    return "Factors of the recipe's own settings.\n\n" + "\n".join(rows) + f"\n\n{source}"


def _input_link(info: MethodInfo, folder: str) -> str:
    name = info.options["activation"]
    return f"[{name}]({folder}{name}.md)"


def method_page(info: MethodInfo, curves: Sequence[Curve]) -> str:
    """Return the page of a method, as Markdown."""
    frame = method_frame(info)
    defaults = {name: value for name, value in info.options.items() if name not in COMMON}
    normalizer = f"none: {info.no_normalizer}" if info.no_normalizer else "any, by `normalize=`"
    example = frame.sections.get("Example", "")
    page = (
        f"# {info.name} {{#wnq.methods.{info.function.__module__.rpartition('.')[2]}.{info.name}}}\n\n"
        f"{frame.summary}\n\n"
        f"- Paper: {linked(info.paper) or 'none, a baseline'}\n"
        f"- Widths of weights: {short_widths(info.widths)}\n"
        f"- Input quantizer: {_input_link(info, '../inputs/')}\n"
        f"- Normalizer in front: {normalizer}\n"
        f'- In code: `wnq.get_method("{info.name}", w_bits={defaults["w_bits"]}, a_bits={defaults["a_bits"]})`\n\n'
        + _plot(
            info.name,
            curves,
            WEIGHT_NAMES,
            "One filter of 301 fixed weights with a tail. Right: the gradient where that of every quantized weight is 1.",
        )
        + _section("Forward", frame.forward)
        + _section("Gradient", frame.gradient)
        + _section("Notes", frame.notes)
        + _section("Arguments", _arguments(frame, defaults))
        + _section("Example", f"```pycon\n{example}\n```" if example else "")
        + _section("Differences from the paper", frame.sections.get("Differences from the paper", ""))
        + _section("Recommended training settings", recommended_settings(info.recommended))
        + _section("References", linked(frame.sections.get("References", "")))
    )
    return _cross(page, info.name)


def input_page(info: InputInfo, curves: Sequence[Curve]) -> str:
    """Return the page of an input quantizer, as Markdown."""
    frame, kind = input_frame(info), input_class(info.name)
    beside = methods_beside(kind)
    defaults = {n: p.default for n, p in inspect.signature(kind).parameters.items() if p.default is not p.empty}
    used = [f"[{m.name}](../methods/{m.name}.md)" for m in list_methods() if m.options["activation"] == info.name]
    page = (
        f"# {info.name} {{#{kind.__module__}.{kind.__qualname__}}}\n\n"
        f"{frame.summary}\n\n"
        f"- Paper: {linked(info.paper) or 'none, a baseline'}\n"
        f"- Widths of inputs: {short_widths(info.widths)}\n"
        f"- Class: `{kind.__module__}.{kind.__qualname__}`\n"
        f"- The default of: {', '.join(used) or 'no method'}\n"
        f'- In code: `activation="{info.name}"`, in any method\n\n'
        + _plot(info.name, curves, INPUT_NAMES, "In training, started from a batch that comes out of a ReLU.")
        + _section("Definition", frame.notes)
        + _section("Forward", frame.forward)
        + _section("Gradient", frame.gradient)
        + _section("Arguments of the class", _arguments(frame, defaults))
        + _section("Differences from the paper", frame.sections.get("Differences from the paper", ""))
        + _section("References", linked(frame.sections.get("References", "")))
        + (_section("More", f"The paper and what differs from it: {beside}.") if beside else "")
    )
    return _cross(page, "", "../methods/")


def methods_beside(kind: type[Quantizer]) -> str:
    """Return links to the methods in the same file, whose pages name the paper and the differences from it."""
    names = [info.name for info in list_methods() if info.function.__module__ == kind.__module__]
    return ", ".join(f"[{name}](../methods/{name}.md)" for name in names)


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def methods_table() -> str:
    """Return the table of all methods."""
    table = _row("method", "what it does", "paper", "bits", "inputs", "normalizer") + "|---|---|---|---|---|---|\n"
    for info in list_methods():
        table += _row(
            f"[{info.name}](methods/{info.name}.md)",
            method_frame(info).summary,
            linked(info.paper),
            short_widths(info.widths),
            _input_link(info, "inputs/"),
            "no" if info.no_normalizer else "yes",
        )
    return table


def inputs_table() -> str:
    """Return the table of all input quantizers."""
    table = _row("input quantizer", "what it does", "paper", "bits") + "|---|---|---|---|\n"
    for info in list_inputs():
        link = f"[{info.name}](inputs/{info.name}.md)"
        table += _row(link, input_frame(info).summary, linked(info.paper), short_widths(info.widths))
    return table


# Hooks of mkdocs


def pages() -> dict[str, str]:
    """Return path -> content of every generated file."""
    made: dict[str, str] = {}
    for info in list_methods():
        curves = method_curves(info)
        made[f"methods/{info.name}.md"] = method_page(info, curves)
        made[f"methods/{info.name}.svg"] = draw(curves, names=WEIGHT_NAMES)
    for info in list_inputs():
        curves = input_curves(info)
        made[f"inputs/{info.name}.md"] = input_page(info, curves)
        made[f"inputs/{info.name}.svg"] = draw(curves, names=INPUT_NAMES)
    return made


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Put the pages into the navigation, where it names ``methods.md``."""
    weights = [{info.name: f"methods/{info.name}.md"} for info in list_methods()]
    inputs = [{info.name: f"inputs/{info.name}.md"} for info in list_inputs()]
    full = [{"All": "methods.md"}, {"Weights": weights}, {"Inputs": inputs}]
    config.nav = [{k: full if v == "methods.md" else v for k, v in entry.items()} for entry in config.nav or []]
    return config


def on_files(files: "Files", config: "MkDocsConfig") -> "Files":
    """Add the pages and plots."""
    from mkdocs.structure.files import File

    for path, content in pages().items():
        files.append(File.generated(config, path, content=content))
    return files


TABLES: Mapping[str, Callable[[], str]] = {"<!-- methods -->": methods_table, "<!-- inputs -->": inputs_table}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the tables."""
    for place, table in TABLES.items():
        if place in markdown:
            markdown = markdown.replace(place, table())
    return markdown
