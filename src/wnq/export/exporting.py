"""Exporting with proof: convert, write, run the written file in a fresh process, and say how it compares."""

import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wnq.environment import environment
from wnq.export.dialect import DIALECTS, Options
from wnq.export.proof import accuracy, differences, operators_of, outputs_of, run_file, sizes
from wnq.files import write_text
from wnq.integer import convert
from wnq.integer.ties import clear_ties_
from wnq.names import check_choice
from wnq.quantizer import FLOAT_BITS

CALIBRATION_IMAGES = 256


def export_model(
    model: nn.Module,
    inputs: Sequence[Tensor],
    out: str | Path,
    *,
    to: str = "onnx",
    flavour: str = "fast",
    labels: Tensor | None = None,
    float_model: nn.Module | None = None,
    calibration: Sequence[Tensor] | None = None,
    accuracy_level: int | None = None,
    vnni: bool = False,
    residual_bits: int = 8,
    seconds: float = 1.0,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a quantized model for an engine and prove the file: it is opened in a fresh process and run beside the model.

    Args:
        model: a quantized, frozen or loaded model. It is only read.
        inputs: the data of the proof: what the model's forward takes, all of it, the batch first.
        out: the file; ``FILE.proof.json`` is written beside it.
        to: one of :data:`wnq.export.DIALECTS`.
        flavour: ``fast`` or ``small``.
        labels: int64, one for each input, for accuracies.
        float_model: the float model that training started from, for its accuracy.
        calibration: inputs for ranges that only the engine needs; by default the first 256 of ``inputs``.
        accuracy_level: of products with packed weights and float inputs: 0 is exact, 4 rounds their inputs to 8 bits by blocks and
            is fast. By default 0 where all such weights are stored in 4 bits, else 4: exact products of other widths are very slow.
        vnni: the file is for processors with VNNI alone; see :mod:`wnq.export.onnx.split`.
        residual_bits: for ONNX Runtime and ExecuTorch, of the values behind convolutions that nothing quantizes: 8 runs these in
            integers, 32 leaves them float, which is exact and slower.
        seconds: that each comparison of speed takes.
        on_step: called with (done, in all).

    Returns:
        The proof, as JSON types; what ``FILE.proof.json`` holds.

    Raises:
        ValueError: an unknown engine or flavour, a float model, or one that cannot be traced.
        ProofError: the engine cannot run the file.
        OSError: a file cannot be written.
    """

    def step(done: int, total: int = 5) -> None:
        if on_step is not None:
            on_step(done, total)

    dialect, out = DIALECTS[check_choice(to, DIALECTS, where="to")], Path(out)
    check_choice(flavour, dialect.flavours, where=f"flavour of {to}")
    if residual_bits not in (8, FLOAT_BITS):
        raise ValueError(f"residual_bits must be 8, or {FLOAT_BITS} for float, got {residual_bits!r}.")
    begin = time.perf_counter()
    first = tuple(x[:2] for x in inputs)
    conversion = convert(model, *first)
    sample = [tuple(x[:CALIBRATION_IMAGES] for x in (calibration or inputs))]
    moved = clear_ties_(conversion.model, sample)
    step(1)
    options = Options(flavour, sample if residual_bits == 8 else [], vnni)
    written = dialect.writer()(conversion, first, out, options)
    step(2)
    level = accuracy_level
    if level is None:
        level = 0 if all(bits == 4 for bits in written.blocked.values()) else 4
    trained, reference = outputs_of(model, inputs), outputs_of(conversion.model, inputs)
    step(3)
    with tempfile.TemporaryDirectory() as folder:
        twin = Path(folder) / f"float{dialect.ending}" if written.write_float else None
        float_file = written.write_float(twin) if written.write_float and twin else None
        outputs, answer = run_file(out, dialect.engine, inputs, accuracy_level=level, twin=twin, seconds=seconds)
    step(4)
    targets = None if labels is None else labels.numpy()
    proof: dict[str, Any] = {
        "file": str(out),
        "to": to,
        "flavour": flavour,
        **written.details,
        "engine": answer["engine"],
        "settings": answer["settings"],
        "processor": answer["processor"],
        "inputs": len(inputs[0]),
        "engine_vs_trained": differences(outputs, trained),
        "engine_vs_reference": differences(outputs, reference),
        "reference_vs_trained": differences(reference, trained),
        "accuracy": {
            "float": accuracy(outputs_of(float_model, inputs), targets) if float_model is not None else None,
            "trained": accuracy(trained, targets),
            "reference": accuracy(reference, targets),
            "engine": accuracy(outputs, targets),
        },
        "operators": operators_of(answer, conversion),
        "bytes": {
            **written.bytes,
            "float_file": float_file,
            **{f"weights_{k}": v for k, v in sizes(conversion).items()},
        },
        "latency": answer["latency"],
        "accuracy_level": level if written.blocked else None,
        "blocked": written.blocked,
        "residual_bits": residual_bits if dialect.engine in ("onnxruntime", "executorch") else None,
        "notes": [*written.notes, *_tie_notes(moved)],
        "layers": [record.to_json() for record in conversion.layers],
        "seconds": round(time.perf_counter() - begin, 2),
        "environment": environment(),
    }
    write_text(out.with_name(f"{out.name}.proof.json"), json.dumps(proof, indent=2) + "\n")
    step(5)
    return proof


def _tie_notes(moved: dict[str, float]) -> list[str]:
    return [
        f"{name}: a value of the input lay within float noise of a threshold; the step changed by {1e6 * change:+.1f} parts per "
        "million, and the scale back."
        for name, change in moved.items()
    ]
