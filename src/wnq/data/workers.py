"""The processes that read and decode: one step's images at a time, and what becomes of those that cannot be read."""

import os
import random
import signal
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from wnq.data.crops import centre, random_part
from wnq.data.steps import Steps
from wnq.data.streamed import CHANNELS, StreamedImages

REPLACEMENTS = 20
"""Other images that are tried in the place of an unreadable one."""


class Part(NamedTuple):
    """One process's share of one step.

    Attributes:
        images: uint8, ``(B, H, W, 3)``.
        labels: int64, ``(B,)``.
        unreadable: path and reason of each image that could not be read.
        empty: places in the batch for which no readable image was found.
    """

    images: Tensor
    labels: Tensor
    unreadable: tuple[tuple[str, str], ...]
    empty: int


class Reader(Dataset[Part]):
    """The steps of one epoch, each a function of ``(seed, epoch, position)`` and the order alone.

    In training an unreadable image is replaced by another, drawn at random; in evaluation it is left out, so that no image counts
    twice.

    Args:
        split: the images.
        order: int64, ``(N,)``: the image at each position of the epoch.
        steps: which positions are this process's at each step.
        training: random parts; otherwise the centres.
        flip: mirror random parts, half of the time.
        seed: of the draws, together with ``epoch``.
        epoch: its number.
    """

    def __init__(
        self, split: StreamedImages, order: Tensor, steps: Steps, *, training: bool, flip: bool, seed: int, epoch: int
    ) -> None:
        self.split, self.order, self.steps = split, order, steps
        self.training, self.flip = training, flip
        self.drawn_from = f"{seed}/{epoch}"

    def __getitem__(self, step: int) -> Part:
        """Return this process's share of a step."""
        mine = self.steps.share(step)
        size = self.split.size
        images = np.empty((mine.stop - mine.start, size, size, CHANNELS), dtype=np.uint8)
        labels: list[int] = []
        unreadable: dict[str, str] = {}
        for position in range(mine.start, mine.stop):
            rng = random.Random(f"{self.drawn_from}/{position}")
            index = int(self.order[position])
            for _ in range(1 + (REPLACEMENTS if self.training else 0)):
                pixels = self._pixels(index, rng, unreadable)
                if pixels is not None:
                    images[len(labels)] = pixels
                    labels.append(int(self.split.labels[index]))
                    break
                index = int(rng.random() * len(self.split))
        empty = len(images) - len(labels)
        return Part(
            torch.from_numpy(images[: len(labels)]),
            torch.tensor(labels, dtype=torch.int64),
            tuple(unreadable.items()),
            empty,
        )

    def _pixels(self, index: int, rng: random.Random, unreadable: dict[str, str]) -> NDArray[np.uint8] | None:
        """Return what the network sees of an image, or None and an entry in ``unreadable``."""
        split, place = self.split, int(self.split.positions[index])
        try:
            data = split.source.read(place)
            if self.training:
                return random_part(data, split.size, self.flip, rng)
            return centre(data, split.size, split.resize)
        except Exception as error:  # a damaged file can make a decoder raise anything
            where = split.source.where(place)
            unknown = type(error).__name__ == "UnidentifiedImageError"
            reason = "its format is not known" if unknown else str(error) or type(error).__name__
            unreadable[where] = reason.removeprefix(f"{where}: ")
            return None


def start_worker(_: int) -> None:
    """Prepare a process that reads: one thread, and Ctrl-C is the training process's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # such as Pillow's about metadata that nobody reads


def unchanged(part: Any) -> Any:
    """Return what a reader returned, instead of collating it."""
    return part


def default_workers() -> int:
    """Return the processor cores there are for each training process of this machine, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
