"""A loss on the distribution of every pre-activation channel, so that few bits see something to tell apart."""

import contextlib
import functools
import math
from typing import Any, cast

import torch
from torch import Tensor, nn

from wnq.procedures.procedure import Procedure, hooked
from wnq.procedures.registry import check_number, register_procedure
from wnq.quantizer import Quantizer, compute_dtype

TINY = 1e-10
"""Added to variances, so that the gradient of a standard deviation of zero is finite."""


def distribution_terms(x: Tensor, channel_dim: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return what is wrong with each channel, with m its mean and s its (biased) standard deviation over all else.

    Args:
        x: pre-activations, at least two dimensions.
        channel_dim: where the channels run.

    Returns:
        Three ``(channels,)`` tensors: mismatch :math:`[\min(2 - m - s, 2 + m - s)]_+^2`, above 0 where
        :math:`|m| + s < 2`, so that most of the channel lies where a sign differs most from its linear gradient;
        saturation :math:`[s - 4]_+^2`; degeneration :math:`[m^2 - s^2]_+`, above 0 where most of it has one sign.
    """
    x = x.to(compute_dtype(x)).movedim(channel_dim, 0).flatten(1)
    mean = x.mean(1)
    variance = (x - mean[:, None]).square().mean(1) + TINY
    deviation = variance.sqrt()
    mismatch = torch.minimum(2 - mean - deviation, 2 + mean - deviation).clamp(min=0).square()
    saturation = (deviation - 4).clamp(min=0).square()
    return mismatch, saturation, (mean.square() - variance).clamp(min=0)


class DistributionLoss(Procedure):
    """Adds the mean of :func:`distribution_terms` over channels and layers; see :func:`distribution_loss`."""

    compiles = False

    def __init__(self, weight: float, until: float) -> None:
        super().__init__()
        self.weight, self.until = weight, until
        self.active = True
        self._seen: list[tuple[Tensor, int]] = []

    def start_(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Check that there is something to watch.

        Raises:
            ValueError: no input is quantized.
        """
        if not _layers(model):
            raise ValueError(
                "distribution_loss watches quantized inputs, but no input is quantized: set a_bits below 32."
            )

    def start_epoch_(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Switch off for the last epochs."""
        # A share of the epochs that is a whole number but for rounding counts as one.
        self.active = epoch < max(1, math.floor(self.until * epochs + 1e-6))

    def watching(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Keep the float inputs of all layers with an input quantizer."""
        self._seen.clear()
        keep = functools.partial(_keep, self._seen)
        layers = _layers(model) if self.active else []
        return hooked(layer.register_forward_pre_hook(keep, prepend=True, with_kwargs=True) for layer in layers)

    def loss(self, loss: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Add the weighted mean over layers."""
        if not self._seen:
            return loss
        layers = [torch.stack(distribution_terms(x, dim)).sum(0).mean() for x, dim in self._seen]
        self._seen.clear()
        return loss + self.weight * torch.stack(layers).mean()


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(getattr(m, "input_quantizer", None), Quantizer)]


def _keep(seen: list[tuple[Tensor, int]], layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook. The images themselves, which nothing can train, are no pre-activations."""
    x = cast(Tensor, args[0] if args else kwargs["input"])
    if x.requires_grad and x.ndim > 1:
        seen.append((x, x.ndim - 1 if isinstance(layer, nn.Linear) else 1))


@register_procedure(paper="arXiv:1904.02823")
def distribution_loss(*, weight: float = 2.0, until: float = 60 / 65) -> Procedure:
    r"""Add a loss on mean and standard deviation of every pre-activation channel.

    Loss: :math:`f + \lambda\,\mathrm{mean}([\min(2-m-s, 2+m-s)]_+^2 + [s-4]_+^2 + [m^2-s^2]_+)`, over the channels of each
    layer's float input and then over layers. It is zero where :math:`|m| \le s`, :math:`|m| + s \ge 2` and
    :math:`s \le 4`: zero lies inside the channel, which is neither narrow nor wide. Made for signs: inputs of both signs,
    as a BatchNorm gives them, at one or two bits. Behind a ReLU it asks for what such inputs cannot have.

    Args:
        weight: lambda, >= 0.
        until: share of the epochs with the loss, from 0 to 1; at least the first has it.

    Returns:
        The procedure. It cannot watch a compiled model.

    Raises:
        ValueError: an option out of range; at the start, a model without quantized inputs.

    References:
        R. Ding et al., Regularizing Activation Distribution for Training Binarized Deep Networks, arXiv:1904.02823,
        CVPR 2019, and the authors' code, which the formula, lambda and the 60 of 65 epochs are from.

    Differences from the paper: it watches the inputs of all layers with an input quantizer except the images; the authors
    list theirs by hand. Which of the three terms the paper calls by which name was judged by where it is above zero.
    """
    return DistributionLoss(
        check_number(weight, "distribution_loss: weight"), check_number(until, "distribution_loss: until", high=1.0)
    )
