"""Writing an integer reference model as an ONNX file, for one engine and in one flavour."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wnq.export.dialect import FLAVOURS, Options, Written
from wnq.export.onnx.blocks import block_
from wnq.export.onnx.graph import initializers, shorten_names_
from wnq.export.onnx.openvino import settle_
from wnq.export.onnx.runtime import listed, tune_
from wnq.export.onnx.small import shrink_
from wnq.export.onnx.split import PAIR_LIMIT, saturating, split_
from wnq.export.onnx.tracing import trace
from wnq.export.onnx.twin import float_twin
from wnq.files import replacing
from wnq.integer import Conversion
from wnq.names import check_choice

ENGINES = ("onnxruntime", "openvino")

PARTS = {"weights": (".weight", ":planes", ":whole"), "biases": (".bias", ".negative_bias", ":bias")}


@dataclass(frozen=True)
class OnnxFile:
    """What was written.

    Attributes:
        path: the file.
        flavour: ``fast`` or ``small``.
        engine: that it was written for.
        opset: of the standard operators.
        ir_version: of the format.
        bytes: of the file by part: weights, scales (levels, steps and zero points too), biases, graph.
        blocked: linear layer with a float input -> bits of a stored weight.
        notes: what else a user must know, one sentence each.
    """

    path: Path
    flavour: str
    engine: str
    opset: int
    ir_version: int
    bytes: dict[str, int]
    blocked: dict[str, int] = field(default_factory=dict[str, int])
    notes: tuple[str, ...] = ()


def write_onnx(
    conversion: Conversion,
    inputs: tuple[Any, ...],
    path: str | Path,
    *,
    engine: str = "onnxruntime",
    flavour: str = "fast",
    calibration: Sequence[tuple[Tensor, ...]] = (),
    traced: Any = None,
    vnni: bool = False,
) -> OnnxFile:
    """Write a model's integers as ONNX, whole or not at all.

    Args:
        conversion: from :func:`wnq.integer.convert`.
        inputs: what the model's forward takes; the batch is the first dimension of each tensor.
        path: the file.
        engine: ``onnxruntime`` gets what makes all its convolutions integer: 8-bit values behind convolutions whose output
            nothing quantizes, larger integers with smaller scales, and searched integer biases. ``openvino`` needs none of it.
        flavour: ``fast`` stores int8, ``small`` the true width; an engine computes the same with both.
        calibration: batches of inputs, for ``onnxruntime``'s 8-bit values; without any, those convolutions stay float.
        vnni: the file is for processors with VNNI alone, so layers whose sums saturate on others are left whole.
        traced: what :func:`wnq.export.onnx.trace` returned for the same model; traced anew if None.

    Raises:
        ValueError: an unknown engine or flavour, or the model cannot be traced.
        OSError: the file cannot be written.
    """
    check_choice(engine, ENGINES, where="engine")
    check_choice(flavour, FLAVOURS, where="flavour")
    model = trace(conversion.model, inputs) if traced is None else copy.deepcopy(traced)
    notes: list[str] = []
    blocked = block_(model, engine=engine)
    unsafe = saturating(model)
    halved = {} if vnni else split_(model)
    notes.append(_on_saturation(unsafe, saturating(model)))
    if engine == "onnxruntime":
        notes += tune_(model, calibration)
    else:
        settle_(model)
    if flavour == "small":
        shrink_(model, halved)
    shorten_names_(model, tuple(end for ends in PARTS.values() for end in ends))
    import onnx

    onnx.checker.check_model(model)
    content = model.SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxFile(
        Path(path), flavour, engine, opset, model.ir_version, _bytes(model, len(content)), blocked, tuple(notes)
    )


def for_onnxruntime(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options) -> Written:
    """Write the dialect ``onnx``."""
    return _written(conversion, inputs, path, options, "onnxruntime")


def for_openvino(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options) -> Written:
    """Write the dialect ``openvino``."""
    return _written(conversion, inputs, path, options, "openvino")


def _written(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options, engine: str) -> Written:
    traced = trace(conversion.model, inputs)
    file = write_onnx(
        conversion, inputs, path, engine=engine, flavour=options.flavour, calibration=options.calibration,
        traced=traced, vnni=options.vnni,
    )  # fmt: skip

    def write_float(path: Path) -> int:
        return path.write_bytes(float_twin(traced).SerializeToString())

    details = {"opset": file.opset, "ir_version": file.ir_version}
    return Written(file.bytes, file.notes, details, file.blocked, write_float)


def _on_saturation(before: Sequence[str], after: Sequence[str]) -> str:
    """Return what a user must know of processors without VNNI, see :mod:`wnq.export.onnx.split`."""
    rule = f"2 x largest input x largest weight <= {PAIR_LIMIT}"
    split = [name for name in before if name not in after]
    text = (
        f"No sum saturates on processors without VNNI: {rule}."
        if not after
        else (
            f"On processors without VNNI the sums of {listed(after)} can saturate, and the outputs be wrong there: not {rule}."
        )
    )
    if split:
        text += f" For that, {listed(split)} have weights split in two; with --vnni they stay whole, for processors that have it."
    return text


def _bytes(model: Any, whole: int) -> dict[str, int]:
    from onnx.numpy_helper import to_array

    found = dict.fromkeys((*PARTS, "scales"), 0)
    for name, value in initializers(model).items():
        part = next((part for part, ends in PARTS.items() if name.endswith(ends)), "scales")
        found[part] += len(value.raw_data) or to_array(value).nbytes
    return {**found, "graph": whole - sum(found.values()), "file": whole}
