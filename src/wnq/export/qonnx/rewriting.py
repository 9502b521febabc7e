"""From a Q/DQ graph to QONNX operators: the same values, and the width of each, which 8-bit integers do not tell.

``Quant(x, scale, zero, bits)`` is ``scale * round(clip(x / scale))``; ``BipolarQuant(x, scale)`` is ``scale`` with the sign of x. A
weight is a float tensor that its ``Quant`` leaves as it is. Every zero point is 0: qonnx infers no width from others, and FINN
refuses them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wnq.export.onnx.graph import (
    PRODUCTS,
    array_of,
    constant_of,
    drop_unread_,
    initializers,
    readers_of,
    replace_initializers_,
    tensor_of,
)
from wnq.export.onnx.small import unpack_

DOMAIN, QONNX_OPSET = "qonnx.custom_op.general", 1
"""Where QONNX's operators are defined."""


@dataclass(frozen=True)
class Width:
    """The integers of one ``Quant``.

    Attributes:
        bits: >= 1; >= 2 where signed, because qonnx takes one signed bit for ±1.
        signed: whether they start below zero.
        narrow: whether the smallest of the signed ones is left out, so that they are symmetric.
    """

    bits: int
    signed: bool
    narrow: bool

    @property
    def low(self) -> int:
        """The smallest integer."""
        return -(2 ** (self.bits - 1)) + self.narrow if self.signed else 0

    @property
    def high(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - self.signed) - 1


def width_of(low: int, high: int, planned: int = 1) -> Width:
    """Return the narrowest width, of ``planned`` bits or more, that holds the integers from ``low`` to ``high``."""
    if low >= 0:
        return Width(max(1, planned, high.bit_length()), False, False)
    bits = max(2, planned, 1 + max(high, -low - 1).bit_length())
    return Width(bits, True, low > -(2 ** (bits - 1)))


@dataclass
class Rewritten:
    """What the file says.

    Attributes:
        weights: layer -> planned bits and stated bits of its weight under a ``Quant``.
        bipolar: layers whose weight is under a ``BipolarQuant``.
        clipped: layers whose input has a ``Clip`` before its ``Quant``, because no width has exactly these integers; empty names
            for inputs that no product reads.
    """

    weights: dict[str, tuple[int, int]] = field(default_factory=dict[str, tuple[int, int]])
    bipolar: list[str] = field(default_factory=list[str])
    clipped: list[str] = field(default_factory=list[str])


