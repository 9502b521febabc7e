"""Attaching a plan to a model: a parametrization on each weight, a hook before each input, nothing else changes.

The layers keep their classes, the model keeps its forward, the user keeps the training loop.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnq.layers import INDEX_INPUT, channel_axis
from wnq.methods.jacob import RunningRange
from wnq.names import did_you_mean
from wnq.plan import LayerPlan, Plan
from wnq.prepared import (
    accept_float_checkpoint,
    accept_unrounded_checkpoint,
    attach_output_,
    deployed,
    float_weight,
    keep_input,
    observe_weight,
    pass_output,
    quantize_input,
    reduce_parametrized,
    weight_quantizer,
)
from wnq.quantizer import CodebookQuantizer, Quantized, Quantizer, check_finite


def quantize_(model: nn.Module, plan: Plan) -> nn.Module:
    """Attach a plan to a model, in place, and return the model. Train it as before.

    Everything is checked before anything is changed. Learned parameters of weight quantizers start from the weights as they are
    now; input quantizers with a learned range start at the first batch in training mode (or at :func:`calibrate_`).

    Raises:
        ValueError: the plan names a layer that the model lacks or whose weight has another shape, the model is quantized already,
            or a weight holds NaN or infinity (with the layer's name).
    """
    modules = dict(model.named_modules())
    layers = {entry.name: _checked_layer(modules, entry, type(model).__name__) for entry in plan.layers}
    _check_outputs(modules, plan, type(model).__name__)
    quantizers: dict[str, Quantizer] = {}
    for entry in plan.layers:
        layer = layers[entry.name]
        if entry.method.weight is not None:
            quantizer = quantizers.get(entry.tied_to or "")
            if quantizer is None:
                quantizer = entry.method.weight(cast(Tensor, layer.weight).detach(), cast(int, channel_axis(layer)))
            quantizers[entry.name] = quantizer
            attach_weight_(layer, quantizer, observed=entry.tied_to is None)
        attach_sides_(layer, entry)
    attach_outputs_(model, plan)
    set_plan_(model, plan)
    return model


def set_plan_(model: nn.Module, plan: Plan) -> None:
    """Remember the plan on the model, where saving finds it."""
    object.__setattr__(model, "wnq_plan", plan)


def get_plan(model: nn.Module) -> Plan:
    """Return the plan that a model was quantized by.

    Raises:
        ValueError: the model has none.
    """
    plan = getattr(model, "wnq_plan", None) or getattr(getattr(model, "module", None), "wnq_plan", None)
    if not isinstance(plan, Plan):
        raise ValueError(
            f"{type(model).__name__} carries no plan: it is a float model. Quantize it first, "
            "quantize_(model, make_plan(model, method)), or train a recipe with a [quantize] table."
        )
    return plan


def _checked_layer(modules: dict[str, nn.Module], entry: LayerPlan, kind: str) -> nn.Module:
    layer = modules.get(entry.name)
    if layer is None:
        hint = did_you_mean(entry.name, modules)
        raise ValueError(f"the plan names layer {entry.name!r}, which {kind} does not have.{hint}")
    if channel_axis(layer) is None:
        raise ValueError(
            f"layer {entry.name!r} is a {type(layer).__name__}, whose weight cannot be quantized; mend the plan."
        )
    if parametrize.is_parametrized(layer) or hasattr(layer, "input_quantizer"):
        raise ValueError(f"layer {entry.name!r} is quantized already; quantize_ works on a float model, once.")
    weight = cast(Tensor, layer.weight)
    if tuple(weight.shape) != entry.shape:
        raise ValueError(
            f"layer {entry.name!r} has shape {entry.shape} in the plan but {tuple(weight.shape)} in the model; "
            "make the plan anew with make_plan(model, method)."
        )
    check_finite(weight.detach(), where=f"the weight of layer {entry.name!r}")
    if entry.method.output is not None and not isinstance(layer, INDEX_INPUT):
        entry.method.output(layer)
    return layer


def attach_weight_(layer: nn.Module, quantizer: Quantizer, *, observed: bool = True) -> None:
    """Parametrize a layer's weight, so that ``layer.weight`` is the quantized one and still pickles and loads float files.

    A quantizer with running statistics sees the float weight once per training step, if ``observed``.
    """
    weight = cast(Tensor, layer.weight)
    quantizer.to(weight.device)
    parametrize.register_parametrization(layer, "weight", quantizer, unsafe=True)
    type(layer).__reduce_ex__ = reduce_parametrized  # pyright: ignore[reportAttributeAccessIssue]
    layer.register_load_state_dict_pre_hook(accept_float_checkpoint)
    if observed and type(quantizer).observe_ is not Quantizer.observe_:
        layer.register_forward_pre_hook(observe_weight)


def attach_sides_(layer: nn.Module, entry: LayerPlan) -> None:
    """Give a layer the planned input quantizer and output module, unless its input is indices."""
    if isinstance(layer, INDEX_INPUT):
        return
    if entry.method.output is not None:
        layer.output_module = entry.method.output(layer)
        layer.register_forward_pre_hook(keep_input, with_kwargs=True)
        layer.register_forward_hook(pass_output)
    if entry.method.input is None:
        return
    layer.input_quantizer = entry.method.input().to(float_weight(layer).device)
    layer.register_forward_pre_hook(quantize_input, with_kwargs=True)
    if not parametrize.is_parametrized(layer):
        layer.register_load_state_dict_pre_hook(accept_float_checkpoint)


def _check_outputs(modules: dict[str, nn.Module], plan: Plan, kind: str) -> None:
    layers, seen = [entry.name for entry in plan.layers], set[str]()
    for output in plan.outputs:
        if output.name not in modules:
            hint = did_you_mean(output.name, modules)
            raise ValueError(f"the plan rounds the output of {output.name!r}, which {kind} does not have.{hint}")
        if output.layer not in layers:
            hint = did_you_mean(output.layer, layers)
            raise ValueError(
                f"the plan rounds the output of {output.name!r} for {output.layer!r}, which it does not quantize.{hint}"
            )
        if output.name in seen or hasattr(modules[output.name], "output_quantizer"):
            raise ValueError(f"the output of {output.name!r} is rounded already; an output is rounded once.")
        seen.add(output.name)


def output_quantizer(bits: int) -> Quantizer:
    """Return what rounds an output: a grid over its running range, in which zero is exact, at BatchNorm's own pace."""
    return RunningRange(bits, momentum=0.1)


def attach_outputs_(model: nn.Module, plan: Plan) -> None:
    """Round the outputs that a plan lists."""
    device = next((p.device for p in model.parameters()), None)
    for output in plan.outputs:
        module = model.get_submodule(output.name)
        attach_output_(module, output_quantizer(output.bits).to(device).train(module.training))
    if plan.outputs:
        model.register_load_state_dict_pre_hook(accept_unrounded_checkpoint)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Quantizer]]:
    """Yield ``(name, layer, weight quantizer)``, in order; a weight that several layers share comes once."""
    seen: set[int] = set()
    for name, layer in model.named_modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None and id(float_weight(layer)) not in seen:
            seen.add(id(float_weight(layer)))
            yield name, layer, quantizer


