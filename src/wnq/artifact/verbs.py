"""Saving a quantized model as a small file, and everything that is done with that file.

The file holds, for each quantized layer, ``<layer>.weight_packed`` (codes, :mod:`wnq.packing`), ``<layer>.weight_grid``
or ``<layer>.weight_levels``, and ``<layer>.weight_scale``; and every other tensor of the model's state under its own
name. Weights that layers share are stored once. Training-only state, such as float weights and learned steps of weight
quantizers, is left out: a loaded model is for inference.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wnq.artifact.container import PACKED, ArtifactError, header_size, read_artifact, write_artifact
from wnq.artifact.content import GRID, LEVELS, SCALE, Content, key_of, store_levels
from wnq.artifact.manifest import Manifest, Stored
from wnq.attach import attach_codebook_, attach_sides_, get_plan, quantized_layers, set_plan_
from wnq.models import registered_model
from wnq.packing import pack_codes
from wnq.prepared import deployed, float_weight, weight_quantizer


@dataclass(frozen=True)
class LayerSize:
    """One stored weight: ``packed_bytes`` are its codes in the file, ``float_bytes`` the same weight as float32."""

    name: str
    shape: tuple[int, ...]
    bits: int
    weights: int
    packed_bytes: int
    float_bytes: int


@dataclass(frozen=True)
class SizeReport:
    """Where the bytes of a file are. ``packed + codebooks + rest + header == file``.

    Attributes:
        layers: one row a stored weight; a weight that layers share comes once.
        packed_bytes: codes of all weights.
        codebook_bytes: levels and scales.
        rest_bytes: all other tensors: biases, normalization, float layers, input quantizers.
        header_bytes: table of tensors and metadata.
        file_bytes: the whole file.
        float_bytes: the model's float state_dict with float32 weights.
        sha256: of the file.
    """

    layers: tuple[LayerSize, ...]
    packed_bytes: int
    codebook_bytes: int
    rest_bytes: int
    header_bytes: int
    file_bytes: int
    float_bytes: int
    sha256: str

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(layer.weights for layer in self.layers)

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float32 state."""
        return self.float_bytes / self.file_bytes


