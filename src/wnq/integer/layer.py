"""The layers of the integer reference model: integer weights, an exact sum, then one scale and one bias a channel."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq.integer.inputs import InputGrid
from wnq.integer.weights import level_values
from wnq.quantizer import along_axis

FLOAT_EXACT = 2**24
"""Every integer up to here is a float32. A sum of integers whose magnitudes add up to no more is therefore exact in float32 in
whatever order it is taken, since all its partial sums are such integers too. Larger ones are taken in float64, exact to 2**53."""

Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Computing = Convolution | Transposed | nn.Linear


class DeployedLayer(nn.Module):
    """A convolution, transposed convolution or linear layer as an integer engine runs it.

    ``y = (sum of integer inputs * integer weights) * input step * scale + bias``, BatchNorm being part of scale and bias.

    Attributes:
        geometry: the layer of torch's that this one stands for, without its weight: strides, padding, groups, and the like.
        weight: int8, the shape of the layer's weight; or None.
        codes: uint8, where the weight is not one of small integers: positions in ``levels``; or None.
        levels: float32, ``(n_levels,)`` or ``(channels, n_levels)``; or None.
        values: float32, where the weight was left in floating point; or None.
        scale: float32, ``(out,)``; > 0 for integers.
        bias: float32, ``(out,)``.
        grid: integers of the input; None for a float input.
        input_quantizer: what the input passes through instead, a table where that is possible, if its quantizer is no such grid.
        output_module: what the output passes through; almost always None.
        bits: width of a weight's code; 32 for ``values``.
        largest_sum: what no sum exceeds in magnitude, whatever the input; 0 where the sums are not of integers.
    """

    weight: Tensor | None
    codes: Tensor | None
    levels: Tensor | None
    values: Tensor | None
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        geometry: Computing,
        *,
        weight: Tensor | None,
        codes: Tensor | None,
        levels: Tensor | None,
        values: Tensor | None,
        scale: Tensor,
        bias: Tensor,
        bits: int,
        grid: InputGrid | None,
        input_quantizer: nn.Module | None,
        output_module: nn.Module | None,
    ) -> None:
        super().__init__()
        self.geometry = geometry
        self.register_buffer("weight", weight)
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.bits = bits
        self.grid = grid
        self.input_quantizer = input_quantizer
        self.output_module = output_module
        self.largest_sum = 0
        if weight is not None and grid is not None and weight.numel():
            magnitudes = per_output(weight.double().abs(), self.is_transposed, self.groups)
            self.largest_sum = int(magnitudes.flatten(1).sum(1).max().item()) * grid.largest

    @property
    def is_linear(self) -> bool:
        """Whether this is a linear layer."""
        return isinstance(self.geometry, nn.Linear)

    @property
    def is_transposed(self) -> bool:
        """Whether this is a transposed convolution, whose output channels are the weight's second dimension."""
        return isinstance(self.geometry, Transposed)

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 of a linear layer."""
        return 1 if isinstance(self.geometry, nn.Linear) else self.geometry.groups

    def table(self) -> Tensor:
        """Return what the sum runs over, float32, before the scale: integers, or levels, or values."""
        if self.weight is not None:
            return self.weight.float()
        if self.codes is not None and self.levels is not None:
            return level_values(self.codes, self.levels, 1 if self.is_transposed else 0)
        assert self.values is not None
        return self.values

    @property
    def is_integer(self) -> bool:
        """Whether both sides of the sum are integers."""
        return self.weight is not None and self.grid is not None

    def combine(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's sum of products without bias."""
        layer = self.geometry
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight)
        if isinstance(layer, Convolution):
            return layer._conv_forward(x, weight, None)  # pyright: ignore[reportPrivateUsage, reportArgumentType]
        dims = len(layer.kernel_size)
        # torch's own rule for the requested size of the output, its only private part.
        more = layer._output_padding(  # pyright: ignore[reportPrivateUsage]
            x, output_size, list(layer.stride), list(cast("tuple[int, ...]", layer.padding)), list(layer.kernel_size), dims,
            list(layer.dilation),
        )  # fmt: skip
        transpose = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[dims]
        return transpose(x, weight, None, layer.stride, layer.padding, more, layer.groups, layer.dilation)  # pyright: ignore[reportArgumentType]

    def along_output(self, per_channel: Tensor, y: Tensor) -> Tensor:
        """View an ``(out,)`` tensor so that it broadcasts along the channels of an output."""
        if self.is_linear:
            return per_channel
        dims = len(cast(Convolution, self.geometry).kernel_size)
        return along_axis(per_channel, y.ndim, y.ndim - dims - 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Return the layer's output, float32, for its float input."""
        scale = self.scale
        if self.is_integer:
            assert self.grid is not None and self.weight is not None
            exact = torch.float32 if self.largest_sum <= FLOAT_EXACT else torch.float64
            total = self.combine(self.grid.integers(x).to(exact), self.weight.to(exact), output_size)
            scale = (scale.double() * self.grid.step).to(exact)
            y = (total * self.along_output(scale, total)).float()
        else:
            h = x if self.input_quantizer is None else self.input_quantizer(x)
            if self.grid is not None:
                h = self.grid.integers(x) * self.grid.step
            total = self.combine(h, self.table(), output_size)
            y = total * self.along_output(scale, total)
        y = y + self.along_output(self.bias, y)
        return y if self.output_module is None else self.output_module(self.geometry, x, y)

    def extra_repr(self) -> str:
        """Show what the layer computes in ``print(model)``."""
        form = "integers" if self.weight is not None else "codebook" if self.codes is not None else "float"
        return f"{form}, bits={self.bits}, input={self.grid or 'float'}"


def per_output(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Return a weight with its output channels first, ``(out, …)``; a transposed one holds them by groups, second."""
    if not transposed:
        return weight
    split = weight.unflatten(0, (groups, -1))  # (groups, in / groups, out / groups, …)
    return split.transpose(1, 2).flatten(0, 1)


def from_output(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """Reverse :func:`per_output`."""
    if not transposed:
        return weight
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()


class DeployedOutput(nn.Module):
    """Rounds what a module puts out: ``y = integer * step``.

    Attributes:
        grid: the integers and their step.
    """

    def __init__(self, grid: InputGrid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the integers, float32."""
        return self.grid.integers(x) * self.grid.step

    def extra_repr(self) -> str:
        """Show the grid in ``print(model)``."""
        return str(self.grid)


class DeployedEmbedding(nn.Module):
    """A table of integers: ``y = scale * integers[index]``.

    Attributes:
        weight: int8, ``(rows, features)``; or None.
        codes: uint8, the same shape, positions in ``levels``; or None.
        levels: float32, ``(n_levels,)`` or ``(rows, n_levels)``; or None.
        scale: float32, ``()`` or ``(rows,)``.
        bits: width of a code.
    """

    weight: Tensor | None
    codes: Tensor | None
    levels: Tensor | None
    scale: Tensor

    def __init__(
        self, *, weight: Tensor | None, codes: Tensor | None, levels: Tensor | None, scale: Tensor, bits: int
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("codes", codes)
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)
        self.bits = bits

    def forward(self, index: Tensor) -> Tensor:
        """Map indices ``(…)`` to ``(…, features)``, float32."""
        if self.weight is not None:
            rows = self.weight[index].float()
        else:
            assert self.codes is not None and self.levels is not None
            codes = self.codes[index].long()
            rows = self.levels[codes] if self.levels.ndim == 1 else torch.gather(self.levels[index], -1, codes)
        return rows * (self.scale[index].unsqueeze(-1) if self.scale.ndim else self.scale)
