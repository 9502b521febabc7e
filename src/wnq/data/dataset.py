"""What a data set is here: two splits, in memory or streamed, and the statistics that normalise them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from wnq.data.images import ImageData
from wnq.data.streamed import StreamedImages

Split = ImageData | StreamedImages


@dataclass(frozen=True)
class Dataset:
    """Training and validation images with the statistics of the training images.

    Attributes:
        train: what the model learns from.
        val: what it is judged by; same channels, size and classes.
        mean: per channel, in units of the pixel range (0 to 1).
        std: per channel, in the same units, greater than 0.
    """

    train: Split
    val: Split
    mean: tuple[float, ...]
    std: tuple[float, ...]


def align_classes(split: Split, classes: Sequence[str]) -> Split:
    """Return ``split`` with its labels renumbered to the order of ``classes``.

    Raises:
        ValueError: the split has a class that ``classes`` lacks.
    """
    if split.classes == tuple(classes):
        return split
    number = {name: index for index, name in enumerate(classes)}
    if missing := [name for name in split.classes if name not in number]:
        raise ValueError(f"the validation images have classes that the training images lack: {', '.join(missing[:5])}")
    renumber = torch.tensor([number[name] for name in split.classes], dtype=torch.int64)
    return replace(split, labels=renumber[split.labels], classes=tuple(classes))
