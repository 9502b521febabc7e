"""Time and memory of ``wnq report`` and ``wnq stats`` on a checkpoint of a billion bfloat16 parameters in several files.

    python benchmarks/report_large.py [--parameters 1000000000]

The checkpoint is made in a temporary folder, one shard at a time (2 GB on disk): a transformer with one large embedding, weights
of Student's t, in shards with an index as Hugging Face writes them. Each command runs once for each number of threads, in a
process of its own. Writes ``benchmarks/results/report_large_<hardware>_<yyyymm>.{json,md}``. A few minutes.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import hardware_tag, write_results
from safetensors.torch import save_file
from tails import memory_bar

from wnq.environment import environment

ROOT = Path(__file__).resolve().parent.parent
WIDTH, VOCABULARY, SHARDS = 2048, 32_000, 5
BLOCK = 12 * WIDTH**2

CHILD = """
import sys, torch
sys.path.insert(0, {folder!r})
from tails import peak_memory
from wnq.cli import main
torch.set_num_threads({threads})
try:
    main({arguments!r})
except SystemExit as end:
    if end.code:
        raise
finally:
    print("peak", peak_memory(), file=sys.stderr)
"""


def shapes(parameters: int) -> dict[str, tuple[int, ...]]:
    """Return a transformer of about this many parameters: an embedding and as many blocks as fit."""
    table: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for i in range(max(1, round((parameters - VOCABULARY * WIDTH) / BLOCK))):
        own = f"model.layers.{i}."
        table |= {f"{own}self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        table |= {f"{own}mlp.up_proj.weight": (4 * WIDTH, WIDTH), f"{own}mlp.down_proj.weight": (WIDTH, 4 * WIDTH)}
        table |= {f"{own}{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return table


def write_checkpoint(folder: Path, parameters: int, seed: int) -> tuple[int, int, int]:
    """Write the shards and their index; return the number of parameters, of tensors, and the bytes of the largest tensor."""
    generator = np.random.default_rng(seed)
    table = shapes(parameters)
    names = list(table)
    index: dict[str, str] = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        own = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
        tensors: dict[str, torch.Tensor] = {}
        for name in own:
            size = math.prod(table[name])
            spread = np.sqrt(generator.standard_gamma(3.0, size, dtype=np.float32) / 3)
            values = generator.standard_normal(size, dtype=np.float32) / spread * np.float32(0.02)
            tensors[name] = torch.from_numpy(values).to(torch.bfloat16).reshape(table[name])
        save_file(tensors, folder / file)
        index |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    sizes = [math.prod(shape) for shape in table.values()]
    return sum(sizes), len(sizes), 2 * max(sizes)


def run(arguments: list[str], threads: int) -> tuple[float, int]:
    """Return the seconds of one command and the most memory its process had."""
    code = CHILD.format(folder=str(Path(__file__).parent), threads=threads, arguments=arguments)
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, int(done.stderr.split("peak")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=1_000_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", default=None, help="tag in the name of the results file")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        folder.mkdir()
        parameters, tensors, largest = write_checkpoint(folder, options.parameters, options.seed)
        page = Path(name) / "report.html"
        for command, arguments in (
            ("wnq report", ["report", str(folder), "--out", str(page)]),
            ("wnq stats", ["stats", str(folder), "--json"]),
        ):
            for threads in options.threads:
                load = os.getloadavg()[0]
                seconds, memory = run(arguments, threads)
                rows.append(
                    {
                        "command": command,
                        "threads": threads,
                        "seconds": seconds,
                        "memory": memory,
                        "memory_bar": memory_bar(largest),
                        "page_bytes": page.stat().st_size if command == "wnq report" else None,
                        "load": load,
                    }
                )
                print(rows[-1], file=sys.stderr)
    lines = ["| command | threads | seconds | peak MB | allowed MB | page MB | load before |", "| --- " * 7 + "|"]
    for r in rows:
        size = "–" if r["page_bytes"] is None else f"{r['page_bytes'] / 1e6:.1f}"
        memory = f"{r['memory'] / 1e6:.0f} | {r['memory_bar'] / 1e6:.0f}"
        lines.append(f"| {r['command']} | {r['threads']} | {r['seconds']:.0f} | {memory} | {size} | {r['load']:.1f} |")
    config = {
        "command": f"python benchmarks/report_large.py --parameters {options.parameters}",
        "checkpoint": f"{parameters:,} bfloat16 parameters in {tensors} tensors and {SHARDS} files, the largest tensor "
        f"{largest / 1e6:.0f} MB; Student's t with 6 degrees of freedom, seed {options.seed}",
        "seconds": "of the whole process, start of Python included; one run each; the files were just written, so mostly in memory",
        "memory": "most resident memory of the process, mapped files included; allowed: 3 times the largest tensor and 300 MB",
    }
    path = write_results("report_large", options.hardware or hardware_tag(), config, environment(), rows, lines)
    print("\n".join(lines))
    print(f"written to {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
