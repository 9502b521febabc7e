"""A tensor in pieces that fit a processor's cache: memory to work in, threads to work with.

The pieces are NumPy views, shared out to as many threads as torch is set to use (``torch.get_num_threads()``); NumPy lets them
run side by side. The pieces and the order in which their results are joined do not depend on the number of threads, so neither
does any result.
"""

import contextlib
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

CHUNK = 1 << 17
"""Elements a piece: 1 MiB in float64, about a second-level cache."""

DEVICE_CHUNK = 1 << 22
"""Elements a piece where they are not on the CPU."""

Array: TypeAlias = NDArray[Any]
T = TypeVar("T")


class Room:
    """Memory of one thread, used again for every piece: fresh memory costs more than the arithmetic on it.

    That holds for small tensors too, so the rooms of a call are kept for the next one, a few MB for each thread.
    """

    def __init__(self) -> None:
        self._slots: dict[int, Array] = {}

    def array(self, slot: int, size: int, dtype: Any) -> Array:
        """Return an uninitialized array, which lies where the last one of this slot lay."""
        held = self._slots.get(slot)
        if held is None or held.size < size:
            held = self._slots[slot] = np.empty(size, np.float64)
        return held.view(dtype)[:size]


_KEPT: deque[Room] = deque(maxlen=16)


@contextlib.contextmanager
def _room() -> Generator[Room, None, None]:
    try:
        room = _KEPT.pop()
    except IndexError:
        room = Room()
    yield room
    _KEPT.append(room)


def in_threads(work: Callable[[int, Room], T], count: int) -> list[T]:
    """Return ``[work(0, room), …, work(count - 1, room)]``, computed by torch's number of threads where that is worth it."""
    threads = min(torch.get_num_threads(), count // 4)
    if threads < 2:
        with _room() as room:
            return [work(i, room) for i in range(count)]
    results: dict[int, T] = {}
    todo = deque(range(count))

    def worker(_: int) -> None:
        with _room() as room:
            while True:
                try:
                    i = todo.popleft()
                except IndexError:
                    return
                results[i] = work(i, room)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(worker, range(threads)))
    return [results[i] for i in range(count)]


def readable(weight: Tensor, *, where: str) -> Tensor:
    """Return a tensor that the passes can read: without its history, and on the CPU if its device has no float64.

    Raises:
        ValueError: it holds complex numbers, is not dense, or has no data.
    """
    if weight.is_complex() or weight.layout != torch.strided or weight.device.type == "meta":
        raise ValueError(
            f"{where} needs a dense tensor of real numbers with data, got {weight.dtype}, {weight.layout}, on {weight.device}."
        )
    weight = weight.detach().resolve_neg()
    return weight.cpu() if weight.device.type == "mps" else weight


def plain(x: Tensor, room: Room) -> Array:
    """Return the elements of a CPU tensor as float32 or, from float64 and integers, float64; a view where that is possible."""
    if x.dtype == torch.bfloat16:  # the upper half of a float32
        bits = room.array(3, x.numel(), np.uint32)
        np.left_shift(x.view(torch.int16).numpy().view(np.uint16), 16, out=bits, dtype=np.uint32)
        return bits.view(np.float32)
    if x.dtype == torch.float16:
        out = room.array(3, x.numel(), np.float32)
        np.copyto(out, x.numpy())
        return out
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float() if x.dtype.is_floating_point else x.double()
    return x.numpy()


def dot(a: Array, b: Array) -> float:
    """Return the inner product, on this thread alone and always in the same order (a BLAS promises neither)."""
    return float(np.einsum("i,i->", a, b))


def rows_of(tensor: Tensor, axis: int) -> Tensor:
    """View a tensor as ``(channels, elements of each)``; a copy if memory runs the other way."""
    channels = tensor.shape[axis]
    return tensor.movedim(axis, 0).reshape(channels, tensor.numel() // max(1, channels))


def blocks(matrix: Tensor, chunk: int) -> list[tuple[slice, slice]]:
    """Cut a matrix into blocks of at most ``chunk`` elements that lie together in memory."""
    rows, columns = matrix.shape
    if not rows * columns:
        return []
    high, wide = max(1, chunk // columns), min(columns, chunk)
    return [
        (slice(r, min(r + high, rows)), slice(c, min(c + wide, columns)))
        for r in range(0, rows, high)
        for c in range(0, columns, wide)
    ]
