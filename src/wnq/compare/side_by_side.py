"""Running the cells of a comparison side by side."""

import queue
from collections.abc import Callable

from wnq.compare.cells import Cell
from wnq.compare.jobs import fail
from wnq.compare.schedule import Schedule
from wnq.compare.workers import Events, StreamWorker, Worker
from wnq.train.interrupt import tell_threads

GRACE_SECONDS = 60.0
"""What a worker has to end its step and to write its checkpoint."""


def run_side_by_side(schedule: Schedule, count: int, start: Callable[[int, Events], Worker | StreamWorker]) -> None:
    """Run what is not finished in several workers at a time.

    Args:
        schedule: of the cells.
        count: of workers.
        start: starts a worker, given its number and what takes its events.

    Raises:
        OSError: a folder cannot be written.
    """
    events: Events = queue.SimpleQueue()
    idle = list(range(count))
    spare: list[Worker | StreamWorker] = []
    busy: dict[Worker | StreamWorker, Cell] = {}
    try:
        while schedule.waiting or busy:
            free = len(idle) + len(spare)
            for cell, job in schedule.ready() if free else ():
                worker = spare.pop() if spare else start(idle.pop(0), events)
                busy[worker] = cell
                worker.start(job)
                free -= 1
                if not free:
                    break
            if busy:
                worker, event = events.get()
                cell = busy.get(worker)
                if event["event"] == "step" and cell is not None:
                    schedule.step(cell, event["progress"])
                elif event["event"] == "end" and cell is not None:
                    del busy[worker]
                    spare.append(worker)
                    schedule.end(cell)
                elif event["event"] == "broken":
                    raise OSError(event["reason"])
                elif event["event"] == "gone":
                    spare = [other for other in spare if other is not worker]
                    idle.append(worker.number)
                    if cell is not None:
                        del busy[worker]
                        fail(schedule.out / cell.name, "failed", worker.why_gone(event["code"]))
                        schedule.end(cell)
    finally:
        _stop([*busy, *spare])


def _stop(workers: list[Worker | StreamWorker]) -> None:
    """Let the workers write their checkpoints; a second Ctrl-C ends them at once."""
    for worker in workers:
        worker.interrupt()
    try:
        for worker in workers:
            worker.end(GRACE_SECONDS)
    except KeyboardInterrupt:
        for worker in workers:
            worker.end(0)
    finally:
        tell_threads(stop=False)
