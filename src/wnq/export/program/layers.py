"""Deployed layers in the form that torch's compiler and ExecuTorch know as integer layers: Q/DQ pairs of ``quantized_decomposed``.

These readers drop the bounds of grids below 8 bits, so a clip of the float input stands before each quantization.
"""

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq.export.program.weights import StoredWeight
from wnq.integer import DeployedLayer, DeployedOutput, InputGrid
from wnq.integer.biases import PAIR_LIMIT
from wnq.integer.layer import from_output, per_output
from wnq.prepared import move_output_


@dataclass(frozen=True)
class Style:
    """What a reader of programs wants.

    Attributes:
        codes: type of stored inputs, ``uint8`` or ``int8``; their smallest integer is stored as 0, or as -128.
        split: whether sums that could saturate on processors without VNNI (:mod:`wnq.export.onnx.split`) are taken in two halves.
        planes: whether weights are stored as planes of bits.
        folds: whether the reader computes what depends on stored numbers alone, once; else float products store float weights.
    """

    codes: torch.dtype = torch.uint8
    split: bool = True
    planes: bool = False
    folds: bool = True

    def form(self, grid: InputGrid) -> tuple[float, int, int, int, torch.dtype]:
        """Return a grid as Q and DQ take it: step, zero point, smallest and largest code, type."""
        low = int(torch.iinfo(self.codes).min)
        return grid.step, low - grid.low, low, low + grid.high - grid.low, self.codes


def runs_in_integers(layer: DeployedLayer) -> bool:
    """Whether the readers have an integer form of a layer: linear, or a convolution of one or two dimensions."""
    return layer.is_integer and isinstance(layer.geometry, nn.Linear | nn.Conv1d | nn.Conv2d)


def saturates(layer: DeployedLayer) -> bool:
    """Whether sums of a layer can saturate on processors without VNNI.

    Depthwise convolutions have kernels of their own, which take every product in 32 bits.
    """
    geometry = layer.geometry
    if not runs_in_integers(layer) or (
        not isinstance(geometry, nn.Linear) and geometry.groups == geometry.in_channels == geometry.out_channels
    ):
        return False
    assert layer.grid is not None and layer.weight is not None
    peak = int(layer.weight.short().abs().max()) if layer.weight.numel() else 0
    return 2 * (layer.grid.high - layer.grid.low) * peak > PAIR_LIMIT


def coded(x: Tensor, grid: InputGrid, style: Style) -> Tensor:
    """Return the codes of values."""
    clipped = F.hardtanh(x, grid.low * grid.step, grid.high * grid.step)
    return torch.ops.quantized_decomposed.quantize_per_tensor(clipped, *style.form(grid))


def decoded(codes: Tensor, grid: InputGrid, style: Style) -> Tensor:
    """Return the values of codes."""
    return torch.ops.quantized_decomposed.dequantize_per_tensor(codes, *style.form(grid))


@functools.cache
def _zeros(count: int) -> Tensor:
    """Return zero points; one tensor for all layers of as many channels, so that a file holds it once."""
    return torch.zeros(count, dtype=torch.int64)


