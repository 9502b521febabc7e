"""Damaged and hostile packed files: does each end in one clear error, quickly and in little memory, or load as it says?

    python benchmarks/fuzz.py [--files 120000] [--workers 2] [--seed 0] [--index N]

Valid files of both format versions, all coders and all kinds of codebook are damaged: blindly, in their tables, and in their
content with the checksums recomputed. Each is unpacked, loaded and inspected. It passes if every read refuses it by
``ArtifactError``, in one sentence, or returns what is right: the original's tensors where nothing was recomputed, else what the
independent reader of docs/format.md reads from the same bytes. Everything else is a failure: another exception, wrong values, a
crash, more memory than the limit (a hard one of the operating system, on the worker's address space), more time (the worker is
killed).

File ``N`` of a run can be made and judged again by ``--index N``. Writes ``benchmarks/results/fuzz_<hardware>_<yyyymm>.{json,md}``.
About half an hour on one processor core.
"""

import argparse
import faulthandler
import json
import logging
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fuzz_judge import Verdict, judge, seeds, to_json
from results import hardware_tag, write_results

from wnq.environment import environment

WATCHDOG_SECONDS = 20
MEMORY_MB = 512
PASSED = ("refused", "loaded")


def work(start: int, step: int, stop: int, seed: int) -> None:
    """Judge files ``start, start + step, …`` and print one verdict a line; the last line before a crash tells which it was."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds(folder)
        for index in range(3):  # everything that is imported late is imported before the limit
            judge(index, seed, folder)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY_MB * 2**20,) * 2)
        base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({"base_mb": base}), flush=True)
        for index in range(start, stop, step):
            faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
            verdict = judge(index, seed, folder)
            faulthandler.cancel_dump_traceback_later()
            print(to_json(verdict), flush=True)


def supervise(worker: int, workers: int, files: int, seed: int, verdicts: list[Verdict], growth: list[float]) -> None:
    """Run one worker to its end; a file that kills it is a failure, and the next worker goes on behind it."""
    start = worker
    while start < files:
        command = [sys.executable, __file__, "--worker", str(start), str(workers), str(files), str(seed)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stderr is not None
        base = peak = 0.0
        for line in process.stdout:
            entry = json.loads(line)
            if "base_mb" in entry:
                base = peak = entry["base_mb"]
                continue
            verdicts.append(Verdict(**entry))
            if entry["outcome"] not in PASSED:
                print(f"\n{line}", file=sys.stderr)
            peak, start = entry["peak_mb"], entry["index"] + workers
        growth.append(peak - base)
        if process.wait() != 0:
            last = (process.stderr.read().strip() or "no message").splitlines()[-1]
            outcome = f"crashed or hung, exit code {process.returncode}"
            verdicts.append(Verdict(start, "?", "?", 0, outcome, last[:200], float(WATCHDOG_SECONDS), 0.0, peak))
            start += workers


def summary(verdicts: list[Verdict]) -> list[dict[str, Any]]:
    rows = []
    for mutation in sorted({verdict.mutation for verdict in verdicts}):
        own = [verdict for verdict in verdicts if verdict.mutation == mutation]
        slowest = max(own, key=lambda verdict: verdict.cpu_seconds)
        outcomes = Counter(verdict.outcome for verdict in own)
        rows.append(
            {
                "mutation": mutation,
                "files": len(own),
                "refused": outcomes["refused"],
                "loaded": outcomes["loaded"],
                "failures": sum(count for outcome, count in outcomes.items() if outcome not in PASSED),
                "slowest_cpu_seconds": round(slowest.cpu_seconds, 4),
                "slowest_index": slowest.index,
                "slowest_seconds": round(max(verdict.seconds for verdict in own), 4),
                "largest_file": max(verdict.bytes for verdict in own),
                "errors": dict(Counter(verdict.error for verdict in own if verdict.error).most_common()),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], totals: dict[str, Any]) -> list[str]:
    lines = [
        f"**{totals['files']:,} files: {totals['refused']:,} refused, {totals['loaded']:,} loaded as they say, "
        f"{totals['failures']} failures.** Slowest read: {totals['slowest_cpu_seconds']:.3f} s of processor time (file "
        f"{totals['slowest_index']}, {totals['slowest_mutation']}). Memory of a worker grew by at most "
        f"{totals['memory_growth_mb']:.0f} MB over all its files.",
        "",
        "Of a mutation that mends no checksum, a file counts as loaded only if it equals the original bit for bit (what changed "
        "was the order of its table, or padding); of one that mends them (`sealed`), if it equals what the reader of the "
        "format's page reads. Every file is read three times; one read may load what another refuses, as a file may be whole but "
        "not fit the network.",
        "",
        "| mutation | files | refused | loaded | failures | slowest read, CPU s | wall s | largest file |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['mutation']} | {row['files']:,} | {row['refused']:,} | {row['loaded']:,} | {row['failures']} "
            f"| {row['slowest_cpu_seconds']:.3f} | {row['slowest_seconds']:.3f} | {row['largest_file']:,} |"
        )
    errors: Counter[str] = Counter()
    for row in rows:
        errors.update(row["errors"])
    lines += [
        "",
        f"The most frequent of {len(errors)} kinds of message (names as …, numbers as N):",
        "",
        "| files | message |",
        "|---:|---|",
    ]
    lines += [f"| {count:,} | {message.replace('|', '/')} |" for message, count in errors.most_common(40)]
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=120_000, help="how many files to damage (default: 120,000)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--index", type=int, help="judge this file only, and print the verdict")
    parser.add_argument("--worker", type=int, nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        start, step, stop, seed = args.worker
        work(start, step, stop, seed)
        return 0
    if args.index is not None:
        with tempfile.TemporaryDirectory() as name:
            verdict = judge(args.index, args.seed, Path(name))
        print(json.dumps(vars(verdict), indent=1))
        return verdict.outcome not in PASSED
    verdicts: list[Verdict] = []
    growth: list[float] = []
    threads = [
        threading.Thread(target=supervise, args=(i, args.workers, args.files, args.seed, verdicts, growth))
        for i in range(args.workers)
    ]
    begin = time.monotonic()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        bad = sum(verdict.outcome not in PASSED for verdict in list(verdicts))
        print(f"\r{len(verdicts):,} of {args.files:,} files, {bad} failures", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    rows = summary(verdicts)
    failures = [vars(verdict) for verdict in verdicts if verdict.outcome not in PASSED]
    slowest = max(verdicts, key=lambda verdict: verdict.cpu_seconds)
    totals = {
        "files": len(verdicts),
        "refused": sum(row["refused"] for row in rows),
        "loaded": sum(row["loaded"] for row in rows),
        "failures": len(failures),
        "slowest_cpu_seconds": round(slowest.cpu_seconds, 4),
        "slowest_seconds": round(max(verdict.seconds for verdict in verdicts), 4),
        "slowest_index": slowest.index,
        "slowest_mutation": slowest.mutation,
        "memory_growth_mb": round(max(growth), 1),
        "seconds": round(time.monotonic() - begin),
        "failed": failures[:100],
    }
    with tempfile.TemporaryDirectory() as name:
        valid = [f"{seed.name} ({len(seed.data):,} bytes)" for seed in seeds(Path(name))]
    config = {
        "files": args.files,
        "seed": args.seed,
        "valid files": "; ".join(valid),
        "reads of each": "unpack_file, load, inspect_file",
        "limits": f"{MEMORY_MB} MiB of address space above a warm worker's, {WATCHDOG_SECONDS} s",
    }
    packages = {name: version(name) for name in ("safetensors", "zstandard", "constriction")}
    path = write_results(
        "fuzz", hardware_tag(), config, environment() | packages, [totals, *rows], markdown(rows, totals)
    )
    print(f"{path} and {path.with_suffix('.md').name}")
    for failure in failures[:20]:
        print(failure)
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
