"""A file of torch.save: tensors only, never code.

It is mapped whole, so the pages that were read stay in memory until it is opened anew, which is done after each :data:`KEPT`
bytes; the tensors that are handed out are copies. The oldest kind, from before torch 1.6, cannot be mapped and is read whole.
"""

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from wnq.checkpoints.source import TensorInfo

KEPT = 32 * 2**20
"""Bytes of a file that may have been touched before it is opened anew."""

NESTED = ("state_dict", "model_state_dict", "models", "model", "module", "net")
"""Where training programs put the weights in a file that also holds an optimizer's state; the first that is there counts, and
may hold another of these, as in the checkpoints of :func:`wnq.train.fit`."""


class PickledFile:
    """Tensors of a file of :func:`torch.save`, at the top or in the first entry of :data:`NESTED`.

    Raises:
        ValueError: it is missing, damaged, holds anything but plain data, or no tensors by name.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._touched = 0
        self._state: dict[str, Tensor] | None = None
        self.stored: Mapping[str, TensorInfo] = {
            name: TensorInfo(name, tuple(t.shape), t.dtype, t.numel() * t.element_size(), path)
            for name, t in self._opened().items()
        }

    def read(self, name: str) -> Tensor:
        """Return a copy of a tensor."""
        stored, info = self._opened().get(name), self.stored[name]
        if stored is None or tuple(stored.shape) != info.shape or stored.dtype != info.dtype:
            raise ValueError(f"{self._path} changed since it was opened; open it again.")
        tensor = stored.clone(memory_format=torch.contiguous_format)
        self._touched += info.bytes
        if self._touched > KEPT:
            self._state, self._touched = None, 0
        return tensor

    def _opened(self) -> dict[str, Tensor]:
        if self._state is None:
            self._state = _tensors(self._path, _loaded(self._path))
        return self._state


def _loaded(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise ValueError(f"there is no file {path}.") from None
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise _damaged(path, error) from None
        raise ValueError(
            f"{path} holds more than tensors: reading it could run code that it brings along, so it is left alone. "
            "Save the state dict alone, torch.save(model.state_dict(), path), where you trust it."
        ) from None
    except OSError as error:
        raise OSError(f"cannot read {path}: {error.strerror or error}.") from None
    except Exception as error:  # torch raises all kinds for a damaged file
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ValueError(
        f"cannot read {path}: {reason}. Expected a state dict of tensors by torch.save; download or copy it again."
    )


def _tensors(path: Path, content: object) -> dict[str, Tensor]:
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a state dict (name -> tensor).")
    table = cast(Mapping[Any, Any], content)
    inner = table
    while (key := next((key for key in NESTED if isinstance(inner.get(key), Mapping)), None)) is not None:
        inner = cast(Mapping[Any, Any], inner[key])
    tensors = {
        name: value.detach()
        for name, value in inner.items()
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
    }
    if not tensors:
        keys = ", ".join(sorted(map(str, table))[:5]) or "nothing"
        raise ValueError(
            f"{path} holds no tensors by name ({keys}); expected a state dict, or one under {', '.join(map(repr, NESTED))}."
        )
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path}: tensor {name!r} of shape {tuple(tensor.shape)} is larger than what the file holds of it."
            )
    return tensors
