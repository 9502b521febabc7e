"""The processes that a comparison's cells run in."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from wnq.compare.jobs import Job
from wnq.metrics import Metrics
from wnq.train import Progress


class Worker:
    """One process, which runs one job at a time.

    Args:
        number: which one; names its log.
        threads: of the processor.
        folder: for the log.
        events: takes ``(worker, event)``; the last event is ``{"event": "gone", "code": exit code}``.
    """

    def __init__(
        self, number: int, threads: int, folder: Path, events: "queue.SimpleQueue[tuple[Worker, dict[str, Any]]]"
    ) -> None:
        self.number = number
        self.job: Job | None = None
        self.log = folder / f"worker-{number}.log"
        self._events = events
        # Two processes that each take all cores make both several times slower.
        limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        paths = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "wnq.compare.worker", str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**os.environ, **limits, "PYTHONPATH": paths},
                text=True,
                encoding="utf-8",
                start_new_session=True,  # a terminal's Ctrl-C must not reach it twice
            )
        threading.Thread(target=self._listen, daemon=True).start()

    def start(self, job: Job) -> None:
        """Begin a job; how it goes arrives as events."""
        self.job = job
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(job.to_json()) + "\n")
            self.process.stdin.flush()
        except OSError:
            pass  # it is gone; that event says why

    def interrupt(self) -> None:
        """Let it write a checkpoint and end."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def end(self, seconds: float) -> None:
        """Wait until it has ended, but no longer than this; then make it."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def why_gone(self, code: int) -> str:
        """Return a sentence on an unexpected end."""
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"the worker process ended unexpectedly ({how}; {self.log.name} ends: {lines[-1] if lines else 'empty'})"

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._events.put((self, json.loads(line)))
        self._events.put((self, {"event": "gone", "code": self.process.wait()}))


def progress_from(content: dict[str, Any]) -> Progress:
    """Return the progress that a worker reported."""
    val = None if content["val"] is None else Metrics(**content["val"])
    rest: dict[str, Any] = {key: value for key, value in content.items() if key != "val"}
    return Progress(**rest, val=val)
