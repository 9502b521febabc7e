"""``wnq train`` and ``wnq evaluate``."""

import dataclasses
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import FailureError, Json, StoppedError, command, existing
from wnq.cli.options import (
    DataName,
    DataOption,
    InChannels,
    ModelName,
    ModelOption,
    Normalize,
    NumClasses,
    data_options,
    normalizer_options,
    set_keys,
)
from wnq.cli.screen import Screen
from wnq.cli.targets import Target, open_target

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from wnq.data import Dataset
    from wnq.plan import Plan
    from wnq.recipe import DataSection, Recipe


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(
        app,
        "wnq train recipe.toml --out runs/first",
        "wnq train recipe.toml --out runs/first --resume",
        "wnq train recipe.toml --set train.epochs=3 --set quantize.options.w_bits=2",
        "accelerate launch -m wnq.cli train recipe.toml --out runs/first",
    )(train)
    command(
        app,
        "wnq evaluate runs/first",
        "wnq evaluate model.wnq.safetensors --data digits",
        "wnq evaluate model.wnq.safetensors --data cifar100 --data-option folder=cifar100-parquet",
    )(evaluate)


def train(
    screen: Screen,
    recipe: Annotated[Path, typer.Argument(help="TOML file: [model], [data], [quantize], [train].")],
    out: Annotated[
        Path | None, typer.Option(help="The run's folder. Default: runs/ and the recipe's name.", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the unfinished run in the folder.")] = False,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change a key of the recipe. Can be repeated."),
    ] = None,
    normalize: Normalize = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Of the processor; tiny networks on a busy machine are fastest with 1.", show_default=False
        ),
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Log to TensorBoard in the run's folder.")] = False,
) -> Json:
    """Train a recipe, float or quantized, into a folder. Ctrl-C saves the state; --resume continues."""
    import torch

    from wnq.plan_table import outputs_in_words
    from wnq.quantizer import FLOAT_BITS
    from wnq.recipe import load_recipe, recipe_from, run_recipe
    from wnq.train import Interrupted

    if threads is not None:
        torch.set_num_threads(threads)
    tables = load_recipe(existing(recipe)).to_json()
    set_keys(tables, assign)
    if normalize is not None:
        if tables["quantize"] is None:
            raise ValueError(f"--normalize {normalize}: {recipe} has no [quantize] table, so nothing is quantized.")
        tables["quantize"]["options"] |= normalizer_options(normalize)
    plan = recipe_from(tables, where=str(recipe))
    if screen.seed is not None:
        plan = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=screen.seed))
    out = out or Path("runs") / recipe.stem
    with screen.bar("reading images") as on_image:
        data = read_images(plan.data, on_image)
    checked = _check(plan, data)
    if checked is not None and plan.quantize is not None and plan.quantize.residual_bits != FLOAT_BITS:
        screen.say(outputs_in_words(checked))
    screen.work()
    accelerator = _tracker(out, plan) if tensorboard else None
    try:
        with screen.training_bar(out.name) as on_step:
            _, result = run_recipe(plan, out, resume=resume, data=data, accelerator=accelerator, on_step=on_step)
    except Interrupted:
        again = ["wnq", "train", str(recipe), "--out", str(out), "--resume"]
        again += [word for text in assign or () for word in ("--set", text)]
        again += [] if normalize is None else ["--normalize", normalize]
        again += [] if threads is None else ["--threads", str(threads)]
        again += [] if screen.seed is None else ["--seed", str(screen.seed)]
        raise StoppedError(f"stopped; the state is saved in {out}. Continue with: {shlex.join(again)}") from None
    finally:
        if accelerator is not None:
            accelerator.end_training()
    screen.table(result.history[-1:], ["epoch", "loss", "accuracy", "val_loss", "val_accuracy"])
    screen.say(
        f"{result.val.accuracy:.2f} % of {result.val.images:,} validation images, after {result.seconds:.1f} s at "
        f"{result.images_per_second:,.0f} images/s. Everything is in {out}."
    )
    if plan.quantize is not None:
        screen.say(f"Next: wnq pack {shlex.quote(str(out))} --out model.wnq.safetensors")
    return {
        "out": out,
        "val_accuracy": result.val.accuracy,
        "val_loss": result.val.loss,
        "val_images": result.val.images,
        "seconds": round(result.seconds, 3),
        "images_per_second": round(result.images_per_second, 1),
        "history": result.history,
    }


