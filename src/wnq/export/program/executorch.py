"""The dialect ``executorch``: a ``.pte`` program whose layers XNNPACK runs, for phones and other small machines."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Generator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from wnq.export.dialect import Options, Written
from wnq.export.onnx.runtime import listed
from wnq.export.program.graph import operator_name, weighted_products
from wnq.export.program.layers import program_form
from wnq.export.program.tracing import trace_program
from wnq.export.program.writing import part_bytes
from wnq.export.program.xnnpack import Tuned, tuned
from wnq.files import replacing
from wnq.integer import Conversion

LARGEST_BATCH = 32
"""Memory is planned for it when a program is loaded."""

LAYERS = "layers"
"""Method of a program that returns the names of its products' layers, in order."""

NOISY = ("torchao", "torch.utils._pytree", "executorch", "root")
"""Loggers that speak of what concerns nobody here."""


def for_executorch(conversion: Conversion, inputs: tuple[Any, ...], path: Path, options: Options) -> Written:
    """Write the dialect ``executorch``.

    Raises:
        ModuleNotFoundError: the extra ``executorch`` is not installed.
        ValueError: the model cannot be traced, or an operator cannot be written.
        OSError: the file cannot be written.
    """
    model = tuned(conversion.model, inputs, options.calibration)
    while True:
        program = model.program(inputs, largest_batch=LARGEST_BATCH)
        edge = lowered(program)
        left = _left(edge) - model.floats
        if not left:
            break
        model.leave_float_(left)
    content = serialized(edge)
    with replacing(path) as temporary:
        temporary.write_bytes(content)

    def write_float(path: Path) -> int:
        form = program_form(conversion.model, None)
        return path.write_bytes(serialized(lowered(trace_program(form, inputs, largest_batch=LARGEST_BATCH))))

    parts = part_bytes(program, len(content), left_out=(".zero",))
    details = {"executorch": version("executorch"), "backend": "XNNPACK", "largest_batch": LARGEST_BATCH}
    return Written(parts, tuple(_notes(model, options)), details, write_float=write_float)


def lowered(program: Any) -> Any:
    """Return a program with what XNNPACK can run given to it, as an ``EdgeProgramManager``."""
    names = ",".join(layer for layer, _ in weighted_products(program))
    with _quiet():
        try:
            partition: Any = importlib.import_module("executorch.backends.xnnpack.partition.xnnpack_partitioner")
            exir: Any = importlib.import_module("executorch.exir")
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f'{error.name} is not installed: pip install "wnq[executorch]".', name=error.name
            ) from None
        return exir.to_edge_transform_and_lower(
            program, partitioner=[partition.XnnpackPartitioner()], constant_methods={LAYERS: names}
        )


def serialized(edge: Any) -> bytes:
    """Return a lowered program as a ``.pte`` file.

    Raises:
        ValueError: an operator that XNNPACK does not run has no other form either.
    """
    with _quiet():
        exir: Any = importlib.import_module("executorch.exir")
        plan = importlib.import_module("executorch.exir.passes").MemoryPlanningPass(alloc_graph_input=False)
        try:
            return bytes(edge.to_executorch(exir.ExecutorchBackendConfig(memory_planning_pass=plan)).buffer)
        except RuntimeError as error:
            line = str(error).strip().splitlines()[0][:300].rstrip(".")
            raise ValueError(
                f"the network cannot be written for ExecuTorch: {line}. Replace that operator by others of torch.nn.functional, or "
                "keep that part out of the exported model."
            ) from error


def _left(edge: Any) -> set[str]:
    """Return the layers with weights of integers whose products XNNPACK did not take; nothing else runs these.

    Raises:
        ValueError: a layer for which there is no kernel at all.
    """
    products = weighted_products(edge.exported_program())
    for layer, node in products:
        if operator_name(node) == "convolution" and node.meta["val"].ndim == 5:
            raise ValueError(
                f"layer {layer!r} is a convolution of three dimensions, for which ExecuTorch has no kernel. Keep that part out of "
                "the exported model, or export to onnx, openvino or torch."
            )
    return {
        layer
        for layer, node in products
        if any(operator_name(source).startswith("dequantize_per_channel") for source in node.all_input_nodes)
    }


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the packages' chatter off the screen while the block runs."""
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _notes(model: Tuned, options: Options) -> list[str]:
    notes: list[str] = []
    if model.outputs:
        count = sum(len(batch[0]) for batch in options.calibration)
        notes.append(
            f"8-bit values, calibrated on {count} inputs, behind {len(model.outputs)} convolutions that nothing quantizes: "
            f"{listed(list(model.outputs))}."
        )
    missed, asked = (sum(counts) for counts in zip((0, 0), *model.thresholds.values(), strict=True))
    if asked:
        notes.append(f"Integer biases: {missed} of {asked} thresholds lie between other sums than in the reference.")
    if model.floats:
        notes.append(
            f"In floating point, with float32 weights, because XNNPACK takes integer products only with a quantization behind "
            f"them: {listed(sorted(model.floats))}."
        )
    notes.append(f"The batch may be 1 to {LARGEST_BATCH}.")
    return notes
