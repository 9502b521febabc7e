"""Training procedures, one paper a file. To add one, write one file with one registered function into this folder."""

import importlib
import pkgutil

from wnq.procedures.extragradient import looked_ahead
from wnq.procedures.procedure import Procedure
from wnq.procedures.registry import ProcedureInfo, get_procedure, list_procedures, register_procedure

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["Procedure", "ProcedureInfo", "get_procedure", "list_procedures", "looked_ahead", "register_procedure"]
