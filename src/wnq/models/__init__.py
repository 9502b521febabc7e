"""Networks by name: the in-house ones of the low-bit literature, and any other by a prefixed name.

:func:`registered_model` builds only what is registered in this process and imports nothing; it is what loading a file
may call. :func:`build_model` builds anything, foreign code included, and is for names that the user wrote.
"""

from typing import Any

from torch import nn

from wnq.models.imagenet import ImageNetResNet
from wnq.models.mobile import MobileNet
from wnq.models.networks import PreActResNet, ResNet
from wnq.models.outside import OUTSIDE, from_import_path
from wnq.models.registry import list_models, register_model, registered_model
from wnq.names import did_you_mean

__all__ = [
    "ImageNetResNet",
    "MobileNet",
    "PreActResNet",
    "ResNet",
    "build_model",
    "list_models",
    "register_model",
    "registered_model",
]


def build_model(name: str, /, **options: Any) -> nn.Module:
    """Build a network.

    Args:
        name: one of :func:`list_models`, or ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` (transformers; a hub name
            or a folder; the outputs are its logits), or ``package.module:factory``, a function that returns a module.
        options: keyword arguments of the network. ``num_classes`` and ``in_channels`` mean the same for in-house, timm,
            torchvision and transformers networks; ``pretrained=True`` loads the weights of the latter three.

    Raises:
        ValueError: the name is unknown, or the network does not take an option or its value.
        TypeError: a user's factory returns something other than a module.
        ModuleNotFoundError: the package of the name is not installed.
    """
    prefix, colon, rest = name.partition(":")
    if not colon:
        if name in list_models():
            return registered_model(name, **options)
        raise ValueError(
            f"unknown model {name!r}.{did_you_mean(name, list_models(), most=3)} Known: {', '.join(list_models())}; others as "
            "timm:NAME, torchvision:NAME, hf:NAME or package.module:factory"
        )
    if prefix in OUTSIDE:
        return OUTSIDE[prefix](rest, **options)
    return from_import_path(name, **options)
