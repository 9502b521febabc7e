"""The proof of an export: the written file, opened in a fresh process and run beside the model, on the same data."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wnq.integer import Conversion, DeployedEmbedding, DeployedLayer

BATCH = 128


class ProofError(RuntimeError):
    """The engine could not open or run the file that was written."""


def run_file(
    path: Path,
    engine: str,
    inputs: Sequence[Tensor],
    *,
    accuracy_level: int = 0,
    twin: Path | None = None,
    seconds: float = 1.0,
) -> tuple[Any, dict[str, Any]]:
    """Run a file in a fresh process.

    Args:
        path: the file.
        engine: ``onnxruntime`` or ``openvino``.
        inputs: all of the data, the batch first.
        accuracy_level: of products with packed weights.
        twin: a float file to compare its speed with.
        seconds: that each comparison of speed takes.

    Returns:
        The outputs as one array, and what the process says: engine, operators, processor, latency.

    Raises:
        ProofError: the process failed; with its last line.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        request = {
            "file": str(path.resolve()), "engine": engine, "accuracy_level": accuracy_level, "batch": BATCH,
            "twin": None if twin is None else str(twin.resolve()), "latency_batches": [1, 32], "seconds": seconds,
        }  # fmt: skip
        (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
        np.savez(folder / "inputs.npz", *(x.numpy() for x in inputs))
        command = [sys.executable, "-m", "wnq.export.worker", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise ProofError(f"{engine} cannot run {path}: {lines[-1] if lines else f'exit code {done.returncode}'}")
        return np.load(folder / "outputs.npy"), json.loads((folder / "answer.json").read_text(encoding="utf-8"))


@torch.no_grad()
def outputs_of(model: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """Return a model's outputs for all of the data, in eval mode."""
    mode = model.training
    model.eval()
    try:
        parts = [model(*(x[at : at + BATCH] for x in inputs)).float() for at in range(0, len(inputs[0]), BATCH)]
    finally:
        model.train(mode)
    return torch.cat(parts).numpy()


def differences(ours: Any, theirs: Any) -> dict[str, float]:
    """Return maximum and mean of |difference|, and the share of equal arg-max, in percent, along the last dimension."""
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).mean())
    return {"max": float(gap.max()), "mean": float(gap.mean()), "agreement": 100 * agree}


def accuracy(outputs: Any, labels: Any) -> float | None:
    """Return the share of right arg-max, in percent; None without labels."""
    return None if labels is None else 100 * float((outputs.argmax(-1) == labels).mean())


def sizes(conversion: Conversion) -> dict[str, float]:
    """Return the bytes of the weights: as float32, at their true width, and at the entropy of their integers or codes."""
    found = {"float32": 0.0, "true_width": 0.0, "entropy": 0.0}
    for module in conversion.model.modules():
        if not isinstance(module, DeployedLayer | DeployedEmbedding):
            continue
        stored = module.weight if module.weight is not None else module.codes
        if stored is None:
            assert isinstance(module, DeployedLayer) and module.values is not None
            for key in found:
                found[key] += 4 * module.values.numel()
            continue
        count = np.unique(stored.numpy(), return_counts=True)[1]
        share = count / count.sum()
        found["float32"] += 4 * stored.numel()
        found["true_width"] += module.bits * stored.numel() / 8
        found["entropy"] += float(-(share * np.log2(share)).sum()) * stored.numel() / 8
    return found


def operators_of(answer: dict[str, Any], conversion: Conversion) -> dict[str, Any]:
    """Return how many products the engine runs in integers, and the layers that it does not, in words."""
    operators = answer["operators"]
    integer = [operator for operator in operators if operator["integer"]]
    kinds: dict[str, int] = {}
    for operator in operators:
        label = f"{operator['kind']} ({'integer' if operator['integer'] else 'float'})"
        kinds[label] = kinds.get(label, 0) + 1
    expected = {record.name for record in conversion.layers if record.sums == "integer"}
    left = [o["layer"] for o in operators if not o["integer"] and o["layer"] in expected]
    return {
        "products": len(operators), "integer": len(integer), "kinds": kinds,
        "integer_layers_run_in_float": left,
    }  # fmt: skip
