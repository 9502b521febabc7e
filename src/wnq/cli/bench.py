"""``wnq bench infer``; ``wnq bench train`` is in :mod:`wnq.cli.bench_train`."""

import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.bench_train import train
from wnq.cli.command import Json, command
from wnq.cli.options import DataName, DataOption, InChannels, ModelName, ModelOption, NumClasses, build, data_options
from wnq.cli.screen import Screen
from wnq.cli.shapes import numbers_in, shape_of, widths_of
from wnq.cli.targets import Target, open_target
from wnq.cli.training import data_section, read_images

if TYPE_CHECKING:
    from torch import Tensor, nn


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    bench = typer.Typer(
        name="bench", help="Measure speed.", no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False
    )
    command(
        bench,
        "wnq bench infer runs/first",
        "wnq bench infer preact_resnet18 --bits 4/4 --size 3x224x224 --batches 1,32",
        "wnq bench infer timm:resnet18 --size 3x224x224 --engines onnx,openvino --out speed.json",
    )(infer)
    command(
        bench,
        "wnq bench train recipe.toml --compile",
        "wnq bench train resnet20 --bits 3/3 --set train.batch_size=128 --set train.bf16=true",
    )(train)
    app.add_typer(bench)


def infer(
    screen: Screen,
    target: Annotated[
        str,
        typer.Argument(
            help="A quantized run's folder, a packed file, or a network's name: its shapes, random weights."
        ),
    ],
    batches: Annotated[str, typer.Option(metavar="SIZE,…", help="Batch sizes.")] = "1,32",
    engines: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…", help="eager, compiled, or what wnq export --to takes; by default all.", show_default=False
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each batch size, all ways together.")] = 10.0,
    base: Annotated[
        str | None,
        typer.Option(help="What the others are compared with; by default float in ONNX Runtime.", show_default=False),
    ] = None,
    bits: Annotated[str, typer.Option(metavar="W/A", help="Of a network given by name.")] = "4/4",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="CxHxW", help="Of one image, for a network given by name; what suits it.", show_default=False
        ),
    ] = None,
    data: DataName = None,
    data_option: DataOption = None,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to this JSON file too.", show_default=False)
    ] = None,
) -> Json:
    """Measure how long a network takes, float and integer, in every engine that is installed.

    One thread, no spinning. All ways run in turn, in an order drawn anew each round, so that they meet the same machine; ratios
    are medians over rounds with 95 % intervals. What is not installed or does not work is named.
    """
    from wnq.export import DIALECTS
    from wnq.files import write_text
    from wnq.names import check_choice
    from wnq.speed import measure_speed

    numbers = numbers_in(batches, ",", "--batches")
    chosen = None if engines is None else [part.strip() for part in engines.split(",")]
    for name in chosen or ():
        check_choice(name, ("eager", "compiled", *DIALECTS), where="--engines")
    if Path(target).exists():
        opened = open_target(Path(target), model, num_classes, in_channels, model_option)
        section = data_section(opened, data, data_options(data_option))
        with screen.bar("reading images") as on_image:
            split = read_images(section, on_image)
        from wnq.data import batches_of

        x, _ = next(iter(batches_of(split.train, min(256, len(split.train)), mean=split.mean, std=split.std).epoch(0)))
        quantized, network = opened.model, _float_network(opened)
    else:
        network = build(target, num_classes, in_channels, model_option)
        quantized, x = _by_name(network, bits, shape_of(target, size))
    screen.work()
    with screen.bar("making files") as on_arm, screen.bar("measuring") as on_second:
        found = measure_speed(
            quantized, (x,), batches=numbers, float_model=network, engines=chosen, base=base, seconds=seconds,
            seed=screen.seed or 0, on_arm=on_arm, on_second=lambda a, b: on_second(round(10 * a), round(10 * b)),
        )  # fmt: skip
    found = {"target": target, "input": list(x.shape[1:]), "bits": None if Path(target).exists() else bits, **found}
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n")
    _show(screen, found)
    return found


def _by_name(network: "nn.Module", bits: str, shape: list[int]) -> "tuple[nn.Module, Tensor]":
    """Return a network's quantized version with random weights, and random images."""
    import torch

    from wnq.attach import calibrate_, quantize_
    from wnq.methods import get_method
    from wnq.plan import make_plan

    widths = widths_of(bits)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(32, *shape)
    network.train()
    with torch.no_grad():  # BatchNorm statistics that fit, or signals would vanish or explode
        for module in network.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):  # pyright: ignore[reportPrivateUsage]
                module.momentum = 1.0
        network(x)
    network.eval()
    quantized = copy.deepcopy(network)
    quantize_(quantized, make_plan(quantized, get_method("wnq", **widths)))
    with torch.no_grad():
        calibrate_(quantized, x)
    return quantized.eval(), x


def _float_network(opened: Target) -> "nn.Module | None":
    """Return the float network of a target, with weights of its own: speed does not depend on them."""
    from wnq.models import build_model

    recipe = opened.recipe
    if recipe is not None:
        return build_model(recipe.model.name, **recipe.model.options).eval()
    named: dict[str, Any] | None = getattr(opened.model, "wnq_model", None)
    return None if named is None else build_model(named["name"], **named["options"]).eval()


def _show(screen: Screen, found: dict[str, Any]) -> None:
    for batch in dict.fromkeys(row["batch"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["batch"] == batch]
        screen.table(
            [
                {
                    "way": row["arm"],
                    "median, ms": row["median_ms"],
                    "5 to 95 %, ms": f"{row['p5_ms']:.3g} to {row['p95_ms']:.3g}",
                    f"times {found['base']}": row["times_faster"],
                    "95 % interval": f"{row['times_faster_low']:.2f} to {row['times_faster_high']:.2f}",
                }
                for row in sorted(rows, key=lambda row: row["median_ms"])
            ],
            title=f"batch {batch}, {rows[0]['rounds']} rounds",
        )
        screen.say("")
    for entry in found["left_out"]:
        screen.say(f"Not measured: {entry['name']}: {entry['why']}")
    cpu = found["processor"]
    has = "with VNNI, files for such processors" if cpu["vnni"] else "without VNNI, so 8-bit products are slow"
    screen.say(f"1 thread, {cpu['name']} {has}.")
