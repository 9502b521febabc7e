"""Which of torch's layers can be quantized, and along which dimension their output channels run."""

from torch import nn

CHANNEL_AXIS: dict[type[nn.Module], int] = {
    nn.Conv1d: 0,
    nn.Conv2d: 0,
    nn.Conv3d: 0,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 1,
    nn.ConvTranspose3d: 1,
    nn.Linear: 0,
    nn.Embedding: 0,
    nn.EmbeddingBag: 0,
}
"""Layers whose ``weight`` can be quantized, with the dimension of their output channels."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

INDEX_INPUT = (nn.Embedding, nn.EmbeddingBag)
"""Layers whose input is indices, which are never quantized."""

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d

FUSED = (nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
"""Layers that bypass their children or keep several weights: left float, whole."""


def channel_axis(layer: nn.Module) -> int | None:
    """Return the output-channel dimension of a layer's weight, or None if the layer cannot be quantized."""
    return next((axis for kind, axis in CHANNEL_AXIS.items() if isinstance(layer, kind)), None)
