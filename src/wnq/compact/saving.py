"""The option: a hook behind each quantized layer that replaces what autograd saved of its input and weight."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from wnq.activations import ClippedReLU
from wnq.compact.codes import Codes, in_memory_order
from wnq.compact.rebuilding import forget, rebuild
from wnq.learned_step import LearnedStep
from wnq.prepared import float_weight, weight_quantizer
from wnq.quantizer import Quantizer

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
INPUTS = (LearnedStep, ClippedReLU)
SAVED = {
    "ConvolutionBackward0": ("input", "weight"),
    "AddmmBackward0": ("mat1", "mat2"),
    "MmBackward0": ("self", "mat2"),
}
"""What a layer's node calls its input and its weight."""
RESHAPED = ("ViewBackward0", "UnsafeViewBackward0", "SqueezeBackward1")
"""What a layer may do to its result behind that node."""
ROUNDINGS = ("RoundToStepBackward", "MaxRoundingBackward")
"""Nodes that save what came in, what they put out, and more."""
DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Float16 is not among them: below its smallest normal number a value is no longer a multiple of the step."""


def compact_activations_(model: nn.Module) -> dict[str, str]:
    """Let a quantized model train in less memory, in place: values and gradients stay what they are, bit for bit.

    A convolution or linear layer needs its rounded input for its weight's gradient: it is kept as codes of 1, 2, 4 or 8 bits.
    The rounding needs the input before it, which the ReLU in front keeps as well: where that ReLU stands behind a BatchNorm
    in training, its output is not kept but computed anew from the BatchNorm's input. The rounded weight is computed anew from
    the float one. Everything is restored when the backward pass asks; on a layer's first batch of a device and type what is
    computed anew is compared with what was there, which is kept where they differ.

    Costs time: one pass over each input to pack it, one to unpack it, one more BatchNorm and ReLU. Works in eager mode; a
    compiled step decides by itself what to keep. A zero loses its sign, and a NaN among the inputs is not restored (the loss
    shows it). Within someone else's ``saved_tensors_hooks`` or checkpoint it stands back.

    Args:
        model: from :func:`wnq.quantize_`.

    Returns:
        The quantized layers whose inputs are kept as before, each with the reason.
    """
    left: dict[str, str] = {}
    for name, layer in model.named_modules():
        quantizer = getattr(layer, "input_quantizer", None)
        if not isinstance(quantizer, Quantizer):
            continue
        if not isinstance(layer, LAYERS):
            left[name] = "it is neither a convolution nor a linear layer"
        elif not isinstance(quantizer, INPUTS):
            left[name] = f"its input is rounded by {type(quantizer).__name__}, not to multiples of one step"
        elif compact_saved not in layer._forward_hooks.values():  # pyright: ignore[reportPrivateUsage]
            layer.register_forward_hook(compact_saved, with_kwargs=True, prepend=True)
    return left


def compact_saved(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
    """Forward hook."""
    if torch.compiler.is_compiling() or output.grad_fn is None:
        return
    node = cast(Any, output.grad_fn)
    while node.name() in RESHAPED:
        node = node.next_functions[0][0]
    if node.name() not in SAVED:
        return
    value = cast(Tensor, args[0] if args else kwargs["input"])
    kind = f"{value.device} {value.dtype}"
    check = vars(module).get("compact_checked") != kind
    vars(module)["compact_checked"] = kind
    with torch.no_grad():
        _weight_anew(module, node, check=check)
        _input_as_codes(node, value)
    _float_input_anew(value, check=check)


def _replace(node: Any, name: str, value: Tensor, restore: Callable[[], Tensor]) -> bool:
    """Let a node restore what it saved under ``name`` from ``restore``, if that is ``value`` or a view of it."""
    kept = cast("Tensor | None", getattr(node, f"_saved_{name}"))
    if kept is None or kept.dtype != value.dtype or kept.numel() != value.numel():
        return False  # the layer padded or converted it, and keeps that
    if kept.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return False
    size, stride = kept.size(), kept.stride()
    return forget(getattr(node, f"_raw_saved_{name}"), lambda: restore().as_strided(size, stride))


def _rounding(value: Tensor | None) -> Any | None:
    node = cast(Any, None if value is None else value.grad_fn)
    return node if node is not None and node.name() in ROUNDINGS else None


class _Again:
    """A rounded weight, rounded again: quantizers are pure."""

    def __init__(self, quantizer: Quantizer, weight: Tensor) -> None:
        self.quantizer, self.weight = quantizer, weight
        self._value: Tensor | None = None

    @torch.no_grad()
    def restore(self, *, last: bool = False) -> Tensor:
        value = self.quantizer(self.weight) if self._value is None else self._value
        self._value = None if last else value
        return value


def _weight_anew(module: nn.Module, node: Any, *, check: bool) -> None:
    quantizer, kept = weight_quantizer(module), cast("Tensor | None", getattr(node, f"_saved_{SAVED[node.name()][1]}"))
    if quantizer is None or kept is None:
        return
    made_by = cast(Any, kept.grad_fn)
    if made_by is not None and made_by.name() == "TBackward0":
        made_by = made_by.next_functions[0][0]
    if made_by is None or made_by.name() not in ROUNDINGS:
        return
    value, again = made_by.saved_tensors[1], _Again(quantizer, float_weight(module))
    if check and not torch.equal(again.restore(last=True), value):
        return
    if _replace(node, SAVED[node.name()][1], value, again.restore):
        forget(made_by._raw_saved_tensors[1], lambda: again.restore(last=True))


def _input_as_codes(node: Any, value: Tensor) -> None:
    rounding = _rounding(value)
    if rounding is None or len(rounding._raw_saved_tensors) != 3 or value.dtype not in DTYPES:
        return
    if in_memory_order(value) is None:
        return
    codes = Codes(value, rounding.saved_tensors[2].detach(), *rounding.bounds)
    if _replace(node, SAVED[node.name()][0], value, codes.restore):
        forget(rounding._raw_saved_tensors[1], lambda: codes.restore(last=True))


def _float_input_anew(value: Tensor, *, check: bool) -> None:
    rounding = _rounding(value)
    source = cast(Any, None if rounding is None else rounding.next_functions[0][0])
    if rounding is None or source is None:
        return
    if source.name() == "ReluBackward0":
        rebuilt = rebuild(source, check=check)
        if rebuilt is not None:
            forget(rounding._raw_saved_tensors[0], rebuilt.value)
    elif source.name() == "MaxPool2DWithIndicesBackward0":
        before = source.next_functions[0][0]
        rebuilt = rebuild(before, check=check) if before is not None and before.name() == "ReluBackward0" else None
        if rebuilt is not None:
            forget(source._raw_saved_self, rebuilt.value)
