"""OpenVINO."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wnq.export.engines.engine import Operator


class OpenVino:
    """OpenVINO on one thread of the CPU, in float32 where it is not in integers; its default is bfloat16 on some processors.

    Args:
        path: an ONNX file. A small one is unpacked: OpenVINO would fold its weights to floats.
        accuracy_level: of products with packed weights; 0 is exact.
    """

    def __init__(self, path: Path, *, accuracy_level: int = 0) -> None:
        import onnx
        import openvino

        from wnq.export.onnx.small import unpack_

        self.version = f"openvino {openvino.get_version()}"
        self.settings: dict[str, str] = {"INFERENCE_PRECISION_HINT": "f32"}
        if accuracy_level == 0:
            self.settings["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = "0"
        core: Any = openvino.Core()
        model = core.read_model(unpack_(onnx.load(path)).SerializeToString())
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
                names = re.split("[,/]", str(info["originalLayersNames"]))
                layer = next((name for name in names if not re.fullmatch("v[0-9a-z]{1,5}", name)), "")  # values' names
                found.append(Operator(layer, info["layerType"], info["runtimePrecision"] in ("u8", "i8")))
        return found
