"""TGA: ternary weights whose threshold is learned through a Gaussian model of the weights."""

import math

import torch
from torch import Tensor, nn

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, compute_dtype
from wnq.ste import straight_through

START = 0.05
"""First threshold, as a share of the largest magnitude."""

RANGE = (0.001, 0.99)
"""What the threshold is held to, as shares of the largest magnitude: positive, and some weight is always beyond it."""

FARTHEST = 1e4
"""Distances from the mean are cut here, in standard deviations; n weights reach no farther than the root of n."""


def inverse_mills(x: Tensor) -> Tensor:
    r"""Return the hazard of the standard normal, :math:`h(x) = \varphi(x) / (1 - \Phi(x))`, finite in both far tails.

    On the right by the scaled complementary error function, whose exponentials have cancelled; on the left as it stands.
    """
    right, left = x.clamp(min=0), x.clamp(max=0)
    by_erfcx = math.sqrt(2 / math.pi) / torch.special.erfcx(right * math.sqrt(0.5))
    as_it_stands = torch.exp(-left.square() / 2) / math.sqrt(2 * math.pi) / torch.special.ndtr(-left)
    return torch.where(x > 0, by_erfcx, as_it_stands)


def truncated_mean(mean: Tensor, deviation: Tensor, threshold: Tensor) -> Tensor:
    r"""Return :math:`E(|w| : |w| > \delta)` for :math:`w \sim N(\mu, \sigma^2)`, differentiable in all three.

    It is :math:`|\mu|` where σ = 0. With :math:`a = (\delta - \mu)/\sigma`, :math:`b = (\delta + \mu)/\sigma`, the upper tail
    :math:`P(x) = 1 - \Phi(x)` and :math:`h = \varphi / P`: the right side has mass P(a) and mean :math:`\mu + \sigma h(a)`;
    the left, mirrored, has P(b) and :math:`-\mu + \sigma h(b)`. The ratio of masses is taken from their logarithms.

    Args:
        mean: of the weights.
        deviation: standard deviation, >= 0.
        threshold: delta, >= 0.
    """
    sigma = torch.where(deviation > 0, deviation, 1.0)
    a = ((threshold - mean) / sigma).clamp(-FARTHEST, FARTHEST)
    b = ((threshold + mean) / sigma).clamp(-FARTHEST, FARTHEST)
    share = torch.sigmoid(torch.special.log_ndtr(-a) - torch.special.log_ndtr(-b))
    both = share * (mean + sigma * inverse_mills(a)) + (1 - share) * (sigma * inverse_mills(b) - mean)
    return torch.where(deviation > 0, both, mean.abs())


class GaussianTernary(Quantizer):
    r""":math:`w_q = \alpha(\delta)\,\mathrm{sign}(w)\,1_{|w| > \delta}`, δ learned, α the mean that :func:`truncated_mean` expects.

    Args:
        weight: the layer's weight, which the threshold starts from.
    """

    bits = 2

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.zeros((), dtype=compute_dtype(weight), device=weight.device))
        self.reset_(weight)

    def reset_(self, x: Tensor) -> None:
        """Start the threshold at 0.05 of the largest magnitude."""
        self.threshold.data.copy_(START * x.detach().to(compute_dtype(x)).abs().amax())

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Bring a threshold that the last step took out of its range back to the bound, lest it drift away."""
        self.threshold.copy_(self._held(x.detach().to(self.threshold.dtype)))

    def _held(self, w: Tensor) -> Tensor:
        """Return the threshold, held to its range; the gradient passes the clamp, so that it can leave a bound."""
        largest, threshold = w.abs().amax(), self.threshold.to(w.dtype)
        return straight_through(threshold.clamp(RANGE[0] * largest, RANGE[1] * largest), threshold)

    def _ternary(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signs in {-1, 0, 1}, and alpha with its gradient."""
        w = w.detach()
        threshold = self._held(w)
        mean = w.mean()
        deviation = (w - mean).square().mean().sqrt()
        above = (w.abs() > threshold.detach()).to(w.dtype)
        return w.sign() * above, truncated_mean(mean, deviation, threshold)

    def forward(self, x: Tensor) -> Tensor:
        """Return values in {-alpha, 0, alpha}."""
        w = x.to(compute_dtype(x))
        ternary, alpha = self._ternary(w)
        scaled = ternary * alpha
        value = self.pass_through(scaled, w, 2 * alpha.detach())
        return (value + (scaled - scaled.detach())).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0, 1, 2 for levels -1, 0, 1."""
        ternary, alpha = self._ternary(x)
        levels = torch.tensor([-1.0, 0.0, 1.0], dtype=alpha.dtype, device=x.device)
        return Quantized((ternary + 1).to(torch.uint8), levels, alpha.detach(), self.axis)


@register(paper="arXiv:1810.01018", widths=(2,))
def tga(w_bits: int = 2, a_bits: int = 32, *, activation: str = "lsq") -> Method:
    r"""Ternary weights with a learned threshold: the scale is a closed formula of it, if the weights are Gaussian.

    Forward: :math:`w_q = \alpha\,\mathrm{sign}(w)\,1_{|w| > \delta}`, one δ a layer. With μ and σ the weights' mean and standard
    deviation, :math:`a = (\delta-\mu)/\sigma`, :math:`b = (\delta+\mu)/\sigma`, φ and Φ the normal density and
    distribution, and :math:`P = 1 - \Phi`:

    .. math:: \alpha = E(|w| : |w| > \delta) = \frac{\sigma(\varphi(a) + \varphi(b)) + \mu(P(a) - P(b))}{P(a) + P(b)}.

    Gradient: dw_q/dw = 1, not multiplied by the scale;
    :math:`dL/d\delta = (d\alpha/d\delta) \sum g\,\mathrm{sign}(w)\,1_{|w| > \delta}` with

    .. math:: \frac{d\alpha}{d\delta} = (\alpha - \delta)\,\frac{\varphi(a) + \varphi(b)}{\sigma\,(P(a) + P(b))}.

    δ starts at 0.05 max|w|. It is held between 0.001 and 0.99 of max|w|: by a clamp that its gradient passes, and by bringing
    the parameter itself back to the bound once a training step. μ, σ and the maximum are constants of the gradient. The formula
    was re-derived here from the definition of the conditional mean, on both sides of zero and for any μ, not copied; for μ = 0
    it is the one-sided truncated Gaussian's mean.

    Args:
        w_bits: 2 (three of its four codes are used), or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        Z. He and D. Fan, Simultaneously Optimizing Weight and Quantizer of Ternary Neural Network Using Truncated Gaussian
        Approximation, arXiv:1810.01018, CVPR 2019.

    Differences from the paper: thresholds and weights are updated in the same step, not one after the other on a batch. The clamp
    of δ, the stop-gradient on μ and σ, and the two-sided form for μ other than 0 are this library's. Without the authors'
    residual expansion (a second ternary tensor beside the first).
    """
    return Method(weight=lambda weight, _: GaussianTernary(weight), input=input_builder(activation, a_bits))
