"""Engines that run an exported file, one file each, and what they say of how they run it."""

from importlib import import_module
from pathlib import Path

from wnq.export.engines.engine import Engine, Operator
from wnq.export.engines.timing import latency, processor
from wnq.names import check_choice

__all__ = ["ENGINES", "Engine", "Operator", "latency", "open_engine", "processor"]

ENGINES = {
    "onnxruntime": ("wnq.export.engines.onnxruntime:OnnxRuntime", "onnx"),
    "openvino": ("wnq.export.engines.openvino:OpenVino", "openvino"),
    "torch": ("wnq.export.engines.torch:Torch", ""),
    "executorch": ("wnq.export.engines.executorch:ExecuTorch", "executorch"),
    "qonnx": ("wnq.export.engines.qonnx:Qonnx", "qonnx"),
}
"""Name -> where its class is, and the extra of wnq that brings its package."""


def open_engine(name: str, path: str | Path, *, accuracy_level: int = 0) -> Engine:
    """Load a file.

    Raises:
        ValueError: an unknown engine.
        ModuleNotFoundError: the engine's package is not installed.
    """
    where, extra = ENGINES[check_choice(name, ENGINES, where="engine")]
    module, _, kind = where.partition(":")
    try:
        return getattr(import_module(module), kind)(Path(path), accuracy_level=accuracy_level)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed: pip install "wnq[{extra}]".', name=error.name
        ) from None
