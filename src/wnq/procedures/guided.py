"""Guidance by a float twin: the feature maps of both nets are drawn together."""

import contextlib
import copy
import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq.attach import quantized_layers
from wnq.names import did_you_mean
from wnq.procedures.procedure import Procedure, hooked
from wnq.procedures.registry import check_flag, check_number, register_procedure
from wnq.quantizer import compute_dtype


class Guided(Procedure):
    """Adds the distance between feature maps of the model and of its float twin; see :func:`guided`.

    The twin is a submodule, so that a checkpoint holds it.
    """

    compiles = False
    needs_teacher = True

    def __init__(self, layers: Sequence[str], weight: float, *, joint: bool) -> None:
        super().__init__()
        self.layers, self.weight, self.joint = tuple(layers), weight, joint
        self.twin: nn.Module | None = None
        self._maps: dict[str, Tensor] = {}

    def start_(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Copy the twin.

        Raises:
            ValueError: there is none, or a layer is unknown to either net.
        """
        if teacher is None:
            raise ValueError("procedure 'guided' needs a teacher: pass the float twin.")
        self.layers = self.layers or _last_hidden(model)
        for net, whose in ((model, "the model"), (teacher, "the float twin")):
            known = [name for name, _ in net.named_modules() if name]
            for name in self.layers:
                if name not in known:
                    raise ValueError(f"guided: {whose} has no layer {name!r}.{did_you_mean(name, known)}")
        self.twin = copy.deepcopy(teacher).train(self.joint).requires_grad_(self.joint)

    def watching(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Keep the model's feature maps."""
        self._maps.clear()
        return _keeping(model, self.layers, self._maps)

    def loss(self, loss: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Add the weighted distance, and in joint training the twin's own loss."""
        if self.twin is None:
            raise RuntimeError("guided has no twin yet: call start_(model, teacher) first (fit does).")
        hints: dict[str, Tensor] = {}
        with _keeping(self.twin, self.layers, hints), torch.set_grad_enabled(self.joint and torch.is_grad_enabled()):
            logits = self.twin(images)
        distances = [_distance(self._maps[name], hints[name]) for name in self.layers]
        self._maps.clear()
        loss = loss + self.weight * torch.stack(distances).mean()
        return loss + F.cross_entropy(logits.float(), labels) if self.joint else loss


def _distance(one: Tensor, other: Tensor) -> Tensor:
    """Half the mean squared difference."""
    kind = compute_dtype(one)
    return F.mse_loss(one.to(kind), other.to(kind)) / 2


def _last_hidden(model: nn.Module) -> tuple[str, ...]:
    names = [name for name, _, _ in quantized_layers(model)]
    if len(names) < 2:
        raise ValueError("guided: the model has no hidden quantized layer; name some, such as layers = ['layer3'].")
    return (names[-2],)


def _keeping(net: nn.Module, names: Iterable[str], maps: dict[str, Tensor]) -> contextlib.AbstractContextManager[None]:
    """Put the outputs of the named layers into ``maps``."""
    return hooked(net.get_submodule(n).register_forward_hook(functools.partial(_keep, maps, n)) for n in names)


def _keep(maps: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
    """Forward hook."""
    maps[name] = output


@register_procedure(paper="arXiv:1711.00205")
def guided(*, layers: Sequence[str] = (), weight: float = 1.0, joint: bool = True) -> Procedure:
    r"""Draw feature maps of the quantized net and of its float twin together, training both.

    Loss: :math:`CE(y, p) + CE(y, p_t) + \lambda\,\frac12 \mathrm{mean}\,(\mu - \mu_t)^2`, with feature maps :math:`\mu` of
    the net and :math:`\mu_t` of the twin, averaged over elements and then over layers. With a fixed twin the second term
    is left out and nothing of the third reaches it. The twin's parameters have the rate and decay of the model's.

    Args:
        layers: names of the layers whose outputs are compared; none: the last but one quantized layer.
        weight: lambda, >= 0.
        joint: train the twin too, from the teacher's weights, with BatchNorm in training mode; false: a fixed twin.

    Returns:
        The procedure. It needs a teacher (a recipe's ``[model] start``) and cannot watch a compiled model; training both
        nets needs a single process.

    Raises:
        ValueError: an option of the wrong kind; at the start, no teacher or an unknown layer.

    References:
        B. Zhuang et al., Towards Effective Low-bitwidth Convolutional Neural Networks, arXiv:1711.00205, CVPR 2018,
        section on guided training.

    Differences from the paper: written down from memory of it, not checked against its text. The maps are compared as
    they are, without rounding those of the twin; the value of lambda is ours; the twin starts from trained weights.
    """
    if isinstance(layers, str) or not all(isinstance(name, str) for name in layers):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"guided: layers must be an array of names, got {layers!r}.")
    return Guided(layers, check_number(weight, "guided: weight"), joint=check_flag(joint, "guided: joint"))
