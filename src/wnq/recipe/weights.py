"""Float weights from a file into a model."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wnq.prepared import ORIGINAL

QUANTIZERS = re.compile(r"(^|\.)(parametrizations\.weight|(in|out)put_quantizer|output_module)\.")
"""States that a quantized model has beside those of the float one."""


def load_weights_(model: nn.Module, path: str | Path) -> None:
    """Load a state dict from ``.safetensors``, ``.pt`` (tensors only, never code) or a run's folder, in place.

    Raises:
        ValueError: the file is missing or unreadable, or its names or shapes do not fit the model.
    """
    file, state = _read(Path(path))
    _load_(model, state, file)


def load_float_weights_(model: nn.Module, path: str | Path) -> None:
    """Load what a float model can take from the file of a quantized one: the float weights behind, biases, statistics.

    Raises:
        ValueError: as :func:`load_weights_`.
    """
    file, state = _read(Path(path))
    plain = {name.replace(ORIGINAL, "weight"): value for name, value in state.items()}
    _load_(model, {name: value for name, value in plain.items() if not QUANTIZERS.search(name)}, file)


def _read(path: Path) -> tuple[Path, dict[str, Any]]:
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
    return file, dict(state)  # pyright: ignore[reportUnknownArgumentType]


def _load_(model: nn.Module, state: dict[str, Any], file: Path) -> None:
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{file} does not fit {type(model).__name__}: {str(error).strip()}\n"
            "Build the model with the name and options that these weights were trained with."
        ) from None
