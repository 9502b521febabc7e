"""Batches from images held in memory: shuffled, augmented and normalised in tensor code, without worker processes.

All randomness of an epoch is a function of ``(seed, epoch)``, drawn for the whole (global) epoch at once; a step takes
its part. So a run resumed at any step sees the same batches as one that was never stopped, and the ranks of a
distributed run see together what a single process sees.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.data.images import ImageData
from wnq.data.steps import Normalizer, Steps, epoch_generator

PAD_MODES = ("reflect", "zero")


@dataclass(frozen=True)
class Augment:
    """Random changes of a training image, drawn for each image in each epoch.

    Attributes:
        crop_padding: pixels added on every side before a crop of the original size is taken at a random place.
        flip: mirror left to right, half of the time.
        pad_mode: what the added pixels are, ``reflect`` (the image mirrored at its edge) or ``zero`` (black).

    Raises:
        ValueError: a negative padding or an unknown ``pad_mode``.
    """

    crop_padding: int = 0
    flip: bool = False
    pad_mode: str = "reflect"

    def __post_init__(self) -> None:
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be 0 or more pixels, got {self.crop_padding}")
        if self.pad_mode not in PAD_MODES:
            raise ValueError(f"pad_mode must be one of {', '.join(PAD_MODES)}, got {self.pad_mode!r}")


@dataclass(frozen=True)
class Draws:
    """The random draws of one epoch, one entry per position in the order of the epoch, on the device of the images.

    Attributes:
        order: which image, int64.
        down: rows that it moves up by, int64; the rows below come into view.
        right: columns that it moves left by, int64.
        flip: whether it is mirrored.
    """

    order: Tensor
    down: Tensor
    right: Tensor
    flip: Tensor


class Batches:
    """Batches of one split, moved to ``device`` once as uint8 and turned to normalised floats batch by batch.

    Args:
        data: the split.
        batch_size: images per step over all ranks together.
        mean: per channel, in units of the pixel range (0 to 1).
        std: per channel, same units, greater than 0.
        augment: random crops and flips; None leaves the images as they are.
        shuffle: a new order every epoch; otherwise the order of ``data``.
        seed: of order and augmentation.
        device: where the images live and the batches appear.
        rank: which share of each batch this process takes, in ``[0, world_size)``.
        world_size: number of processes that share each batch.
        drop_last: leave out the last batch of an epoch if it is not full. Otherwise the ranks share it as evenly as
            they can; a rank gets an empty one when there are fewer images than ranks.
        channels_last: memory format of the images.
        dtype: of the images returned; they are normalised in float32.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``world_size``, or any other argument does not fit.
    """

    def __init__(
        self,
        data: ImageData,
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
        _, channels, height, width = data.images.shape
        self._steps = Steps(len(data), batch_size, rank, world_size, drop_last)
        if augment is not None and augment.pad_mode == "reflect" and augment.crop_padding >= min(height, width):
            raise ValueError(
                f"crop_padding {augment.crop_padding} must be less than the image size {height}x{width} to be "
                "filled by reflection"
            )
        self.batch_size = batch_size
        self.augment = augment
        self.shuffle = shuffle
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.drop_last = drop_last
        self.dtype = dtype
        self.device = torch.device(device)
        self.classes = data.classes
        self._normalize = Normalizer(mean, std, channels, self.device, dtype, channels_last)
        self._images = data.images.to(self.device)
        self._labels = data.labels.to(self.device)
        self._rows = torch.arange(height, device=self.device)
        self._columns = torch.arange(width, device=self.device)

    def __len__(self) -> int:
        """Return the number of images in the split, over all ranks."""
        return self._images.shape[0]

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch, the same on every rank."""
        return self._steps.per_epoch

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over the batches of one epoch from ``start_step`` on.

        Args:
            epoch: number of the epoch; with ``seed`` it determines order and augmentation.
            start_step: batches to pass over, in ``[0, steps_per_epoch]``.

        Returns:
            An iterator of (images ``(B, C, H, W)`` normalised float, labels ``(B,)`` int64), where ``B`` is this rank's
            share of the batch.

        Raises:
            ValueError: ``start_step`` is out of range.
        """
        self._steps.check_start(start_step)
        return self._iterate(self.draw(epoch), start_step)

    def _iterate(self, drawn: Draws, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step in range(start_step, self.steps_per_epoch):
            yield self.pick(drawn, self._steps.share(step))

    def pick(self, drawn: Draws, mine: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and labels at some positions of an epoch's order; nothing here waits for the device.

        Args:
            drawn: of the epoch.
            mine: the positions, as int64 indices where only the device knows them.
        """
        chosen = drawn.order[mine]
        images = self._images.index_select(0, chosen)
        if self.augment is not None:
            images = self._crop_and_flip(images, drawn.down[mine], drawn.right[mine], drawn.flip[mine])
        return self._normalize(images), self._labels.index_select(0, chosen)

    def draw(self, epoch: int) -> Draws:
        """Return the random draws of an epoch."""
        generator = epoch_generator(self.seed, epoch)
        augment = self.augment or Augment()
        count = len(self)
        order = torch.randperm(count, generator=generator) if self.shuffle else torch.arange(count)
        shift = torch.randint(-augment.crop_padding, augment.crop_padding + 1, (2, count), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        flip = mirrored if augment.flip else torch.zeros_like(mirrored)
        return Draws(*(draw.to(self.device) for draw in (order, shift[0], shift[1], flip)))

    def _crop_and_flip(self, images: Tensor, down: Tensor, right: Tensor, flip: Tensor) -> Tensor:
        """Gather every output pixel from where it comes from: pad, crop and flip in one pass over uint8."""
        if self.augment is None or not (self.augment.crop_padding or self.augment.flip):
            return images
        batch, channels, height, width = images.shape
        columns = torch.where(flip[:, None], width - 1 - self._columns, self._columns) + right[:, None]
        rows = self._rows + down[:, None]
        source = _mirror(rows, height)[:, :, None] * width + _mirror(columns, width)[:, None, :]
        source = source.view(batch, 1, height * width).expand(batch, channels, height * width)
        cropped = images.view(batch, channels, height * width).gather(2, source).view_as(images)
        if self.augment.pad_mode == "zero" and self.augment.crop_padding:
            inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
            cropped.mul_(inside[:, None])
        return cropped


def _mirror(position: Tensor, size: int) -> Tensor:
    """Fold positions outside ``[0, size)`` back in, the edge pixel not repeated, and clamp what lies further out."""
    return (size - 1 - (size - 1 - position.abs()).abs()).clamp_(0, size - 1)
