"""LR-Net: weights drawn from learned probabilities; training samples what a layer puts out, not the weights."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, compute_dtype

LOWEST, HIGHEST = 0.05, 0.95
"""Bounds of the starting probabilities."""

FLOOR = 1e-3
"""Added to the variance of an output, as in the authors' code: the root has a finite slope where all inputs are zero."""

SAMPLED: tuple[type[nn.Module], ...] = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
"""Layers whose output is a sum over weights that can be sampled."""


def starting_probabilities(weight: Tensor, *, ternary: bool) -> tuple[Tensor, Tensor]:
    r"""Return P(0) and P(+1 | not 0) for float weights, so that E[w] follows :math:`u = \mathrm{clip}(w/\sigma, -1, 1)`.

    Ternary: :math:`P(0) = 0.95 - 0.9\,|u|`, :math:`P(+1 \mid \ne 0) = (1 + u/(1 - P(0)))/2`; binary: P(0) = 0 and
    :math:`(1 + u)/2`. The second is clipped to [0.05, 0.95]; where it is not, E[w] = u. σ is the layer's standard deviation (1
    where it is 0).
    """
    deviation = (weight - weight.mean()).square().mean().sqrt()
    u = (weight / torch.where(deviation > 0, deviation, 1.0)).clamp(-1, 1)
    zero = HIGHEST - (HIGHEST - LOWEST) * u.abs() if ternary else torch.zeros_like(u)
    return zero, ((1 + u / (1 - zero)) / 2).clamp(LOWEST, HIGHEST)


