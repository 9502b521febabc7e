"""The registry of methods: a method is a short function that composes normalizer, quantizer and scale.

The function's name is the method's name everywhere: in plans, recipes, files, the command line and the docs. To add one,
write one file with one registered function and import it at the end of this one.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor

from wnq.quantizer import FLOAT_BITS, Quantizer

WeightBuilder = Callable[[Tensor, int], Quantizer]
"""``(weight, output-channel axis) -> quantizer``, with learned parameters already set from the weight."""

InputBuilder = Callable[[], Quantizer]


@dataclass(frozen=True)
class Method:
    """A named recipe for one layer, rebuilt anywhere from ``(name, options)``.

    Attributes:
        weight: builds the weight quantizer; None leaves the weight in floating point.
        input: builds the input quantizer; None leaves the input in floating point.
        name: name in the registry.
        options: every option with its value, defaults included; plain JSON types.
    """

    weight: WeightBuilder | None = field(compare=False, repr=False)
    input: InputBuilder | None = field(compare=False, repr=False)
    name: str = ""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def with_options(self, **options: Any) -> "Method":
        """Return the same method with some options changed."""
        return get_method(self.name, **{**self.options, **options})

    def __reduce__(self) -> tuple[Callable[..., "Method"], tuple[str, dict[str, Any]]]:
        """Pickle by name and options: the builders are closures."""
        return _rebuild, (self.name, dict(self.options))

    @property
    def w_bits(self) -> int:
        """Width of the weights; 32 when they stay float."""
        return int(self.options.get("w_bits", MethodInfo.of(self.name).fixed_w_bits or FLOAT_BITS))

    @property
    def a_bits(self) -> int:
        """Width of the inputs; 32 when they stay float."""
        return int(self.options.get("a_bits", FLOAT_BITS))


@dataclass(frozen=True)
class MethodInfo:
    """What the registry knows of a method.

    Attributes:
        name: the registered function's name.
        paper: where it was published, for example ``arXiv:1907.00593``; empty for a baseline without a paper.
        function: the registered function; its docstring is the method's page.
        fixed_w_bits: width of the weights for a method that has no choice (1 for binary, 2 for ternary), else None.
    """

    name: str
    paper: str
    function: Callable[..., Method]
    fixed_w_bits: int | None = None

    @staticmethod
    def of(name: str) -> "MethodInfo":
        """Look a method up by name.

        Raises:
            ValueError: unknown name, with the closest ones.
        """
        if name not in _REGISTRY:
            close = difflib.get_close_matches(name, _REGISTRY, n=3)
            hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
            raise ValueError(f"unknown method {name!r}.{hint} Available: {', '.join(_REGISTRY)}.")
        return _REGISTRY[name]

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default."""
        return {name: p.default for name, p in inspect.signature(self.function).parameters.items()}

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").splitlines()[0]


_REGISTRY: dict[str, MethodInfo] = {}


def register(
    *, paper: str, fixed_w_bits: int | None = None
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function that returns a :class:`Method`; all its parameters need defaults of plain JSON types.

    Raises:
        ValueError: the name is taken, or a parameter has no default.
    """

    def decorate(function: Callable[..., Method]) -> Callable[..., Method]:
        name = function.__name__
        if name in _REGISTRY:
            raise ValueError(f"method {name!r} is registered already; a method's name must be unique.")
        signature = inspect.signature(function)
        if missing := [n for n, p in signature.parameters.items() if p.default is p.empty]:
            raise ValueError(f"method {name!r}: parameters {missing} need defaults, so that a name alone builds it.")

        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Method:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return replace(function(*args, **kwargs), name=name, options=MappingProxyType(dict(bound.arguments)))

        _REGISTRY[name] = MethodInfo(name, paper, build, fixed_w_bits)
        return build

    return decorate


def get_method(name: str, **options: Any) -> Method:
    """Build a method from its name and options.

    Raises:
        ValueError: unknown method or option (with the closest names), or a value out of range.
    """
    info = MethodInfo.of(name)
    accepted = info.options
    for option in options:
        if option not in accepted:
            close = difflib.get_close_matches(option, accepted, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"method {name!r} has no option {option!r}.{hint} It takes: {', '.join(accepted)}.")
    return info.function(**options)


def _rebuild(name: str, options: dict[str, Any]) -> Method:
    return get_method(name, **options)


def list_methods() -> list[MethodInfo]:
    """Return every registered method, in order of registration."""
    return list(_REGISTRY.values())


from wnq.methods.bwn import bwn  # noqa: E402
from wnq.methods.dorefa import dorefa  # noqa: E402
from wnq.methods.lsq import lsq  # noqa: E402
from wnq.methods.minmax import minmax  # noqa: E402
from wnq.methods.twn import twn  # noqa: E402
from wnq.methods.wnq import wnq  # noqa: E402

__all__ = [
    "InputBuilder",
    "Method",
    "MethodInfo",
    "WeightBuilder",
    "bwn",
    "dorefa",
    "get_method",
    "list_methods",
    "lsq",
    "minmax",
    "register",
    "twn",
    "wnq",
]
