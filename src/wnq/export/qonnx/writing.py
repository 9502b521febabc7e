"""Writing an integer reference model as a QONNX file."""

from pathlib import Path
from typing import Any

from wnq.export.dialect import Options, Written
from wnq.export.onnx.graph import initializers
from wnq.export.onnx.runtime import listed
from wnq.export.onnx.tracing import trace
from wnq.export.qonnx.form import Table, qonnx_form
from wnq.export.qonnx.rewriting import QONNX_OPSET, Rewritten, rewrite_
from wnq.files import replacing
from wnq.integer import Conversion, DeployedLayer

PARTS = {"weights": ".weight", "biases": ".bias"}
"""Endings of the names of stored numbers; the rest are scales and widths."""

ABOUT = (
    "qonnx executes the file in floats; a product is called integer here if both its sides are integers times scales."
)


def write_qonnx(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options) -> Written:
    """Write a model's integers as QONNX, whole or not at all.

    Args:
        conversion: from :func:`wnq.integer.convert`.
        inputs: what the model's forward takes; the batch is the first dimension of each tensor.
        path: the file.
        options: none concerns this dialect.

    Returns:
        What was written.

    Raises:
        ValueError: the model cannot be traced, or an operator has no ONNX form; with its layer.
        OSError: the file cannot be written.
    """
    form = qonnx_form(conversion.model)
    planned = {
        name: module.bits
        for name, module in form.named_modules(remove_duplicate=False)
        if isinstance(module, DeployedLayer | Table)
    }
    model = trace(form, inputs)
    import onnx

    report = rewrite_(model, planned)
    onnx.checker.check_model(model)
    content = model.SerializeToString()
    with replacing(path) as temporary:
        temporary.write_bytes(content)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    details = {"opset": opset, "ir_version": model.ir_version, "qonnx_opset": QONNX_OPSET}
    return Written(_bytes(model, len(content)), notes(conversion, report), details)


def notes(conversion: Conversion, report: Rewritten) -> tuple[str, ...]:
    """Return what a user must know of the file, one sentence each."""
    found = [ABOUT]
    wider = [f"{name} ({bits} for {planned})" for name, (planned, bits) in report.weights.items() if bits > planned]
    if wider:
        found.append(
            f"Weights stated with more bits than planned: {listed(wider)}; their integers are odd, as in the full grid, or not "
            "symmetric, or zero in a channel that BatchNorm turns off, and the zero point that would say the planned width is "
            "refused by FINN and by qonnx's inference of widths."
        )
    if report.bipolar:
        found.append(
            f"Weights of one bit under a BipolarQuant, which qonnx's costs, where it has a scale, take for 32-bit floats: "
            f"{listed(report.bipolar)}."
        )
    if report.clipped:
        layers = listed([name or "an input" for name in report.clipped])
        found.append(f"Inputs with a Clip before the Quant, because no width has exactly their integers: {layers}.")
    quantized = {*report.weights, *report.bipolar}
    floats = [record.name for record in conversion.layers if record.shape and record.name not in quantized]
    if floats:
        found.append(f"Weights written as dequantized floats, without a Quant: {listed(floats)}.")
    layers = conversion.model.named_modules()
    inputs = [name for name, layer in layers if isinstance(layer, DeployedLayer) and layer.grid is None]
    if inputs:
        found.append(f"Inputs left in floating point, without a Quant: {listed(inputs)}.")
    return tuple(found)


def _bytes(model: Any, whole: int) -> dict[str, int]:
    found = dict.fromkeys((*PARTS, "scales"), 0)
    for name, value in initializers(model).items():
        part = next((part for part, end in PARTS.items() if name.endswith(end)), "scales")
        found[part] += len(value.raw_data)
    return {**found, "graph": whole - sum(found.values()), "file": whole}
