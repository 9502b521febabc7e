"""Files that engines run, each made from the one integer reference model (:mod:`wnq.integer`) and proven when it is written.

One dialect a file or folder. ``onnx`` serves ONNX Runtime and OpenVINO.
"""

from wnq.export.exporting import DIALECTS, export_model
from wnq.export.proof import ProofError

__all__ = ["DIALECTS", "ProofError", "export_model"]