def rewrite_(model: Any, planned: Mapping[str, int]) -> Rewritten:
    """Turn a model from :func:`wnq.export.onnx.trace` into QONNX, in place.

    Args:
        model: an ``onnx.ModelProto``.
        planned: layer -> bits of its weight's codes.

    Returns:
        What the file says of the widths.
    """
    from onnx import helper

    unpack_(model)  # tables of levels become the floats that they stand for
    rewriting = _Rewriting(model, planned)
    nodes = [new for node in model.graph.node for new in rewriting.replaced(node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    replace_initializers_(model, {name: [value] for name, value in rewriting.stored.items()})
    model.opset_import.append(helper.make_opsetid(DOMAIN, QONNX_OPSET))
    drop_unread_(model)
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    return rewriting.report


class _Rewriting:
    """The graph, and what is to be added to it."""

    def __init__(self, model: Any, planned: Mapping[str, int]) -> None:
        self.model = model
        self.planned = planned
        self.values = initializers(model)
        self.made = {name: node for node in model.graph.node for name in node.output}
        self.stored: dict[str, Any] = {}
        self.report = Rewritten()

    def replaced(self, node: Any) -> list[Any]:
        """Return what stands for a node; all that it reads has been asked for before."""
        if node.op_type == "DequantizeLinear":
            return self._weight(node) if node.input[0] in self.values else self._input(node)
        if node.op_type in PRODUCTS and node.input[1] in self.values and not node.input[1].endswith(".weight"):
            node.input[1] = self._store(f"{node.name or node.output[0]}.weight", self._array(node.input[1]))
        if node.op_type == "Sub" and node.input[1].endswith(".negative_bias"):
            bias = self._store(f"{node.input[1].removesuffix('.negative_bias')}.bias", -self._array(node.input[1]))
            node.op_type, node.input[1] = "Add", bias
        if node.op_type in ("Clip", "Resize"):
            self._fill_(node)
        return [node]

    def _fill_(self, node: Any) -> None:
        """Write out bounds of a clip and the region of a resizing, where a node leaves them out; qonnx does not execute that."""
        fillings: dict[int, Any] = {}
        if node.op_type == "Resize":
            fillings = {1: np.zeros(0)}
        elif any(self._array(name).dtype == np.float32 for name in node.input[1:] if name in self.values):
            fillings = {1: -np.inf, 2: np.inf}
        for place, numbers in fillings.items():
            if place < len(node.input) and not node.input[place]:
                node.input[place] = self._store(f"{node.output[0]}:{place}", numbers)

    def _input(self, node: Any) -> list[Any]:
        """Replace Q, perhaps a clip of codes, and DQ."""
        from onnx import helper

        zero = int(self._array(node.input[2]))
        low, high = np.iinfo(self._array(node.input[2]).dtype).min, np.iinfo(self._array(node.input[2]).dtype).max
        before = self.made[node.input[0]]
        if before.op_type == "Clip":
            low, high = (int(self._array(name)) for name in before.input[1:3])
            before = self.made[before.input[0]]
        low, high = int(low) - zero, int(high) - zero
        source, scale, width = before.input[0], self._array(node.input[1]), width_of(low, high)
        nodes: list[Any] = []
        if (width.low, width.high) != (low, high):
            layer = next((reader.name for reader in readers_of(self.model, node.output[0])), "")
            self.report.clipped.append(layer)
            # An end divided by the scale is within a rounding of its integer, so it rounds to that integer.
            ends = [
                self._store(f"{node.output[0]}:{side}", scale * end) for side, end in (("low", low), ("high", high))
            ]
            nodes.append(helper.make_node("Clip", [source, *ends], [f"{node.output[0]}:clip"]))
            source = nodes[0].output[0]
        elif not width.signed and not self._is_rectified(source):
            # It changes nothing, and FINN takes unsigned integers from a ReLU alone, which it then removes.
            nodes.append(helper.make_node("Relu", [source], [f"{node.output[0]}:relu"]))
            source = nodes[0].output[0]
        return [*nodes, self._quant(source, node.output[0], self._store(f"{node.output[0]}:scale", scale), width)]

    def _is_rectified(self, name: str) -> bool:
        """Whether a value comes from a ReLU that nothing else reads."""
        return name in self.made and self.made[name].op_type == "Relu" and len(readers_of(self.model, name)) == 1

    def _weight(self, node: Any) -> list[Any]:
        """Replace the DQ of a weight."""
        from onnx import helper

        layer = node.input[0].rpartition(".")[0] or node.output[0]
        integers, scale = self._array(node.input[0]), self._array(node.input[1])
        if scale.ndim and np.all(scale == scale[0]):
            scale = scale[0]
        if scale.ndim:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            scale = scale.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
        weight = self._store(f"{layer}.weight", integers.astype(np.float32) * scale)
        stored = self._store(f"{layer}.scale", scale)
        planned = self.planned.get(layer, 1)
        if planned == 1 and integers.size and np.all(np.abs(integers) == 1):
            self.report.bipolar.append(layer)
            return [helper.make_node("BipolarQuant", [weight, stored], [node.output[0]], domain=DOMAIN)]
        width = width_of(*((int(integers.min()), int(integers.max())) if integers.size else (0, 0)), planned)
        if layer in self.planned:
            self.report.weights[layer] = planned, width.bits
        return [self._quant(weight, node.output[0], stored, width)]

    def _quant(self, source: str, output: str, scale: str, width: Width) -> Any:
        from onnx import helper

        inputs = [source, scale, self._store("zero", 0), self._store(f"bits{width.bits}", width.bits)]
        return helper.make_node(
            "Quant", inputs, [output], domain=DOMAIN, signed=int(width.signed), narrow=int(width.narrow),
            rounding_mode="ROUND",
        )  # fmt: skip

    def _array(self, name: str) -> Any:
        return array_of(constant_of(name, self.values, self.made))

    def _store(self, name: str, numbers: Any) -> str:
        """Add float32 numbers under a name, or under one like it if others have that already."""
        numbers, free, count = np.asarray(numbers, np.float32), name, 1
        while not self._is_free(free, numbers):
            stem, _, part = name.rpartition(".")
            free, count = f"{stem}:{count}.{part}", count + 1
        self.stored.setdefault(free, tensor_of(free, numbers))
        return free

    def _is_free(self, name: str, numbers: Any) -> bool:
        """Whether no other floats have a name; the integers of a weight give theirs up."""
        value = self.stored.get(name, self.values.get(name))
        if value is None or array_of(value).dtype != np.float32:
            return True
        return array_of(value).shape == numbers.shape and np.array_equal(array_of(value), numbers)
