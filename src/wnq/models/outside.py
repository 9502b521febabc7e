"""Networks from elsewhere: timm, torchvision, transformers, or a function of the user's own.

Building one imports and runs foreign code, so none of this is reachable from :func:`wnq.models.registered_model`.
"""

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from wnq.models.registry import check_options
from wnq.names import did_you_mean


class Logits(nn.Module):
    """A transformers image classifier whose ``forward`` takes a tensor and returns a tensor.

    Args:
        model: called as ``model(pixel_values=images)``; its output has ``logits``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map images ``(B, C, H, W)`` to logits ``(B, num_classes)``."""
        return self.model(pixel_values=images).logits


def from_timm(name: str, *, pretrained: bool = False, **options: Any) -> nn.Module:
    """Build ``timm.create_model(name)``; ``in_channels`` is passed on as timm's ``in_chans``."""
    timm: Any = _import("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}.{did_you_mean(name, timm.list_models(), most=3)}")
    if "in_channels" in options:
        options["in_chans"] = options.pop("in_channels")
    return _call(f"timm:{name}", timm.create_model, name, pretrained=pretrained, **options)


def from_torchvision(name: str, *, pretrained: bool = False, in_channels: int = 3, **options: Any) -> nn.Module:
    """Build ``torchvision.models.get_model(name)``; ``pretrained`` takes its default weights."""
    models: Any = _import("torchvision.models", f"torchvision:{name}")
    if name not in models.list_models():
        raise ValueError(f"torchvision has no model {name!r}.{did_you_mean(name, models.list_models(), most=3)}")
    if in_channels != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels, got in_channels={in_channels}")
    weights = "DEFAULT" if pretrained else None
    return _call(f"torchvision:{name}", models.get_model, name, weights=weights, **options)


def from_transformers(
    name: str,
    *,
    pretrained: bool = False,
    num_classes: int | None = None,
    in_channels: int | None = None,
    **options: Any,
) -> nn.Module:
    """Build ``AutoModelForImageClassification`` for a hub name or folder; other options go to its configuration."""
    transformers: Any = _import("transformers", f"hf:{name}")
    if num_classes is not None:
        options["num_labels"] = num_classes
    if in_channels is not None:
        options["num_channels"] = in_channels
    auto: Any = transformers.AutoModelForImageClassification
    try:
        config, unknown = transformers.AutoConfig.from_pretrained(name, return_unused_kwargs=True, **options)
        if unknown:
            raise ValueError(f"its configuration has no {', '.join(unknown)}")
        if not pretrained:
            return Logits(auto.from_config(config))
        return Logits(auto.from_pretrained(name, config=config, ignore_mismatched_sizes=num_classes is not None))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"hf:{name}: transformers cannot build it: {_first_line(error)}") from error


def from_import_path(path: str, **options: Any) -> nn.Module:
    """Call the factory at ``package.module:factory`` with ``options``."""
    module_name, _, attribute = path.partition(":")
    if not attribute.isidentifier() or not all(part.isidentifier() for part in module_name.split(".")):
        raise ValueError(f"model {path!r} is not of the form 'package.module:factory'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"model {path!r}: no module {error.name!r}; install it, or put its folder on PYTHONPATH"
        ) from error
    factory: Any = getattr(module, attribute, None)
    if not callable(factory):
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"model {path!r}: {module_name} has no function {attribute!r}.{did_you_mean(attribute, public)}"
        )
    check_options(path, factory, options)
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {path!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


OUTSIDE: dict[str, Callable[..., nn.Module]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "hf": from_transformers,
}


def _import(module: str, model: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise ModuleNotFoundError(f"model {model!r} needs {package}: pip install {package}") from error


def _call(model: str, factory: Callable[..., nn.Module], /, *arguments: str, **options: Any) -> nn.Module:
    """Call a factory whose options cannot be read off its signature; a refused one becomes a ``ValueError``."""
    try:
        return factory(*arguments, **options)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {model!r} cannot be built: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
