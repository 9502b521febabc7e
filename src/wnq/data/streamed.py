"""A split whose images are read while training: where they are, and what turned out to be unreadable."""

from dataclasses import dataclass, field, replace
from typing import NoReturn, Protocol

import torch.distributed as dist
from torch import Tensor

from wnq.data.images import ImageData

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CHANNELS = 3


class Source(Protocol):
    """Encoded images by number, from any process: it is copied to those that read."""

    def where(self, position: int) -> str:
        """Return what messages call an image: its path, or its table and row."""
        ...

    def read(self, position: int) -> bytes:
        """Return the bytes of an image.

        Raises:
            ValueError: there are none.
        """
        ...


@dataclass(frozen=True)
class StreamedImages:
    """One split, not in memory: :func:`wnq.data.batches_of` reads it. Always RGB.

    Attributes:
        name: what messages call it, such as ``imagenet train``.
        source: the encoded images.
        positions: int64, ``(N,)``: the number in ``source`` of each image.
        labels: int64, ``(N,)``, values in ``[0, len(classes))``.
        classes: the name of each class, in the order of the labels.
        size: height and width of what a network sees, pixels.
        resize: pixels that the shorter side is scaled to before the centre is cut out, at least ``size``.
        workers: processes that read and decode; 0: the training process itself.
        unreadable: what could not be read so far in this process, path -> reason; batches enter it here.
    """

    name: str
    source: Source
    positions: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    size: int
    resize: int
    workers: int
    unreadable: dict[str, str] = field(default_factory=dict[str, str])

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.positions)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: channels, height, width."""
        return CHANNELS, self.size, self.size

    @property
    def images(self) -> NoReturn:
        """Not there: raises ``ValueError``."""
        raise ValueError(
            f"{self.name} is streamed: its images are never all in memory. Take batches: batches_of(split, …)"
        )

    def select(self, indices: Tensor) -> "StreamedImages":
        """Return the images at ``indices`` (int64, ``(M,)``) in that order."""
        return replace(self, positions=self.positions[indices], labels=self.labels[indices])


def unreadable_images(*splits: ImageData | StreamedImages) -> dict[str, str]:
    """Return what could not be read so far, path -> reason, over all splits and all processes of the job.

    All processes must call it, if the splits are streamed.
    """
    streamed = [split for split in splits if isinstance(split, StreamedImages)]
    found = {path: reason for split in streamed for path, reason in split.unreadable.items()}
    if streamed and dist.is_available() and dist.is_initialized():
        gathered: list[dict[str, str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, found)
        found = {path: reason for part in gathered for path, reason in (part or {}).items()}
    return dict(sorted(found.items()))
