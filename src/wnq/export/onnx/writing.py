"""Writing an integer reference model as an ONNX file, for one engine and in one flavour."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from wnq.export.onnx.blocks import block_
from wnq.export.onnx.graph import initializers
from wnq.export.onnx.runtime import tune_
from wnq.export.onnx.small import shrink_
from wnq.export.onnx.tracing import trace
from wnq.files import replacing
from wnq.integer import Conversion
from wnq.names import check_choice

FLAVOURS = ("fast", "small")
ENGINES = ("onnxruntime", "openvino")

PARTS = {"weights": (".weight", ".codes", ":planes"), "biases": (".bias", ".negative_bias", ":bias")}


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
    if engine == "onnxruntime":
        notes += tune_(model, calibration)
    if flavour == "small":
        shrink_(model)
    import onnx

    onnx.checker.check_model(model)
    content = model.SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return OnnxFile(
        Path(path), flavour, engine, opset, model.ir_version, _bytes(model, len(content)), blocked, tuple(notes)
    )


def _bytes(model: Any, whole: int) -> dict[str, int]:
    from onnx.numpy_helper import to_array

    found = dict.fromkeys((*PARTS, "scales"), 0)
    for name, value in initializers(model).items():
        part = next((part for part, ends in PARTS.items() if name.endswith(ends)), "scales")
        found[part] += len(value.raw_data) or to_array(value).nbytes
    return {**found, "graph": whole - sum(found.values()), "file": whole}
