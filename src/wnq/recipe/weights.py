"""Float weights from a file into a model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from ``.safetensors``, ``.pt`` (tensors only, never code) or a run's folder, in place.

    Raises:
        ValueError: the file is missing or unreadable, or its names or shapes do not fit the model.
    """
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(
            f"cannot read the weights {file}: {reason}. Give a .safetensors file, a .pt state dict of tensors, or the "
            "folder of a finished run."
        ) from None
    if isinstance(state, Mapping) and "state_dict" in state:
        state = state["state_dict"]  # pyright: ignore[reportUnknownVariableType]
    if not isinstance(state, Mapping):
        raise ValueError(f"{file} holds a {type(state).__name__}, expected a state dict (name -> tensor).")
    try:
        model.load_state_dict(dict(state))  # pyright: ignore[reportUnknownArgumentType]
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: {str(error).strip()}\n"
            "Build the model with the name and options that these weights were trained with."
        ) from None
