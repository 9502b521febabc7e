"""From encoded images (PNG, JPEG, … bytes) to one uint8 tensor, and the file that keeps the result."""

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from wnq.data.crops import eight_bit
from wnq.data.images import ImageData
from wnq.data.streamed import Source

if TYPE_CHECKING:
    from PIL.Image import Image

Progress = Callable[[int, int], None]

logger = logging.getLogger(__name__)

_CACHE_FORMAT = "2"
_REPORT_EVERY = 500


@dataclass(frozen=True)
class EncodedSplit:
    """One split before decoding.

    Attributes:
        name: what messages call it, such as ``cifar100 train``.
        labels: int64, ``(N,)``, of every image.
        classes: the name of each class.
        identity: returns JSON types; they change whenever the source files do.
        read: given ascending positions (int64), yields (where an image is, its bytes) in that order.
        source: single images by number, for streaming; None: they can only be read in order.
    """

    name: str
    labels: Tensor
    classes: tuple[str, ...]
    identity: Callable[[], Mapping[str, Any]]
    read: Callable[[Tensor], Iterator[tuple[str, bytes]]]
    source: Source | None = None


def load_split(
    split: EncodedSplit,
    *,
    size: int | None,
    limit: int | None,
    memory_limit: int,
    cache_dir: Path,
    progress: Progress | None,
) -> ImageData:
    """Return the decoded split, from the cache if it is there, else decoded now and cached.

    Args:
        split: where the images come from.
        size: see :func:`decode`.
        limit: keep this many images at most, chosen at random with a fixed seed.
        memory_limit: see :func:`decode`.
        cache_dir: folder of the cached splits; one that cannot be written to is reported in the log and done without.
        progress: see :func:`decode`.

    Raises:
        ValueError: as :func:`decode`.
    """
    key = json.dumps([_CACHE_FORMAT, split.identity(), size, limit], sort_keys=True)
    stem = "".join(letter if letter.isalnum() else "-" for letter in split.name)[-60:]
    path = cache_dir / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"
    cached = _read_cache(path)
    if cached is not None:
        return cached
    positions = chosen_positions(len(split.labels), limit)
    images = decode(split, positions, size=size, memory_limit=memory_limit, progress=progress)
    decoded = ImageData(images, split.labels[positions], split.classes)
    try:
        _write_cache(path, decoded)
    except OSError as error:
        logger.warning("%s: the decoded images could not be cached (%s)", path, error)
    return decoded


def chosen_positions(count: int, limit: int | None) -> Tensor:
    """Return all positions, or ``limit`` of them at random, always the same ones; int64, ascending."""
    if limit is None or limit >= count:
        return torch.arange(count)
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:limit].sort().values


def decode(
    split: EncodedSplit, positions: Tensor, *, size: int | None, memory_limit: int, progress: Progress | None
) -> Tensor:
    """Decode the images at ``positions`` to uint8 ``(M, C, H, W)``.

    The first image decides: a grey one makes all images grey (C = 1), any other makes all of them RGB (C = 3).

    Everything is held in memory; sets too large for that are streamed, see :mod:`wnq.data.streaming`.

    Args:
        split: where the images come from.
        positions: int64, ascending, at least one.
        size: pixels; scale the shorter side to it and cut out the central square. None: all images must have one size.
        memory_limit: bytes that the decoded images may take.
        progress: called with (images done, images in all) now and then.

    Raises:
        ValueError: an image cannot be read or has another size than the first, or ``memory_limit`` is too low.
    """
    if find_spec("PIL") is None:
        raise missing_extra(split.name, "pillow")
    images: np.ndarray[Any, np.dtype[np.uint8]] | None = None
    mode = "RGB"
    total = len(positions)
    for index, (where, data) in enumerate(split.read(positions)):
        image = _open(where, data)
        if images is None:
            mode = "L" if image.mode in ("1", "L", "LA") else "RGB"
        image = _square(image.convert(mode), size)
        pixels = np.asarray(image, dtype=np.uint8).reshape(image.height, image.width, -1).transpose(2, 0, 1)
        if images is None:
            shape = (total, *pixels.shape)
            check_memory(split.name, shape, memory_limit)
            images = np.empty(shape, dtype=np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{where}: the image is {image.height}x{image.width} pixels but the first one of {split.name} is "
                f"{images.shape[2]}x{images.shape[3]}; pass size= to bring all to one size"
            )
        images[index] = pixels
        if progress is not None and (index + 1 == total or (index + 1) % _REPORT_EVERY == 0):
            progress(index + 1, total)
    if images is None:
        raise ValueError(f"{split.name} holds no images")
    return torch.from_numpy(images)


def stamp(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Return what identifies each file in its present state: absolute path, size in bytes and time of change."""
    stats = [(path, path.stat()) for path in paths]
    return [(str(path.absolute()), stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file, or raise ``ValueError`` naming it."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: the image cannot be read ({error.strerror})") from error


def missing_extra(name: str, package: str) -> ModuleNotFoundError:
    """Return the error for a data set that needs a package of the extra ``train``."""
    return ModuleNotFoundError(f'{name} needs {package}: pip install "wnq[train]"')


def _open(where: str, data: bytes) -> "Image":
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = eight_bit(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: not a readable image ({error})") from error
    return image


def _square(image: "Image", size: int | None) -> "Image":
    from PIL import Image

    if size is None or image.size == (size, size):
        return image
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def check_memory(name: str, shape: tuple[int, ...], memory_limit: int) -> None:
    """Raise ``ValueError`` if uint8 images of ``shape`` (N, C, H, W) take more than ``memory_limit`` bytes."""
    count, channels, height, width = shape
    needed = count * channels * height * width
    if needed > memory_limit:
        raise ValueError(
            f"{name}: {count} images of {channels}x{height}x{width} take {needed / 2**30:.2f} GiB decoded, more than "
            f"the memory limit of {memory_limit / 2**30:.2f} GiB; pass stream=True ([data] stream = "
            "true) to decode while training, a smaller size=, a limit= on the number of images, or a larger memory_limit= (bytes)"
        )


def _read_cache(path: Path) -> ImageData | None:
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            classes = json.loads(file.metadata()["classes"])
            return ImageData(file.get_tensor("images"), file.get_tensor("labels"), tuple(classes))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s: unusable cache, decoding the images again (%s)", path, error)
        return None


def _write_cache(path: Path, data: ImageData) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        tensors = {"images": data.images, "labels": data.labels}
        save_file(tensors, str(beside), metadata={"classes": json.dumps(data.classes)})
        beside.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)
