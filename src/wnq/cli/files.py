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
    command(app, "wnq pack runs/first --out model.wnq.safetensors")(pack)
    command(app, "wnq inspect model.wnq.safetensors")(inspect)
    command(app, "wnq unpack model.wnq.safetensors --out state.safetensors")(unpack)


def pack(
    screen: Screen,
    run: Annotated[Path, typer.Argument(help="The folder of a finished, quantized run.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("model.wnq.safetensors"),
) -> Json:
    """Write the trained network as a small file: codes of 1 to 8 bits, codebooks, and the rest of its state."""
    from wnq.artifact import save

    writable(out, ".safetensors")
    opened = open_run(run)
    screen.work()
    return _show(screen, out, save(opened.model, out))


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
    screen.table(
        [
            {**dataclasses.asdict(layer), "times smaller": layer.float_bytes / layer.packed_bytes}
            for layer in sizes.layers
        ]
    )
    totals: dict[str, Any] = {
        "packed_bytes": sizes.packed_bytes,
        "codebook_bytes": sizes.codebook_bytes,
        "rest_bytes": sizes.rest_bytes,
        "header_bytes": sizes.header_bytes,
        "file_bytes": sizes.file_bytes,
        "float_bytes": sizes.float_bytes,
    }
    screen.say("")
    screen.table([totals])
    screen.say(
        f"\n{path}: {sizes.file_bytes:,} bytes, {sizes.ratio:.2f} times smaller than float32.\nSHA-256 {sizes.sha256}"
    )
    return {"file": path, **dataclasses.asdict(sizes), "weights": sizes.weights, "ratio": sizes.ratio}
