"""Train a list of recipes side by side on one device, each in a process of its own: a small network alone leaves a GPU idle.

    python benchmarks/queue_runs.py recipes/a.toml recipes/b.toml --seeds 0,1,2 --workers 4 --out runs/queue [--minutes 9]
    python benchmarks/queue_runs.py recipes/a.toml --set data.folder=cifar100-parquet --set train.epochs=3 --out runs/short

Every recipe and seed is one run, in ``OUT/<recipe>-s<seed>/``. As it ends, ``OUT/<recipe>-s<seed>.json`` says what it came to.
Start the same command again to go on: what is done is passed over; what was stopped, by Ctrl-C, by the time limit or by a crash,
resumes from its last checkpoint; what failed is tried again. The script ends with 0 if all is done, with 1 if a run failed, with 3
if runs are left.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wnq.files import write_text

GRACE_SECONDS = 60.0
"""What a run has to end its step and to write its checkpoint."""


@dataclass
class Run:
    """One recipe with one seed."""

    recipe: Path
    seed: int
    out: Path
    process: "subprocess.Popen[str] | None" = None
    begin: float = field(default=0.0)

    @property
    def name(self) -> str:
        return f"{self.recipe.stem}-s{self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / self.name

    @property
    def report(self) -> Path:
        return self.out / f"{self.name}.json"

    @property
    def state(self) -> str:
        """Return ``done``, ``failed`` or ``waiting``."""
        try:
            return json.loads(self.report.read_text(encoding="utf-8"))["state"]
        except FileNotFoundError:
            return "waiting"

    def start(self, threads: int, assigned: list[str]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "wnq.cli", "train", str(self.recipe), "--out", str(self.folder)]
        command += ["--resume", "--seed", str(self.seed), "--threads", str(threads)]
        command += [word for text in assigned for word in ("--set", text)]
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={**os.environ, **limits},
                text=True,
                start_new_session=True,  # a terminal's Ctrl-C must not reach it twice
            )
        self.begin = time.perf_counter()

    def end(self, code: int) -> str:
        """Write what became of a run whose process has ended, and return it."""
        if code == 130:
            return "stopped"
        content: dict[str, Any] = {"name": self.name, "seed": self.seed}
        content["wall_seconds"] = round(time.perf_counter() - self.begin, 2)
        if code == 0:
            content |= {"state": "done", **json.loads((self.folder / "result.json").read_text(encoding="utf-8"))}
            content["recipe"] = {"file": str(self.recipe), **content["recipe"]}
        else:
            lines = (self.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
            why = signal.Signals(-code).name if code < 0 else lines[-1] if lines else f"exit code {code}"
            content |= {"state": "failed", "code": code, "reason": why}
        write_text(self.report, json.dumps(content, indent=1) + "\n")
        return content["state"]


def work(runs: list[Run], workers: int, threads: int, assigned: list[str], seconds: float) -> None:
    """Run what is not done, ``workers`` at a time, until all has been tried or the time is up."""
    waiting, busy = [run for run in runs if run.state != "done"], list[Run]()
    begin = time.perf_counter()
    try:
        while (waiting or busy) and time.perf_counter() - begin < seconds:
            while waiting and len(busy) < workers:
                busy.append(waiting.pop(0))
                busy[-1].start(threads, assigned)
                print(f"{busy[-1].name}: running", flush=True)
            time.sleep(0.1)
            for run in list(busy):
                assert run.process is not None
                if (code := run.process.poll()) is not None:
                    busy.remove(run)
                    print(f"{run.name}: {run.end(code)}", flush=True)
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        stop(busy)


def stop(busy: list[Run]) -> None:
    """Let runs write their checkpoints and end."""
    for run in busy:
        assert run.process is not None
        run.process.send_signal(signal.SIGINT)
    last = time.perf_counter() + GRACE_SECONDS
    for run in busy:
        assert run.process is not None
        try:
            code = run.process.wait(max(0.1, last - time.perf_counter()))
        except subprocess.TimeoutExpired:
            run.process.kill()
            run.process.wait()
            code = 130
        print(f"{run.name}: {run.end(code)}", flush=True)


@contextlib.contextmanager
def alone(out: Path) -> Generator[None]:
    """Keep a second queue out of the folder while the block runs."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                sys.exit(f"another queue runs in {out}. Wait for it, or use another folder.")
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--seeds", default="0", help="separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="processes side by side")
    parser.add_argument("--threads", type=int, default=1, help="of the processor for each")
    parser.add_argument("--set", dest="assigned", action="append", default=[], metavar="SECTION.KEY=VALUE")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after this time, to be continued")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if missing := [str(path) for path in options.recipes if not path.exists()]:
        sys.exit(f"these recipes do not exist: {', '.join(missing)}.")
    if len({path.stem for path in options.recipes}) < len(options.recipes):
        sys.exit("two recipes have the same name: their runs would meet in one folder. Rename one.")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = [Run(recipe, seed, options.out) for seed in seeds for recipe in options.recipes]
    begin = time.perf_counter()
    with alone(options.out):
        work(runs, options.workers, options.threads, options.assigned, 60 * options.minutes)
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    print(f"{len(runs)} runs: {counts}, after {time.perf_counter() - begin:.0f} s")
    sys.exit(1 if "failed" in states else 3 if "waiting" in states else 0)


if __name__ == "__main__":
    main()
