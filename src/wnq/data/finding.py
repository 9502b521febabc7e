"""Where the splits of a data set are: in local files, or on the Hugging Face hub."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wnq.data.decode import EncodedSplit, check_memory, missing_extra
from wnq.data.folders import image_folder_split, image_folders
from wnq.data.tables import dataset_split, parquet_files, parquet_split, streamed_parquet_split
from wnq.names import did_you_mean

VAL_SPLITS = ("test", "validation", "valid", "val")


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


def find_splits(
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
    stream_into: Path | None,
) -> list[EncodedSplit]:
    """Return the training split and, if wanted, the validation split."""
    known = _HUB_SOURCES.get(name)
    local = _local_folder(name, folder, is_known=known is not None)
    if local is not None:
        files = parquet_files(local)
        if files:
            if known is not None and known.val_split in files:
                val_split = val_split or known.val_split
            chosen = _choose_splits(str(local), list(files), val_split, wants_val=wants_val)
            if stream_into is not None:
                return [
                    streamed_parquet_split(f"{name} {split}", files[split], image_column, label_column, stream_into)
                    for split in chosen
                ]
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
    if stream_into is None:
        if known.size is None and size is None:
            raise ValueError(
                f"{name} has images of many sizes; pass size= to bring all to one size, such as size=32, or stream=True "
                "([data] stream = true) to read them while training"
            )
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
