r"""One tensor in numbers: its tail, its quantization error, and the law between the two.

With
``C = max|w| / rms(w)``, the crest factor, a uniform grid over ``[-max|w|, max|w|]`` errs by about ``C^2 / (12 N^2)``
(:func:`predicted_error`), so a method lowers the rounding error at a given width exactly as far as it lowers C.

Sums run in float64 over pieces (:mod:`wnq.tails.pieces`), so a weight needs no more memory than itself and a few MB; one that
is not contiguous is copied. On the CPU as many threads work as torch is set to use, and the result does not depend on their
number; on another device the work is done there. NaN and infinity are counted and left out of every other number. What is
undefined (the crest factor of an all-zero weight) is NaN.
"""

from wnq.tails.channels import ChannelStats, channel_stats
from wnq.tails.errors import ErrorStats, error_stats, predicted_error
from wnq.tails.statistics import TAIL, Histogram, TensorStats, describe, histogram, tensor_stats

__all__ = [
    "TAIL",
    "ChannelStats",
    "ErrorStats",
    "Histogram",
    "TensorStats",
    "channel_stats",
    "describe",
    "error_stats",
    "histogram",
    "predicted_error",
    "tensor_stats",
]
