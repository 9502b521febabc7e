"""What every engine offers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Operator:
    """One product of the engine's optimized graph: its layer (if the engine kept the name), its kind, and whether it is integer."""

    layer: str
    kind: str
    integer: bool


class Engine(Protocol):
    """A loaded file, which runs on one thread of the CPU."""

    version: str
    """The package and its version."""
    settings: dict[str, str]
    """What a user must set to get the same numbers."""

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output, a NumPy array."""
        ...

    def operators(self) -> list[Operator]:
        """Return the products of the optimized graph."""
        ...
