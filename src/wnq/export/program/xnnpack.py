"""What XNNPACK needs beyond the plain program to run convolutions in integers, and to round no bias wrongly.

A product of integers must be followed by a quantization, and adds an int32 bias in units of input step times weight scale. As for
ONNX Runtime (:mod:`wnq.export.onnx.runtime`), convolutions that nothing quantizes get 8-bit values behind them, and integer biases
are searched with which sums pass the same thresholds of the next quantization as with the exact biases.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from wnq.export.onnx.biases import best_biases
from wnq.export.onnx.runtime import ENDS
from wnq.export.program.graph import Following, dequantize_apart_, following, quantize_ahead_, weighted_products
from wnq.export.program.layers import Style, program_form, runs_in_integers
from wnq.export.program.tracing import trace_program
from wnq.integer import DeployedLayer, InputGrid
from wnq.integer.biases import largest_gain

STYLE = Style(codes=torch.int8, split=False, folds=False)


@dataclass
class Tuned:
    """A model for XNNPACK.

    Attributes:
        source: the model that it was made from.
        model: integer layers with the numbers that XNNPACK gets.
        outputs: layer -> 8-bit integers behind it.
        floats: layers whose sums are of integers and that it runs in floating point.
        thresholds: layer -> those on the wrong side of a sum, and those that a sum can reach.
    """

    source: nn.Module
    model: nn.Module
    outputs: dict[str, InputGrid] = field(default_factory=dict[str, InputGrid])
    floats: set[str] = field(default_factory=set[str])
    thresholds: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])

    def leave_float_(self, layers: set[str]) -> None:
        """Let layers run in floating point, with the numbers that they had."""
        for name in layers:
            ours, theirs = (model.get_submodule(name) for model in (self.model, self.source))
            ours.load_state_dict(theirs.state_dict())
            self.outputs.pop(name, None)
            self.thresholds.pop(name, None)
        self.floats |= layers

    def program(self, inputs: tuple[Any, ...], *, largest_batch: int | None) -> Any:
        """Return the program."""
        form = program_form(self.model, STYLE, floats=frozenset(self.floats), outputs=self.outputs)
        program = trace_program(form, inputs, largest_batch=largest_batch)
        quantize_ahead_(program)
        dequantize_apart_(program)
        return program


def tuned(model: nn.Module, inputs: tuple[Any, ...], calibration: Sequence[tuple[Tensor, ...]]) -> Tuned:
    """Return a model for XNNPACK.

    Args:
        model: of a :class:`wnq.integer.Conversion`; it is only read.
        inputs: what its forward takes.
        calibration: batches of inputs, for 8-bit values behind convolutions that nothing quantizes; without any these stay float.
    """
    found = Tuned(model, copy.deepcopy(model))
    layers = {n: m for n, m in found.model.named_modules() if isinstance(m, DeployedLayer) and m.is_integer}
    products = weighted_products(found.program(inputs, largest_batch=None))
    count = Counter(name for name, _ in products)
    behind = {name: following(node) for name, node in products if name in layers}
    for name, layer in layers.items():
        path = behind.get(name)
        if (
            not runs_in_integers(layer)
            or path is None
            or count[name] > 1
            or not _can_be_quantized(layer, path, calibration)
        ):
            found.floats.add(name)
    open_ends = [name for name in behind if name not in found.floats and behind[name].quantization is None]
    for name, (low, high) in _ranges(found.model, open_ends, calibration).items():
        found.outputs[name] = _eight_bits(0.0 if behind[name].clips_at_zero else low, high)
    for name, path in behind.items():
        if name not in found.floats:
            found.thresholds[name] = _tune_(layers[name], found.outputs.get(name), path)
    return found


def _can_be_quantized(layer: DeployedLayer, path: Following, calibration: Sequence[Any]) -> bool:
    if path.quantization is not None:
        return True
    return bool(calibration) and not layer.is_linear and not path.is_output and layer.output_module is None


def _ranges(
    model: nn.Module, names: Iterable[str], calibration: Sequence[tuple[Tensor, ...]]
) -> dict[str, tuple[float, float]]:
    """Return the range, with zero in it, of each layer's output over the calibration data, all but its ends."""
    found = dict.fromkeys(names, (0.0, 0.0))

    def note(name: str, value: Tensor) -> None:
        low, high = found[name]
        ends = np.quantile(value.numpy(), (ENDS, 1 - ENDS))
        found[name] = min(low, float(ends[0])), max(high, float(ends[1]))

    def noting(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _module, _inputs, value: note(name, value)

    handles = [model.get_submodule(name).register_forward_hook(noting(name)) for name in found]
    try:
        with torch.no_grad():
            for batch in calibration if found else ():
                model(*batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _eight_bits(low: float, high: float) -> InputGrid:
    """Return 256 integers with a step that covers a range with zero in it."""
    step = float(np.float32(max(high - low, 1e-12) / 255))
    lowest = int(np.clip(np.rint(low / step), -255, 0))
    return InputGrid(step, lowest, lowest + 255, 8)


def _tune_(layer: DeployedLayer, output: InputGrid | None, path: Following) -> tuple[int, int]:
    """Give a layer integer biases, in place; return how many thresholds they miss, and of how many."""
    assert layer.weight is not None and layer.grid is not None
    if output is not None:
        step, low, high = output.step, output.low, output.high
    else:
        _, step, zero, lowest, highest = path.quantization.args[:5]
        low, high = lowest - zero, highest - zero
    unit = layer.grid.step * layer.scale.double().numpy()
    magnitudes = layer.weight.int().abs().flatten(1)
    largest = magnitudes.sum(1).numpy().astype(np.int64) * layer.grid.largest
    peak = int(magnitudes.max()) if magnitudes.numel() else 0
    thresholds = (np.arange(low, high) + 0.5) * step
    room = largest_gain(peak, layer.grid.high - layer.grid.low)
    new = best_biases(layer.bias.double().numpy(), unit, thresholds, room, largest)
    gain = torch.from_numpy(np.asarray(new.gain, np.int32)).reshape(-1, *[1] * (layer.weight.ndim - 1))
    layer.weight = (layer.weight.int() * gain).to(torch.int8)
    # XNNPACK's unit is the product of two float32 numbers, and its biases are floats divided by it.
    layer.scale = torch.from_numpy(new.unit / layer.grid.step).float()
    layer.bias = torch.from_numpy(new.bias * (layer.scale.double().numpy() * layer.grid.step)).float()
    return int(new.missed.sum()), int(new.asked.sum())
