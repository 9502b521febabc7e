"""Options that several commands take, and how their text becomes values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import nn

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Network to load the file into: a name of wnq's, timm:NAME, torchvision:NAME, hf:NAME or package.module:factory. "
        "Run folders and most packed files know theirs.",
    ),
]
NumClasses = Annotated[int | None, typer.Option(help="Outputs of the network, if not its default.")]
InChannels = Annotated[int | None, typer.Option(help="Image channels of the network, if not its default.")]
ModelOption = Annotated[
    list[str] | None, typer.Option(metavar="KEY=VALUE", help="Another option of the network. Can be repeated.")
]
DataName = Annotated[
    str | None,
    typer.Option("--data", help="Images: digits, cifar10, cifar100, imagenet, a folder, or a hub name owner/dataset."),
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=VALUE", help="A key of a recipe's [data] table: folder, size, limit, … Can be repeated."),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        metavar="NAME[:GAIN]",
        help="Normalizer in front of the weight quantizer: max_abs, tanh, standardize, l1_mean or none; GAIN is the share of the "
        "gradient through the maximum that is kept (1).",
        show_default=False,
    ),
]


def normalizer_options(text: str | None) -> dict[str, Any]:
    """Return ``NAME[:GAIN]`` as options of a method; None as no options.

    Raises:
        ValueError: the gain is no number.
    """
    if text is None:
        return {}
    name, colon, gain = text.partition(":")
    if not colon:
        return {"normalize": name}
    try:
        return {"normalize": name, "normalize_gain": float(gain)}
    except ValueError:
        raise ValueError(f"--normalize must be NAME or NAME:GAIN with a number, got {text!r}.") from None


def pairs(texts: Sequence[str] | None, option: str) -> dict[str, Any]:
    """Return ``KEY=VALUE`` texts as a dictionary. A value is read as JSON where it is JSON, else it is text.

    Raises:
        ValueError: there is no ``=``, or no key.
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"{option} must be KEY=VALUE, got {text!r}.")
        found[key.strip()] = parse(value.strip())
    return found


def parse(text: str) -> Any:
    """Return JSON's meaning of ``text``, or ``text`` itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def override(text: str) -> dict[str, Any]:
    """Return ``PATTERN=method:key=value,key=value`` as an entry of a recipe's ``override``.

    Raises:
        ValueError: it has another form.
    """
    pattern, equals, rest = text.partition("=")
    method, _, options = rest.partition(":")
    if not equals or not pattern or not method or "=" in method:
        raise ValueError(f"--override must be PATTERN=METHOD or PATTERN=METHOD:key=value,key=value, got {text!r}.")
    listed = [part for part in options.split(",") if part]
    return {"pattern": pattern, "method": method, "options": pairs(listed, f"--override {text}:")}


def set_keys(tables: dict[str, Any], texts: Sequence[str] | None) -> None:
    """Set dotted keys, such as ``train.epochs=3``, in nested tables, in place.

    Raises:
        ValueError: a text is not ``SECTION.KEY=VALUE``, or leads through something that is no table.
    """
    for key, value in pairs(texts, "--set").items():
        *path, last = key.split(".")
        if not path:
            raise ValueError(f"--set must be SECTION.KEY=VALUE, for example train.epochs=3, got {key}={value}.")
        table: Any = tables
        for name in path:
            if table.get(name) is None:
                table[name] = {}
            table = table[name]
            if not isinstance(table, dict):
                raise ValueError(f"--set {key}: {name!r} is not a table.")
        table[last] = value


def build(name: str, num_classes: int | None, in_channels: int | None, options: Sequence[str] | None) -> "nn.Module":
    """Build the network that the options mean."""
    from wnq.models import build_model

    sizes = {"num_classes": num_classes, "in_channels": in_channels}
    given = {key: value for key, value in sizes.items() if value is not None}
    return build_model(name, **given, **pairs(options, "--model-option"))


def data_options(texts: Sequence[str] | None) -> dict[str, Any]:
    """Return the values of ``--data-option``, checked against the keys of a recipe's ``[data]`` table."""
    from wnq.recipe import recipe_from

    given = pairs(texts, "--data-option")
    recipe_from({"data": given}, where="--data-option")
    return given


def writable(path: Path, suffix: str) -> Path:
    """Return ``path`` if it ends as it must.

    Raises:
        ValueError: it does not.
    """
    if path.suffix != suffix:
        raise ValueError(f"--out must end in {suffix}, got {path}.")
    return path
