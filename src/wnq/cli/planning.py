"""``wnq methods`` and ``wnq plan``."""

import inspect
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.budgeting import show_choice, within_budget
from wnq.cli.command import Json, command, existing
from wnq.cli.options import (
    InChannels,
    ModelOption,
    Normalize,
    NumClasses,
    build,
    normalizer_options,
    override,
    pairs,
)
from wnq.cli.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from wnq.methods import MethodInfo, Recommended


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "wnq methods", "wnq methods wnq", "wnq methods --json")(methods)
    command(
        app,
        "wnq plan resnet20 --w-bits 2 --a-bits 2",
        "wnq plan resnet20 --method lsq --override 'layer3.*=wnq:w_bits=4,a_bits=4' --save plan.json",
        "wnq plan resnet20 --method twn --normalize max_abs",
        "wnq plan runs/float --budget 2.5bits --sensitivity sensitivity.json --save plan.json",
    )(plan)


def methods(
    screen: Screen,
    name: Annotated[str | None, typer.Argument(help="Show everything about this one.", show_default=False)] = None,
) -> Json:
    """List the quantization methods and input quantizers, or explain one method."""
    from wnq.activations import list_inputs
    from wnq.methods import COMMON, MethodInfo, list_methods

    if name is not None:
        info = MethodInfo.of(name)
        docstring = inspect.getdoc(info.function) or ""
        screen.say(f"{info.name}  {info.paper}\n\n{docstring}\n")
        screen.table([{"option": key, "default": str(value)} for key, value in info.options.items()])
        if info.recommended.source:
            screen.say(f"Recommended training settings, which wnq compare applies: {_recommended(info.recommended)}.")
        return {**_described(info), "docstring": docstring}
    described = [_described(info) for info in list_methods()]
    shown = [
        {
            "name": row["name"],
            "w_bits": _ranges(row["w_bits"]),
            "paper": row["paper"],
            "summary": row["summary"],
            "options": ", ".join(
                f"{k}={v}" for k, v in row["options"].items() if k not in (*COMMON, "w_bits", "a_bits")
            ),
        }
        for row in described
    ]
    screen.table(shown)
    screen.say(f"Every method also takes a_bits and {', '.join(f'{key}={value}' for key, value in COMMON.items())}.\n")
    inputs: list[dict[str, Any]] = [
        {"activation": entry.name, "a_bits": list(entry.widths), "paper": entry.paper, "summary": entry.summary}
        for entry in list_inputs()
    ]
    screen.table([{**row, "a_bits": _ranges(row["a_bits"])} for row in inputs])
    return {"methods": described, "inputs": inputs}


def _described(info: "MethodInfo") -> dict[str, Any]:
    return {
        "name": info.name,
        "paper": info.paper,
        "summary": info.summary,
        "w_bits": list(info.widths),
        "options": info.options,
        "recommended": vars(info.recommended) | {"weight_decay_at": dict(info.recommended.weight_decay_at)},
        "no_normalizer": info.no_normalizer,
    }


def _recommended(settings: "Recommended") -> str:
    """Return the factors that are not those of the recipe itself, and where they are from."""
    plain = type(settings)()
    changed = [
        f"{name} x {value:g}"
        for name in ("lr", "weight_decay", "quantizer_lr", "quantizer_weight_decay")
        if (value := getattr(settings, name)) != getattr(plain, name)
    ]
    changed += [f"weight_decay x {value:g} at {bits} bits" for bits, value in settings.weight_decay_at.items()]
    return f"{', '.join(changed)} ({settings.source})"


def _ranges(widths: Sequence[int]) -> str:
    """Return ``1-8`` for consecutive widths, else ``2, 3, 8``."""
    if len(widths) > 2 and widths[-1] - widths[0] == len(widths) - 1:
        return f"{widths[0]}-{widths[-1]}"
    return ", ".join(map(str, widths))