def input_signs(model: nn.Module) -> dict[str, str]:
    """Return layer -> ``signed``, ``unsigned`` or ``first batch decides``, for the plan's table."""
    words = {True: "signed", False: "unsigned", None: "first batch decides"}
    return {
        name: words[getattr(layer.input_quantizer, "signed", None)]
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "input_quantizer", None), Quantizer)
    }


def quantizer_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that belong to quantizers (steps, clips, scales), each once."""
    owned = {id(p): p for module in model.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    return list(owned.values())


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    quantizer_lr: float | None = None,
    quantizer_weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Split the parameters for an optimizer: the model's own, and the quantizers' (rules on names do not tell them apart).

    Args:
        model: a float or quantized model.
        lr: learning rate of the model's parameters.
        weight_decay: their decay.
        quantizer_lr: learning rate of the quantizers' parameters; None: the same.
        quantizer_weight_decay: their decay; PACT wants that of the weights, learned steps want 0.
    """
    special = quantizer_parameters(model)
    ids = {id(p) for p in special}
    groups = [{"params": [p for p in model.parameters() if id(p) not in ids], "lr": lr, "weight_decay": weight_decay}]
    rate = lr if quantizer_lr is None else quantizer_lr
    return groups + ([{"params": special, "lr": rate, "weight_decay": quantizer_weight_decay}] if special else [])


@torch.no_grad()
def calibrate_(model: nn.Module, *inputs: Any, **named_inputs: Any) -> nn.Module:
    """Start every quantizer of inputs and outputs from one batch, in place, leaving all other state (BatchNorm, dropout) alone.

    Training does the same at its first batch; call this before evaluating an untrained model or to avoid one recompilation.

    Raises:
        ValueError: the model's output is not finite, as happens with BatchNorm statistics that were never trained.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        for module in model.modules():
            if isinstance(getattr(module, "input_quantizer", None), Quantizer):
                module.training = True
            if isinstance(getattr(module, "output_quantizer", None), Quantizer):
                cast(Quantizer, module.output_quantizer).training = True
        output = model(*inputs, **named_inputs)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if isinstance(output, Tensor) and not bool(torch.isfinite(output).all()):
        raise ValueError(
            "calibration gave NaN or infinite outputs. Train the float model first (fresh BatchNorm statistics diverge), "
            "or calibrate with real inputs."
        )
    return model


def _detach_weight_(layer: nn.Module) -> None:
    """Give a layer its float weight and its own class back.

    torch's ``remove_parametrizations`` deletes the property from the run-time class, which every deepcopy of the layer shares.
    """
    original = float_weight(layer)
    layer.__class__ = type(layer).__mro__[1]
    del layer.parametrizations
    layer.weight = cast(nn.Parameter, original)


@torch.no_grad()
def freeze_(model: nn.Module) -> nn.Module:
    """Replace every prepared weight by its quantized values, in place: same outputs, no rounding at run time, no training.

    The layers keep their codebooks, so a frozen model can still be packed and analysed. A float layer that shares its weight
    with a quantized one keeps the float values.
    """
    frozen: dict[int, tuple[nn.Parameter, Quantized]] = {}
    for layer in list(model.modules()):
        quantizer = weight_quantizer(layer) if parametrize.is_parametrized(layer, "weight") else None
        if quantizer is None:
            continue
        original = float_weight(layer)
        if id(original) not in frozen:
            quantized = deployed(quantizer, original)
            values = torch.empty_like(original).copy_(quantized.dequantize())
            frozen[id(original)] = nn.Parameter(values, requires_grad=False), quantized
        _detach_weight_(layer)
        layer.weight, quantized = frozen[id(original)]
        attach_codebook_(layer, quantized, quantizer.bits)
    return model


def attach_codebook_(layer: nn.Module, quantized: Quantized, bits: int) -> None:
    """Remember the grid of a frozen layer, whose weight already holds quantized values."""
    layer.weight_quantizer = CodebookQuantizer(quantized.levels, quantized.scale, bits, quantized.axis)
