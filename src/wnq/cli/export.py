"""``wnq export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import FailureError, Json, command
from wnq.cli.options import (
    DataName,
    DataOption,
    InChannels,
    ModelName,
    ModelOption,
    NumClasses,
    data_options,
)
from wnq.cli.screen import Screen
from wnq.cli.targets import Target, open_target
from wnq.cli.training import data_section, read_images

if TYPE_CHECKING:
    from torch import nn


def register(app: typer.Typer) -> None:
    """Add the command to the program."""
    command(
        app,
        "wnq export runs/first --to openvino --out deploy",
        "wnq export runs/first --to onnx --small --out deploy/model.onnx --require-agreement 99.5",
        "wnq export model.wnq.safetensors --to onnx --data digits",
    )(export)


def export(
    screen: Screen,
    target: Annotated[Path, typer.Argument(help="The folder of a finished, quantized run, or a packed file.")],
    to: Annotated[
        str,
        typer.Option(
            help="onnx (for ONNX Runtime), openvino, torch (for torch.compile), executorch (for phones) or qonnx (for FPGA "
            "flows)."
        ),
    ] = "onnx",
    small: Annotated[
        bool, typer.Option("--small/--fast", help="Weights at their true width, or as int8. Same outputs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="The file to write, or a folder for model.onnx.")] = Path("export"),
    data: DataName = None,
    data_option: DataOption = None,
    images: Annotated[int, typer.Option(min=1, help="Validation images of the proof, at most.")] = 1000,
    require_agreement: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Fail below this share of equal arg-max, in percent, with the trained model."
        ),
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(
            min=0, max=4, help="Of packed linear layers with float inputs: 0 exact, 4 fast.", show_default=False
        ),
    ] = None,
    residual_bits: Annotated[
        int,
        typer.Option(
            help="Of the values behind convolutions that nothing quantizes, for ONNX Runtime and ExecuTorch: 8 runs those "
            "convolutions in integers, 32 leaves them float: nearer to the trained network, and slower."
        ),
    ] = 8,
    vnni: Annotated[
        bool,
        typer.Option(
            "--vnni", help="For processors with VNNI alone: 8-bit layers stay whole, whose sums saturate on others."
        ),
    ] = False,
    model: ModelName = None,
    num_classes: NumClasses = None,
    in_channels: InChannels = None,
    model_option: ModelOption = None,
) -> Json:
    """Write a quantized network for an integer engine, and prove the file.

    The written file is opened in a fresh process and run beside the trained network: agreement, accuracy, operators that run in
    integers, bytes and speed are printed and saved as FILE.proof.json.
    """
    import torch

    from wnq.export import DIALECTS, ProofError, export_model
    from wnq.names import check_choice

    check_choice(to, DIALECTS, where="--to")
    if small and "small" not in DIALECTS[to].flavours:
        raise ValueError(f"--small: --to {to} has no small flavour; leave it out.")
    if residual_bits not in (8, 32):
        raise ValueError(f"--residual-bits must be 8, or 32 for float, got {residual_bits}.")
    options = data_options(data_option)
    opened = open_target(target, model, num_classes, in_channels, model_option)
    section = data_section(opened, data, options)
    with screen.bar("reading images") as on_image:
        split = read_images(section, on_image)
    ending = DIALECTS[to].ending
    out = out if out.suffix == ending else out / f"model{ending}"
    screen.work()
    from wnq.data import batches_of

    def some(part: Any, count: int) -> "tuple[torch.Tensor, torch.Tensor]":
        batch = min(count, len(part))
        return next(iter(batches_of(part, batch, mean=split.mean, std=split.std).epoch(0)))

    x, labels = some(split.val, images)
    calibration, _ = some(split.train, 256)
    torch.set_num_threads(1)
    try:
        with screen.bar(f"exporting to {to}") as step:
            proof = export_model(
                opened.model, (x,), out, to=to, flavour="small" if small else "fast", labels=labels,
                float_model=_float_start(opened), calibration=(calibration,), accuracy_level=accuracy_level,
                vnni=vnni, residual_bits=residual_bits, on_step=step,
            )  # fmt: skip
    except ProofError as error:
        raise FailureError(str(error)) from error
    _show(screen, proof)
    agreement = proof["engine_vs_trained"]["agreement"]
    if require_agreement is not None and agreement < require_agreement:
        raise FailureError(
            f"{out}: {agreement:.2f} % of {len(x):,} arg-max agree with the trained network, --require-agreement asks for "
            f"{require_agreement:g} %."
        )
    return proof


def _float_start(opened: Target) -> "nn.Module | None":
    """Return the float network that a run started from, if it is there."""
    import torch

    from wnq.models import build_model
    from wnq.recipe import load_weights_

    recipe = opened.recipe
    if recipe is None or recipe.model.start is None or not Path(recipe.model.start).exists():
        return None
    with torch.random.fork_rng(devices=[]):
        network = build_model(recipe.model.name, **recipe.model.options)
    load_weights_(network, recipe.model.start)
    return network.eval()


def _show(screen: Screen, proof: dict[str, Any]) -> None:
    screen.table(
        [
            {k: row[k] for k in ("name", "kind", "form", "bits", "input", "sums", "batchnorm", "why")}
            for row in proof["layers"]
        ]
    )
    screen.say("")
    pairs = ("engine_vs_trained", "engine_vs_reference", "reference_vs_trained")
    screen.table(
        [
            {
                "logits": name.replace("_", " "),
                "max |difference|": proof[name]["max"],
                "mean |difference|": proof[name]["mean"],
                "same arg-max, %": proof[name]["agreement"],
            }
            for name in pairs
        ]
    )
    screen.say("")
    screen.table([{"accuracy, %": "", **proof["accuracy"]}])
    screen.say("")
    size = proof["bytes"]
    screen.table([{k: round(v) for k, v in size.items() if v is not None}], title="bytes")
    operators = proof["operators"]
    kinds = ", ".join(f"{count} {kind}" for kind, count in operators["kinds"].items())
    said = f"{operators['integer']} of {operators['products']} products run in integers in {proof['engine']}: {kinds}."
    screen.say("\n" + (said if operators["products"] else f"{proof['engine']} does not say how it runs the products."))
    if operators["integer_layers_run_in_float"]:
        screen.say(
            f"Run in float though their sums are integers: {', '.join(operators['integer_layers_run_in_float'])}."
        )
    floats = [row["name"] for row in proof["layers"] if row["sums"] == "float"]
    screen.say(f"Float layers left: {', '.join(floats) or 'none'}.")
    for note in proof["notes"]:
        screen.say(note)
    if proof["accuracy_level"] is not None:
        settings = ", ".join(f"{k}={v}" for k, v in proof["settings"].items())
        screen.say(f"Packed linear layers: accuracy level {proof['accuracy_level']}; open the file with {settings}.")
    moved = any("8-bit values" in note for note in proof["notes"])
    if moved and proof["engine_vs_trained"]["agreement"] < 99.5:
        screen.say(
            "The 8-bit values move roundings behind them, and with them the arg-max where logits are close. --residual-bits 32 "
            "leaves them float, and --to openvino needs none."
        )
    cpu = proof["processor"]
    for row in proof["latency"]:
        screen.say(
            f"Quick look at speed, batch {row['batch']}: {row['integer_ms']:.3g} ms, float {row['float_ms']:.3g} ms, "
            f"{row['float_ms'] / row['integer_ms']:.2f} times, {row['runs']} paired runs, 1 thread, {cpu['name']}"
            f"{'' if cpu['vnni'] else ' without VNNI'}."
        )
    beside = "" if size["float_file"] is None else f", float {size['float_file']:,}"
    screen.say(f"{proof['file']}: {size['file']:,} bytes{beside}. {proof['seconds']:.1f} s in all.")
