"""ONNX Runtime."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wnq.export.engines.engine import Operator

INTEGER_OPERATORS = frozenset(
    {
        "QLinearConv",
        "QGemm",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "ConvInteger",
    }
)
FLOAT_OPERATORS = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"}
)
"""ONNX Runtime's products, after its optimization."""


class OnnxRuntime:
    """ONNX Runtime on one thread of the CPU, without spinning.

    Args:
        path: an ONNX file.
        accuracy_level: of products with packed weights: 0 is exact, 4 rounds their inputs to 8 bits by blocks and is fast.
    """

    def __init__(self, path: Path, *, accuracy_level: int = 0) -> None:
        import onnx
        import onnxruntime

        self.version = f"onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
        self.settings = {"session.qdq_matmulnbits_accuracy_level": str(accuracy_level)}
        with tempfile.TemporaryDirectory() as folder:
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            self._session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
            self._optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output."""
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]

    def operators(self) -> list[Operator]:
        """Return the products of the optimized graph."""
        return [
            Operator(re.sub(r"_token_\d+$", "", node.name), node.op_type, node.op_type in INTEGER_OPERATORS)
            for node in self._optimized.graph.node
            if node.op_type in INTEGER_OPERATORS | FLOAT_OPERATORS
        ]
