"""The content of a file, decoded and checked: against itself at once, against a model on request."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from wnq.artifact.container import PACKED, ArtifactError
from wnq.artifact.manifest import Manifest
from wnq.layers import INDEX_INPUT, channel_axis
from wnq.packing import unpack_codes
from wnq.prepared import weight_quantizer
from wnq.quantizer import Quantized, Quantizer

LEVELS, GRID, SCALE = "weight_levels", "weight_grid", "weight_scale"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


def key_of(layer: str, name: str) -> str:
    """Return the state_dict key of a layer's tensor; the model itself has the empty name."""
    return f"{layer}.{name}" if layer else name


def store_levels(levels: Tensor) -> dict[str, Tensor]:
    """Return levels in the smallest form that holds them exactly.

    Integers with one distance, as in every uniform grid, become ``weight_grid``: int16 (first, distance, number), one
    row where there is one row of levels. All others are ``weight_levels``, in int8 or int16 where that is exact.
    """
    first, count = levels[..., :1], levels.shape[-1]
    distance = levels[..., 1:2] - first if count > 1 else torch.zeros_like(first)
    grid = torch.cat([first, distance, torch.full_like(first, count)], dim=-1).to(torch.int16)
    if levels.numel() and torch.equal(read_levels(grid, levels.dtype), levels):
        return {GRID: grid}
    for dtype in (torch.int8, torch.int16):
        if torch.equal(levels.to(dtype).to(levels.dtype), levels):
            return {LEVELS: levels.to(dtype)}
    return {LEVELS: levels}


