"""Speed of storing and reading codes, one layer: in rows (coder none), by zstd, by ans; all cases interleaved.

    python benchmarks/coders.py [--weights 2359296] [--runs 9] [--seed 0]

The codes are those of Gaussian weights under the method wnq (full grid, scaled by the largest weight). Rates are in bytes of the
float32 weights that the codes stand for. Writes ``benchmarks/results/coders_<hardware>_<yyyymm>.{json,md}``.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from results import hardware_tag, write_results

import wnq
from wnq.artifact.coders import decode, encode
from wnq.environment import environment
from wnq.packing import pack_rows, unpack_rows

COLUMNS = 4608


def codes_of(bits: int, weights: int, seed: int) -> torch.Tensor:
    """Codes of Gaussian weights, as a matrix."""
    weight = torch.randn(weights // COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return wnq.get_method("wnq", w_bits=bits).weight(weight, 0).quantize(weight).codes


def once(coder: str, matrix: torch.Tensor, bits: int) -> tuple[str, int, float, float]:
    """Return the method that was chosen, bytes, and seconds to encode and to decode."""
    flat = matrix.reshape(-1).numpy()
    begin = time.perf_counter()
    if coder == "none":
        packed = pack_rows(matrix, bits)
        middle = time.perf_counter()
        back, method, size = unpack_rows(packed, bits, COLUMNS), "rows", packed.nbytes
        end = time.perf_counter()
        exact = torch.equal(back, matrix)
    else:
        method, stream = encode(flat, bits, coder)
        middle = time.perf_counter()
        decoded, size = decode(method, stream, bits, flat.size), len(stream)
        end = time.perf_counter()
        exact = bool((decoded == flat).all())
    if not exact:
        sys.exit(f"{coder} at {bits} bits does not give back its codes")
    return method, size, middle - begin, end - middle


def markdown(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "MB/s of float32 weights, one thread, median (slowest–fastest) of interleaved runs. `zstd` and `ans` try every method "
        "they may use and keep the smallest, so `ans` includes the time of zstd.",
        "",
        "| bits | coder | chosen | bits a weight | entropy | encode MB/s | decode MB/s |",
        "|---:|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = []
        for what in ("encode_seconds", "decode_seconds"):
            at = sorted(4e-6 * row["weights"] / seconds for seconds in row[what])
            cells.append(f"{statistics.median(at):,.0f} ({at[0]:,.0f}–{at[-1]:,.0f})")
        size = f"{8 * row['bytes'] / row['weights']:.4f}"
        lines.append(
            f"| {row['bits']} | {row['coder']} | {row['method']} | {size} | {row['entropy']:.4f} | {' | '.join(cells)} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=int, default=512 * COLUMNS, help="of the layer (default: 2,359,296)")
    parser.add_argument("--runs", type=int, default=9, help="timings a case, at least 7 (default: 9)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: 0)")
    args = parser.parse_args()
    if args.runs < 7 or args.weights < COLUMNS:
        parser.error(f"--runs must be 7 or more and --weights {COLUMNS} or more")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    matrices = {bits: codes_of(bits, args.weights, args.seed) for bits in range(1, 9)}
    for bits, matrix in matrices.items():
        shares = np.bincount(matrix.reshape(-1).numpy()) / matrix.numel()
        entropy = float(-(shares[shares > 0] * np.log2(shares[shares > 0])).sum())
        about = {
            "bits": bits,
            "weights": matrix.numel(),
            "entropy": entropy,
            "encode_seconds": [],
            "decode_seconds": [],
        }
        rows += [
            {**about, "coder": coder, "encode_seconds": [], "decode_seconds": []} for coder in ("none", "zstd", "ans")
        ]
    for run in range(args.runs + 1):
        for row in rows:
            method, size, encoding, decoding = once(row["coder"], matrices[row["bits"]], row["bits"])
            row |= {"method": method, "bytes": size}
            if run:  # the first round warms up
                row["encode_seconds"].append(encoding)
                row["decode_seconds"].append(decoding)
    config = {
        "weights": matrices[1].numel(),
        "runs": args.runs,
        "seed": args.seed,
        "unit": "seconds a call, in the JSON",
    }
    packages = {name: version(name) for name in ("zstandard", "constriction")}
    path = write_results("coders", hardware_tag(), config, environment() | packages, rows, markdown(rows))
    print(f"{path} and {path.with_suffix('.md').name}")


if __name__ == "__main__":
    main()