class CategoricalWeight(Quantizer):
    r"""A distribution over {-1, +1} or {-1, 0, +1} for each weight; its values are the most probable ones.

    The trained float weight w sets the sign: :math:`P(+1 \mid \ne 0) = \mathrm{sigmoid}(\kappa w + s)`. A parameter a of the
    weight's shape, ternary only, sets :math:`P(0) = \mathrm{sigmoid}(\kappa a)`. The constants :math:`\kappa = 2/\sigma` and s,
    one for each weight, are chosen by :meth:`reset_` so that the probabilities start at :func:`starting_probabilities` exactly.
    With this κ a learning rate for float weights serves both: a step of one standard deviation moves the log-odds by 2, the
    slope of the binary start.

    ``forward`` gives the most probable values in training too, with the identity as the gradient of w and that of E[w] for a.
    Training by sampling is the matter of :class:`SampledOutput`.

    Args:
        weight: the layer's weight.
        bits: 1 binary, 2 ternary.
        axis: output-channel dimension.
    """

    kappa: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, bits: int, axis: int = 0) -> None:
        super().__init__()
        self.bits = bits
        self.axis = axis
        like = weight.detach().to(compute_dtype(weight))
        self.register_buffer("kappa", torch.ones_like(like.sum()))
        self.register_buffer("shift", torch.zeros_like(like))
        self.zero = nn.Parameter(torch.zeros_like(like)) if bits == 2 else None
        self.reset_(weight)

    @torch.no_grad()
    def reset_(self, x: Tensor) -> None:
        """Start the probabilities from the float weight."""
        w = x.detach().to(compute_dtype(x))
        zero, positive = starting_probabilities(w, ternary=self.bits == 2)
        deviation = (w - w.mean()).square().mean().sqrt()
        self.kappa.copy_(2 / torch.where(deviation > 0, deviation, 1.0))
        self.shift.copy_(positive.logit() - self.kappa * w)
        if self.zero is not None:
            self.zero.data.copy_(zero.logit() / self.kappa)

    def log_odds(self, w: Tensor) -> Tensor:
        """Return the logit of P(+1 | not 0)."""
        return self.kappa.to(w.dtype) * w + self.shift.to(w.dtype)

    def zero_log_odds(self, like: Tensor) -> Tensor | None:
        """Return the logit of P(0) in the type of ``like``; None for binary weights, which are never zero."""
        return None if self.zero is None else self.kappa.to(like.dtype) * self.zero.to(like.dtype)

    def _nonzero(self, w: Tensor) -> Tensor:
        """Return 1 - P(0)."""
        zero = self.zero_log_odds(w)
        return torch.ones_like(w) if zero is None else torch.sigmoid(-zero)

    def moments(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return E[w] and Var[w] of each weight, differentiable in w and a."""
        w = weight.to(compute_dtype(weight))
        nonzero, tilt = self._nonzero(w), torch.tanh(self.log_odds(w) / 2)
        # Var = P(not 0) - E^2, in a form that rounding cannot make negative.
        return nonzero * tilt, nonzero * (1 - nonzero * tilt.square())

    def forward(self, x: Tensor) -> Tensor:
        """Return the most probable values."""
        w = x.to(compute_dtype(x))
        value = self.pass_through(self.encode(w.detach()).dequantize(), w, 2.0)
        if self.zero is not None:
            mean, _ = self.moments(w.detach())
            value = value + (mean - mean.detach())
        return value.to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Quantized:
        """Return codes of the most probable of the levels -1, (0,) +1; ties go to zero, then to +1."""
        log_odds = self.log_odds(x)
        if self.zero is None:
            codes, levels = (log_odds >= 0).to(torch.uint8), torch.tensor([-1.0, 1.0])
        else:
            nonzero = self._nonzero(x)
            kept = nonzero * torch.sigmoid(log_odds.abs()) > 1 - nonzero
            sign = torch.where(log_odds >= 0, 1, -1)
            codes, levels = (1 + sign * kept).to(torch.uint8), torch.tensor([-1.0, 0.0, 1.0])
        return Quantized(codes, levels.to(x), torch.ones_like(x.sum()), self.axis)


class SampledOutput(nn.Module):
    r"""The local reparameterization: in training, a layer's output is drawn from the Gaussian that its sum over weights tends to.

    :math:`z = \sum E[w] h + b + \sqrt{\sum \mathrm{Var}[w] h^2 + 0.001}\,\epsilon` with the layer's (quantized) input h, its bias
    b and one standard normal ε an output, from torch's global generator as dropout's noise is. It replaces the output; gradients
    reach the probabilities through both sums. In evaluation mode, and for a frozen layer, the output passes through.
    """

    def forward(self, layer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Return the sample in training, else ``y``.

        Raises:
            ValueError: the layer, in training, computes something else than torch's linear and convolutional layers.
        """
        parts = categorical(layer)
        if not self.training or parts is None:
            return y
        if not any(type(layer).forward is kind.forward for kind in SAMPLED):
            raise ValueError(
                "method 'lrnet' samples the outputs of torch's linear and convolutional layers, but "
                f"{type(layer).__mro__[1].__name__} has a forward of its own; give this layer another method, or keep it float, "
                "by make_plan(..., override=...)."
            )
        quantizer, weight = parts
        if isinstance(getattr(layer, "input_quantizer", None), Quantizer):
            x = cast(Quantizer, layer.input_quantizer)(x)
        mean, variance = (moment.to(weight.dtype) for moment in quantizer.moments(weight))
        centre = _apply(layer, x, mean, cast(Any, layer).bias, y)
        spread = (_apply(layer, x.square(), variance, None, y) + FLOOR).sqrt()
        return (centre + spread * torch.randn_like(centre)).to(y.dtype)


def _apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> Tensor:
    """Return what the layer computes with another weight, in the shape of its output ``y``."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    conv = cast(Any, layer)
    if not conv.transposed:
        return conv._conv_forward(x, weight, bias)
    count = len(conv.kernel_size)
    # A caller may have asked for an output size, so the output padding is read off the output.
    least = [
        (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1
        for size, stride, padding, dilation, kernel in zip(
            x.shape[-count:], conv.stride, conv.padding, conv.dilation, conv.kernel_size, strict=True
        )
    ]
    extra = [size - low for size, low in zip(y.shape[-count:], least, strict=True)]
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[count - 1]
    return function(x, weight, bias, conv.stride, conv.padding, extra, conv.groups, conv.dilation)


def categorical(layer: nn.Module) -> tuple[CategoricalWeight, Tensor] | None:
    """Return the distribution of a layer's weight and the float weight, or None if it has none or is frozen."""
    if not parametrize.is_parametrized(layer, "weight"):
        return None
    parts = cast(Any, layer).parametrizations.weight
    return (parts[0], parts.original) if isinstance(parts[0], CategoricalWeight) else None


def probability_decay(model: nn.Module) -> Tensor:
    r"""Return the paper's regularizer, for the caller to weigh and add to the loss.

    Ternary layers: half the sum of squares of both logits, which pulls the probabilities to the middle and keeps them random.
    Binary layers: :math:`\sum p (1 - p)`, the Beta term, which pushes them to certainty. The authors' CIFAR-10 code weighs them by
    1e-11 and 1e-6.

    Args:
        model: prepared by ``quantize_`` with method ``lrnet``.

    Returns:
        A scalar, differentiable.

    Raises:
        ValueError: no layer of the model has such a weight.
    """
    parts = {id(found[1]): found for module in model.modules() if (found := categorical(module)) is not None}
    if not parts:
        raise ValueError(
            f"{type(model).__name__} has no layer to train by method 'lrnet'; call quantize_ first, and not after freeze_."
        )
    terms: list[Tensor] = []
    for quantizer, weight in parts.values():
        w = weight.to(compute_dtype(weight))
        log_odds, zero = quantizer.log_odds(w), quantizer.zero_log_odds(w)
        if zero is None:
            terms.append((torch.sigmoid(log_odds) * torch.sigmoid(-log_odds)).sum())
        else:
            terms.append((zero.square() + log_odds.square()).sum() / 2)
    return torch.stack(terms).sum()


@register(
    paper="arXiv:1710.07739",
    widths=(1, 2),
    no_normalizer="its float weights are log-odds, not magnitudes, and its layers sample from them directly",
)
def lrnet(w_bits: int = 2, a_bits: int = 32, *, activation: str = "lsq") -> Method:
    r"""Binary or ternary weights as random variables: their probabilities are trained by sampling each layer's output.

    Forward, in training: :math:`z = \sum_i E[w_i] h_i + \sqrt{\sum_i \mathrm{Var}[w_i] h_i^2 + 0.001}\,\epsilon`, ε normal, with
    :math:`P(0) = \mathrm{sigmoid}(\kappa a)` (0 at one bit), :math:`P(+1 \mid \ne 0) = \mathrm{sigmoid}(\kappa w + s)`,
    :math:`E = (1 - P(0))\tanh((\kappa w + s)/2)` and :math:`\mathrm{Var} = 1 - P(0) - E^2`. In evaluation, and in the file: the
    most probable of -1, (0,) +1. The values are not scaled; a BatchNorm is expected behind each layer.

    Gradient: of z, through E and Var, to w and a (κ and s are constants). Of the most probable value, where something reads
    ``layer.weight``: 1 for w, dE/da for a.

    The probabilities start from the float weights, see :func:`starting_probabilities`. Take new BatchNorm statistics after
    training (``bn_batches`` of a recipe), because those of training belong to the samples.
    Weight decay draws w, not the log-odds, to zero: give these weights none, and :func:`probability_decay` if wanted. Each
    training step computes a layer three times.

    Args:
        w_bits: 1 (binary), 2 (ternary, three of its four codes), or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        O. Shayer et al., Learning Discrete Weights Using the Local Reparameterization Trick, arXiv:1710.07739, ICLR 2018. The
        equations were re-derived from the definition of the categorical distribution; starting probabilities, the 0.001 under
        the root and the regularizers were read in the authors' code.

    Differences from the paper: the log-odds are affine maps of the float weight and of a, whose constants come from the float
    weights, instead of parameters themselves, so that float checkpoints load and the learning rate of float weights serves. The
    final weights are the most probable ones; drawing many sets and keeping the best is not provided. The regularizer is a
    function that the training loop has to call. An embedding has no sum to sample: it trains its most probable values, straight
    through.
    """
    return Method(
        weight=lambda weight, axis: CategoricalWeight(weight, w_bits, axis),
        input=input_builder(activation, a_bits),
        output=lambda _: SampledOutput(),
    )
