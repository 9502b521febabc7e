"""The in-house networks by name. Nothing here imports or runs anything that a name could point to."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from wnq.names import did_you_mean

ModelFactory = Callable[..., nn.Module]

_FACTORIES: dict[str, ModelFactory] = {}

# Sizes come from files as well; the bound keeps a hostile one from asking for terabytes.
MAX_SIZE = 65_536


def register_model(factory: ModelFactory) -> ModelFactory:
    """Make a factory known by its function name. Use as a decorator.

    Raises:
        ValueError: the name is taken.
    """
    name = factory.__name__
    if name in _FACTORIES:
        raise ValueError(f"model {name!r} is registered already, by {_FACTORIES[name].__module__}; choose another name")
    _FACTORIES[name] = factory
    return factory


def list_models() -> list[str]:
    """Return the names of the registered networks, sorted."""
    return sorted(_FACTORIES)


def registered_model(name: str, /, **options: Any) -> nn.Module:
    """Build a registered network, and nothing else: safe for names and options that come from a file.

    The model carries ``model.wnq_model = {"name": name, "options": options}``, from which it can be built again.

    Args:
        name: one of :func:`list_models`.
        options: keyword arguments of the network's function, such as ``num_classes`` and ``in_channels``.

    Raises:
        ValueError: the name is unknown, or the network does not take an option or its value.
    """
    if name not in _FACTORIES:
        raise ValueError(
            f"unknown model {name!r}.{did_you_mean(name, _FACTORIES, most=3)} Known: {', '.join(list_models())}"
        )
    factory = _FACTORIES[name]
    check_options(name, factory, options)
    model = factory(**options)
    # Not by assignment: nn.Module declares that attributes are tensors or modules.
    vars(model)["wnq_model"] = {"name": name, "options": dict(options)}
    return model


def check_size(name: str, value: object) -> None:
    """Raise ``ValueError`` unless ``value`` is an integer from 1 to 65,536.

    Args:
        name: of the option, for the message.
        value: to check; ``object`` because it may come from a file.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_SIZE:
        raise ValueError(f"{name} must be an integer from 1 to {MAX_SIZE}, got {value!r}")


def check_options(name: str, factory: Callable[..., object], options: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the accepted options if ``factory`` cannot be called with ``options``."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = [key for key, parameter in parameters.items() if parameter.kind in _BY_KEYWORD]
    if unknown := [key for key in options if key not in accepted]:
        raise ValueError(
            f"model {name!r} does not take {', '.join(unknown)}.{did_you_mean(unknown[0], accepted)} "
            f"Options: {', '.join(accepted) or 'none'}"
        )


_BY_KEYWORD = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
