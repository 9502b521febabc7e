"""TBN: ternary inputs and binary weights."""

import torch
from torch import Tensor

from wnq.activations import input_builder, register_input
from wnq.methods.bwn import ScaledSign
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, compute_dtype
from wnq.starting import StartsFromData, across_processes


class TernaryInput(StartsFromData):
    r"""Three values an input: :math:`\mathrm{sign}(x)\,1_{|x| \ge \Delta}`, :math:`\Delta = \delta\,E|x|`.

    Gradient: :math:`1_{|x| \le 1}`.

    :math:`E|x|` is a running average over training batches; the first batch sets it. Batches whose mean is not finite are left
    out. All processes of a distributed job average together.

    Args:
        delta: > 0.
        momentum: weight of a new batch in the average, above 0 and at most 1; 1 takes the last batch alone.
    """

    bits = 2
    signed = True
    mean: Tensor

    def __init__(self, delta: float = 0.4, momentum: float = 0.1) -> None:
        super().__init__()
        if not 0 < delta < float("inf"):
            raise ValueError(f"delta must be positive and finite, got {delta!r}.")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must lie above 0 and at most 1, got {momentum!r}.")
        self.delta = delta
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(()))

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Bring the batch's mean absolute value into the average."""
        batch = across_processes(x.detach().to(compute_dtype(x)).abs().mean().to(self.mean.dtype))
        moved = torch.where(self.initialized, torch.lerp(self.mean, batch, self.momentum), batch)
        finite = torch.isfinite(batch)
        self.mean.copy_(torch.where(finite, moved, self.mean))
        self.initialized.logical_or_(finite)
        self._ready = True

    def _ternary(self, x: Tensor) -> Tensor:
        self.check_ready()
        return x.sign() * (x.abs() >= self.delta * self.mean.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return -1, 0 or 1."""
        exact = x.to(compute_dtype(x))
        return self.pass_through(self._ternary(exact.detach()), exact.clamp(-1, 1), 2.0).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0, 1, 2 for levels -1, 0, 1."""
        scale = torch.ones((), dtype=x.dtype, device=x.device)
        return Quantized((self._ternary(x) + 1).to(torch.uint8), torch.tensor([-1.0, 0.0, 1.0]).to(x), scale)

    def extra_repr(self) -> str:
        """Show the constants in ``print(model)``."""
        return f"bits=2, delta={self.delta}, momentum={self.momentum}"


register_input("tbn", lambda _: TernaryInput(), paper="ECCV 2018", widths=(2,))


@register(paper="ECCV 2018", widths=(1,))
def tbn(w_bits: int = 1, a_bits: int = 2, *, activation: str = "tbn") -> Method:
    r"""Binary weights with the scale of each filter, inputs of -1, 0 or 1.

    Forward: :math:`w_q = \alpha\,\mathrm{sign}(w)`, :math:`\alpha = \mathrm{mean}|w|` of each filter;
    :math:`x_q = \mathrm{sign}(x)\,1_{|x| \ge \Delta}`, :math:`\Delta = 0.4\,E|x|`.

    Gradient: :math:`dw_q/dw = 1`, alpha under stop-gradient; :math:`dx_q/dx = 1_{|x| \le 1}`.

    The sign of the inputs counts, so the block is BatchNorm, ternary, convolution, as in ``xnor``; after a ReLU two of the three
    values are left.

    Args:
        w_bits: 1, or 32.
        a_bits: width of the inputs: 2 for the paper's ternary values (three of four codes), or 32; others by ``activation``.
        activation: ``"tbn"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range.

    References:
        D. Wan et al., TBN: Convolutional Neural Network with Ternary Inputs and Binary Weights, ECCV 2018,
        doi:10.1007/978-3-030-01216-8_20.

    Differences from the paper: the constant 0.4 and the gradient of the inputs are stated from memory. :math:`E|x|` is one running
    average a layer (new batches weigh 0.1), used in training and evaluation alike; the authors' later code (TBNv2) takes the
    batch's own mean in training and a running average (0.01) in evaluation, with 0.5 for 0.4, and multiplies the ternary values by
    :math:`2\Delta`, which is left out here.
    """
    return Method(weight=lambda _, axis: ScaledSign("channel", axis), input=input_builder(activation, a_bits))
