"""Deployed layers in the form that translates to ONNX: Q, clip, DQ of the input; DQ of the weight; one operator with a bias."""

import copy

import torch
from torch import Tensor, nn

from wnq.export.onnx.operators import dequantize, look_up, round_input
from wnq.integer import DeployedEmbedding, DeployedLayer, DeployedOutput
from wnq.prepared import move_output_


class OnnxLayer(nn.Module):
    """Stands for a :class:`DeployedLayer` while a model is traced."""

    weight: Tensor
    scale: Tensor
    zero: Tensor
    levels: Tensor
    bias: Tensor

    def __init__(self, layer: DeployedLayer) -> None:
        super().__init__()
        # Sharing everything but the weights: geometry, quantizer and output module.
        self.layer = copy.copy(layer)
        self.form = "integer" if layer.weight is not None else "codebook" if layer.codes is not None else "float"
        self.outside = layer.is_transposed and layer.groups > 1
        """Whether the scales do not run along one dimension of the weight, and multiply the output instead."""
        weight = layer.weight if layer.weight is not None else layer.codes if layer.codes is not None else layer.values
        assert weight is not None
        # A linear layer is a product with (in, out), which engines know as the form of packed weights.
        self.weight = nn.Buffer(weight.t().contiguous() if layer.is_linear and self.form == "integer" else weight)
        self.axis = 1 if layer.is_transposed or (layer.is_linear and self.form == "integer") else 0
        self.bias = nn.Buffer(layer.bias)
        self.negative_bias = nn.Buffer(-layer.bias)
        self.scale = nn.Buffer(layer.scale)
        if layer.levels is not None:
            self.levels = nn.Buffer(layer.levels)
        # A scalar scale where the true ones cannot stand in the weight.
        self.inner = nn.Buffer(torch.ones(()) if self.outside else layer.scale)
        self.zero = nn.Buffer(torch.zeros(self.inner.shape, dtype=torch.int8))

    def values(self) -> Tensor:
        """Return the weight, scaled where that is possible."""
        if self.form == "integer":
            return dequantize(self.weight, self.inner, self.zero, self.axis)
        table = self.weight
        if self.form == "codebook":
            channels_first = self.axis == 1 and self.levels.ndim == 2
            codes = self.weight.transpose(0, 1) if channels_first else self.weight
            table = look_up(codes.contiguous(), self.levels)
            table = table.transpose(0, 1) if channels_first else table
        if self.outside:
            return table
        return table * self.scale.reshape([-1 if d == self.axis else 1 for d in range(table.ndim)])

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        layer, grid = self.layer, self.layer.grid
        if grid is not None:
            h = round_input(x, grid.step, grid.zero_point, grid.low, grid.high)
            if not layer.is_integer:
                # It changes nothing, and keeps ONNX Runtime from rounding float weights between two quantizations to 8 bits.
                h = torch.clamp(h, grid.low * grid.step, grid.high * grid.step)
        else:
            h = x if layer.input_quantizer is None else layer.input_quantizer(x)
        weight = self.values()
        if layer.is_linear:
            y = torch.matmul(h, weight if self.form == "integer" else weight.t())
            # ONNX Runtime would make a float product of an integer one followed by an addition, but not by a subtraction.
            y = y - self.negative_bias if layer.is_integer else y + self.bias
        elif self.outside or layer.is_transposed:
            y = layer.combine(h, weight)
            if self.outside:
                y = y * layer.along_output(self.scale, y)
            y = y + layer.along_output(self.bias, y)
        else:
            y = layer.geometry._conv_forward(h, weight, self.bias)  # pyright: ignore[reportCallIssue, reportPrivateUsage]
        return y if layer.output_module is None else layer.output_module(layer.geometry, x, y)


class OnnxEmbedding(nn.Module):
    """Stands for a :class:`DeployedEmbedding`: rows are gathered as integers, then scaled."""

    def __init__(self, layer: DeployedEmbedding) -> None:
        super().__init__()
        self.layer = layer
        self.zero = nn.Buffer(torch.zeros((), dtype=torch.int8))
        self.one = nn.Buffer(torch.ones(()))

    def forward(self, index: Tensor) -> Tensor:
        """Map indices to rows."""
        layer = self.layer
        if layer.weight is None:
            return layer(index)
        rows = layer.weight[index]
        if layer.scale.ndim == 0:
            return dequantize(rows, layer.scale, self.zero, 0)
        return dequantize(rows, self.one, self.zero, 0) * layer.scale[index].unsqueeze(-1)


class OnnxOutput(nn.Module):
    """Stands for a :class:`DeployedOutput`."""

    def __init__(self, output: DeployedOutput) -> None:
        super().__init__()
        self.grid = output.grid

    def forward(self, x: Tensor) -> Tensor:
        """Return the values of the integers."""
        return round_input(x, self.grid.step, self.grid.zero_point, self.grid.low, self.grid.high)


FORMS: dict[type[nn.Module], type[nn.Module]] = {
    DeployedLayer: OnnxLayer,
    DeployedEmbedding: OnnxEmbedding,
    DeployedOutput: OnnxOutput,
}


def onnx_form(model: nn.Module) -> nn.Module:
    """Return a copy of an integer reference model in the form that translates to ONNX."""
    model = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) in FORMS:
            if id(module) not in made:
                made[id(module)] = FORMS[type(module)](module)
            new = move_output_(module, made[id(module)])
            if not name:
                return new
            path, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(path), attribute, new)
    return model
