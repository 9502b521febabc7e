"""``wnq methods`` and ``wnq plan``."""

import inspect
from pathlib import Path
from typing import Annotated

import typer

from wnq.cli.command import Json, command
from wnq.cli.options import InChannels, ModelOption, NumClasses, build, override, pairs
from wnq.cli.screen import Screen


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "wnq methods", "wnq methods wnq", "wnq methods --json")(methods)
    command(
        app,
        "wnq plan resnet20 --w-bits 2 --a-bits 2",
        "wnq plan resnet20 --method lsq --override 'layer3.*=wnq:w_bits=4,a_bits=4' --save plan.json",
    )(plan)


def methods(
    screen: Screen,
    name: Annotated[str | None, typer.Argument(help="Show everything about this one.", show_default=False)] = None,
) -> Json:
    """List the quantization methods, or explain one."""
    from wnq.methods import MethodInfo, list_methods

    chosen = list_methods() if name is None else [MethodInfo.of(name)]
    described = [
        {
            "name": info.name,
            "paper": info.paper,
            "summary": info.summary,
            "options": info.options,
            "docstring": inspect.getdoc(info.function) or "",
        }
        for info in chosen
    ]
    if name is None:
        for entry in described:
            del entry["docstring"]
        options = [", ".join(f"{key}={value}" for key, value in info.options.items()) for info in chosen]
        screen.table([{**row, "options": text} for row, text in zip(described, options, strict=True)])
        return described
    info = chosen[0]
    screen.say(f"{info.name}  {info.paper}\n\n{described[0]['docstring']}\n")
    screen.table([{"option": key, "default": str(value)} for key, value in info.options.items()])
    return described[0]


def plan(
    screen: Screen,
    model: Annotated[
        str, typer.Argument(help="A name of wnq's, timm:NAME, torchvision:NAME, hf:NAME or package.module:factory.")
    ],
    method: Annotated[str, typer.Option(help="What the layers get; see wnq methods.")] = "wnq",
    w_bits: Annotated[int | None, typer.Option(help="Width of the weights, 1 to 8, 32 for float.")] = None,
    a_bits: Annotated[int | None, typer.Option(help="Width of the inputs, 1 to 8, 32 for float.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another option of the method. Can be repeated."),
    ] = None,
    first_last_bits: Annotated[
        str,
        typer.Option(metavar="BITS", help="Width of the first and last layer, or none to treat them as all others."),
    ] = "8",
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave float, as a wildcard. Can be repeated.")
    ] = None,
    exception: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN=METHOD:KEY=VALUE,…",
            help="Layers that get another method. Can be repeated; later ones win.",
        ),
    ] = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
) -> Json:
    """Show which layer of a network would get what, and the size that comes of it."""
    from wnq.plan_table import plan_rows
    from wnq.recipe import QuantizeSection, plan_of

    widths = {"w_bits": w_bits, "a_bits": a_bits}
    section = QuantizeSection(
        method=method,
        options={key: bits for key, bits in widths.items() if bits is not None} | pairs(option, "--option"),
        first_last_bits=_first_last(first_last_bits),
        keep_float=tuple(keep_float or ()),
        override=tuple(override(text) for text in exception or ()),
    )
    made = plan_of(section, build(model, num_classes, in_channels, model_option))
    rows = plan_rows(made)
    # Before the first batch there is nothing to say about the inputs.
    screen.table(rows, [column for column in rows[0] if column not in ("kind", "input")])
    quantized = sum(layer.parameters for layer in made.layers)
    floats = sum(left.parameters for left in made.floats)
    kib = sum(layer.size_kib for layer in made.layers) + sum(left.size_kib for left in made.floats)
    totals = {"layers": len(made.layers), "quantized": quantized, "float": floats, "kib": round(kib, 2)}
    totals["float_kib"] = round((quantized + floats) * 4 / 1024, 2)
    screen.say(
        f"{quantized:,} weights in {len(made.layers)} layers; {totals['float_kib']:,} KiB as float32, "
        f"{totals['kib']:,} KiB as planned."
    )
    screen.work()
    if save is not None:
        made.save(save)
        screen.say(f"Plan written to {save}; a recipe takes it as plan = {str(save)!r} in [quantize].")
    return {"model": model, "rows": rows, "totals": totals, "plan": made.to_json()}


def _first_last(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--first-last-bits must be an integer or none, got {text!r}.") from None
