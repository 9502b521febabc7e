"""Engines that run an exported file, and what they say of how they run it."""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

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


@dataclass(frozen=True)
class Operator:
    """One product of the engine's optimized graph: its layer (if the engine kept the name), its kind, and whether it is integer."""

    layer: str
    kind: str
    integer: bool


class Engine(Protocol):
    """A loaded file."""

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output, a NumPy array."""
        ...

    def operators(self) -> list[Operator]:
        """Return the products of the optimized graph."""
        ...


class OnnxRuntime:
    """ONNX Runtime on one thread of the CPU, without spinning.

    Args:
        content: an ONNX model.
        accuracy_level: of products with packed weights: 0 is exact, 4 rounds their inputs to 8 bits by blocks and is fast.
    """

    def __init__(self, content: bytes, *, accuracy_level: int = 0) -> None:
        import tempfile

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
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self._optimized = onnx.load(options.optimized_model_filepath, load_external_data=False)
        self._names = [value.name for value in self._session.get_inputs()]

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output."""
        return self._session.run(None, dict(zip(self._names, inputs, strict=True)))[0]

    def operators(self) -> list[Operator]:
        """Return the products of the optimized graph."""
        return [
            Operator(node.name, node.op_type, node.op_type in INTEGER_OPERATORS)
            for node in self._optimized.graph.node
            if node.op_type in INTEGER_OPERATORS | FLOAT_OPERATORS
        ]


class OpenVino:
    """OpenVINO on one thread of the CPU, in float32 where it is not in integers; its default is bfloat16 on some processors."""

    def __init__(self, content: bytes, *, accuracy_level: int = 0) -> None:
        import openvino

        self.version = f"openvino {openvino.get_version()}"
        self.settings: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
        if accuracy_level == 0:
            self.settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        core: Any = openvino.Core()
        model = core.read_model(content)
        self._model = core.compile_model(model, "CPU", {**self.settings, "INFERENCE_NUM_THREADS": 1})

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output."""
        return np.array(self._model(list(inputs))[0])

    def operators(self) -> list[Operator]:
        """Return the products of the optimized graph."""
        found: list[Operator] = []
        for node in self._model.get_runtime_model().get_ops():
            info = {
                key: node.get_rt_info()[key].value for key in ("layerType", "runtimePrecision", "originalLayersNames")
            }
            if info["layerType"] in ("Convolution", "Deconvolution", "FullyConnected", "MatMul"):
                layer = str(info["originalLayersNames"]).split(",")[0]
                found.append(Operator(layer, info["layerType"], info["runtimePrecision"] in ("u8", "i8")))
        return found


ENGINES: dict[str, Any] = {"onnxruntime": OnnxRuntime, "openvino": OpenVino}


def open_engine(name: str, path: str | Path, *, accuracy_level: int = 0) -> Engine:
    """Load a file.

    Small files are unpacked for OpenVINO, which would otherwise fold their weights to floats.

    Raises:
        ModuleNotFoundError: the engine's package is not installed.
    """
    content = Path(path).read_bytes()
    try:
        if name == "openvino":
            import onnx

            from wnq.export.onnx.small import unpack_

            content = unpack_(onnx.load_from_string(content)).SerializeToString()
        return ENGINES[name](content, accuracy_level=accuracy_level)
    except ModuleNotFoundError as error:
        extra = "openvino" if error.name == "openvino" else "onnx"
        raise ModuleNotFoundError(
            f'{error.name} is not installed: pip install "wnq[{extra}]".', name=error.name
        ) from None


def latency(engine: Engine, other: Engine, inputs: Sequence[Any], *, seconds: float) -> tuple[float, float, int]:
    """Return median milliseconds of one run in each of two engines, taken in turn, and the number of runs."""
    times: tuple[list[float], list[float]] = ([], [])
    for one in (engine, other):
        one.run(inputs)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for one, taken in zip((engine, other), times, strict=True):
            start = time.perf_counter()
            one.run(inputs)
            taken.append(1000 * (time.perf_counter() - start))
    return float(np.median(times[0])), float(np.median(times[1])), len(times[0])


def processor() -> dict[str, Any]:
    """Return the CPU's name, and which of the instructions that decide here it has."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    flags = set(fields.get("flags", "").split())
    return {
        "name": fields.get("model name", platform.processor() or platform.machine()),
        "avx2": "avx2" in flags,
        "vnni": bool(flags & {"avx512_vnni", "avx_vnni"}),
    }
