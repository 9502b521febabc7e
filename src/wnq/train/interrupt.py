"""Ctrl-C, taken at a moment that suits the trainer."""

import contextlib
import signal
import threading
from collections.abc import Callable, Generator


class Interrupted(Exception):  # noqa: N818 - it is no error
    """Ctrl-C arrived; the state is saved."""


_stop_threads = threading.Event()


def tell_threads(stop: bool) -> None:
    """Let runs in other threads than the main one stop as at a Ctrl-C, or no longer."""
    if stop:
        _stop_threads.set()
    else:
        _stop_threads.clear()


@contextlib.contextmanager
def catching_interrupt() -> Generator[Callable[[], bool]]:
    """Yield a function that tells whether Ctrl-C has arrived, so that the running step can end.

    A second Ctrl-C stops at once. Outside the main thread, which alone receives signals, it says what :func:`tell_threads` said.
    """
    arrived = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield _stop_threads.is_set
        return

    def catch(*_: object) -> None:
        arrived.set()
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, catch)
    try:
        yield arrived.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
