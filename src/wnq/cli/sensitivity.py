"""``wnq sensitivity``."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wnq.cli.command import Json, StoppedError, command
from wnq.cli.options import DataName, DataOption, InChannels, ModelName, ModelOption, NumClasses, data_options, writable
from wnq.cli.screen import Screen
from wnq.cli.targets import Target, open_target
from wnq.cli.training import data_section, device_of, read_images

if TYPE_CHECKING:
    from wnq.data import Split
    from wnq.sensitivity import Sensitivity

SPLITS = ("train", "val")


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(
        app,
        "wnq sensitivity runs/float --out sensitivity.json",
        "wnq sensitivity resnet20.pt --model resnet20 --data cifar10 --bits 2,3,4 --samples 2048",
        "wnq sensitivity runs/float --inputs --leave-out --json",
    )(sensitivity)


def sensitivity(
    screen: Screen,
    target: Annotated[Path, typer.Argument(help="A float run's folder, or float weights with --model.")],
    data: DataName = None,
    data_option: DataOption = None,
    bits: Annotated[str, typer.Option(metavar="BITS,…", help="Widths to measure.")] = "2,3,4,8",
    leave_out: Annotated[
        bool,
        typer.Option("--leave-out", help="Also all layers together, and all but one: what leaving it float gains."),
    ] = False,
    inputs: Annotated[
        bool, typer.Option("--inputs", help="Quantize the layers' inputs too, at the same width.")
    ] = False,
    granularity: Annotated[str, typer.Option(help="One range a tensor, or one a channel.")] = "tensor",
    grid: Annotated[str, typer.Option(help="full (2^k levels, no zero) or symmetric (an exact zero).")] = "full",
    layer: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Measure these layers only, as a wildcard. Can be repeated."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Images, drawn by --seed (0); all if there are fewer.")] = 1024,
    split: Annotated[str, typer.Option(help="Which images: train, or val.")] = "train",
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; by default whichever is there.")] = None,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
    out: Annotated[
        Path, typer.Option(help="JSON file, written after every layer; the same measurement is continued there.")
    ] = Path("sensitivity.json"),
) -> Json:
    """Measure what quantizing each layer alone does to the loss and the accuracy.

    Twice a layer and width: with max scaling, tail included, and clipped where the squared error is least. Where the clip is
    better, removing the tail can pay. Nothing is trained. wnq plan --budget chooses widths by the file.
    """
    from wnq.data import batches_of
    from wnq.sensitivity import Prober, Settings, measure_sensitivity
    from wnq.sensitivity.storing import sensitivity_json
    from wnq.sensitivity.summary import sentences

    settings = Settings(
        bits=_widths(bits), grid=grid, granularity=granularity, inputs=inputs, leave_out=leave_out,
        layers=tuple(layer or ()),
    )  # fmt: skip
    if split not in SPLITS:
        raise ValueError(f"--split must be train or val, got {split!r}.")
    writable(out, ".json")
    options = data_options(data_option)
    place = device_of(device)
    opened = open_target(target, model, num_classes, in_channels, model_option)
    _require_float(opened)
    section = data_section(opened, data, options)
    with screen.bar("reading images") as on_image:
        images = read_images(section, on_image)
    seed = screen.seed or 0
    chosen = _subset(images.train if split == "train" else images.val, samples, seed)
    about = {"target": str(target), "data": section.name, "split": split, "samples": len(chosen), "seed": seed}
    batches = batches_of(chosen, batch_size, mean=images.mean, std=images.std, device=place)
    prober = Prober(opened.model.to(place), batches.epoch(0), settings)
    screen.work()
    try:
        with screen.bar("measuring layers") as show:
            found = measure_sensitivity(prober, out, about=about, on_row=lambda _, done, total: show(done, total))
    except KeyboardInterrupt:
        raise StoppedError(f"stopped; what was measured is in {out}. The same command continues.") from None
    _show(screen, found, out)
    return {"out": out, "sentences": sentences(found), **sensitivity_json(found)}


def _widths(text: str) -> tuple[int, ...]:
    """Return what ``--bits`` means.

    Raises:
        ValueError: it is no list of integers.
    """
    try:
        return tuple(int(entry) for entry in text.split(","))
    except ValueError:
        raise ValueError(f"--bits must be integers separated by commas, such as 2,3,4,8, got {text!r}.") from None


def _require_float(target: Target) -> None:
    """Raise ``ValueError`` if a target's weights are quantized, with what to measure instead."""
    from wnq.attach import quantized_layers

    if next(iter(quantized_layers(target.model)), None) is None:
        return
    start = target.recipe.model.start if target.recipe is not None else None
    remedy = (
        f"what it started from: wnq sensitivity {shlex.quote(start)}" if start else "the float network it came from"
    )
    raise ValueError(f"{target.path} is quantized already. Measure {remedy}.")


def _subset(images: "Split", count: int, seed: int) -> "Split":
    """Return some images, always the same ones for a seed, in the order of the split."""
    import torch

    if count >= len(images):
        return images
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images.select(order[:count].sort().values)


def _show(screen: Screen, found: "Sensitivity", out: Path) -> None:
    from wnq.sensitivity.summary import sentences, together_rows, width_rows

    accuracy = "" if found.accuracy is None else f", accuracy {found.accuracy:.2f} %"
    screen.say(
        f"Float: loss {found.loss:.4g}{accuracy}, on {found.samples:,} images ({found.about.get('split', 'train')}). Changes from "
        "there with one layer quantized, tail included, ± standard error; * beyond noise:\n"
    )
    for bits, sentence in zip(found.settings.bits, sentences(found), strict=True):
        screen.table(width_rows(found, bits))
        screen.say("")
        if rows := together_rows(found, bits):
            screen.table(rows, title="All layers quantized, and what leaving one float changes then:")
            screen.say("")
        screen.say(f"{sentence}\n")
    network = shlex.quote(str(found.about.get("target", "MODEL")))
    screen.say(f"Written to {out}. Next: wnq plan {network} --budget 3bits --sensitivity {shlex.quote(str(out))}")