def save(model: nn.Module, path: str | Path) -> SizeReport:
    """Save a quantized or frozen model; the same model gives the same bytes.

    Args:
        model: what :func:`wnq.quantize_` returned, trained; its input quantizers have met a batch. It is only read.
        path: where to; an existing file is replaced only once the new one is complete.

    Returns:
        The sizes, read back from the file, whose checksums are thereby verified.

    Raises:
        ValueError: the model carries no plan, its layers are not those of the plan, or a weight is not finite.
        OSError: the file cannot be written; what stood there is untouched.
    """
    model = _unwrapped(model)
    plan = get_plan(model)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    dtypes: set[torch.dtype] = set()
    for name, layer, quantizer in quantized_layers(model):
        weight = float_weight(layer).detach()
        quantized = deployed(quantizer, weight)
        tensors[key_of(name, PACKED)] = pack_codes(quantized.codes, quantizer.bits)
        tensors |= {key_of(name, part): levels for part, levels in store_levels(quantized.levels.cpu()).items()}
        tensors[key_of(name, SCALE)] = quantized.scale
        stored[name] = Stored(quantizer.bits, quantized.axis)
        dtypes.add(weight.dtype)
    planned = {layer.name for layer in plan.layers if layer.method.weight is not None and layer.tied_to is None}
    if stored.keys() != planned:
        raise ValueError(
            f"the quantized layers of {type(model).__name__} are not those of its plan: "
            f"{sorted(stored.keys() ^ planned)}; quantize the float model anew after changing its layers."
        )
    if len(dtypes) > 1:
        raise ValueError(
            f"the quantized weights must have one dtype, got {sorted(map(str, dtypes))}; use model.to(dtype)."
        )
    rest, aliases = _other_state(model)
    if taken := sorted(rest.keys() & tensors.keys()):
        raise ValueError(f"the model's own tensor {taken[0]!r} has a name that the file uses; rename it.")
    registered: dict[str, Any] | None = vars(model).get("wnq_model")
    dtype = str(dtypes.pop() if dtypes else torch.float32).removeprefix("torch.")
    write_artifact(path, tensors | rest, Manifest(plan, stored, aliases, dtype, registered).to_json())
    return inspect_file(path)


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a file as a frozen model in eval mode, whose outputs equal the saved model's bit for bit.

    Args:
        path: a file that :func:`save` wrote. Nothing in it is imported or run, and nothing it says is used unchecked.
        model: the float model to load into, changed in place once everything is checked, on its own device. None builds
            it by :func:`wnq.models.registered_model`, which works for models that came from there.

    Raises:
        ArtifactError: the file is no valid artifact, does not fit the model, or names no registered model where none
            is given.
    """
    tensors, document = read_artifact(path)
    content = Content(str(path), Manifest.from_json(document, where=str(path)), tensors)
    if model is None:
        content.check_fits(_registered(content, meta=True))
        model = _registered(content, meta=False)
    else:
        content.check_fits(model)
    parameters: dict[str, nn.Parameter] = {}
    for entry in content.manifest.plan.layers:
        layer = model.get_submodule(entry.name)
        old = cast(Tensor, layer.weight)
        attach_sides_(layer, entry)
        owner = entry.tied_to or entry.name
        if owner not in content.quantized:
            continue
        if owner not in parameters:
            parameters[owner] = nn.Parameter(content.state[key_of(owner, "weight")].to(old.device), requires_grad=False)
        # A new parameter, not a copy into the old one, which a float layer may share.
        layer.weight = parameters[owner]
    model.load_state_dict(content.state)
    for entry in content.manifest.plan.layers:
        owner = entry.tied_to or entry.name
        if owner in content.quantized:
            layer = model.get_submodule(entry.name)
            attach_codebook_(layer, content.quantized[owner], content.manifest.stored[owner].bits)
            cast(nn.Module, layer.weight_quantizer).to(cast(Tensor, layer.weight).device)
    set_plan_(model, content.manifest.plan)
    return model.eval()


def unpack_file(path: str | Path) -> dict[str, Tensor]:
    """Return a file's weights as the plain state_dict of the float model, which it loads into strictly.

    Quantization of inputs is not part of it. Weights that layers share are one tensor under several keys.

    Raises:
        ArtifactError: the file is no valid artifact.
    """
    tensors, document = read_artifact(path)
    content = Content(str(path), Manifest.from_json(document, where=str(path)), tensors)
    return {key: tensor for key, tensor in content.state.items() if not content.is_input_state(key)}


def inspect_file(path: str | Path) -> SizeReport:
    """Return where the bytes of a file are, without building a model; its checksums are verified.

    Raises:
        ArtifactError: the file is no valid artifact.
    """
    tensors, document = read_artifact(path)
    content = Content(str(path), Manifest.from_json(document, where=str(path)), tensors)
    layers = tuple(
        LayerSize(
            name=name,
            shape=tuple(quantized.codes.shape),
            bits=content.manifest.stored[name].bits,
            weights=quantized.codes.numel(),
            packed_bytes=tensors[key_of(name, PACKED)].nbytes,
            float_bytes=4 * quantized.codes.numel(),
        )
        for name, quantized in content.quantized.items()
    )
    books = [tensors.get(key_of(name, part)) for name in content.quantized for part in (LEVELS, GRID, SCALE)]
    codebooks = sum(tensor.nbytes for tensor in books if tensor is not None)
    packed_bytes = sum(layer.packed_bytes for layer in layers)
    rest_bytes = sum(tensor.nbytes for tensor in tensors.values()) - packed_bytes - codebooks
    other = {key: t for key, t in content.rest.items() if not content.is_input_state(key)}
    return SizeReport(
        layers=layers,
        packed_bytes=packed_bytes,
        codebook_bytes=codebooks,
        rest_bytes=rest_bytes,
        header_bytes=header_size(path),
        file_bytes=Path(path).stat().st_size,
        float_bytes=sum(layer.float_bytes for layer in layers) + sum(tensor.nbytes for tensor in other.values()),
        sha256=hashlib.sha256(Path(path).read_bytes()).hexdigest(),
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's or a data-parallel wrapper, else the model."""
    for attribute in ("_orig_mod", "module"):
        inner = getattr(model, attribute, None)
        if isinstance(inner, nn.Module) and "wnq_plan" in vars(inner):
            return inner
    return model


def _other_state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return every tensor that is no quantized weight nor part of its quantizer, once, and all second names.

    Second names (key -> key that owns the tensor) are those of the float model's state_dict, with quantized weights.
    """
    weight_keys: dict[str, str] = {}
    owners = {id(float_weight(layer)): key_of(name, "weight") for name, layer, _ in quantized_layers(model)}
    hidden: set[str] = set()
    for path, layer in model.named_modules(remove_duplicate=False):
        if weight_quantizer(layer) is None:
            continue
        weight_keys[key_of(path, "weight")] = owners[id(float_weight(layer))]
        own = ("weight", "parametrizations.weight.", "weight_quantizer.")
        hidden |= {key_of(path, key) for key in layer.state_dict() if key == own[0] or key.startswith(own[1:])}
    aliases = {key: owner for key, owner in weight_keys.items() if key != owner}
    rest: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if key in hidden:
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"the model's state {key!r} is a {type(tensor).__name__}; only tensors can be saved.")
        owner = first.setdefault(id(tensor), key)
        if owner == key:
            rest[key] = tensor.detach().cpu()
        else:
            aliases[key] = owner
    return rest, aliases


def _registered(content: Content, *, meta: bool) -> nn.Module:
    """Build the registered model that a file names; on the meta device nothing is allocated."""
    if content.manifest.model is None:
        raise ArtifactError(
            f"{content.where}: the file names no registered model; pass the float model, load(path, model=MyModel())."
        )
    name, options = content.manifest.model["name"], content.manifest.model["options"]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta" if meta else "cpu"):
            model = registered_model(name, **options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ArtifactError(f"{content.where}: cannot rebuild its model {name!r:.80}: {error}") from None
    return model.to(content.dtype)
