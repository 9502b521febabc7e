"""Work for a CUDA device that is captured once and then replayed: one launch in place of some hundred."""

import contextlib
import logging
import math
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

WARM_UP = 5
"""Calls before the capture: they choose convolution algorithms, compile what is compiled, and allocate what stays."""

_one_at_a_time = threading.RLock()
"""Threads warm up and capture one after the other: what waits for the whole device, as the first call of a library may, breaks
another's capture."""


class Captured:
    """A function of no arguments whose work on the device is the same at every call; on other devices it is just called.

    Whatever changes from call to call must stand in tensors that stay where they are. The first :data:`WARM_UP` calls run as
    written.

    Work that waits for the device, as some quantizers do in every step, cannot be captured: a warning says so, and it goes on as
    written.

    Args:
        function: queues the work. What it does on the host happens only while it is warmed up and captured.
        device: that the work is for.
    """

    def __init__(self, function: Callable[[], object], device: torch.device) -> None:
        self.function, self.device = function, device
        self._left: float = WARM_UP
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream = _stream_for(device) if device.type == "cuda" else None

    def __call__(self) -> None:
        """Do the work once."""
        if self._stream is None:
            self.function()
            return
        if not self._left and self._graph is None:
            self._graph = self._capture(self._stream)
        if self._graph is None:
            self._left = max(0, self._left - 1)
            self._as_written(self._stream)
        else:
            self._graph.replay()

    def _as_written(self, stream: torch.cuda.Stream) -> None:
        # On the stream of the capture: gradients accumulate on the stream that they were first accumulated on.
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with _one_at_a_time if math.isfinite(self._left) else contextlib.nullcontext(), torch.cuda.stream(stream):
            self.function()
        torch.cuda.current_stream(self.device).wait_stream(stream)

    def _capture(self, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                _one_at_a_time,
                # Other threads may allocate and wait meanwhile.
                torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"),
            ):
                self.function()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            logger.warning("the steps cannot be captured into a CUDA graph and are queued one by one: %s", reason)
            self._left = math.inf
            return None
        return graph


def _stream_for(device: torch.device) -> torch.cuda.Stream:
    """Return the current stream if it can be captured, else another: torch has 32 in all, and gives them out again and again."""
    current = torch.cuda.current_stream(device)
    return torch.cuda.Stream(device) if current == torch.cuda.default_stream(device) else current