def read_levels(grid: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the levels of a ``weight_grid``, whose rows must have one number of levels."""
    steps = torch.arange(int(grid[..., 2].max()), dtype=torch.int64)
    return (grid[..., :1].long() + grid[..., 1:2].long() * steps).to(dtype)


class Content:
    """Everything in a file: quantized weights and the other tensors, under the float model's keys.

    Attributes:
        where: the file, for messages.
        manifest: its metadata.
        quantized: layer -> codes and codebook.
        rest: key -> tensor that is no quantized weight, each stored one once.
        state: key -> tensor, quantized weights as values, shared tensors under every key; what a loaded model has.

    Raises:
        ArtifactError: tensors are missing or do not fit the metadata or each other.
    """

    def __init__(self, where: str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        self.where = where
        self.manifest = manifest
        if manifest.dtype not in _DTYPES:
            raise ArtifactError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, got {manifest.dtype!r:.40}.")
        self.dtype = _DTYPES[manifest.dtype]
        planned = {e.name for e in manifest.plan.layers if e.method.weight is not None and e.tied_to is None}
        if differ := set(manifest.stored) ^ planned:
            name = min(differ)
            raise ArtifactError(f"{where}: the plan and the stored weights disagree on layer {name!r}.")
        self.rest = dict(tensors)
        self.quantized = {e.name: self._take(e.name, e.shape) for e in manifest.plan.layers if e.name in planned}
        self.state = self.rest | {
            key_of(name, "weight"): quantized.dequantize().to(self.dtype) for name, quantized in self.quantized.items()
        }
        for key, target in sorted(manifest.aliases.items()):
            if key in self.state or target in manifest.aliases or target not in self.state:
                raise ArtifactError(f"{where}: {key!r} is said to share {target!r}, which cannot be.")
        self.state |= {key: self.state[target] for key, target in manifest.aliases.items()}

    def _take(self, name: str, shape: tuple[int, ...]) -> Quantized:
        """Move a layer's tensors from the rest to codes and codebook."""
        stored = self.manifest.stored[name]
        packed, scale = self._pop(name, PACKED), self._pop(name, SCALE)
        try:
            codes = unpack_codes(packed, stored.bits, shape)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise ArtifactError(f"{self.where}: layer {name!r}: {error}") from None
        channels, most = shape[stored.axis], 2**stored.bits
        if scale.dtype not in (torch.float32, torch.float64) or tuple(scale.shape) not in ((), (channels,)):
            raise ArtifactError(
                f"{self.where}: layer {name!r} of {channels} channels cannot have a scale of {scale.dtype} "
                f"and shape {tuple(scale.shape)}."
            )
        gridded = key_of(name, GRID) in self.rest
        levels = self._pop(name, GRID if gridded else LEVELS)
        fits = levels.ndim > 0 and tuple(levels.shape[:-1]) in ((), (channels,))
        if gridded and fits:
            fits = levels.dtype == torch.int16 and levels.shape[-1] == 3 and levels.numel() > 0
            count = int(levels.reshape(-1)[2]) if fits else 0
            fits = fits and 1 <= count <= most and bool((levels[..., 2] == count).all())
            levels = read_levels(levels, scale.dtype) if fits else levels
        elif fits:
            fits = levels.dtype in (torch.int8, torch.int16, scale.dtype) and levels.shape[-1] <= most
        if not fits:
            raise ArtifactError(
                f"{self.where}: layer {name!r} of shape {shape} at {stored.bits} bits cannot have levels of "
                f"{levels.dtype} and shape {tuple(levels.shape)}."
            )
        if codes.numel() and int(codes.max()) >= levels.shape[-1]:
            raise ArtifactError(
                f"{self.where}: layer {name!r} has code {int(codes.max())} but only {levels.shape[-1]} levels."
            )
        return Quantized(codes, levels.to(scale.dtype), scale, stored.axis)

    def _pop(self, name: str, part: str) -> Tensor:
        key = key_of(name, part)
        if key not in self.rest:
            raise ArtifactError(f"{self.where}: tensor {key!r} is missing.")
        return self.rest.pop(key)

    def is_input_state(self, key: str) -> bool:
        """Return whether a key of :attr:`state` belongs to an input quantizer."""
        key = self.manifest.aliases.get(key, key)
        return any(
            key.startswith(key_of(entry.name, "input_quantizer."))
            for entry in self.manifest.plan.layers
            if entry.method.input is not None
        )

    def check_fits(self, model: nn.Module) -> None:
        """Compare layers, keys, shapes and dtypes with a float model, which is only read.

        Raises:
            ArtifactError: the first difference, with both sides.
        """
        modules = dict(model.named_modules())
        inputs: dict[nn.Module, Quantizer] = {}
        for entry in self.manifest.plan.layers:
            layer = modules.get(entry.name)
            if layer is None or channel_axis(layer) is None:
                found = "there is no such layer" if layer is None else f"it is a {type(layer).__name__}"
                raise ArtifactError(
                    f"{self.where}: layer {entry.name!r} is a quantized {entry.kind} in the file but {found} "
                    "in the model."
                )
            if weight_quantizer(layer) is not None or hasattr(layer, "input_quantizer"):
                raise ArtifactError(
                    f"{self.where}: layer {entry.name!r} of the model is quantized already; load into the float model."
                )
            self._compare(f"layer {entry.name!r}", "shape", entry.shape, tuple(cast(Tensor, layer.weight).shape))
            if entry.method.input is not None and not isinstance(layer, INDEX_INPUT):
                inputs[layer] = entry.method.input()
        expected = model.state_dict()
        for path, module in model.named_modules(remove_duplicate=False):
            if module in inputs:
                prefix = key_of(path, "input_quantizer.")
                expected |= {prefix + key: value for key, value in inputs[module].state_dict().items()}
        for keys, problem in (
            (expected.keys() - self.state.keys(), "is in the model but not in the file"),
            (self.state.keys() - expected.keys(), "is in the file but not in the model"),
        ):
            if keys:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                raise ArtifactError(
                    f"{self.where}: tensor {min(keys)!r}{more} {problem}; it was saved from another one."
                )
        for key, tensor in self.state.items():
            self._compare(f"tensor {key!r}", "shape", tuple(tensor.shape), tuple(expected[key].shape))
            self._compare(f"tensor {key!r}", "dtype", tensor.dtype, expected[key].dtype)

    def _compare(self, what: str, kind: str, mine: object, theirs: object) -> None:
        if mine != theirs:
            raise ArtifactError(f"{self.where}: {what} has {kind} {mine} in the file but {theirs} in the model.")
