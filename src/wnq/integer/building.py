"""One layer's numbers: BatchNorm into scale and bias, signs into the integers."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from wnq.integer.inputs import InputGrid
from wnq.integer.layer import Computing, DeployedEmbedding, DeployedLayer, Transposed, from_output, per_output
from wnq.integer.weights import INT8, WeightForm
from wnq.layers import BatchNorm

NEGLIGIBLE = 2.0**-24
"""A channel that adds less than this share of its own bias adds nothing in float32."""

SCALE_FLOOR = 2.0**-100
"""Smaller scales than this underflow when they meet an input step or an accumulator."""


def folded_factor(norm: BatchNorm | None, out: int, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what an output channel is multiplied by and what is added, float64, BatchNorm and the layer's bias together."""
    own = torch.zeros(out, dtype=torch.float64) if bias is None else bias.detach().double()
    if norm is None:
        return torch.ones(out, dtype=torch.float64), own
    assert norm.running_mean is not None and norm.running_var is not None
    gamma = torch.ones(out, dtype=torch.float64) if norm.weight is None else norm.weight.detach().double()  # pyright: ignore[reportUnnecessaryComparison]
    beta = torch.zeros(out, dtype=torch.float64) if norm.bias is None else norm.bias.detach().double()  # pyright: ignore[reportUnnecessaryComparison]
    factor = gamma / (norm.running_var.double() + norm.eps).sqrt()
    return factor, beta + (own - norm.running_mean.double()) * factor


def deployed_layer(
    layer: Computing,
    form: WeightForm | None,
    bits: int,
    norm: BatchNorm | None,
    grid: InputGrid | None,
    quantizer: nn.Module | None,
    output: nn.Module | None,
) -> DeployedLayer:
    """Return the layer that stands for ``layer``.

    Args:
        layer: with its quantized values as weight.
        form: integers, or codes and levels, of its weight; None where the weight is float.
        bits: width of the codes.
        norm: the BatchNorm that reads its output alone, or None.
        grid: the integers of its input, or None.
        quantizer: its input quantizer, used where there is no grid.
        output: what its output passes through, or None.
    """
    transposed = isinstance(layer, Transposed)
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    out = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
    factor, bias = folded_factor(norm, out, layer.bias)
    if form is None:  # a float weight behind a quantized input
        values = layer.weight.detach()
        wide = per_output(values.double(), transposed, groups) * factor.reshape(-1, *[1] * (values.ndim - 1))
        values = from_output(wide, transposed, groups).float()
        parts: dict[str, Any] = {"weight": None, "codes": None, "levels": None, "values": values}
        scale = torch.ones(out)
    else:
        channel = form.scale.double().repeat(groups if transposed and form.scale.ndim else 1)
        scale = channel.expand(out) * factor
        table = form.integers if form.integers is not None else form.levels
        largest = _largest_output(form, layer, table, grid) * scale.abs()
        dead = (scale.abs() < SCALE_FLOOR) | (largest <= bias.abs() * NEGLIGIBLE)
        flip = (scale < 0) & ~dead
        parts = _signed_parts(form, flip, dead, transposed, groups)
        if parts["weight"] is not None:
            scale = torch.where(dead, 1.0, scale.abs())
    return DeployedLayer(
        _geometry(layer), **parts, scale=scale.float(), bias=bias.float(), bits=bits,
        grid=grid, input_quantizer=None if grid is not None else quantizer, output_module=output,
    )  # fmt: skip


def _largest_output(form: WeightForm, layer: Computing, table: Tensor, grid: InputGrid | None) -> float:
    """Return a bound on any sum of the layer, in units of its scale; infinite where the input has no bound."""
    if grid is None:
        return float("inf")
    fan = form.codes.numel() // max(1, form.codes.shape[1 if isinstance(layer, Transposed) else 0])
    largest = float(table.abs().max()) if table.numel() else 0.0
    return fan * largest * grid.largest * grid.step


def _signed_parts(
    form: WeightForm, flip: Tensor, dead: Tensor, transposed: bool, groups: int
) -> dict[str, Tensor | None]:
    """Return integers with the sign of each output channel's factor in them, and zeros where the factor is nothing.

    Codes and levels stay what they are: their sums are of floats, so that a scale may be negative or zero.
    """
    if form.integers is not None:
        wide = per_output(form.integers.short(), transposed, groups)
        sign = torch.where(dead, 0, torch.where(flip, -1, 1)).to(torch.int16)
        wide = wide * sign.reshape(-1, *[1] * (wide.ndim - 1))
        if not wide.numel() or (int(wide.min()) >= INT8[0] and int(wide.max()) <= INT8[1]):
            return {
                "weight": from_output(wide, transposed, groups).to(torch.int8),
                "codes": None, "levels": None, "values": None,
            }  # fmt: skip
    return {"weight": None, "codes": form.codes, "levels": form.levels, "values": None}


def _geometry(layer: Computing) -> Computing:
    """Return the layer without weight, hooks and quantizers."""
    plain = copy.copy(layer)
    for attribute in ("_parameters", "_modules", "_buffers"):
        vars(plain)[attribute] = {}
    for attribute in [a for a in vars(plain) if a.endswith("_hooks") or "_hooks_" in a]:
        vars(plain)[attribute] = type(vars(plain)[attribute])()
    bias = layer.bias
    plain.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False))
    plain.register_parameter("weight", None)
    return plain


def deployed_embedding(form: WeightForm, bits: int) -> DeployedEmbedding:
    """Return the table that stands for an embedding."""
    if form.integers is not None:
        return DeployedEmbedding(weight=form.integers, codes=None, levels=None, scale=form.scale, bits=bits)
    return DeployedEmbedding(weight=None, codes=form.codes, levels=form.levels, scale=form.scale, bits=bits)
