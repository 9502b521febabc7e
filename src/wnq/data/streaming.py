"""Batches of images that are read and decoded while training, by processes beside it."""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from wnq.data.batches import Augment
from wnq.data.steps import Normalizer, Steps, epoch_generator
from wnq.data.streamed import CHANNELS, StreamedImages
from wnq.data.workers import Part, Reader, start_worker, unchanged

logger = logging.getLogger(__name__)

ALLOWED_SHARE, ALLOWED = 0.01, 3
"""Unreadable images that an epoch may meet: this share of them, and this many in any case."""


class StreamedBatches:
    """Batches of a streamed split, with the interface of :class:`wnq.data.Batches`.

    All randomness is a function of ``(seed, epoch, position)``: the batches do not depend on the number of processes that read or
    train, nor on where a run is resumed.

    Workers decode, crop and scale to uint8; a batch is normalised on ``device``. An unreadable image is replaced by another one
    in training and left out in evaluation, and entered in ``data.unreadable``.

    Args:
        data: the split.
        batch_size: images a step over all ranks together.
        mean: per channel, in units of the pixel range (0 to 1).
        std: per channel, same units, greater than 0.
        augment: random parts of the images, mirrored if its ``flip`` says so; None: their centres.
        shuffle: a new order every epoch; otherwise the order of ``data``.
        seed: of order and augmentation.
        device: where the batches appear.
        rank: which share of each batch this process takes, in ``[0, world_size)``.
        world_size: number of processes that share each batch.
        drop_last: leave out the last batch of an epoch if it is not full.
        channels_last: memory format of the images.
        dtype: of the images returned; they are normalised in float32.

    Raises:
        ValueError: ``augment`` pads, or ``batch_size`` is not a positive multiple of ``world_size``, or any other argument does
            not fit.
    """

    def __init__(
        self,
        data: StreamedImages,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augment: Augment | None = None,
        shuffle: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool = False,
        channels_last: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if augment is not None and augment.crop_padding:
            raise ValueError(
                f"crop_padding is for images in memory, got {augment.crop_padding}; leave it 0: of streamed images random parts "
                "are taken anyway"
            )
        self._steps = Steps(len(data), batch_size, rank, world_size, drop_last)
        self.data = data
        self.batch_size = batch_size
        self.augment = augment
        self.shuffle = shuffle
        self.seed = seed
        self.device = torch.device(device)
        self.classes = data.classes
        self._normalize = Normalizer(mean, std, CHANNELS, self.device, dtype, channels_last)

    def __len__(self) -> int:
        """Return the number of images in the split, over all ranks."""
        return len(self.data)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return self._steps.per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of one epoch from ``start_step`` on; see :meth:`wnq.data.Batches.epoch`.

        Raises:
            ValueError: ``start_step`` is out of range; or, while iterating, more than 1 % of this rank's images cannot be read.
            ChildProcessError: while iterating, a process that reads has died.
        """
        self._steps.check_start(start_step)
        return self._iterate(epoch, start_step)

    def _iterate(self, epoch: int, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        steps = range(start_step, self.steps_per_epoch)
        count = len(self.data)
        order = (
            torch.randperm(count, generator=epoch_generator(self.seed, epoch)) if self.shuffle else torch.arange(count)
        )
        reader = Reader(
            self.data, order, self._steps, training=self.augment is not None,
            flip=self.augment is not None and self.augment.flip, seed=self.seed, epoch=epoch,
        )  # fmt: skip
        unreadable: set[str] = set()
        options: dict[str, Any] = {
            "num_workers": min(self.data.workers, len(steps)),
            "collate_fn": unchanged,
            "worker_init_fn": start_worker,
            "pin_memory": self.device.type == "cuda",
            "generator": torch.Generator(),  # of its own, or torch's global one would be drawn from
        }
        # On another thread: on the main one torch would install a handler that, when a worker dies, raises wherever the program is.
        with ThreadPoolExecutor(1) as thread:
            parts = thread.submit(iter, DataLoader(reader, batch_size=None, sampler=steps, **options)).result()
        while True:
            try:
                part: Part | None = next(parts, None)
            except (RuntimeError, OSError, EOFError) as error:  # what torch and the connection to the process raise
                if not self.data.workers or (type(error) is RuntimeError and "DataLoader worker" not in str(error)):
                    raise
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ChildProcessError(
                    f"{self.data.name}: a process that reads images has died ({reason}). Often memory or shared memory (/dev/shm) "
                    "is too small: lower [data] workers or the batch size"
                ) from None
            if part is None:
                return
            self._note(part, unreadable)
            images = part.images.to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            yield self._normalize(images), part.labels.to(self.device, non_blocking=True)

    def _note(self, part: Part, unreadable: set[str]) -> None:
        """Enter what could not be read, and stop if it is too much."""
        for path, reason in part.unreadable:
            if path not in self.data.unreadable:
                logger.warning("%s: not a readable image, left out (%s)", path, reason)
            self.data.unreadable[path] = reason
            unreadable.add(path)
        share = len(self) / self._steps.world_size
        if len(unreadable) > max(ALLOWED, ALLOWED_SHARE * share) or (part.empty and self.augment is not None):
            some = "; ".join(f"{path} ({self.data.unreadable[path]})" for path in sorted(unreadable)[:3])
            raise ValueError(
                f"{self.data.name}: {len(unreadable)} images cannot be read, more than 1 %, among them {some}. Repair or remove "
                "them, or check that their disk is there."
            )
