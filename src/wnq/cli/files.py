"""``wnq pack``, ``wnq inspect`` and ``wnq unpack``."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wnq.cli.command import Json, command, existing
from wnq.cli.options import writable
from wnq.cli.screen import Screen
from wnq.cli.targets import open_run

if TYPE_CHECKING:
    from wnq.artifact import SizeReport


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    command(app, "wnq pack runs/first --out model.wnq.safetensors", "wnq pack runs/first --coder ans")(pack)
    command(app, "wnq inspect model.wnq.safetensors")(inspect)
    command(app, "wnq unpack model.wnq.safetensors --out state.safetensors")(unpack)


def pack(
    screen: Screen,
    run: Annotated[Path, typer.Argument(help="The folder of a finished, quantized run.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.wnq.safetensors"),
    coder: Annotated[
        str,
        typer.Option(
            help="none: codes at their width, which any safetensors reader and compressed-tensors can unpack. zstd: smaller. ans: "
            "near the entropy of the codes, or zstd where that is smaller. zstd and ans need the extra wnq[pack], also to read.",
        ),
    ] = "none",
) -> Json:
    """Write the trained network as a small file: codes of 1 to 8 bits, codebooks, and the rest of its state."""
    from wnq.artifact import save
    from wnq.artifact.coders import CODERS, versions
    from wnq.names import check_choice

    writable(out, ".safetensors")
    versions(check_choice(coder, CODERS, where="--coder"))
    opened = open_run(run)
    screen.work()
    return _show(screen, out, save(opened.model, out, coder=coder))


def inspect(screen: Screen, file: Annotated[Path, typer.Argument(help="A packed file.")]) -> Json:
    """Show what is in a packed file: layers, widths, sizes, checksum. Its contents are verified."""
    from wnq.artifact import inspect_file

    existing(file)
    screen.work()
    return _show(screen, file, inspect_file(file))


def unpack(
    screen: Screen,
    file: Annotated[Path, typer.Argument(help="A packed file.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("state.safetensors"),
) -> Json:
    """Write a packed file's weights as the plain state dict of the float network, for any PyTorch program.

    The weights have their quantized values. How the inputs of layers are quantized is not part of it.
    """
    from safetensors.torch import save_file

    from wnq.artifact import unpack_file
    from wnq.files import replacing

    writable(out, ".safetensors")
    existing(file)
    screen.work()
    # safetensors refuses tensors that share memory, as tied weights do.
    state = {key: tensor.detach().clone().contiguous() for key, tensor in unpack_file(file).items()}
    with replacing(out) as temporary:
        save_file(state, temporary)
    size = out.stat().st_size
    screen.say(f"{len(state)} tensors, {size:,} bytes, written to {out}.")
    return {"out": out, "tensors": len(state), "bytes": size}


def _show(screen: Screen, path: Path, sizes: "SizeReport") -> dict[str, Any]:
    """Show a file's layers and parts, and how near its codes are to what is possible."""
    columns = ["name", "shape", "bits", "weights", "method", "bytes", "float32 / bytes", "bits a weight", "entropy"]
    rows = [
        (
            *(layer.name, layer.shape, layer.bits, layer.weights, layer.method, layer.packed_bytes),
            *(layer.float_bytes / max(1, layer.packed_bytes), layer.bits_per_weight, layer.entropy),
        )
        for layer in sizes.layers
    ]
    screen.table([dict(zip(columns, row, strict=True)) for row in rows])
    parts = {
        "codes": sizes.packed_bytes,
        "scales": sizes.scale_bytes,
        "codebooks": sizes.codebook_bytes,
        "biases, normalization, float layers": sizes.rest_bytes,
        "header": sizes.header_bytes,
        "whole file": sizes.file_bytes,
    }
    screen.say("")
    screen.table([{"part": part, "bytes": n, "% of the file": 100 * n / sizes.file_bytes} for part, n in parts.items()])
    if sizes.weights:
        yardsticks = {
            "the codes in this file": float(sizes.packed_bytes),
            "as float32": 4.0 * sizes.weights,
            "at exactly their widths": sizes.ideal_bytes,
            "at the entropy of each layer": sizes.entropy_bytes,
        }
        screen.say("")
        screen.table(
            [
                {"quantized weights": what, "bytes": round(n), "bits a weight": 8 * n / sizes.weights}
                for what, n in yardsticks.items()
            ]
        )
    screen.say(
        f"\n{path}: {sizes.file_bytes:,} bytes, {sizes.ratio:.2f} times smaller than float32, coder {sizes.coder}.\n"
        f"SHA-256 {sizes.sha256}"
    )
    return {"file": path, **dataclasses.asdict(sizes), "weights": sizes.weights, "ratio": sizes.ratio}
