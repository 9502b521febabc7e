"""The content of a file, checked: against itself at once, against a model on request; decoded only after that."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from wnq.artifact.coding import Stored
from wnq.artifact.container import ArtifactError
from wnq.artifact.layout import SCALE, Codes, key_of
from wnq.artifact.manifest import Manifest
from wnq.attach import output_quantizer
from wnq.layers import INDEX_INPUT, channel_axis
from wnq.prepared import weight_quantizer
from wnq.quantizer import Quantized, Quantizer

LEVELS, GRID = "weight_levels", "weight_grid"
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


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


@dataclass(frozen=True)
class Book:
    """What the codes of a layer stand for; ``levels`` in the type of ``scale``, ``nbytes`` as they lie in the file."""

    levels: Tensor
    scale: Tensor
    nbytes: int


class Content:
    """Everything in a file: quantized weights and the other tensors, under the float model's keys.

    Making one checks types and lengths, and decodes nothing: what is decoded takes memory in proportion to what a file says, so
    compare it with a model first where there is one.

    Attributes:
        where: the file, for messages.
        manifest: its metadata.
        codes: the stored codes.
        books: layer -> what its codes stand for.
        rest: key -> tensor that is no quantized weight, each stored one once.
        signatures: key -> shape and dtype of everything in :attr:`state`.

    Raises:
        ArtifactError: tensors are missing or do not fit the metadata or each other.
    """

    def __init__(self, where: str, manifest: Manifest, tensors: Mapping[str, Tensor]) -> None:
        self.where = where
        self.manifest = manifest
        if manifest.dtype not in _DTYPES:
            raise ArtifactError(f"{where}: dtype must be one of {', '.join(_DTYPES)}, got {manifest.dtype!r:.40}.")
        self.dtype = _DTYPES[manifest.dtype]
        planned = {e.name: e.shape for e in manifest.plan.layers if e.method.weight is not None and e.tied_to is None}
        if differ := set(manifest.stored) ^ planned.keys():
            name = min(differ)
            raise ArtifactError(f"{where}: the plan and the stored weights disagree on layer {name!r}.")
        self.rest = dict(tensors)
        layers = {name: (shape, manifest.stored[name]) for name, shape in planned.items()}
        try:
            self.codes = Codes(manifest.version, manifest.coding, self.rest, layers)
        except ValueError as error:
            raise ArtifactError(f"{where}: {error}.") from None
        self.books = {name: self._book(name, *layers[name]) for name in layers}
        self.signatures: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            key: (tuple(tensor.shape), tensor.dtype) for key, tensor in self.rest.items()
        }
        self.signatures |= {key_of(name, "weight"): (shape, self.dtype) for name, shape in planned.items()}
        for key, target in sorted(manifest.aliases.items()):
            if key in self.signatures or target in manifest.aliases or target not in self.signatures:
                raise ArtifactError(f"{where}: {key!r} is said to share {target!r}, which cannot be.")
        self.signatures |= {key: self.signatures[target] for key, target in manifest.aliases.items()}

    @cached_property
    def quantized(self) -> dict[str, Quantized]:
        """Layer -> codes and codebook.

        Raises:
            ArtifactError: codes are damaged.
            ModuleNotFoundError: the package that decodes them is not installed.
        """
        return {name: self._decode(name, book) for name, book in self.books.items()}

    @cached_property
    def state(self) -> dict[str, Tensor]:
        """Key -> tensor, quantized weights as values, shared tensors under every key; what a loaded model has."""
        state = self.rest | {
            key_of(name, "weight"): quantized.dequantize().to(self.dtype) for name, quantized in self.quantized.items()
        }
        return state | {key: state[target] for key, target in self.manifest.aliases.items()}

    def _book(self, name: str, shape: tuple[int, ...], stored: Stored) -> Book:
        """Move a layer's levels and scale out of the rest."""
        scale = self._pop(name, SCALE)
        channels, most = shape[stored.axis], 2**stored.bits - stored.shift
        # Version 1 had scales of shape () and (channels,); what other packages read has one dimension more.
        forms = ((), (channels,)) if self.manifest.version == 1 else ((1,), (channels, 1))
        if (
            scale.dtype not in (torch.float32, torch.float64)
            or tuple(scale.shape) not in forms
            or not bool(torch.isfinite(scale).all())
        ):
            raise ArtifactError(
                f"{self.where}: layer {name!r} of {channels} channels cannot have a scale of {scale.dtype} "
                f"and shape {tuple(scale.shape)}{_worst(scale)}."
            )
        gridded = key_of(name, GRID) in self.rest
        levels = self._pop(name, GRID if gridded else LEVELS)
        nbytes = levels.nbytes
        fits = levels.ndim > 0 and tuple(levels.shape[:-1]) in ((), (channels,))
        if gridded and fits:
            fits = levels.dtype == torch.int16 and levels.shape[-1] == 3 and levels.numel() > 0
            count = int(levels.reshape(-1)[2]) if fits else 0
            fits = fits and 1 <= count <= most and bool((levels[..., 2] == count).all())
            levels = read_levels(levels, scale.dtype) if fits else levels
        elif fits:
            fits = levels.dtype in (torch.int8, torch.int16, scale.dtype) and levels.shape[-1] <= most
            fits = fits and bool(torch.isfinite(levels).all())
        if not fits:
            raise ArtifactError(
                f"{self.where}: layer {name!r} of shape {shape} at {stored.bits} bits cannot have levels of "
                f"{levels.dtype} and shape {tuple(levels.shape)}{_worst(levels)}."
            )
        scale = scale.reshape(() if tuple(scale.shape) == forms[0] else (channels,))
        return Book(levels.to(scale.dtype), scale, nbytes)

    def _decode(self, name: str, book: Book) -> Quantized:
        try:
            codes = self.codes.decode(name)
        except ValueError as error:
            raise ArtifactError(f"{self.where}: layer {name!r}: {error}.") from None
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{self.where}: layer {name!r}: {error}", name=error.name) from None
        if codes.numel() and int(codes.max()) >= book.levels.shape[-1]:
            raise ArtifactError(
                f"{self.where}: layer {name!r} has code {int(codes.max())} but only {book.levels.shape[-1]} levels."
            )
        return Quantized(codes, book.levels, book.scale, self.manifest.stored[name].axis)

    def _pop(self, name: str, part: str) -> Tensor:
        key = key_of(name, part)
        if key not in self.rest:
            raise ArtifactError(f"{self.where}: tensor {key!r} is missing.")
        return self.rest.pop(key)

    def is_quantizer_state(self, key: str) -> bool:
        """Return whether a key of :attr:`state` belongs to a quantizer of an input or output."""
        key = self.manifest.aliases.get(key, key)
        for kind, owners in self._quantizers.items():
            owner, part, _ = key.partition(f"{kind}.")
            if part and owner.removesuffix(".") in owners:
                return True
        return False

    @cached_property
    def _quantizers(self) -> dict[str, set[str]]:
        plan = self.manifest.plan
        return {
            "input_quantizer": {entry.name for entry in plan.layers if entry.method.input is not None},
            "output_quantizer": {output.name for output in plan.outputs},
        }

    def check_fits(self, model: nn.Module) -> None:
        """Compare layers, keys, shapes and dtypes with a float model, which is only read; nothing is decoded.

        Raises:
            ArtifactError: the first difference, with both sides.
        """
        modules = dict(model.named_modules())
        inputs: dict[nn.Module, Quantizer] = {}
        outputs: dict[nn.Module, Quantizer] = {}
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
        for output in self.manifest.plan.outputs:
            if output.name not in modules:
                raise ArtifactError(
                    f"{self.where}: the output of {output.name!r} is rounded in the file but there is no such module in the model."
                )
            outputs[modules[output.name]] = output_quantizer(output.bits)
        expected = model.state_dict()
        for path, module in model.named_modules(remove_duplicate=False):
            for kind, quantizers in (("input_quantizer.", inputs), ("output_quantizer.", outputs)):
                if module in quantizers:
                    prefix = key_of(path, kind)
                    expected |= {prefix + key: value for key, value in quantizers[module].state_dict().items()}
        for keys, problem in (
            (expected.keys() - self.signatures.keys(), "is in the model but not in the file"),
            (self.signatures.keys() - expected.keys(), "is in the file but not in the model"),
        ):
            if keys:
                more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
                raise ArtifactError(
                    f"{self.where}: tensor {min(keys)!r}{more} {problem}; it was saved from another one."
                )
        for key, (shape, dtype) in self.signatures.items():
            self._compare(f"tensor {key!r}", "shape", shape, tuple(expected[key].shape))
            self._compare(f"tensor {key!r}", "dtype", dtype, expected[key].dtype)

    def _compare(self, what: str, kind: str, mine: object, theirs: object) -> None:
        if mine != theirs:
            raise ArtifactError(f"{self.where}: {what} has {kind} {mine} in the file but {theirs} in the model.")


def _worst(tensor: Tensor) -> str:
    return "" if bool(torch.isfinite(tensor).all()) else ", with NaN or infinity"
