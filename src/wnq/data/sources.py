"""Where images come from: scikit-learn's digits, the Hugging Face hub, parquet files or a folder of images."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wnq.data.dataset import Dataset, align_classes
from wnq.data.decode import EncodedSplit, Progress, chosen_positions, load_split, missing_extra
from wnq.data.finding import find_splits
from wnq.data.images import ImageData, channel_statistics, hold_out
from wnq.data.streamed import IMAGENET_MEAN, IMAGENET_STD, StreamedImages
from wnq.data.workers import default_workers

MEMORY_LIMIT = 8 * 2**30
STREAMED_SIZE = 224


def load_data(
    name: str,
    *,
    folder: str | Path | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    val_split: str | None = None,
    val_share: float | None = None,
    size: int | None = None,
    limit: int | None = None,
    stream: bool = False,
    resize: int | None = None,
    workers: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cache_dir: str | Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> Dataset:
    """Load an image classification data set into memory, or make it ready to be read while training.

    Args:
        name: one of ``digits`` (1x8x8, comes with scikit-learn), ``cifar10``, ``cifar100``, ``imagenet``; or a local
            folder; or ``owner/dataset`` on the Hugging Face hub. A folder holds either parquet files
            (``train-*.parquet`` and ``test-*.parquet`` or ``validation-*.parquet``, also below ``data/``) or images
            (``train/<class>/*.png`` and ``test/<class>/*.png``, or ``<class>/*.png`` together with ``val_share``).
        folder: local files to read a named data set from instead of the hub.
        image_column: column of the images, needed where it is not evident.
        label_column: column of the class labels, needed where it is not evident.
        val_split: name of the split for validation; by default the first there is of test, validation, valid, val.
        val_share: hold out this share (0 to 1) of the training images, class by class and always the same ones, as
            validation images, whatever other splits there are.
        size: pixels; scale the shorter side of each image to it and cut out the central square. Streamed: what a network sees,
            224 by default.
        limit: at most this many images of each split, chosen at random, always the same ones.
        stream: read and decode images while training, for sets that do not fit in memory. Batches for training then take a random
            part of each image, as is usual for ImageNet; others scale and cut out the centre. All images become RGB. Tables are
            copied once to ``cache_dir``.
        resize: streamed: pixels that the shorter side is scaled to before the centre is cut out; by default 8/7 of ``size``, 256.
        workers: streamed: processes that read and decode, for each training process; by default its share of the machine's cores.
            The batches do not depend on it. 0: none beside the training process.
        mean: per channel, in units of the pixel range (0 to 1); computed from the training images by default. Streamed: those of
            ImageNet.
        std: per channel, same units; computed likewise.
        cache_dir: folder for decoded sets; by default the environment's ``WNQ_CACHE``, else ``~/.cache/wnq``.
        memory_limit: bytes that a decoded split may take. Larger sets need a smaller ``size`` or a ``limit``.
        progress: called with (images done, images in all) while a split is decoded.

    Raises:
        ValueError: the name, an option or the data do not fit, or the hub cannot be reached; the message says which.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    if limit is not None and limit <= 0:
        raise ValueError(f"limit must be a positive number of images, got {limit}")
    if size is not None and size <= 0:
        raise ValueError(f"size must be a positive number of pixels, got {size}")
    if val_share is not None and not 0 < val_share < 1:
        raise ValueError(f"val_share must lie between 0 and 1, got {val_share}")
    if val_share is not None and val_split is not None:
        raise ValueError("val_share takes validation images from the training split; val_split cannot be set as well")

    if not stream and (resize is not None or workers is not None):
        raise ValueError("resize and workers are for images that are read while training: set stream as well")
    if name == "digits":
        options = {
            "folder": folder, "image_column": image_column, "label_column": label_column,
            "val_split": val_split, "size": size, "stream": stream or None,
        }  # fmt: skip
        if ignored := [option for option, value in options.items() if value is not None]:
            raise ValueError(f"digits does not take {', '.join(ignored)}")
        train, val = _digits(limit, 0.2 if val_share is None else val_share)
    else:
        where = Path(cache_dir or os.environ.get("WNQ_CACHE") or Path.home() / ".cache" / "wnq").expanduser() / "images"
        splits = find_splits(
            name,
            folder,
            image_column,
            label_column,
            val_split,
            wants_val=val_share is None,
            size=size,
            limit=limit,
            memory_limit=memory_limit,
            stream_into=where if stream else None,
        )
        loaded = [
            _streamed(split, size, resize, workers, limit)
            if stream
            else load_split(
                split, size=size, limit=limit, memory_limit=memory_limit, cache_dir=where, progress=progress
            )
            for split in splits
        ]
        if val_share is not None:
            kept, held = hold_out(loaded[0].labels, val_share)
            train, val = loaded[0].select(kept), loaded[0].select(held)
        else:
            train, val = loaded[0], align_classes(loaded[1], loaded[0].classes)
    if train.shape != val.shape:
        raise ValueError(
            f"{name}: training images are {train.shape} (channels, height, width) but validation "
            f"images are {val.shape}; pass size= to bring all to one size"
        )
    if mean is None or std is None:
        computed_mean, computed_std = (
            channel_statistics(train.images) if isinstance(train, ImageData) else (IMAGENET_MEAN, IMAGENET_STD)
        )
        mean = computed_mean if mean is None else mean
        std = computed_std if std is None else std
    channels = train.shape[0]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{name}: mean and std need {channels} values, one per channel, got {len(mean)} and {len(std)}"
        )
    return Dataset(train, val, tuple(mean), tuple(std))


def _streamed(
    split: EncodedSplit, size: int | None, resize: int | None, workers: int | None, limit: int | None
) -> StreamedImages:
    """Return a split that is read while training.

    Raises:
        ValueError: a number is out of range.
    """
    if find_spec("PIL") is None:
        raise missing_extra(split.name, "pillow")
    size = size or STREAMED_SIZE
    resize = round(size * 8 / 7) if resize is None else resize
    if resize < size:
        raise ValueError(f"resize must be at least size, {size} pixels, got {resize}")
    if workers is not None and workers < 0:
        raise ValueError(f"workers must be 0 or more processes, got {workers}")
    assert split.source is not None
    workers = default_workers() if workers is None else workers
    positions = chosen_positions(len(split.labels), limit)
    return StreamedImages(
        split.name, split.source, positions, split.labels[positions], split.classes, size, resize, workers
    )


def _digits(limit: int | None, val_share: float) -> tuple[ImageData, ImageData]:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise missing_extra("digits", "scikit-learn") from error
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1).contiguous()
    data = ImageData(images, torch.from_numpy(bunch.target).long(), tuple(str(digit) for digit in range(10)))
    train, val = (data.select(part) for part in hold_out(data.labels, val_share))
    if limit is None:
        return train, val
    generator = torch.Generator().manual_seed(0)
    first, second = (part.select(torch.randperm(len(part), generator=generator)[:limit]) for part in (train, val))
    return first, second
