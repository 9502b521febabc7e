"""Functions that are known by their names and build something: what the registries of methods and procedures share."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from wnq.names import did_you_mean

Built = TypeVar("Built")
Info = TypeVar("Info")


@dataclass(frozen=True)
class Registered(Generic[Built]):
    """What a registry knows of a function.

    Attributes:
        name: the function's name.
        paper: where it was published.
        function: all its parameters have defaults; its docstring is its page.
    """

    name: str
    paper: str
    function: Callable[..., Built]

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        return {name: p.default for name, p in inspect.signature(self.function).parameters.items()}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]

    def build(self, kind: str, options: Mapping[str, Any]) -> Built:
        """Call the function. ``kind`` is what error messages call it: ``"method"``.

        Raises:
            ValueError: it has no such option, with the closest one; or a value is out of range.
        """
        accepted = self.options
        for option in options:
            if option not in accepted:
                hint = did_you_mean(option, accepted)
                raise ValueError(
                    f"{kind} {self.name!r} has no option {option!r}.{hint} It takes: {', '.join(accepted)}."
                )
        return self.function(**options)


def find(kind: str, name: str, registry: Mapping[str, Info]) -> Info:
    """Look a function up by name.

    Raises:
        ValueError: unknown name, with the closest ones.
    """
    if name not in registry:
        hint = did_you_mean(name, registry, most=3)
        raise ValueError(f"unknown {kind} {name!r}.{hint} Available: {', '.join(sorted(registry))}.")
    return registry[name]


def new_signature(kind: str, function: Callable[..., Any], registry: Mapping[str, Any]) -> inspect.Signature:
    """Return the signature of a function that may be registered.

    Raises:
        ValueError: the name is taken, or a parameter has no default.
    """
    name = function.__name__
    if name in registry:
        raise ValueError(f"{kind} {name!r} is registered already; a {kind}'s name must be unique.")
    signature = inspect.signature(function)
    if missing := [n for n, p in signature.parameters.items() if p.default is p.empty]:
        raise ValueError(f"{kind} {name!r}: parameters {missing} need defaults, so that a name alone builds it.")
    return signature
