"""Where images come from: scikit-learn's digits, the Hugging Face hub, parquet files or a folder of images."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wnq.data.decode import EncodedSplit, Progress, check_memory, load_split, missing_extra
from wnq.data.folders import image_folder_split, image_folders
from wnq.data.images import Dataset, ImageData, align_classes, channel_statistics, hold_out
from wnq.data.tables import dataset_split, parquet_files, parquet_split
from wnq.names import did_you_mean

VAL_SPLITS = ("test", "validation", "valid", "val")
MEMORY_LIMIT = 8 * 2**30


@dataclass(frozen=True)
class _HubSource:
    """A data set of the hub that has a short name here."""

    path: str
    image_column: str
    label_column: str
    val_split: str
    count: int
    """Training images."""
    size: int | None
    """Height and width in pixels; None: they vary."""


_HUB_SOURCES = {
    "cifar10": _HubSource("uoft-cs/cifar10", "img", "label", "test", 50_000, 32),
    "cifar100": _HubSource("uoft-cs/cifar100", "img", "fine_label", "test", 50_000, 32),
    "imagenet": _HubSource("ILSVRC/imagenet-1k", "image", "label", "validation", 1_281_167, None),
}


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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    cache_dir: str | Path | None = None,
    memory_limit: int = MEMORY_LIMIT,
    progress: Progress | None = None,
) -> Dataset:
    """Load an image classification data set into memory.

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
        size: pixels; scale the shorter side of each image to it and cut out the central square.
        limit: at most this many images of each split, chosen at random, always the same ones.
        mean: per channel, in units of the pixel range (0 to 1); computed from the training images by default.
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

    if name == "digits":
        options = {
            "folder": folder, "image_column": image_column, "label_column": label_column,
            "val_split": val_split, "size": size,
        }  # fmt: skip
        if ignored := [option for option, value in options.items() if value is not None]:
            raise ValueError(f"digits does not take {', '.join(ignored)}")
        train, val = _digits(limit, 0.2 if val_share is None else val_share)
    else:
        splits = _find_splits(
            name,
            folder,
            image_column,
            label_column,
            val_split,
            wants_val=val_share is None,
            size=size,
            limit=limit,
            memory_limit=memory_limit,
        )
        where = Path(cache_dir or os.environ.get("WNQ_CACHE") or Path.home() / ".cache" / "wnq").expanduser()
        loaded = [
            load_split(
                split, size=size, limit=limit, memory_limit=memory_limit, cache_dir=where / "images", progress=progress
            )
            for split in splits
        ]
        if val_share is not None:
            kept, held = hold_out(loaded[0].labels, val_share)
            train, val = loaded[0].select(kept), loaded[0].select(held)
        else:
            train, val = loaded[0], align_classes(loaded[1], loaded[0].classes)
    if train.images.shape[1:] != val.images.shape[1:]:
        raise ValueError(
            f"{name}: training images are {tuple(train.images.shape[1:])} (channels, height, width) but validation "
            f"images are {tuple(val.images.shape[1:])}; pass size= to bring all to one size"
        )
    if mean is None or std is None:
        computed_mean, computed_std = channel_statistics(train.images)
        mean = computed_mean if mean is None else mean
        std = computed_std if std is None else std
    channels = train.images.shape[1]
    if len(mean) != channels or len(std) != channels:
        raise ValueError(
            f"{name}: mean and std need {channels} values, one per channel, got {len(mean)} and {len(std)}"
        )
    return Dataset(train, val, tuple(mean), tuple(std))


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


def _find_splits(
    name: str,
    folder: str | Path | None,
    image_column: str | None,
    label_column: str | None,
    val_split: str | None,
    *,
    wants_val: bool,
    size: int | None,
    limit: int | None,
    memory_limit: int,
) -> list[EncodedSplit]:
    """Return the training split and, if wanted, the validation split."""
    known = _HUB_SOURCES.get(name)
    local = _local_folder(name, folder, is_known=known is not None)
    if local is not None:
        files = parquet_files(local)
        if files:
            chosen = _choose_splits(str(local), list(files), val_split, wants_val=wants_val)
            return [parquet_split(f"{name} {split}", files[split], image_column, label_column) for split in chosen]
        folders = image_folders(local, ("train", *VAL_SPLITS))
        if image_column is not None or label_column is not None:
            raise ValueError(
                f"{local}: a folder of images has no columns; image_column and label_column are for tables"
            )
        chosen = _choose_splits(str(local), list(folders), val_split, wants_val=wants_val)
        return [image_folder_split(f"{name} {split}", folders[split]) for split in chosen]
    if known is None:
        return _hub_splits(name, name, image_column, label_column, val_split, wants_val=wants_val)
    if known.size is None and size is None:
        raise ValueError(f"{name} has images of many sizes; pass size= to bring all to one size, such as size=32")
    # Before the download, which may be as large as 150 GB.
    pixels = size or known.size or 1
    check_memory(f"{name} train", (min(limit or known.count, known.count), 3, pixels, pixels), memory_limit)
    return _hub_splits(
        name,
        known.path,
        image_column or known.image_column,
        label_column or known.label_column,
        val_split or known.val_split,
        wants_val=wants_val,
    )


def _local_folder(name: str, folder: str | Path | None, *, is_known: bool) -> Path | None:
    """Return the local folder that is meant, or None for the hub."""
    if folder is not None:
        path = Path(folder).expanduser()
    elif is_known:
        return None
    else:
        path = Path(name).expanduser()
        looks_local = name.startswith((".", "/", "~")) or "\\" in name
        if not path.exists() and not looks_local:
            if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
                return None
            names = ["digits", *_HUB_SOURCES]
            raise ValueError(
                f"unknown data set {name!r}.{did_you_mean(name, names)} Give one of {', '.join(names)}, an existing folder, "
                "or a hub name 'owner/dataset'"
            )
    if not path.is_dir():
        raise ValueError(f"data folder {str(path)!r} {'is not a folder' if path.exists() else 'does not exist'}")
    return path


def _choose_splits(where: str, names: Sequence[str], val_split: str | None, *, wants_val: bool) -> list[str]:
    if "train" not in names:
        raise ValueError(f"{where}: no split 'train' among: {', '.join(names) or 'nothing found'}")
    if not wants_val:
        return ["train"]
    if val_split is not None and val_split not in names:
        raise ValueError(f"{where}: no split {val_split!r} for validation; there are: {', '.join(names)}")
    found = val_split or next((split for split in VAL_SPLITS if split in names), None)
    if found is None:
        raise ValueError(
            f"{where}: there is no split for validation ({', '.join(VAL_SPLITS)}), only: {', '.join(names)}; pass "
            "val_split= to name one or val_share=0.1 to hold out a tenth of the training images"
        )
    return ["train", found]


def _hub_splits(
    name: str,
    path: str,
    image_column: str | None,
    label_column: str | None,
    val_split: str | None,
    *,
    wants_val: bool,
) -> list[EncodedSplit]:
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise missing_extra(name, "datasets") from error
    try:
        loaded: Any = datasets.load_dataset(path)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"data set {path!r} could not be loaded from the Hugging Face hub ({reason}); without a network, pass the "
            "folder of its parquet files"
        ) from error
    chosen = _choose_splits(path, list(loaded), val_split, wants_val=wants_val)
    return [dataset_split(f"{name} {split}", loaded[split], image_column, label_column) for split in chosen]
