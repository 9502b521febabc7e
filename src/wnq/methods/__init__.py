"""The methods, one paper a file. To add one, write one file with one registered function into this folder.

A file may also register the paper's input quantizer, with :func:`wnq.activations.register_input`.
"""

import importlib
import pkgutil

from wnq.activations import list_inputs  # after this package, all of them are registered
from wnq.methods.registry import (
    COMMON,
    Method,
    MethodInfo,
    Recommended,
    get_method,
    list_methods,
    register,
)

for _file in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_file.name}")

__all__ = ["COMMON", "Method", "MethodInfo", "Recommended", "get_method", "list_inputs", "list_methods", "register"]
