"""A weight, rounded in the two ways that are compared."""

import torch
from torch import Tensor

from wnq.clipping import clip_errors
from wnq.methods import get_method
from wnq.methods.sawb import ClippedGrid
from wnq.names import check_choice
from wnq.quantizer import FLOAT_BITS
from wnq.sensitivity.records import VARIANTS


class LeastErrorGrid(ClippedGrid):
    """The grid between plus and minus the clip of the least squared error of the weights."""

    def clip(self, w: Tensor) -> Tensor:
        """Return the clip of the whole tensor, or one a channel; 0 for a group of zeros."""
        groups = [w] if self.granularity == "tensor" else list(w.unbind(self.axis))
        clips = [clip_errors(group, bits=[self.bits], rules=["mse"], grid=self.grid.grid)[0].clip for group in groups]
        found = torch.tensor(clips, dtype=w.dtype, device=w.device)
        return found.reshape(()) if self.granularity == "tensor" else found


@torch.no_grad()
def quantized_weight(weight: Tensor, bits: int, variant: str, *, grid: str, granularity: str, axis: int) -> Tensor:
    """Return a finite weight's quantized values: its own shape, type and device.

    Args:
        weight: any shape.
        bits: 1 to 8 (2 to 8 on the symmetric grid).
        variant: one of :data:`wnq.sensitivity.VARIANTS`; ``max`` is exactly what ``wnq`` starts training with.
        grid: ``full`` or ``symmetric``.
        granularity: one range a ``tensor`` or a ``channel``. The best clip of a channel takes a few milliseconds on a processor.
        axis: output-channel dimension.
    """
    if check_choice(variant, VARIANTS, where="variant") == "clip":
        return LeastErrorGrid(bits, grid, granularity, axis)(weight)
    method = get_method("wnq", w_bits=bits, a_bits=FLOAT_BITS, grid=grid, granularity=granularity)
    assert method.weight is not None
    return method.weight(weight, axis)(weight)


def relative_error(weight: Tensor, values: Tensor) -> float:
    """Return |w - w_q|^2 / |w|^2, summed in float64 (float32 where the device has no other); NaN for a weight of zeros."""
    kind = torch.float32 if weight.device.type == "mps" else torch.float64
    exact = weight.to(kind)
    return ((exact - values.to(kind)).square().sum() / exact.square().sum()).item()
