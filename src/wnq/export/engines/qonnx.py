"""The executor of the ``qonnx`` package."""

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from wnq.export.engines.engine import Operator

QUANTIZERS = frozenset({"Quant", "BipolarQuant"})

PRODUCTS = frozenset({"Conv", "ConvTranspose", "MatMul", "Gemm"})

MOVING = frozenset({"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity", "MaxPool"})
"""Operators that put out nothing but what they read, and zeros."""

IR_VERSION = 10
"""Of the files of one operator that the executor makes; onnx's own default may be newer than what ONNX Runtime loads."""


class Qonnx:
    """qonnx's executor, which computes one operator at a time, in floats.

    Args:
        path: a QONNX file.
        accuracy_level: of products with packed weights, which QONNX has not.
    """

    def __init__(self, path: Path, *, accuracy_level: int = 0) -> None:
        from importlib.metadata import version

        import onnx
        import qonnx  # noqa: F401  # pyright: ignore[reportUnusedImport]

        self.version = f"qonnx {version('qonnx')}"
        self.settings: dict[str, str] = {}
        self._file = onnx.load(path)
        self._made = {name: node for node in self._file.graph.node for name in node.output}
        self._fixed: dict[tuple[Any, ...], Any] = {}

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output.

        Raises:
            ValueError: an operator that qonnx cannot execute, with the layer that it follows.
        """
        from qonnx.core.onnx_exec import execute_onnx

        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes not in self._fixed:
            self._fixed[shapes] = self._with_shapes(shapes)
        model = self._fixed[shapes]
        names = [value.name for value in model.graph.input]
        with _loadable():
            outputs = execute_onnx(model, dict(zip(names, inputs, strict=True)))
        return outputs[model.graph.output[0].name]

    def operators(self) -> list[Operator]:
        """Return the products, which are integer where both sides come out of a quantizer."""
        return [
            Operator(node.name, node.op_type, all(self._is_quantized(name) for name in node.input[:2]))
            for node in self._file.graph.node
            if node.op_type in PRODUCTS
        ]

    def _is_quantized(self, name: str) -> bool:
        node = self._made.get(name)
        while node is not None and node.op_type in MOVING:
            node = self._made.get(node.input[0])
        if node is not None and node.op_type == "Concat":
            return all(self._is_quantized(part) for part in node.input)
        return node is not None and node.op_type in QUANTIZERS

    def _with_shapes(self, shapes: tuple[tuple[int, ...], ...]) -> Any:
        """Return the model for inputs of these shapes; the executor knows no other kind."""
        import onnx
        from qonnx.core.modelwrapper import ModelWrapper
        from qonnx.transformation.fold_constants import FoldConstants
        from qonnx.transformation.infer_shapes import InferShapes

        for node in self._file.graph.node:
            if "" in node.input:
                raise ValueError(self._refusal(node, "leaves out an optional input, which qonnx does not know"))
        proto = onnx.ModelProto()
        proto.CopyFrom(self._file)
        for value, shape in zip(proto.graph.input, shapes, strict=True):
            for dim, length in zip(value.type.tensor_type.shape.dim, shape, strict=True):
                dim.dim_value = length
        for value in proto.graph.output:
            value.type.tensor_type.ClearField("shape")
        with _loadable():
            model = ModelWrapper(proto).transform(InferShapes()).transform(FoldConstants([*QUANTIZERS]))
        for node in model.graph.node:
            for name in node.output:
                shape = model.get_tensor_shape(name)
                if shape is None or 0 in shape:
                    raise ValueError(self._refusal(node, "has an output whose shape qonnx does not know"))
        return model

    def _refusal(self, node: Any, why: str) -> str:
        names = [name for name in node.input if name]
        while names and (source := self._made.get(names[0])) is not None and not source.name:
            names = list(source.input)
        layer = self._made[names[0]].name if names and names[0] in self._made else ""
        where = f" behind layer {layer!r}" if layer else ""
        return (
            f"operator {node.op_type}{where} {why}, so that qonnx cannot execute it. Write that part of the model with other "
            "operators, or leave it out of the exported model."
        )


@contextlib.contextmanager
def _loadable() -> Generator[None]:
    """Let the executor make files that ONNX Runtime loads while the block runs."""
    import onnx

    before = onnx.IR_VERSION
    onnx.IR_VERSION = IR_VERSION
    try:
        yield
    finally:
        onnx.IR_VERSION = before
