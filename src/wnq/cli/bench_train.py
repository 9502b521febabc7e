"""``wnq bench train``."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import Json, existing
from wnq.cli.options import set_keys
from wnq.cli.screen import Screen
from wnq.cli.shapes import shape_of, widths_of
from wnq.cli.training import read_images

if TYPE_CHECKING:
    from wnq.data import Dataset
    from wnq.recipe import Recipe

RANDOM_BYTES = 2**26
"""Of random images: many batches, so that the beginning of an epoch weighs as little as it does in training."""


def train(
    screen: Screen,
    target: Annotated[
        str, typer.Argument(help="A recipe's TOML file, or a network's name: random images and weights.")
    ],
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="W/A", help="Of a network given by name, or a recipe without [quantize]; 3/3.", show_default=False
        ),
    ] = None,
    compiled: Annotated[bool, typer.Option("--compile", help="Measure both networks compiled, too.")] = False,
    graph: Annotated[
        bool,
        typer.Option(
            "--graph", help="Measure every step as one CUDA graph, too; with --compile, of compiled networks."
        ),
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="For all networks together.")] = 20.0,
    memory: Annotated[bool, typer.Option(help="Measure memory, too.")] = True,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="CxHxW", help="Of one image, for a network given by name; what suits it.", show_default=False
        ),
    ] = None,
    num_classes: Annotated[int, typer.Option(min=1, help="Of a network given by name.")] = 100,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe. Can be repeated."),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of the processor.", show_default=False)] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the result to this JSON file too.", show_default=False)
    ] = None,
) -> Json:
    """Measure what a training step takes, float and quantized: time, images a second, memory, and the share that is not the model.

    The steps are those of wnq train, on the device that it would use, in turn and in an order drawn anew each round; ratios are
    medians over rounds with 95 % intervals.
    """
    import torch

    from wnq.attach import quantize_
    from wnq.files import write_text
    from wnq.models import build_model
    from wnq.recipe import plan_of, resolve
    from wnq.speed import measure_training, training_arms

    if graph and not torch.cuda.is_available():
        raise ValueError("--graph: CUDA graphs need a CUDA device, and PyTorch sees none here.")
    if threads is not None:
        torch.set_num_threads(threads)
    recipe, data = _work(screen, target, bits, size, num_classes, assign)
    recipe = resolve(recipe, data)
    torch.manual_seed(recipe.train.seed)
    network = build_model(recipe.model.name, **recipe.model.options)
    quantized = build_model(recipe.model.name, **recipe.model.options)
    quantized.load_state_dict(network.state_dict())
    assert recipe.quantize is not None
    quantize_(quantized, plan_of(recipe.quantize, quantized))
    screen.work()
    with screen.bar("making ready") as on_arm, screen.bar("measuring") as on_second:
        found = measure_training(
            training_arms(network, quantized, compiled=compiled, captured=graph),
            data,
            recipe.train,
            seconds=seconds,
            memory=memory,
            seed=screen.seed or 0,
            on_arm=on_arm,
            on_second=lambda a, b: on_second(round(10 * a), round(10 * b)),
        )
    shape = list(data.train.shape)
    quantization = {"method": recipe.quantize.method, "options": recipe.quantize.options}
    found = {"target": target, "input": shape, "quantize": quantization, **found}
    if out is not None:
        write_text(out, json.dumps(found, indent=2) + "\n")
    _show(screen, found)
    return found


def _work(
    screen: Screen, target: str, bits: str | None, size: str | None, num_classes: int, assign: list[str] | None
) -> "tuple[Recipe, Dataset]":
    """Return what is trained, and on what.

    Raises:
        ValueError: an option does not fit.
    """
    from wnq.recipe import load_recipe, recipe_from
    from wnq.speed import random_images

    of_file = target.endswith((".toml", ".json"))
    if of_file:
        tables: dict[str, Any] = load_recipe(existing(Path(target))).to_json()
    else:
        tables = {"model": {"name": target}, "train": {"channels_last": True, "flip": True}}
        tables["train"]["crop_padding"] = 1 if shape_of(target, size)[1] < 32 else 4
    if of_file and size is not None:
        raise ValueError(f"--size {size}: {target} says itself which images it takes.")
    if tables.get("quantize") is not None and bits is not None:
        raise ValueError(f"--bits {bits}: {target} says itself how it quantizes; use --set quantize.options.w_bits=…")
    if tables.get("quantize") is None:
        tables["quantize"] = {"method": "wnq", "options": widths_of(bits or "3/3")}
    set_keys(tables, assign)
    recipe = recipe_from(tables, where=target if of_file else "--set")
    if of_file:
        with screen.bar("reading images") as on_image:
            return recipe, read_images(recipe.data, on_image)
    shape, batch = shape_of(target, size), recipe.train.batch_size
    batches = min(64, max(4, RANDOM_BYTES // (batch * math.prod(shape))))
    return recipe, random_images(shape, batches * batch, num_classes)


def _show(screen: Screen, found: dict[str, Any]) -> None:
    screen.table(
        [
            {
                "training": row["arm"],
                "images/s": row["images_per_second"],
                "step, ms": row["step_ms"],
                "5 to 95 %, ms": f"{row['p5_ms']:.3g} to {row['p95_ms']:.3g}",
                "times float": row["times_float"],
                "95 % interval": f"{row['times_float_low']:.2f} to {row['times_float_high']:.2f}",
                "not the model": f"{100 * row['not_model']:.0f} %",
                "95 % interval of it": f"{100 * row['not_model_low']:.0f} to {100 * row['not_model_high']:.0f} %",
                "peak, MiB": row["peak_mib"],
            }
            for row in found["rows"]
        ],
        title=f"batch {found['batch_size']}, {found['rows'][0]['rounds']} rounds",
    )
    screen.say("")
    screen.table(
        [{"training": row["arm"], **{f"{k}, ms": v for k, v in row["parts_ms"].items()}} for row in found["rows"]]
    )
    screen.say("")
    where = found["environment"]
    processor = f"{where['cpu']}, {where['threads']} threads" if where["device"] == "cpu" else where["device"]
    screen.say(f"{processor}. Memory: {found['memory'] or 'not measured'}.")
