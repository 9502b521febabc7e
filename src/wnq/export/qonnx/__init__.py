"""The ``qonnx`` dialect: ONNX with quantization operators that say widths in full, which FINN, hls4ml and other FPGA flows read."""

from wnq.export.qonnx.rewriting import DOMAIN, Rewritten, Width, rewrite_, width_of
from wnq.export.qonnx.writing import write_qonnx

__all__ = ["DOMAIN", "Rewritten", "Width", "rewrite_", "width_of", "write_qonnx"]
