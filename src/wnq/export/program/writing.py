"""The dialect ``torch``: a ``.pt2`` program that ``torch.compile`` turns into integer kernels."""

import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wnq.export.dialect import Options, Written
from wnq.export.onnx.runtime import listed
from wnq.export.program.layers import Style, program_form, runs_in_integers, saturates
from wnq.export.program.tracing import strip_, trace_program
from wnq.files import replacing
from wnq.integer import Conversion, DeployedLayer
from wnq.integer.biases import PAIR_LIMIT

PARTS = {"weights": (".weight", ".planes", ".values"), "biases": (".bias",)}

IMPORTS = (
    "To run the file: import torch and torch.ao.quantization.fx._decomposed (its operators), set torch._inductor.config.freezing, "
    "load it by torch.export.load(FILE).module(), and torch.compile that; wnq is not needed."
)


def for_torch(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options) -> Written:
    """Write the dialect ``torch``.

    Raises:
        ValueError: the model cannot be traced.
        OSError: the file cannot be written.
    """
    style = Style(split=not options.vnni, planes=options.flavour == "small")
    program = trace_program(program_form(conversion.model, style), inputs)
    content = saved(program)
    with replacing(path) as temporary:
        temporary.write_bytes(content)

    def write_float(path: Path) -> int:
        return path.write_bytes(saved(trace_program(program_form(conversion.model, None), inputs)))

    notes = (*_notes(conversion.model, options), IMPORTS)
    details = {"torch": torch.__version__}
    return Written(
        part_bytes(program, len(content), stored=stored_bytes(content)), notes, details, write_float=write_float
    )


def saved(program: Any) -> bytes:
    """Return a program as a ``.pt2`` file without the exporter's notes; all but its weights is compressed where that is less."""
    strip_(program)
    plain, packed = io.BytesIO(), io.BytesIO()
    torch.export.save(program, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w") as target:
        whole = {path for name, path in _entries(source).items() if name.endswith(PARTS["weights"])}
        for entry in source.infolist():
            data = source.read(entry)
            gains = entry.filename not in whole and len(zlib.compress(data)) < len(data)
            fresh = zipfile.ZipInfo(entry.filename)  # 1980, so that the same model gives the same bytes
            target.writestr(fresh, data, zipfile.ZIP_DEFLATED if gains else zipfile.ZIP_STORED)
    return packed.getvalue()


def stored_bytes(content: bytes) -> dict[str, int]:
    """Return what each tensor of a ``.pt2`` file takes in it, by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.getinfo(path).compress_size for name, path in _entries(archive).items()}


def _entries(archive: zipfile.ZipFile) -> dict[str, str]:
    """Return where each tensor lies in an archive, by name."""
    config = next(name for name in archive.namelist() if name.endswith("weights_config.json"))
    tensors: dict[str, dict[str, Any]] = json.loads(archive.read(config))["config"]
    folder = config.rpartition("/")[0]
    return {name: f"{folder}/{about['path_name']}" for name, about in tensors.items()}


def part_bytes(
    program: Any, whole: int, left_out: tuple[str, ...] = (), stored: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return a program's bytes by part: weights, scales (and whatever else is a tensor), biases, graph.

    Args:
        program: that was written.
        whole: the file's bytes.
        left_out: endings of the names of tensors that are not in the file.
        stored: what tensors take in the file, by name; those that are not named take their own bytes.
    """
    found = dict.fromkeys((*PARTS, "scales"), 0)
    for name, value in (*program.state_dict.items(), *program.constants.items()):
        if isinstance(value, torch.Tensor) and not name.endswith(left_out):
            part = next((part for part, ends in PARTS.items() if name.endswith(ends)), "scales")
            found[part] += (stored or {}).get(name, value.nbytes)
    return {**found, "graph": whole - sum(found.values()), "file": whole}


def integer_layers(model: nn.Module) -> dict[str, DeployedLayer]:
    """Return the layers whose sums are of integers, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, DeployedLayer) and m.is_integer}


def _notes(model: nn.Module, options: Options) -> list[str]:
    layers = integer_layers(model)
    unsafe = [name for name, layer in layers.items() if saturates(layer)]
    rule = f"2 x largest input x largest weight <= {PAIR_LIMIT}"
    notes = [f"No sum saturates on processors without VNNI: {rule}."]
    if unsafe and options.vnni:
        notes = [
            f"On processors without VNNI the sums of {listed(unsafe)} can saturate, and the outputs be wrong there: not {rule}."
        ]
    elif unsafe:
        notes[0] += (
            f" For that, {listed(unsafe)} take their sums in two halves; with --vnni they do not, for processors that have it."
        )
    left = [name for name, layer in layers.items() if not runs_in_integers(layer)]
    if left:
        notes.append(
            f"Written as float products of integers, because torch has no integer kernel for their kind: {listed(left)}."
        )
    return notes
