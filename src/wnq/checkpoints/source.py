"""What every kind of file offers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bytes: int
    """Size of its elements."""
    file: Path
    """The file it lies in."""


class Source(Protocol):
    """One file."""

    stored: Mapping[str, TensorInfo]
    """Its tensors under the names they have there."""

    def read(self, name: str) -> Tensor:
        """Return one of them."""
        ...
