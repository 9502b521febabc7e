"""Images in folders named by their class."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import torch

from wnq.data.decode import EncodedSplit, read_file, stamp

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")


class Files:
    """Image files by number; see :class:`wnq.data.streamed.Source`.

    Args:
        paths: of the images. They are kept in one array: a million Python objects would be copied to every process that reads.
    """

    def __init__(self, paths: list[Path]) -> None:
        self.paths = np.array([os.fsencode(path) for path in paths])

    def where(self, position: int) -> str:
        """Return the path of an image."""
        return os.fsdecode(bytes(self.paths[position]))

    def read(self, position: int) -> bytes:
        """Return the bytes of an image file, or raise ``ValueError`` naming it."""
        return read_file(Path(self.where(position)))


def image_folders(folder: Path, split_names: Collection[str]) -> dict[str, Path]:
    """Return the folder of each split; a folder with none of ``split_names`` in it is its own training split.

    Raises:
        ValueError: there are no folders in it.
    """
    inside = {path.name: path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")}
    if not inside:
        raise ValueError(
            f"{folder}: found neither train-*.parquet files nor folders of images such as train/<class>/image.png"
        )
    return inside if any(name in inside for name in split_names) else {"train": folder}


def image_folder_split(name: str, folder: Path) -> EncodedSplit:
    """Return the split of the images below ``folder``, whose folders are the classes in alphabetical order.

    Raises:
        ValueError: there are no images.
    """
    by_class = {
        path.name: [image for image in sorted(path.rglob("*")) if image.suffix.lower() in IMAGE_SUFFIXES]
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }
    classes = tuple(label for label, paths in by_class.items() if paths)
    if not classes:
        raise ValueError(
            f"{folder}: no images in folders named by their class, such as {folder.name}/<class>/image.png"
        )
    paths = [path for label in classes for path in by_class[label]]
    labels = torch.tensor([index for index, label in enumerate(classes) for _ in by_class[label]], dtype=torch.int64)

    def read(positions: torch.Tensor) -> Iterator[tuple[str, bytes]]:
        for position in positions.tolist():
            yield str(paths[position]), read_file(paths[position])

    return EncodedSplit(name, labels, classes, lambda: {"files": stamp(paths)}, read, Files(paths))
