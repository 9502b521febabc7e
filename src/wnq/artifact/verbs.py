"""Saving a quantized model as a small file, and everything that is done with that file.

The file holds, for each quantized layer, its codes (:mod:`wnq.artifact.layout`), ``<layer>.weight_grid`` or
``<layer>.weight_levels``, and ``<layer>.weight_scale``; and every other tensor of the model's state under its own
name. Weights that layers share are stored once. Training-only state, such as float weights and learned steps of weight
quantizers, is left out: a loaded model is for inference.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wnq.artifact.coders import CODERS, versions
from wnq.artifact.coding import Coding, Stored
from wnq.artifact.container import ArtifactError, read_artifact, write_artifact
from wnq.artifact.content import Content, store_levels
from wnq.artifact.layout import CODED, SCALE, SHAPE, key_of, shift_of, store_coded, store_rows, to_matrix
from wnq.artifact.manifest import Manifest
from wnq.artifact.sizes import SizeReport, sizes_of
from wnq.attach import attach_codebook_, attach_outputs_, attach_sides_, get_plan, quantized_layers, set_plan_
from wnq.models import registered_model
from wnq.names import check_choice
from wnq.prepared import deployed, float_weight, weight_quantizer
from wnq.quantizer import check_finite


def save(model: nn.Module, path: str | Path, *, coder: str = "none") -> SizeReport:
    """Save a quantized or frozen model; the same model, by the same packages, gives the same bytes.

    Args:
        model: what :func:`wnq.quantize_` returned, trained; its input quantizers have met a batch. It is only read.
        path: where to; an existing file is replaced only once the new one is complete.
        coder: ``none``: codes at their width, in the layout of compressed-tensors; ``zstd``: each layer by Zstandard where
            that is smaller; ``ans``: each layer by the smallest of those and of an entropy coder. All load to the same model.

    Returns:
        The sizes, read back from the file, whose checksums and codes are thereby verified.

    Raises:
        ValueError: the model carries no plan, its layers are not those of the plan, a weight or scale is not finite, or there
            is no such coder.
        ModuleNotFoundError: the coder's package is not installed.
        OSError: the file cannot be written; what stood there is untouched.
    """
    versions(check_choice(coder, CODERS, where="coder"))
    model = _unwrapped(model)
    plan = get_plan(model)
    tensors: dict[str, Tensor] = {}
    stored: dict[str, Stored] = {}
    matrices: dict[str, Tensor] = {}
    dtypes: set[torch.dtype] = set()
    for name, layer, quantizer in quantized_layers(model):
        weight = float_weight(layer).detach()
        quantized = deployed(quantizer, weight)
        for part, values in (("scale", quantized.scale), ("levels", quantized.levels)):
            check_finite(values, where=f"the {part} of layer {name!r}")
        levels = quantized.levels.cpu()
        tensors |= {key_of(name, part): stored_levels for part, stored_levels in store_levels(levels).items()}
        tensors[key_of(name, SCALE)] = quantized.scale.unsqueeze(-1)
        stored[name] = Stored(quantizer.bits, quantized.axis, shift_of(levels, quantizer.bits))
        matrices[name] = to_matrix(quantized.codes.cpu(), quantized.axis) + stored[name].shift
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
    coding = Coding()
    if coder == "none":
        for name, matrix in matrices.items():
            tensors |= store_rows(name, matrix, stored[name].bits)
    else:
        ordered = {entry.name: matrices[entry.name] for entry in plan.layers if entry.name in matrices}
        tensors[CODED], coding = store_coded(ordered, {name: entry.bits for name, entry in stored.items()}, coder)
    rest, aliases = _other_state(model)
    if taken := sorted(rest.keys() & tensors.keys()):
        raise ValueError(f"the model's own tensor {taken[0]!r} has a name that the file uses; rename it.")
    registered: dict[str, Any] | None = vars(model).get("wnq_model")
    dtype = str(dtypes.pop() if dtypes else torch.float32).removeprefix("torch.")
    # Under their own names, not in the bundle of small tensors, other packages find what they need to unpack the codes.
    apart = {key_of(name, part) for name in stored for part in (SCALE, SHAPE)} if coder == "none" else {CODED}
    metadata = Manifest(plan, stored, aliases, dtype, registered, coding).to_json()
    write_artifact(path, tensors | rest, metadata, apart=apart)
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
        ModuleNotFoundError: the package that decodes the file is not installed.
    """
    content = _content(path)
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
    attach_outputs_(model, content.manifest.plan)
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

    Quantization of inputs and outputs is not part of it. Weights that layers share are one tensor under several keys.

    Raises:
        ArtifactError: the file is no valid artifact.
        ModuleNotFoundError: the package that decodes the file is not installed.
    """
    content = _content(path)
    return {key: tensor for key, tensor in content.state.items() if not content.is_quantizer_state(key)}


def inspect_file(path: str | Path) -> SizeReport:
    """Return where the bytes of a file are, without building a model; its checksums are verified and its codes decoded.

    Raises:
        ArtifactError: the file is no valid artifact.
        ModuleNotFoundError: the package that decodes the file is not installed.
    """
    return sizes_of(_content(path), path)


def _content(path: str | Path) -> Content:
    tensors, document = read_artifact(path)
    return Content(str(path), Manifest.from_json(document, where=str(path)), tensors)


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


class _WithoutValues(TorchFunctionMode):
    """Random initialization does nothing. On the meta device there is nothing to fill, but trying imports torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return args[0] if func in (Tensor.normal_, Tensor.uniform_) else func(*args, **(kwargs or {}))


def _registered(content: Content, *, meta: bool) -> nn.Module:
    """Build the registered model that a file names; on the meta device nothing is allocated."""
    if content.manifest.model is None:
        raise ArtifactError(
            f"{content.where}: the file names no registered model; pass the float model, load(path, model=MyModel())."
        )
    name, options = content.manifest.model["name"], content.manifest.model["options"]
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.device("meta" if meta else "cpu"),
            _WithoutValues() if meta else contextlib.nullcontext(),
        ):
            model = registered_model(name, **options)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ArtifactError(f"{content.where}: cannot rebuild its model {name!r:.80}: {error}") from None
    return model.to(content.dtype)
