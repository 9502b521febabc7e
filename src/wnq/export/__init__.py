"""Files that engines run, each made from the one integer reference model (:mod:`wnq.integer`) and proven when it is written.

:mod:`wnq.export.dialect` says what a dialect is and lists them, :mod:`wnq.export.engines` the engines.
"""

from wnq.export.dialect import DIALECTS, Dialect
from wnq.export.exporting import export_model
from wnq.export.proof import ProofError

__all__ = ["DIALECTS", "Dialect", "ProofError", "export_model"]
