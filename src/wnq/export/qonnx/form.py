"""The integer reference model in the form that becomes QONNX: every integer under one dequantization, of a whole weight."""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq.export.onnx.operators import dequantize
from wnq.integer import DeployedEmbedding, DeployedLayer
from wnq.integer.layer import from_output, per_output
from wnq.integer.weights import level_values

INT16 = 2**15 - 1


class Table(nn.Module):
    """Stands for a :class:`DeployedEmbedding`: the table is scaled, then its rows are gathered."""

    weight: Tensor
    inner: Tensor
    zero: Tensor

    def __init__(self, layer: DeployedEmbedding) -> None:
        super().__init__()
        self.bits = layer.bits
        weight = layer.weight
        if weight is None:
            assert layer.codes is not None and layer.levels is not None
            weight = level_values(layer.codes, layer.levels, 0)
            weight = weight.to(torch.int16) if _are_integers(weight) else weight
        self.is_integer = not weight.is_floating_point()
        self.inner = nn.Buffer(layer.scale)
        self.zero = nn.Buffer(torch.zeros(layer.scale.shape, dtype=torch.int8))
        factor = layer.scale.reshape(-1, 1) if layer.scale.ndim else layer.scale
        self.weight = nn.Buffer(weight if self.is_integer else weight * factor)

    def forward(self, index: Tensor) -> Tensor:
        """Map indices to rows."""
        table = dequantize(self.weight, self.inner, self.zero, 0) if self.is_integer else self.weight
        return F.embedding(index, table)


def qonnx_form(model: nn.Module) -> nn.Module:
    """Return a copy of an integer reference model whose tables of integer levels are integers.

    The levels of the full grid at 8 bits are integers that int8 does not hold, and ``Quant`` says in 9 bits. Tables of other levels
    stay what they are.
    """
    model = copy.deepcopy(model)
    if isinstance(model, DeployedEmbedding):
        return Table(model)
    for layer in model.modules():
        if isinstance(layer, DeployedLayer) and layer.codes is not None:
            _settle_(layer)
        for name, child in list(layer.named_children()):
            if isinstance(child, DeployedEmbedding):
                setattr(layer, name, Table(child))
    return model


def _settle_(layer: DeployedLayer) -> None:
    """Give a layer the integers that its codes stand for, in place, if they are integers."""
    table = layer.table()
    if not _are_integers(table):
        return
    wide = per_output(table, layer.is_transposed, layer.groups)
    # Scales of integers are positive; a factor of zero makes zeros.
    wide = wide * layer.scale.sign().reshape(-1, *[1] * (wide.ndim - 1))
    layer.weight = from_output(wide, layer.is_transposed, layer.groups).to(torch.int16)
    layer.codes = layer.levels = None
    layer.scale = torch.where(layer.scale == 0, 1.0, layer.scale.abs())


def _are_integers(values: Tensor) -> bool:
    return bool((values == values.round()).all()) and (not values.numel() or float(values.abs().max()) <= INT16)
