"""One worker of a comparison: reads jobs from stdin, a line of JSON each, and says on stdout how they go.

``python -m wnq.compare.worker THREADS``; started by :mod:`wnq.compare.workers`. It ends with the process that started it.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

import torch

from wnq.compare.jobs import Images, job_from, run_job
from wnq.compare.workers import seldom
from wnq.train import Interrupted, Progress


def main() -> None:
    """Work until stdin ends."""
    # What others print must not come between the reports.
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(int(sys.argv[1]))
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    images = Images()
    try:
        while True:
            _work(jobs.get(), images, reports)
    except (Interrupted, KeyboardInterrupt):
        _say(reports, event="interrupted")


def _listen(jobs: "queue.SimpleQueue[str]") -> None:
    for line in sys.stdin:
        jobs.put(line)
    # Whoever gave out the jobs is gone: a run that went on would meet its own successor in the same folder.
    os._exit(0)


def _work(line: str, images: Images, reports: TextIO) -> None:
    def on_step(now: Progress) -> None:
        content = {**vars(now), "val": None if now.val is None else vars(now.val)}
        _say(reports, event="step", progress=content)

    try:
        run_job(job_from(json.loads(line)), images, seldom(on_step))
    except OSError as error:
        _say(reports, event="broken", reason=str(error))
    else:
        _say(reports, event="end")


def _say(reports: TextIO, **content: Any) -> None:
    reports.write(json.dumps(content) + "\n")
    reports.flush()


if __name__ == "__main__":
    main()