def plan(
    screen: Screen,
    model: Annotated[
        str,
        typer.Argument(
            help="A name of wnq's, timm:NAME, torchvision:NAME, hf:NAME or package.module:factory, or a run's folder."
        ),
    ],
    method: Annotated[str, typer.Option(help="What the layers get; see wnq methods.")] = "wnq",
    w_bits: Annotated[int | None, typer.Option(help="Width of the weights, 1 to 8, 32 for float.")] = None,
    a_bits: Annotated[int | None, typer.Option(help="Width of the inputs, 1 to 8, 32 for float.")] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another option of the method. Can be repeated."),
    ] = None,
    normalize: Normalize = None,
    first_last_bits: Annotated[
        str,
        typer.Option(metavar="BITS", help="Width of the first and last layer, or none to treat them as all others."),
    ] = "8",
    keep_float: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Layers to leave float, as a wildcard. Can be repeated.")
    ] = None,
    residual_bits: Annotated[
        int,
        typer.Option(
            help="8 rounds what convolutions put out at the ends of residual branches, for engines of integers; 32 does not."
        ),
    ] = 32,
    exception: Annotated[
        list[str] | None,
        typer.Option(
            "--override",
            metavar="PATTERN=METHOD:KEY=VALUE,…",
            help="Layers that get another method. Can be repeated; later ones win.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BITS|SIZE",
            help="Choose widths within it: 2.5bits (mean of the layers that are chosen) or 120KiB (everything). Needs "
            "--sensitivity.",
            show_default=False,
        ),
    ] = None,
    sensitivity: Annotated[
        Path | None, typer.Option(help="What wnq sensitivity measured on this network.", show_default=False)
    ] = None,
    solver: Annotated[str, typer.Option(help="Of --budget: exact, or greedy.")] = "exact",
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this JSON file.")] = None,
) -> Json:
    """Show which layer of a network would get what, and the size that comes of it.

    With --budget each layer gets the width that keeps the sum of the measured loss changes least, and keeps the gradient through
    its maximum or not as the measurement says. --first-last-bits, --override and --keep-float decide first.
    """
    from wnq.plan_table import outputs_in_words, plan_rows
    from wnq.quantizer import FLOAT_BITS
    from wnq.recipe import QuantizeSection, plan_of

    widths = {"w_bits": w_bits, "a_bits": a_bits}
    section = QuantizeSection(
        method=method,
        options={key: bits for key, bits in widths.items() if bits is not None}
        | normalizer_options(normalize)
        | pairs(option, "--option"),
        first_last_bits=_first_last(first_last_bits),
        keep_float=tuple(keep_float or ()),
        residual_bits=residual_bits,
        override=tuple(override(text) for text in exception or ()),
    )
    _check_budget(model, budget, sensitivity, section.options)
    network = _network(model, num_classes, in_channels, model_option)
    if budget is None or sensitivity is None:
        chosen, made = None, plan_of(section, network)
    else:
        chosen = within_budget(network, section, budget, sensitivity, solver)
        made = chosen.plan
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
    if residual_bits != FLOAT_BITS:
        screen.say(outputs_in_words(made))
    screen.work()
    result: dict[str, Any] = {"model": model, "rows": rows, "totals": totals, "plan": made.to_json()}
    if chosen is not None and budget is not None:
        result["budget"] = show_choice(screen, chosen, budget)
    if save is not None:
        made.save(save)
        screen.say(f"Plan written to {save}; a recipe takes it as plan = {str(save)!r} in [quantize].")
    return result


def _check_budget(model: str, budget: str | None, sensitivity: Path | None, options: Mapping[str, Any]) -> None:
    """Raise what is wrong with ``--budget`` and the options beside it."""
    if budget is None:
        if sensitivity is not None:
            raise ValueError("--sensitivity is for --budget, such as --budget 2.5bits.")
        return
    if "w_bits" in options:
        raise ValueError("--budget chooses the widths of the weights; leave w_bits out, or fix layers by --override.")
    if sensitivity is None:
        target = shlex.quote(model) if Path(model).is_dir() else f"WEIGHTS --model {shlex.quote(model)} --data NAME"
        raise ValueError(
            f"--budget needs measurements: run wnq sensitivity {target} --out sensitivity.json and add "
            "--sensitivity sensitivity.json."
        )
    existing(sensitivity)


def _network(
    model: str, num_classes: int | None, in_channels: int | None, options: Sequence[str] | None
) -> "nn.Module":
    """Build the float network that a name or a run's folder means."""
    recipe = Path(model) / "recipe.json"
    if not recipe.is_file():
        return build(model, num_classes, in_channels, options)
    from wnq.models import build_model
    from wnq.recipe import load_recipe

    if num_classes or in_channels or options:
        raise ValueError(f"{model} is a run's folder and knows its network; leave the network's options out.")
    section = load_recipe(recipe).model
    return build_model(section.name, **section.options)


def _first_last(text: str) -> int | None:
    if text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--first-last-bits must be an integer or none, got {text!r}.") from None
