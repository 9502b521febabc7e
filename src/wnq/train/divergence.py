"""Where a loss that is not finite came from."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from wnq.quantizer import Quantizer


class TrainingDivergedError(RuntimeError):
    """The loss, or a weight, is NaN or infinite."""


def finite_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model that are finite now, by name; a mask may hold infinity by design."""
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    floats = {name: t for name, t in named.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return {}
    peaks = [torch.linalg.vector_norm(t.detach(), math.inf).cpu() for t in floats.values()]
    return {name: t for (name, t), peak in zip(floats.items(), peaks, strict=True) if math.isfinite(peak.item())}


@torch.no_grad()
def first_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Return in words what turns NaN or infinite first in a forward pass, in the order of computation.

    Args:
        model: the plain module, neither compiled nor shared.
        run: its forward pass.

    Returns:
        Such as ``the output of layer 'layer1.0.conv1'``; None where everything stays finite.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, _: Any, output: Any) -> None:
            if not found and any(not bool(t.isfinite().all()) for t in _tensors(output)):
                found.append(_in_words(model, name, module))

        return hook

    handles = [
        module.register_forward_hook(look(name)) for name, module in model.named_modules(remove_duplicate=False) if name
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def told_by_any(found: str | None) -> str | None:
    """Return what the first of the processes that know something says."""
    if not (dist.is_available() and dist.is_initialized()):
        return found
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, found)
    return next((text for text in told if text is not None), None)


def in_words(name: str) -> str:
    """Return what a parameter or buffer is, given its name."""
    layer, _, quantizers = name.partition(".parametrizations.weight.")
    if quantizers:
        return f"the weight of layer {layer!r}" if quantizers == "original" else f"the weight quantizer of {layer!r}"
    layer, _, own = name.partition(".input_quantizer.")
    if own:
        return f"the input quantizer of layer {layer!r}"
    layer, _, own = name.rpartition(".")
    return f"{own!r} of layer {layer!r}"


def _in_words(model: nn.Module, name: str, module: nn.Module) -> str:
    """Say of a module whose output is not finite what is wrong with it: what it holds, or what it computes."""
    state = module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    for own, tensor in (pair for pairs in state for pair in pairs):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            return in_words(f"{name}.{own}")
    layer = name.partition(".parametrizations.weight")[0]
    if layer != name:
        original = model.get_parameter(f"{layer}.parametrizations.weight.original")
        return f"the {'quantized ' if bool(original.isfinite().all()) else ''}weight of layer {layer!r}"
    layer = name.removesuffix(".input_quantizer")
    if layer != name and isinstance(module, Quantizer):
        return f"the rounded input of layer {layer!r}"
    return f"the output of layer {name!r}"


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, (list, tuple)):
        return [t for entry in output for t in _tensors(entry)]  # pyright: ignore[reportUnknownVariableType]
    return []
