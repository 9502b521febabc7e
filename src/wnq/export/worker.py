"""A fresh process that opens a written file and runs it: ``python -m wnq.export.worker FOLDER``.

It reads ``request.json`` and ``inputs.npz`` in the folder and writes ``outputs.npy`` and ``answer.json`` there. Nothing of the
model that the file was made from is in its memory.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> None:
    """Answer one request."""
    from wnq.export.engines import latency, open_engine, processor

    request: dict[str, Any] = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    level = int(request["accuracy_level"])
    engine: Any = open_engine(request["engine"], request["file"], accuracy_level=level)
    with np.load(folder / "inputs.npz") as stored:
        inputs = [stored[f"arr_{i}"] for i in range(len(stored.files))]
    size = int(request["batch"])
    parts = [engine.run([x[at : at + size] for x in inputs]) for at in range(0, len(inputs[0]), size)]
    np.save(folder / "outputs.npy", np.concatenate(parts))
    answer: dict[str, Any] = {
        "engine": engine.version,
        "settings": engine.settings,
        "operators": [vars(operator) for operator in engine.operators()],
        "processor": processor(),
        "latency": [],
    }
    if request.get("twin"):
        twin = open_engine(request["engine"], request["twin"], accuracy_level=level)
        for batch in request["latency_batches"]:
            repeated = [np.concatenate([x] * (-(-batch // len(x))))[:batch] for x in inputs]
            ours, theirs, runs = latency(engine, twin, repeated, seconds=float(request["seconds"]))
            answer["latency"].append({"batch": batch, "integer_ms": ours, "float_ms": theirs, "runs": runs})
    (folder / "answer.json").write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
