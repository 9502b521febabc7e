"""ADMM: float weights, their nearest quantized ones, and a multiplier that pulls the two together."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnq.attach import quantized_layers
from wnq.prepared import float_weight
from wnq.procedures.procedure import Procedure, hooked
from wnq.procedures.registry import check_flag, check_number, register_procedure
from wnq.quantizer import Quantizer


class ADMM(Procedure):
    r"""Minimise :math:`f(W)` with W on the grid of each layer's quantizer; see :func:`admm`.

    In training mode the layers compute with W itself, in eval mode with its projection. The quantized weights G and the
    multipliers are buffers, one pair a layer.
    """

    def __init__(self, rho: float, every: int, *, extragradient: bool) -> None:
        super().__init__()
        self.rho, self.every, self.looks_ahead = rho, every, extragradient

    def start_(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Set G to the projected weights and the multipliers to zero.

        Raises:
            ValueError: no weight is quantized, or a quantizer has parameters, which only a gradient could train.
        """
        layers = [(name, quantizer) for name, quantizer, _ in _trained(model)]
        if not layers:
            raise ValueError("admm projects weights, but no weight is quantized: use a method such as 'elbnn'.")
        for name, quantizer in layers:
            if next(quantizer.parameters(), None) is not None:
                raise ValueError(
                    f"admm cannot train the quantizer of layer {name!r}, whose parameters need a gradient through the "
                    "rounding: use a method that projects, such as 'elbnn', 'bwn' or 'twn'."
                )
        for index, (_, quantizer, weight) in enumerate(_trained(model)):
            self.register_buffer(f"projected_{index}", _projection(quantizer, weight))
            self.register_buffer(f"multiplier_{index}", torch.zeros_like(weight, requires_grad=False))

    def _parts(self, model: nn.Module) -> Iterator[tuple[Quantizer, Tensor, Tensor, Tensor]]:
        """Yield quantizer, W, G and multiplier of every layer."""
        for index, (_, quantizer, weight) in enumerate(_trained(model)):
            yield quantizer, weight, getattr(self, f"projected_{index}"), getattr(self, f"multiplier_{index}")

    def watching(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Let the float weights through."""
        return hooked(quantizer.register_forward_hook(_unrounded) for _, quantizer, _ in _trained(model))

    def loss(self, loss: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        r"""Add :math:`\frac{\rho}{2} \sum_l \lVert W_l - G_l + \Lambda_l \rVert^2`."""
        terms = [(w - g + multiplier).square().sum() for _, w, g, multiplier in self._parts(model)]
        return loss + self.rho / 2 * torch.stack(terms).sum()

    def after_step_(self, model: nn.Module, step: int) -> None:
        """Project every ``every`` steps."""
        if self.every and step % self.every == 0:
            self.project_(model)

    def after_epoch_(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Project after every epoch, where ``every`` is 0."""
        if not self.every:
            self.project_(model)

    @torch.no_grad()
    def project_(self, model: nn.Module) -> None:
        """Take the steps of G and of the multipliers."""
        for quantizer, w, g, multiplier in self._parts(model):
            g.copy_(_projection(quantizer, w + multiplier))
            multiplier.add_(w - g)

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        r"""Return :math:`\lVert W - G \rVert / \lVert W \rVert` over all layers: how far the weights are from their grids."""
        apart = torch.stack([(w - g).square().sum() for _, w, g, _ in self._parts(model)]).sum()
        size = torch.stack([w.square().sum() for _, w, _, _ in self._parts(model)]).sum()
        return float((apart / size).sqrt())


def _trained(model: nn.Module) -> Iterator[tuple[str, Quantizer, Tensor]]:
    """Yield name, quantizer and float weight of the layers whose weight is quantized and not frozen."""
    for name, layer, quantizer in quantized_layers(model):
        if parametrize.is_parametrized(layer, "weight"):
            yield name, quantizer, float_weight(layer)


def _unrounded(quantizer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook."""
    return inputs[0] if quantizer.training else output


@torch.no_grad()
def _projection(quantizer: Quantizer, weight: Tensor) -> Tensor:
    """Return the weights as deployed. A NaN stays one, so that the next loss shows it."""
    training = quantizer.training
    try:
        return quantizer.eval()(weight.detach()).clone()
    finally:
        quantizer.train(training)


@register_procedure(paper="arXiv:1707.09870")
def admm(*, rho: float = 0.1, every: int = 0, extragradient: bool = True) -> Procedure:
    r"""Train float weights that an augmented Lagrangian pulls onto the quantizer's grid.

    Problem: minimise :math:`f(W) + I_C(G)` with :math:`W = G`, where C holds :math:`\alpha\,q` for the integers q of each
    layer's quantizer (``elbnn``: the paper's; any other without learned parameters works the same way).

    Steps: W by gradient steps on :math:`f(W) + \frac{\rho}{2} \lVert W - G + \Lambda \rVert^2`, each with extragradient,
    :math:`W^p = W - \eta\,\partial L(W)`, then :math:`W - \eta\,\partial L(W^p)` through the optimizer;
    :math:`G = \mathrm{proj}_C(W + \Lambda)`; :math:`\Lambda \mathrel{+}= W - G`. Training passes use W, evaluation and
    deployment :math:`\mathrm{proj}_C(W)`.

    Args:
        rho: weight of the penalty, > 0. The default is ours (digits, 4 to 8 epochs at a rate of 0.05): over the steps
            between two projections the penalty alone moves W by a share of about rate times rho times steps, and where
            that is far below 1 the weights drift from the grid instead.
        every: steps between two projections; 0: one after every epoch.
        extragradient: predict and correct, at two passes a step; false: one plain pass.

    Returns:
        The procedure. Set ``bn_batches``: BatchNorm statistics of the float weights do not fit the projected ones.

    Raises:
        ValueError: an option out of range; at the start, a model that it cannot train.

    References:
        C. Leng et al., Extremely Low Bit Neural Network: Squeeze the Last Bit Out with ADMM, arXiv:1707.09870, AAAI 2018.

    Differences from the paper: equations written down from memory of it and re-derived from the scaled form of ADMM, not
    checked against its text. The predicting step is plain gradient descent, the correcting one whatever optimizer the run
    uses, momentum included; BatchNorm's running statistics see both passes. Weights start where the model stands.
    """
    if check_number(rho, "admm: rho") == 0:
        raise ValueError("admm: rho must be greater than 0: without the penalty nothing pulls the weights.")
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ValueError(f"admm: every must be a number of steps, or 0 for an epoch, got {every!r}.")
    return ADMM(float(rho), every, extragradient=check_flag(extragradient, "admm: extragradient"))
