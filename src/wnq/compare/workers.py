"""What a comparison's cells run in side by side: processes, or threads of this one, each with a CUDA stream of its own."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wnq.compare.jobs import Images, Job, run_job
from wnq.metrics import Metrics
from wnq.train import Interrupted, Progress
from wnq.train.interrupt import tell_threads

REPORT_SECONDS = 0.2
"""Between two reports of progress at least."""


Events = queue.SimpleQueue[tuple["Worker | StreamWorker", dict[str, Any]]]


class Worker:
    """One process, which runs one job at a time.

    Args:
        number: which one; names its log.
        threads: of the processor.
        folder: for the log.
        events: takes ``(worker, event)``; the last event is ``{"event": "gone", "code": exit code}``.
    """

    def __init__(self, number: int, threads: int, folder: Path, events: Events) -> None:
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
            event = json.loads(line)
            if event["event"] == "step":
                event["progress"] = progress_from(event["progress"])
            self._events.put((self, event))
        self._events.put((self, {"event": "gone", "code": self.process.wait()}))


class StreamWorker:
    """One thread of this process, which runs one job at a time on a CUDA stream of its own, if there is CUDA.

    Small networks leave most of a GPU idle; on several streams their kernels run at the same time.

    Args:
        number: which one.
        images: of the comparison, shared by all.
        events: takes ``(worker, event)``, as of :class:`Worker`.
    """

    def __init__(self, number: int, images: Images, events: Events) -> None:
        self.number, self.images, self._events = number, images, events
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"cell {number}", daemon=True)
        self._thread.start()

    def start(self, job: Job) -> None:
        """Begin a job; how it goes arrives as events."""
        self._jobs.put(job)

    def interrupt(self) -> None:
        """Let it write a checkpoint and end."""
        tell_threads(stop=True)
        self._jobs.put(None)

    def end(self, seconds: float) -> None:
        """Wait until it has ended, but no longer than this."""
        self._thread.join(seconds)

    def why_gone(self, code: int) -> str:
        """Return a sentence on an unexpected end."""
        return "its thread ended unexpectedly; what was printed says why"

    def _work(self) -> None:
        stream = torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else contextlib.nullcontext()
        try:
            with stream:
                while (job := self._jobs.get()) is not None:
                    self._run(job)
        except Interrupted:
            pass
        finally:
            self._events.put((self, {"event": "gone", "code": 0}))

    def _run(self, job: Job) -> None:
        try:
            report = seldom(lambda progress: self._events.put((self, {"event": "step", "progress": progress})))
            run_job(job, self.images, report)
        except OSError as error:
            self._events.put((self, {"event": "broken", "reason": str(error)}))
        else:
            self._events.put((self, {"event": "end"}))


def seldom(report: Callable[[Progress], None]) -> Callable[[Progress], None]:
    """Return the report of one job that passes on every evaluation, and in between no more than one in :data:`REPORT_SECONDS`."""
    last = 0.0

    def pass_on(progress: Progress) -> None:
        nonlocal last
        if progress.val is not None or time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            report(progress)

    return pass_on


def progress_from(content: dict[str, Any]) -> Progress:
    """Return the progress that a worker reported."""
    val = None if content["val"] is None else Metrics(**content["val"])
    rest: dict[str, Any] = {key: value for key, value in content.items() if key != "val"}
    return Progress(**rest, val=val)
