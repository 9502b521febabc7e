"""Training in less memory: what the backward pass needs of a quantized input is kept as codes, and restored bit for bit.

``codes`` packs the rounded input, ``rebuilding`` computes the float input anew from what BatchNorm keeps anyway, ``saving`` puts
both in the place of what autograd saved.
"""

from wnq.compact.saving import compact_activations_

__all__ = ["compact_activations_"]
