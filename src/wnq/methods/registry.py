"""The registry of methods: a method is a short function that composes normalizer, quantizer and scale.

The function's name is the method's name everywhere: in plans, recipes, files, the command line and the docs. Every method
also takes the options of :data:`COMMON`, which the registry adds and carries out.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from wnq.names import check_choice
from wnq.normalized import Preceded
from wnq.normalizers import NORMALIZERS
from wnq.quantizer import FLOAT_BITS, Quantizer
from wnq.registered import Registered, find, new_signature

WeightBuilder = Callable[[Tensor, int], Quantizer]
"""``(weight, output-channel axis) -> quantizer``, with learned parameters already set from the weight."""

InputBuilder = Callable[[], Quantizer]

OutputBuilder = Callable[[nn.Module], nn.Module]
"""Builds, for a layer, a module that its output passes through: ``module(layer, x, y) -> y``, with the float input ``x``.

Raises ``ValueError`` for a kind of layer that it does not fit."""

COMMON: Mapping[str, Any] = MappingProxyType({"normalize": "none", "normalize_gain": 1.0, "ewgs": None})
"""Options of every method, with their defaults.

``normalize``: a normalizer in front of the weight quantizer, see :class:`wnq.normalized.Preceded`. ``normalize_gain``: share
of the gradient through its maximum that is kept. ``ewgs``: element-wise gradient scaling of every rounding of weights and
inputs, see :func:`wnq.ste.elementwise_scaled`; 0 is the straight-through estimator, None what the method's paper has.
"""


@dataclass(frozen=True)
class Recommended:
    """Training settings from a method's paper, as factors of the recipe's own, so that they carry over to other recipes.

    Attributes:
        lr: of the peak learning rate.
        weight_decay: of the weight decay.
        weight_decay_at: width of the weights -> factor, where the paper decays by width; wins over ``weight_decay``.
        quantizer_lr: learning rate of the quantizers' parameters, as a share of the model's.
        quantizer_weight_decay: their decay, as a share of the model's.
        source: where the paper or its code says so; empty for this library's own choice.
    """

    lr: float = 1.0
    weight_decay: float = 1.0
    weight_decay_at: Mapping[int, float] = field(default_factory=lambda: MappingProxyType({}))
    quantizer_lr: float = 1.0
    quantizer_weight_decay: float = 0.0
    source: str = ""


@dataclass(frozen=True)
class Method:
    """A named recipe for one layer, rebuilt anywhere from ``(name, options)``.

    Attributes:
        weight: builds the weight quantizer; None leaves the weight in floating point.
        input: builds the input quantizer; None leaves the input in floating point.
        output: builds what the layer's output passes through; None for almost all methods.
        name: name in the registry.
        options: every option with its value, defaults included; plain JSON types.
    """

    weight: WeightBuilder | None = field(compare=False, repr=False)
    input: InputBuilder | None = field(compare=False, repr=False)
    output: OutputBuilder | None = field(default=None, compare=False, repr=False)
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
        return int(self.options.get("w_bits", FLOAT_BITS))

    @property
    def a_bits(self) -> int:
        """Width of the inputs; 32 when they stay float."""
        return int(self.options.get("a_bits", FLOAT_BITS))


@dataclass(frozen=True)
class MethodInfo(Registered[Method]):
    """What the registry knows of a method.

    Attributes:
        name: the registered function's name.
        paper: where it was published, for example ``arXiv:1907.00593``; empty for a baseline without a paper.
        function: the registered function; its docstring is the method's page.
        widths: the widths of weights that it defines.
        recommended: training settings from its paper.
        no_normalizer: why no normalizer may stand in front of it; empty if one may.
    """

    widths: tuple[int, ...] = tuple(range(1, 9))
    recommended: Recommended = field(default_factory=Recommended)
    no_normalizer: str = ""

    @staticmethod
    def of(name: str) -> "MethodInfo":
        """Look a method up by name.

        Raises:
            ValueError: unknown name, with the closest ones.
        """
        return find("method", name, _REGISTRY)


_REGISTRY: dict[str, MethodInfo] = {}


def register(
    *,
    paper: str,
    widths: Sequence[int] = range(1, 9),
    recommended: Recommended | None = None,
    no_normalizer: str = "",
) -> Callable[[Callable[..., Method]], Callable[..., Method]]:
    """Register a function that returns a :class:`Method`.

    The function takes ``w_bits`` and ``a_bits``, and all its parameters have defaults of plain JSON types. The registry checks
    ``w_bits`` against ``widths``, leaves the weights float at 32 bits, and adds the options of :data:`COMMON`.

    Args:
        paper: for example ``arXiv:1907.00593``.
        widths: the widths of weights that the method defines.
        recommended: training settings from the paper.
        no_normalizer: why no normalizer may stand in front of the weight quantizer, if none may.

    Raises:
        ValueError: the name is taken, or a parameter has no default.
    """

    def decorate(function: Callable[..., Method]) -> Callable[..., Method]:
        name = function.__name__
        own = new_signature("method", function, _REGISTRY)
        if absent := [n for n in ("w_bits", "a_bits") if n not in own.parameters]:
            raise ValueError(f"method {name!r} must take {' and '.join(absent)}, as all methods do.")
        added = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=v) for n, v in COMMON.items()]
        signature = own.replace(parameters=[*own.parameters.values(), *added])
        info = MethodInfo(name, paper, function, tuple(widths), recommended or Recommended(), no_normalizer)

        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Method:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            options = dict(bound.arguments)
            method = function(**{k: v for k, v in options.items() if k not in COMMON} | _width(info, options["w_bits"]))
            if options["w_bits"] == FLOAT_BITS:
                method = replace(method, weight=None, output=None)
            return replace(_with_common(method, info, options), name=name, options=MappingProxyType(options))

        vars(build)["__signature__"] = signature
        _REGISTRY[name] = replace(info, function=build)
        return build

    return decorate


def _width(info: MethodInfo, w_bits: Any) -> dict[str, int]:
    """Return the width to build with; float weights are built at some width and dropped."""
    if w_bits == FLOAT_BITS:
        return {"w_bits": info.widths[-1]}
    if isinstance(w_bits, bool) or w_bits not in info.widths:
        raise ValueError(
            f"method {info.name!r}: w_bits must be {listed(info.widths)} (or 32 for float weights), got {w_bits!r}."
        )
    return {"w_bits": w_bits}


def listed(widths: Sequence[int]) -> str:
    """Return widths in words: ``an integer from 2 to 8``, ``one of 2, 3, 4, 8``, or ``2``."""
    if len(widths) > 2 and list(widths) == list(range(widths[0], widths[-1] + 1)):
        return f"an integer from {widths[0]} to {widths[-1]}"
    return ("one of " if len(widths) > 1 else "") + ", ".join(map(str, widths))


def _with_common(method: Method, info: MethodInfo, options: Mapping[str, Any]) -> Method:
    """Carry out the options of :data:`COMMON`."""
    normalize, gain, ewgs = (options[name] for name in COMMON)
    check_choice(normalize, NORMALIZERS, where="normalize")
    for name, value in (("normalize_gain", gain), ("ewgs", 0 if ewgs is None else ewgs)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}.")
    weight, build_input = method.weight, method.input
    if normalize != "none" and info.no_normalizer:
        raise ValueError(f"method {info.name!r} takes no normalizer in front: {info.no_normalizer}.")
    if normalize != "none" and weight is not None:
        method = replace(method, weight=functools.partial(_preceded, weight, normalize, float(gain)))
    if ewgs is not None:
        if method.weight is not None:
            method = replace(method, weight=functools.partial(_scaled, method.weight, float(ewgs)))
        if build_input is not None:
            method = replace(method, input=functools.partial(_scaled, build_input, float(ewgs)))
    return method


def _preceded(inner: WeightBuilder, normalize: str, gain: float, weight: Tensor, axis: int) -> Quantizer:
    return Preceded(normalize, gain, inner, weight, axis)


def _scaled(build: Callable[..., Quantizer], ewgs: float, *args: Any) -> Quantizer:
    quantizer = build(*args)
    for part in quantizer.modules():
        if isinstance(part, Quantizer):
            part.ewgs = ewgs
    return quantizer


def get_method(name: str, **options: Any) -> Method:
    """Build a method from its name and options.

    Raises:
        ValueError: unknown method or option (with the closest names), or a value out of range.
    """
    return MethodInfo.of(name).build("method", options)


def _rebuild(name: str, options: dict[str, Any]) -> Method:
    return get_method(name, **options)


def list_methods() -> list[MethodInfo]:
    """Return every registered method: wnq, then the others by name."""
    return sorted(_REGISTRY.values(), key=lambda info: (info.name != "wnq", info.name))
