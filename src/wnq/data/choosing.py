"""The batches that fit a split: from memory, or streamed."""

from typing import TypedDict, Unpack

import torch

from wnq.data.batches import Augment, Batches
from wnq.data.dataset import Split
from wnq.data.images import ImageData
from wnq.data.streaming import StreamedBatches


class BatchOptions(TypedDict, total=False):
    """The options that :class:`wnq.data.Batches` and :class:`wnq.data.StreamedBatches` share."""

    augment: Augment | None
    shuffle: bool
    seed: int
    device: torch.device | str
    rank: int
    world_size: int
    drop_last: bool
    channels_last: bool
    dtype: torch.dtype


def batches_of(
    split: Split,
    batch_size: int,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    **options: Unpack[BatchOptions],
) -> Batches | StreamedBatches:
    """Return the batches of a split, in memory or streamed.

    Args:
        split: ``train`` or ``val`` of what :func:`wnq.load_data` returned.
        batch_size: images a step over all ranks together.
        mean: per channel, in units of the pixel range (0 to 1).
        std: per channel, same units.
        options: as :class:`wnq.data.Batches`. ``augment`` pads and crops images in memory; of streamed ones it takes
            random parts.

    Raises:
        ValueError: an option does not fit.
    """
    kind = Batches if isinstance(split, ImageData) else StreamedBatches
    return kind(split, batch_size, mean=mean, std=std, **options)  # pyright: ignore[reportArgumentType]
