"""Biases that integer engines add exactly: multiples of the smallest unit that 8-bit weights can have.

An engine of integers adds an int32 bias to an integer sum, in units of input step times weight scale. At few bits one unit is a
visible part of the next step, and a rounded bias moves decisions behind it. Weights that fill int8 no more than half can be
multiplied by a *gain*, their scale divided by it, which makes the unit as many times finer. A model whose biases are multiples of
that unit has nothing left to round.
"""

import copy
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from wnq.integer.building import folded_factor
from wnq.integer.inputs import input_grid
from wnq.integer.weights import weight_form
from wnq.layers import CONVOLUTIONS, BatchNorm
from wnq.plan import Plan
from wnq.prepared import deployed, float_weight, weight_quantizer
from wnq.quantizer import Quantizer
from wnq.readers import foldable_pairs, only_readers

PAIR_LIMIT = 32767
"""What two products of 8-bit numbers may add up to on processors without VNNI."""

NOISE = 2.0**-20
"""What float operations in another order may change, as a share of the largest magnitudes that they add."""

TRIED = 3
"""Units on either side of the nearest exact bias in which a clear one is looked for."""

Model = TypeVar("Model", bound=nn.Module)


def largest_gain(peak: int, largest_code: int) -> int:
    """Return by how much integer weights can be multiplied.

    Args:
        peak: largest magnitude of a weight.
        largest_code: of the inputs, as stored without sign.
    """
    room = min(127, PAIR_LIMIT // (2 * max(1, largest_code)))
    return max(1, room // peak) if peak else 1


@torch.no_grad()
def round_biases_(model: Model, *inputs: Any) -> Model:
    """Move the bias of every convolution of integers to a near one that an integer engine adds exactly, in place.

    The bias is the one behind BatchNorm, if a BatchNorm alone reads the layer; its shift is changed then, or its running mean where
    it has none. Of the exact biases the nearest is taken with which no sum lies so close to a threshold of the rounding behind
    that the order of float operations decides: that is mostly the nearest of all, at most half a unit away. Call it at the end of a
    training with ``residual_bits=8``, as :func:`wnq.fit` does, before the last evaluation; nothing must change afterwards.

    Args:
        model: a quantized model whose input quantizers have met a batch.
        inputs: what its forward takes; the smallest batch will do.

    Returns:
        The model.
    """
    pairs = foldable_pairs(model, *inputs)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, CONVOLUTIONS)
        and weight_quantizer(layer) is not None
        and isinstance(getattr(layer, "input_quantizer", None), Quantizer)
    }
    behind = _roundings(model, list(layers))
    for name, layer in layers.items():
        quantizer = cast(Quantizer, weight_quantizer(layer))
        form = weight_form(deployed(quantizer, float_weight(layer).detach()))
        grid, _ = input_grid(cast(Quantizer, layer.input_quantizer))
        if form.integers is None or grid is None:
            continue
        merged = cast("BatchNorm | None", getattr(layer, "folded_batchnorm", None))
        pair = cast("BatchNorm | None", model.get_submodule(pairs[name]) if name in pairs else None)
        norm = merged if merged is not None else pair
        own = None if layer.bias is None else layer.bias.detach().cpu()
        factor, bias = folded_factor(None if norm is None else copy.deepcopy(norm).cpu(), layer.out_channels, own)
        magnitudes = form.integers.flatten(1).double().abs()
        gain = largest_gain(int(magnitudes.max()) if magnitudes.numel() else 0, grid.high - grid.low)
        unit = (form.scale.double() if merged is not None else form.scale.double() * factor.abs()) * grid.step / gain
        largest = magnitudes.sum(1) * grid.largest
        chosen = torch.where(unit > 0, clear_biases(bias, unit, gain, behind.get(name), largest), bias)
        _move_bias_(layer, norm, chosen - bias)
    return model


def _roundings(model: nn.Module, layers: list[str]) -> dict[str, Tensor]:
    """Return layer -> thresholds, float64, of what rounds its output, where one rounding does."""
    plan = getattr(model, "wnq_plan", None)
    rounding = {o.layer: model.get_submodule(o.name) for o in (plan.outputs if isinstance(plan, Plan) else ())}
    found = {name: getattr(module, "output_quantizer", None) for name, module in rounding.items()}
    try:
        readers = only_readers(model, layers)
    except ValueError:
        readers = {}  # a forward that cannot be followed: the nearest biases will do
    for layer, reader in readers.items():
        found.setdefault(layer, getattr(model.get_submodule(reader), "input_quantizer", None))
    grids = {layer: input_grid(q)[0] for layer, q in found.items() if isinstance(q, Quantizer)}
    return {
        layer: (torch.arange(grid.low, grid.high, dtype=torch.float64) + 0.5) * grid.step
        for layer, grid in grids.items()
        if grid is not None
    }


def clear_biases(bias: Tensor, unit: Tensor, gain: int, thresholds: Tensor | None, largest: Tensor) -> Tensor:
    """Return multiples of the unit near the biases, with no sum too near to a threshold.

    Args:
        bias: float64, ``(channels,)``.
        unit: float64, ``(channels,)``.
        gain: units of a sum.
        thresholds: float64, ``(n,)``, of the rounding behind; None if there is none.
        largest: ``(channels,)``: no sum is larger in magnitude.
    """
    unit = unit.expand(bias.shape)
    nearest = torch.round(bias / unit)
    if thresholds is None:
        return nearest * unit
    # From the nearest outwards, first to the side that the bias lies on.
    shifts = torch.tensor(sorted(range(-TRIED, TRIED + 1), key=lambda shift: (abs(shift), -shift)), dtype=torch.float64)
    tried = nearest + shifts.unsqueeze(1) * torch.where(bias >= nearest * unit, 1, -1)  # (shifts, channels)
    offset = tried.unsqueeze(2)
    passes = (thresholds / unit.unsqueeze(1) - offset) / gain  # the sum at which a threshold is passed
    distance = (passes - torch.round(passes)).abs()
    noise = passes.abs() + offset.abs() / gain
    reached = passes.abs() <= largest.unsqueeze(1) + 1
    room = torch.where(reached, distance / noise, float("inf")).amin(2).clamp(max=NOISE)  # enough is enough
    best = room.argmax(0, keepdim=True)  # the first, so the nearest, of the best
    return tried.gather(0, best)[0] * unit


def _move_bias_(layer: nn.Module, norm: BatchNorm | None, by: Tensor) -> None:
    """Add to what a layer's output is shifted by, its BatchNorm included."""
    if norm is None:
        bias = cast("nn.Parameter | None", layer.bias)
        if bias is not None:
            bias.add_(by.to(bias))
    elif norm.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        norm.bias.add_(by.to(norm.bias))
    else:
        assert norm.running_mean is not None and norm.running_var is not None
        deviation = (norm.running_var + norm.eps).sqrt()
        norm.running_mean.sub_(by.to(deviation) * deviation)
