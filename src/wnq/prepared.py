"""A prepared layer: what it holds and what it does, namely hooks, loading and pickling.

Hooks are module-level functions that read the module: deepcopy, pickle and averaging depend on it.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnq.quantizer import Quantized, Quantizer

ORIGINAL = "parametrizations.weight.original"
"""Where a prepared layer keeps its float weight, relative to the layer."""


def weight_quantizer(layer: nn.Module) -> Quantizer | None:
    """Return the quantizer of a layer's weight: the attached one, or a frozen layer's codebook; None for a float layer."""
    if parametrize.is_parametrized(layer, "weight"):
        quantizer = cast(Any, layer).parametrizations.weight[0]
        return quantizer if isinstance(quantizer, Quantizer) else None
    frozen = getattr(layer, "weight_quantizer", None)
    return frozen if isinstance(frozen, Quantizer) else None


def deployed(quantizer: Quantizer, weight: Tensor) -> Quantized:
    """Return the codes that a weight is stored as: those of eval mode, which differ where training is stochastic."""
    mode = quantizer.training
    try:
        return quantizer.eval().quantize(weight)
    finally:
        quantizer.train(mode)


def float_weight(layer: nn.Module) -> Tensor:
    """Return what a layer's quantizer reads: the trained float weight, or a frozen layer's values."""
    if parametrize.is_parametrized(layer, "weight"):
        return cast(Any, layer).parametrizations.weight.original
    return cast(Tensor, layer.weight)


def observe_weight(module: nn.Module, _: tuple[Any, ...]) -> None:
    """Forward pre-hook."""
    if module.training:
        quantizer = weight_quantizer(module)
        assert quantizer is not None
        with torch.no_grad():
            quantizer.observe_(float_weight(module))


def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook, before the input is quantized."""
    vars(module)["float_input"] = args[0] if args else kwargs["input"]


def pass_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook."""
    return cast(nn.Module, module.output_module)(module, vars(module).pop("float_input"), output)


def quantize_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook."""
    quantizer = cast(nn.Module, module.output_quantizer)
    if isinstance(quantizer, Quantizer) and quantizer.training:
        quantizer.observe_(output)
    return quantizer(output)


def attach_output_(module: nn.Module, quantizer: nn.Module) -> None:
    """Round what a module puts out."""
    module.output_quantizer = quantizer
    module.register_forward_hook(quantize_output)


def move_output_(old: nn.Module, new: nn.Module) -> nn.Module:
    """Round what ``new`` puts out as ``old`` was rounded, if it was, and return ``new``, which takes its place."""
    if hasattr(old, "output_quantizer"):
        attach_output_(new, cast(nn.Module, old.output_quantizer))
        del old.output_quantizer
    return new


def quantize_input(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook."""
    quantizer = cast(Quantizer, module.input_quantizer)
    x = args[0] if args else kwargs["input"]
    if module.training:
        quantizer.observe_(x)
    if args:
        return (quantizer(x), *args[1:]), kwargs
    return args, {**kwargs, "input": quantizer(x)}


def accept_float_checkpoint(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: a checkpoint of the float model has ``weight`` where this layer has the original and quantizer states.

    The learned parameters of the weight quantizer are set anew from the loaded weight; states that the file does not have keep
    their values, so that strict loading still reports every other missing key.
    """
    plain, original = prefix + "weight", prefix + ORIGINAL
    if plain not in state_dict:
        return
    weight = state_dict[plain]
    if parametrize.is_parametrized(module, "weight"):
        state_dict[original] = state_dict.pop(plain)
        quantizer = weight_quantizer(module)
        assert quantizer is not None
        current = float_weight(module)
        if weight.shape == current.shape:
            quantizer.reset_(weight.to(current))
        _fill(state_dict, prefix + "parametrizations.weight.0.", quantizer)
    if isinstance(getattr(module, "input_quantizer", None), Quantizer):
        _fill(state_dict, prefix + "input_quantizer.", cast(Quantizer, module.input_quantizer))


def accept_unrounded_checkpoint(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook of a whole model: a checkpoint that has no state of any rounded output is of a model that rounds none.

    All of them keep their values then; a checkpoint that has some is held to all.
    """
    if not any("output_quantizer." in key for key in state_dict):
        for name, module in model.named_modules(remove_duplicate=False):
            if name.rpartition(".")[2] == "output_quantizer" and isinstance(module, Quantizer):
                _fill(state_dict, f"{prefix}{name}.", module)


def _fill(state_dict: dict[str, Any], prefix: str, quantizer: Quantizer) -> None:
    for key, value in quantizer.state_dict().items():
        state_dict.setdefault(prefix + key, value)


def reduce_parametrized(layer: nn.Module, _: int) -> tuple[Any, ...]:
    """Pickle a parametrized layer as its plain class plus state; torch's own refusal protects a class made at run time."""
    return _new_layer, (type(layer).__mro__[1],), dict(layer.__dict__), None, None, _restore_parametrized


def _new_layer(kind: type[nn.Module]) -> nn.Module:
    return kind.__new__(kind)


def _restore_parametrized(layer: nn.Module, state: dict[str, Any]) -> None:
    state = dict(state)
    modules = dict(state["_modules"])
    parametrizations = modules.pop("parametrizations")
    state["_modules"] = modules
    layer.__setstate__(state)
    for name, chain in parametrizations.items():
        setattr(layer, name, chain.original)
        for quantizer in chain:
            parametrize.register_parametrization(layer, name, quantizer, unsafe=True)
    type(layer).__reduce_ex__ = reduce_parametrized  # pyright: ignore[reportAttributeAccessIssue]
