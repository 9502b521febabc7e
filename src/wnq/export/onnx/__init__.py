"""The ``onnx`` dialect: one Q/DQ file for ONNX Runtime and OpenVINO, in a fast and a small flavour of the same numbers."""

from wnq.export.onnx.small import unpack_
from wnq.export.onnx.tracing import trace
from wnq.export.onnx.writing import OnnxFile, write_onnx

__all__ = ["OnnxFile", "trace", "unpack_", "write_onnx"]
