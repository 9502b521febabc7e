"""What the batches of every kind of split share: their sizes, who takes which part, the order, the normalisation."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wnq.data.images import PIXEL_MAX


@dataclass(frozen=True)
class Steps:
    """How the images of an epoch are divided into steps, and each step among the processes.

    Attributes:
        count: images in the split.
        batch_size: images a step over all ranks together.
        rank: which share of each step this process takes, in ``[0, world_size)``.
        world_size: number of processes.
        drop_last: leave out the last step if it is not full.

    Raises:
        ValueError: ``batch_size`` is not a positive multiple of ``world_size``, or another value does not fit.
    """

    count: int
    batch_size: int
    rank: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank must be in [0, world_size), got rank {self.rank} of {self.world_size}")
        if self.batch_size <= 0 or self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size must be a positive multiple of world_size {self.world_size}, got {self.batch_size}"
            )
        if self.count == 0:
            raise ValueError("the split holds no images")
        if self.drop_last and self.count < self.batch_size:
            raise ValueError(
                f"drop_last leaves no batch: batch_size is {self.batch_size} but there are {self.count} images"
            )

    @property
    def per_epoch(self) -> int:
        """Steps in an epoch, the same on every rank."""
        return self.count // self.batch_size if self.drop_last else -(-self.count // self.batch_size)

    def share(self, step: int) -> slice:
        """Return which positions in the epoch's order are this rank's at a step; they may be none."""
        first = step * self.batch_size
        count = min(self.batch_size, self.count - first)
        return slice(first + count * self.rank // self.world_size, first + count * (self.rank + 1) // self.world_size)

    def check_start(self, start_step: int) -> None:
        """Raise ``ValueError`` unless an epoch can begin at ``start_step``."""
        if not 0 <= start_step <= self.per_epoch:
            raise ValueError(f"start_step must be in [0, {self.per_epoch}], got {start_step}")


def epoch_generator(seed: int, epoch: int) -> torch.Generator:
    """Return the generator of one epoch's draws, on the CPU: the same seed gives the same batches on every device."""
    digest = hashlib.sha256(f"{seed}/{epoch}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7]))


class Normalizer:
    """From uint8 pixels to normalised floats on a device.

    Args:
        mean: per channel, in units of the pixel range (0 to 1).
        std: per channel, same units, greater than 0.
        channels: of the images.
        device: where the images are.
        dtype: of the result; the arithmetic is float32.
        channels_last: memory format of the result.

    Raises:
        ValueError: ``mean`` or ``std`` do not fit.
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        channels: int,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        if len(mean) != channels or len(std) != channels:
            raise ValueError(f"mean and std need {channels} values, one per channel, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"std must be greater than 0 in every channel, got {tuple(std)}")
        std_column = torch.tensor(list(std), dtype=torch.float64).view(1, channels, 1, 1)
        mean_column = torch.tensor(list(mean), dtype=torch.float64).view(1, channels, 1, 1)
        self.gain = (1 / (PIXEL_MAX * std_column)).to(device, torch.float32)
        self.offset = (-mean_column / std_column).to(device, torch.float32)
        self.dtype = dtype
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images ``(B, C, H, W)`` to floats of the same shape."""
        return (
            images.to(torch.float32)
            .mul_(self.gain)
            .add_(self.offset)
            .to(self.dtype)
            .contiguous(memory_format=self.memory_format)
        )