class IntegerLayer(nn.Module):
    """Stands for a :class:`DeployedLayer` whose product readers know as one of integers.

    Args:
        layer: one that :func:`runs_in_integers`.
        style: of the reader.
        output: what its output is rounded to, or None.
    """

    scale: Tensor
    zero: Tensor
    bias: Tensor

    def __init__(self, layer: DeployedLayer, style: Style, output: InputGrid | None = None) -> None:
        super().__init__()
        assert layer.weight is not None and layer.grid is not None
        self.layer, self.grid, self.style, self.output = without_numbers(layer), layer.grid, style, output
        self.split = style.split and saturates(layer)
        self.stored = StoredWeight(layer.weight, 0, planes=style.planes)
        self.scale = nn.Buffer(layer.scale)
        self.zero = nn.Buffer(_zeros(len(layer.scale)))
        self.bias = nn.Buffer(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        layer = self.layer
        y = self._product(x)
        if self.output is not None:
            y = decoded(coded(y, self.output, self.style), self.output, self.style)
        return y if layer.output_module is None else layer.output_module(layer.geometry, x, y)

    def _product(self, x: Tensor) -> Tensor:
        layer, geometry = self.layer, self.layer.geometry
        padding: Any = 0
        if isinstance(geometry, nn.Conv1d | nn.Conv2d):
            padding = geometry.padding
            if geometry.padding_mode != "zeros" or isinstance(padding, str):
                # Before the quantization, so that this stands next to the product; padding and rounding can change places.
                mode = "constant" if geometry.padding_mode == "zeros" else geometry.padding_mode
                x, padding = F.pad(x, getattr(geometry, "_reversed_padding_repeated_twice"), mode=mode), 0  # noqa: B009
        codes, weight = coded(x, self.grid, self.style), self.stored()
        if self.split:
            codes = self._twice(codes)
            half = torch.bitwise_right_shift(weight, 1)
            weight = torch.cat([half, weight - half], 1)
        h = decoded(codes, self.grid, self.style)
        w = torch.ops.quantized_decomposed.dequantize_per_channel(
            weight, self.scale, self.zero, 0, -128, 127, torch.int8
        )
        if isinstance(geometry, nn.Linear):
            return F.linear(h, w, self.bias)
        convolve: Any = F.conv1d if isinstance(geometry, nn.Conv1d) else F.conv2d
        return convolve(h, w, self.bias, geometry.stride, padding, geometry.dilation, layer.groups)

    def _twice(self, codes: Tensor) -> Tensor:
        """Return an input's channels twice, group by group."""
        layer = self.layer
        if layer.is_linear:
            return torch.cat([codes, codes], -1)
        if layer.groups == 1:
            return torch.cat([codes, codes], 1)
        grouped = codes.unflatten(1, (layer.groups, -1))
        return torch.cat([grouped, grouped], 2).flatten(1, 2)


class FoldedLayer(nn.Module):
    """Stands for a :class:`DeployedLayer` whose product is one of floats. Its weights are stored as they are."""

    scale: Tensor
    bias: Tensor
    values: Tensor
    levels: Tensor

    def __init__(self, layer: DeployedLayer, style: Style) -> None:
        super().__init__()
        self.layer = without_numbers(layer)
        self.stored = None
        if layer.weight is not None:
            self.stored = StoredWeight(layer.weight, 1 if layer.is_transposed else 0, planes=style.planes)
        else:
            self.values = nn.Buffer(layer.table().clone())
        self.scale, self.bias = nn.Buffer(layer.scale), nn.Buffer(layer.bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's output."""
        layer, scale = self.layer, self.scale
        if layer.grid is not None:
            h, scale = layer.grid.integers(x), scale * layer.grid.step
        else:
            h = x if layer.input_quantizer is None else layer.input_quantizer(x)
        total = layer.combine(h, self.values if self.stored is None else self.stored().float(), output_size)
        y = total * layer.along_output(scale, total) + layer.along_output(self.bias, total)
        return y if layer.output_module is None else layer.output_module(layer.geometry, x, y)


class FloatLayer(nn.Module):
    """Stands for a :class:`DeployedLayer` with float32 weights.

    Args:
        layer: any.
        style: of the reader; None for the same network without quantization, for a fair comparison of speed.
    """

    values: Tensor
    bias: Tensor

    def __init__(self, layer: DeployedLayer, style: Style | None) -> None:
        super().__init__()
        self.layer, self.style = without_numbers(layer), style
        table = per_output(layer.table(), layer.is_transposed, layer.groups)
        scaled = table * layer.scale.reshape(-1, *[1] * (table.ndim - 1))
        self.values = nn.Buffer(from_output(scaled, layer.is_transposed, layer.groups))
        self.bias = nn.Buffer(layer.bias)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's output."""
        layer, geometry, h = self.layer, self.layer.geometry, x
        if self.style is not None:
            if layer.grid is not None:
                h = decoded(coded(x, layer.grid, self.style), layer.grid, self.style)
            elif layer.input_quantizer is not None:
                h = layer.input_quantizer(x)
        if isinstance(geometry, nn.Linear):
            y = F.linear(h, self.values, self.bias)
        elif layer.is_transposed:
            y = layer.combine(h, self.values, output_size)
            y = y + layer.along_output(self.bias, y)
        else:
            y = geometry._conv_forward(h, self.values, self.bias)  # pyright: ignore[reportPrivateUsage, reportCallIssue, reportArgumentType]
        return y if layer.output_module is None else layer.output_module(geometry, x, y)


class ProgramOutput(nn.Module):
    """Stands for a :class:`DeployedOutput`."""

    def __init__(self, grid: InputGrid, style: Style) -> None:
        super().__init__()
        self.grid, self.style = grid, style

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the integers."""
        return decoded(coded(x, self.grid, self.style), self.grid, self.style)


def without_numbers(layer: DeployedLayer) -> DeployedLayer:
    """Return a layer that shares everything but weights and biases, which a program would store as well."""
    plain, geometry = copy.copy(layer), copy.copy(layer.geometry)
    for module, kind in ((plain, "_buffers"), (geometry, "_parameters")):
        setattr(module, kind, dict.fromkeys(getattr(module, kind)))
    vars(plain)["_modules"] = {**vars(plain)["_modules"], "geometry": geometry}
    return plain


def program_form(
    model: nn.Module,
    style: Style | None,
    *,
    floats: frozenset[str] = frozenset(),
    outputs: Mapping[str, InputGrid] = MappingProxyType({}),
) -> nn.Module:
    """Return a copy of an integer reference model in the form of programs.

    Args:
        model: of a :class:`wnq.integer.Conversion`.
        style: of the reader; None for the same network without quantization.
        floats: layers whose product is to be one of floats.
        outputs: layer -> what its output is rounded to.
    """
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, DeployedLayer | DeployedOutput):
            continue
        if id(module) not in made:
            made[id(module)] = _form(module, style, integer=name not in floats, output=outputs.get(name))
        new = move_output_(module, made[id(module)])
        if not name:
            return new
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, new)
    return model


def _form(
    module: DeployedLayer | DeployedOutput, style: Style | None, *, integer: bool, output: InputGrid | None
) -> nn.Module:
    if isinstance(module, DeployedOutput):
        return nn.Identity() if style is None else ProgramOutput(module.grid, style)
    if style is not None and integer and runs_in_integers(module):
        return IntegerLayer(module, style, output)
    return FoldedLayer(module, style) if style is not None and style.folds else FloatLayer(module, style)