def data_section(target: Target, data: str | None, options: dict[str, Any]) -> "DataSection":
    """Return which images are meant: those of ``--data``, or a run's own.

    Raises:
        ValueError: neither says.
    """
    from wnq.recipe import DataSection

    if data is not None:
        return DataSection(name=data, **options)
    if target.recipe is not None:
        return dataclasses.replace(target.recipe.data, **options)
    raise ValueError(
        f"{target.path} does not say which images it was trained on: pass --data, for example --data digits."
    )


def read_images(section: "DataSection", on_image: Any) -> "Dataset":
    """Load the images of a ``[data]`` table.

    Raises:
        FailureError: its folder does not exist.
    """
    from wnq.recipe import data_of

    if section.folder is not None:
        existing(Path(section.folder).expanduser())
    return data_of(section, on_image)


def _check(recipe: "Recipe", data: "Dataset") -> "Plan | None":
    """Find what is wrong with a recipe before anything is written; return its plan, if it quantizes a network of wnq's."""
    import torch

    from wnq.models import build_model
    from wnq.recipe import plan_of, resolve

    for path in (recipe.model.start, recipe.quantize and recipe.quantize.plan):
        if path is not None:
            existing(Path(path))
    if ":" in recipe.model.name:
        return None  # may be large, or on a hub: let the run build it, once
    with torch.device("meta"):
        model = build_model(recipe.model.name, **resolve(recipe, data).model.options)
    return None if recipe.quantize is None else plan_of(recipe.quantize, model)


def _tracker(out: Path, recipe: "Recipe") -> "Accelerator":
    try:
        import tensorboard as _  # noqa: F401  # pyright: ignore[reportUnusedImport, reportMissingImports]
        from accelerate import Accelerator
    except ImportError as error:
        raise ModuleNotFoundError(f'--tensorboard needs {error.name}: pip install "wnq[train]"') from error
    accelerator = Accelerator(log_with="tensorboard", project_dir=out)
    simple = {key: value for key, value in dataclasses.asdict(recipe.train).items() if value is not None}
    accelerator.init_trackers("tensorboard", config=simple)
    return accelerator


def device_of(name: str | None) -> "torch.device":
    """Return the device that ``--device`` names; by default the GPU if there is one.

    Raises:
        ValueError: it is no device.
        FailureError: this machine has no such GPU.
    """
    import torch

    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:NUMBER, got {name!r}.") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise FailureError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices.")
    return place


def evaluate(
    screen: Screen,
    target: Annotated[Path, typer.Argument(help="A run's folder, a packed file, or float weights with --model.")],
    data: DataName = None,
    data_option: DataOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default whichever is there.")] = None,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Measure the accuracy on the validation images: a run's own, or those of --data."""
    from wnq.data import batches_of, unreadable_images
    from wnq.metrics import evaluate as measure

    options = data_options(data_option)
    place = device_of(device)
    opened = open_target(target, model, num_classes, in_channels, model_option)
    section = data_section(opened, data, options)
    with screen.bar("reading images") as on_image:
        images = read_images(section, on_image)
    screen.work()
    batches = batches_of(images.val, batch_size, mean=images.mean, std=images.std, device=place)
    begin = time.perf_counter()
    metrics = measure(opened.model.to(place), batches.epoch(0))
    seconds = time.perf_counter() - begin
    row: dict[str, Any] = {"target": str(target), "data": section.name, **dataclasses.asdict(metrics)}
    row["images_per_second"] = round(metrics.images / max(seconds, 1e-9), 1)
    screen.table([row])
    if unreadable := unreadable_images(images.val):
        row["unreadable"] = unreadable
        screen.say(f"{len(unreadable)} images could not be read and were left out: {', '.join(list(unreadable)[:3])}")
    return row
