"""The registry of procedures: a short function a procedure, named as the procedure is in recipes."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from wnq.procedures.procedure import Procedure
from wnq.registered import Registered, find, new_signature


@dataclass(frozen=True)
class ProcedureInfo(Registered[Procedure]):
    """What the registry knows of a procedure.

    Attributes:
        name: the registered function's name.
        paper: where it was published, for example ``arXiv:1707.09870``.
        function: the registered function; its docstring is the procedure's page.
    """


_REGISTRY: dict[str, ProcedureInfo] = {}


def register_procedure(*, paper: str) -> Callable[[Callable[..., Procedure]], Callable[..., Procedure]]:
    """Register a function that returns a fresh :class:`Procedure`. Its parameters have defaults of plain JSON types.

    Args:
        paper: for example ``arXiv:1707.09870``.

    Raises:
        ValueError: the name is taken, or a parameter has no default.
    """

    def decorate(function: Callable[..., Procedure]) -> Callable[..., Procedure]:
        name = function.__name__
        signature = new_signature("procedure", function, _REGISTRY)

        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Procedure:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            procedure = function(*bound.args, **bound.kwargs)
            procedure.name, procedure.options = name, MappingProxyType(dict(bound.arguments))
            return procedure

        _REGISTRY[name] = ProcedureInfo(name, paper, build)
        return build

    return decorate


def get_procedure(name: str, **options: Any) -> Procedure:
    """Build a fresh procedure from its name and options.

    Raises:
        ValueError: unknown procedure or option (with the closest names), or a value out of range.
    """
    return find("procedure", name, _REGISTRY).build("procedure", options)


def list_procedures() -> list[ProcedureInfo]:
    """Return every registered procedure, by name."""
    return [_REGISTRY[name] for name in sorted(_REGISTRY)]


def check_number(value: object, where: str, *, low: float = 0.0, high: float = float("inf")) -> float:
    """Return ``value`` if it is a finite number in ``[low, high]``, else raise ``ValueError``."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or not low <= value <= high
        or value == high == float("inf")
    ):
        limit = f"at least {low:g}" if high == float("inf") else f"from {low:g} to {high:g}"
        raise ValueError(f"{where} must be a finite number {limit}, got {value!r}.")
    return float(value)


def check_flag(value: object, where: str) -> bool:
    """Return ``value`` if it is true or false, else raise ``ValueError``."""
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {value!r}.")
    return value
