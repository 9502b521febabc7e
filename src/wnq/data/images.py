"""A split of uint8 images held in memory, and its statistics."""

from dataclasses import dataclass

import torch
from torch import Tensor

PIXEL_MAX = 255


@dataclass(frozen=True)
class ImageData:
    """One split, whole, as tensors.

    Attributes:
        images: uint8, ``(N, C, H, W)``, contiguous, 0 to 255.
        labels: int64, ``(N,)``, values in ``[0, len(classes))``.
        classes: the name of each class, in the order of the labels; ``str(i)`` where the source gives no names.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes do not fit together, or a label has no class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            raise TypeError(f"images must be uint8 and labels int64, got {self.images.dtype} and {self.labels.dtype}")
        if self.images.ndim != 4 or not self.images.is_contiguous():
            raise ValueError(f"images must be a contiguous (N, C, H, W) tensor, got shape {tuple(self.images.shape)}")
        if self.labels.shape != self.images.shape[:1]:
            raise ValueError(f"{self.images.shape[0]} images need as many labels, got shape {tuple(self.labels.shape)}")
        if len(self) and (int(self.labels.min()) < 0 or int(self.labels.max()) >= len(self.classes)):
            raise ValueError(
                f"labels run from {int(self.labels.min())} to {int(self.labels.max())} but there are "
                f"{len(self.classes)} classes"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return self.images.shape[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image: channels, height, width."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def select(self, indices: Tensor) -> "ImageData":
        """Return the images at ``indices`` (int64, ``(M,)``), copied, in that order."""
        return ImageData(self.images[indices], self.labels[indices], self.classes)


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, in units of the pixel range (0 to 1).

    Exact (from the histogram of the 256 pixel values), without a floating-point copy of the images. A channel that
    hardly varies gets a standard deviation of 1/255, one grey level, so that dividing by it stays finite.

    Args:
        images: uint8, ``(N, C, H, W)``, at least one image.
    """
    values = torch.arange(PIXEL_MAX + 1, dtype=torch.float64) / PIXEL_MAX
    mean: list[float] = []
    std: list[float] = []
    for channel in range(images.shape[1]):
        counts = torch.bincount(images[:, channel].reshape(-1), minlength=PIXEL_MAX + 1).to("cpu", torch.float64)
        share = counts / counts.sum()
        center = float((share * values).sum())
        variance = float((share * (values - center).square()).sum())
        mean.append(center)
        std.append(max(variance**0.5, 1 / PIXEL_MAX))
    return tuple(mean), tuple(std)


def hold_out(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split positions into two parts, each class in the same proportion.

    Args:
        labels: int64, ``(N,)``.
        share: of every class that goes to the second part, in (0, 1); at least one image of a class that has two.
        seed: of the choice.

    Returns:
        The positions (int64, ascending) of the part that stays and of the part held out.

    Raises:
        ValueError: ``share`` is out of range, or the split leaves a part empty.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share to hold out must lie between 0 and 1, got {share}")
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(labels.shape[0], dtype=torch.bool)
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    if not held.any():
        raise ValueError(
            f"no class of the {labels.shape[0]} images has two members, so no share of them can be held out"
        )
    return (~held).nonzero().squeeze(1), held.nonzero().squeeze(1)
