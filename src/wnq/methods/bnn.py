"""BNN: the sign of the weights and of the inputs."""

import torch
from torch import Tensor

from wnq.activations import input_builder, register_input
from wnq.methods.binaryconnect import UNSCALED, ClippedSign
from wnq.methods.registry import Method, register
from wnq.quantizer import Quantized, Quantizer, compute_dtype


class InputSign(Quantizer):
    r"""The sign of the input, with the gradient of Hardtanh.

    Forward: :math:`y = +1` for x > 0, else -1. Gradient: :math:`dy/dx = 1_{|x| \le 1}`.

    Zero counts as negative, so that behind a ReLU the sign still tells active from inactive. The papers' blocks have no ReLU there,
    and give zero the other sign, which is then a matter of one value.
    """

    bits = 1
    signed = True

    def forward(self, x: Tensor) -> Tensor:
        """Return ±1."""
        exact = x.to(compute_dtype(x))
        value = torch.where(exact > 0, 1.0, -1.0).to(exact.dtype)
        return self.pass_through(value, exact.clamp(-1, 1), 2.0).to(x.dtype)

    def encode(self, x: Tensor) -> Quantized:
        """Return codes 0 and 1 for levels -1 and +1."""
        scale = torch.ones((), dtype=x.dtype, device=x.device)
        return Quantized((x > 0).to(torch.uint8), torch.tensor([-1.0, 1.0]).to(x), scale)


register_input("sign", lambda _: InputSign(), paper="arXiv:1602.02830", widths=(1,))


@register(paper="arXiv:1602.02830", widths=(1,), no_normalizer=UNSCALED)
def bnn(w_bits: int = 1, a_bits: int = 1, *, activation: str = "sign") -> Method:
    r"""Weights and inputs of ±1, both with the gradient of Hardtanh.

    Forward: :math:`w_q = \mathrm{sign}(w)` and :math:`x_q = \mathrm{sign}(x)`, with sign(0) = 1 for weights and -1 for
    inputs. No scale.

    Gradient: :math:`dw_q/dw = 1_{|w| \le 1}` and :math:`dx_q/dx = 1_{|x| \le 1}`; the float weights are clipped,
    :math:`w \leftarrow \mathrm{clip}(w, -1, 1)`.

    The paper's block is conv, BatchNorm, (Hardtanh,) sign, with no ReLU; behind one, the sign tells active from inactive.

    Args:
        w_bits: 1, or 32.
        a_bits: width of the inputs: 1 for the paper's sign, or 32; others by ``activation``.
        activation: ``"sign"`` is the paper's.

    Returns:
        The method.

    Raises:
        ValueError: a width or name out of range, or a normalizer in front.

    References:
        I. Hubara, M. Courbariaux et al., Binarized Neural Networks: Training Deep Neural Networks with Weights and Activations
        Constrained to +1 or -1, arXiv:1602.02830, 2016, Sec. 1.1-1.3 and Alg. 1.

    Differences from the paper: the deterministic sign only, and zero inputs count as negative (see :class:`InputSign`). The clip of
    the weights comes just before the next training pass, see ``binaryconnect``. Shift-based BatchNorm and optimizer are not part
    of it. The paper's first layer sees 8-bit pixels with binary weights; which weights are binary is up to the plan (by default
    the first and the last layer have 8 bits).
    """
    return Method(weight=lambda _, axis: ClippedSign(window=True, axis=axis), input=input_builder(activation, a_bits))
