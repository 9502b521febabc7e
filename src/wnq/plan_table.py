"""A plan as a table for people."""

from collections.abc import Mapping
from typing import Any

from wnq.layers import INDEX_INPUT
from wnq.plan import Plan
from wnq.quantizer import FLOAT_BITS


def plan_rows(plan: Plan, signs: Mapping[str, str] | None = None) -> list[dict[str, Any]]:
    """Return the plan as table rows: layer, shape, method, w_bits, a_bits, input, parameters, kib, note.

    Args:
        plan: the plan.
        signs: layer -> what its input quantizer decided, from :func:`wnq.input_signs`; before the first batch: undecided.
    """
    rows: list[dict[str, Any]] = []
    rounded = {output.layer: output for output in plan.outputs}
    for layer in plan.layers:
        takes_indices = layer.kind in {kind.__name__ for kind in INDEX_INPUT}
        output = rounded.get(layer.name)
        notes = [f"tied to {layer.tied_to}"] if layer.tied_to else []
        notes += [] if output is None else [f"output of {output.name} at {output.bits} bits"]
        quantized_input = layer.method.a_bits != FLOAT_BITS and not takes_indices
        rows.append(
            {
                "layer": layer.name,
                "kind": layer.kind,
                "shape": "x".join(map(str, layer.shape)),
                "method": layer.method.name,
                "w_bits": layer.method.w_bits,
                "a_bits": layer.method.a_bits if quantized_input else FLOAT_BITS,
                "input": (signs or {}).get(layer.name, "first batch decides") if quantized_input else "float",
                "parameters": layer.parameters,
                "kib": round(layer.size_kib, 2),
                "note": "; ".join(notes),
            }
        )
    for left in plan.floats:
        rows.append(
            {
                "layer": left.name,
                "kind": left.kind,
                "shape": "",
                "method": "float",
                "w_bits": FLOAT_BITS,
                "a_bits": FLOAT_BITS,
                "input": "float",
                "parameters": left.parameters,
                "kib": round(left.size_kib, 2),
                "note": left.reason,
            }
        )
    return rows


def outputs_in_words(plan: Plan) -> str:
    """Return in one line which outputs a plan rounds."""
    if not plan.outputs:
        return "No output is rounded: one quantized input alone reads what each convolution puts out."
    names = [output.name for output in plan.outputs]
    shown = ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")
    return f"Outputs rounded to {plan.outputs[0].bits} bits, because no quantized input alone reads them: {shown}."


def format_plan(plan: Plan, signs: Mapping[str, str] | None = None) -> str:
    """Return the plan as a plain-text table, one line a layer and a line of totals."""
    header = ("layer", "shape", "method", "W/A", "input", "parameters", "KiB", "note")
    lines = [
        (
            str(row["layer"] or "(model)"),
            str(row["shape"] or row["kind"]),
            str(row["method"]),
            f"{row['w_bits']}/{row['a_bits']}",
            str(row["input"]),
            f"{row['parameters']:,}",
            f"{row['kib']:,.2f}",
            str(row["note"]),
        )
        for row in plan_rows(plan, signs)
    ]
    widths = [max(len(line[i]) for line in [header, *lines]) for i in range(len(header))]
    right = {5, 6}
    text = [
        "  ".join(
            cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, *lines]
    ]
    quantized = sum(layer.parameters for layer in plan.layers)
    total = sum(layer.size_kib for layer in plan.layers) + sum(left.size_kib for left in plan.floats)
    before = (quantized + sum(left.parameters for left in plan.floats)) * 4 / 1024
    text.append(
        f"{quantized:,} weights in {len(plan.layers)} layers; {before:,.1f} KiB as float32, {total:,.1f} KiB as planned."
    )
    return "\n".join(line.rstrip() for line in text)
