"""BinaryConnect: weights of ±1 without a scale, and the clipped sign that BNN shares."""

import torch
from torch import Tensor

from wnq.activations import input_builder
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, compute_dtype

UNSCALED = "its values have no scale, and the weights themselves are clipped to [-1, 1]"
"""Why no normalizer may stand in front of :class:`ClippedSign`."""


class ClippedSign(Quantizer):
    r"""One bit without a scale: ±1; the float weight itself is clipped to [-1, 1] before each training step.

    Clipping before a forward pass instead of after the update before it changes no pass: the sign of a weight and of the clipped
    weight agree, and so do the probabilities.

    Stochastic, while training: +1 with probability :math:`\mathrm{clip}((w + 1)/2, 0, 1)`. The random numbers are drawn by
    :meth:`observe_`, from torch's global generator, so that all passes of one step see the same weights; each process draws its
    own. In eval mode, and before the first draw, it is the sign.

    Args:
        window: the gradient is :math:`1_{|w| \le 1}` (BNN) instead of 1 everywhere (BinaryConnect).
        stochastic: draw the sign.
        axis: output-channel dimension.
    """

    bits = 1
    noise: Tensor | None

    def __init__(self, *, window: bool, stochastic: bool = False, axis: int = 0) -> None:
        super().__init__()
        self.window = window
        self.stochastic = stochastic
        self.axis = axis
        self.register_buffer("noise", None, persistent=False)

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Clip the weight in place, and draw."""
        # Through .data: a second forward before the backward must not invalidate what the first one saved.
        x.data.clamp_(-1, 1)
        if self.stochastic:
            self.noise = torch.rand_like(x, dtype=compute_dtype(x))

    def _positive(self, w: Tensor) -> Tensor:
        if self.training and self.noise is not None:
            return ((w + 1) / 2).clamp(0, 1) > self.noise
        return w >= 0

    def forward(self, x: Tensor) -> Tensor:
        """Return ±1."""
        w = x.to(compute_dtype(x))
        surrogate = w.clamp(-1, 1) if self.window else w
        return self.pass_through(torch.where(self._positive(w), 1.0, -1.0).to(w.dtype), surrogate, 2.0).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 and 1 for levels -1 and +1."""
        scale = torch.ones((), dtype=x.dtype, device=x.device)
        return Quantized(self._positive(x).to(torch.uint8), torch.tensor([-1.0, 1.0]).to(x), scale, self.axis)

    def extra_repr(self) -> str:
        """Show the options in ``print(model)``."""
        return f"bits=1, window={self.window}, stochastic={self.stochastic}"


@register(paper="arXiv:1511.00363", widths=(1,), no_normalizer=UNSCALED)
def binaryconnect(w_bits: int = 1, a_bits: int = 32, *, stochastic: bool = False, activation: str = "lsq") -> Method:
    r"""Weights of ±1 in the passes, float weights clipped to [-1, 1] in the updates.

    Forward: :math:`w_q = \mathrm{sign}(w)`, sign(0) = 1; stochastic, while training: +1 with probability
    :math:`\mathrm{clip}((w+1)/2, 0, 1)`, else -1, drawn anew each step. No scale.

    Gradient: :math:`dw_q/dw = 1`; the float weights are clipped, :math:`w \leftarrow \mathrm{clip}(w, -1, 1)`.

    Args:
        w_bits: 1, or 32.
        a_bits: width of the inputs, 1 to 8, or 32 (the paper's).
        stochastic: draw the signs while training; evaluation and stored files use the sign.
        activation: input quantizer where ``a_bits`` is below 32.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range, or a normalizer in front.

    References:
        M. Courbariaux, Y. Bengio and J.-P. David, BinaryConnect: Training Deep Neural Networks with binary weights during
        propagations, arXiv:1511.00363, NIPS 2015, Eq. 1-3 and Alg. 1.

    Differences from the paper: the clip comes just before the next training pass instead of just after the update; passes and
    updates are the same, but the float weights of a finished training are those of the last update, not clipped. The paper scales
    the learning rate of each layer by its Glorot initialisation; here that is left to the optimizer. The equations are written
    from memory; the number of each was not checked. Values of ±1 are far larger than usual initial weights: a net without
    BatchNorm behind every layer changes scale.
    """
    return Method(
        weight=lambda _, axis: ClippedSign(window=False, stochastic=stochastic, axis=axis),
        input=input_builder(activation, a_bits),
    )
