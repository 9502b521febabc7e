"""What OpenVINO needs beyond the plain file."""

from typing import Any

import numpy as np

from wnq.export.onnx.graph import array_of, drop_unread_, initializers, tensor_of

NEXT_TO_NOTHING = np.float32(1e-30)
"""A bias that changes no sum."""


def settle_(model: Any) -> None:
    """Give every convolution a bias, in place.

    Version 2026.4 computes wrong residual sums behind an integer convolution that has none, and takes a bias of zeros for none.
    """
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    for conv in [node for node in model.graph.node if node.op_type == "Conv" and node.name]:
        weight = made.get(conv.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in values:
            continue
        if len(conv.input) > 2 and (conv.input[2] not in values or array_of(values[conv.input[2]]).any()):
            continue
        channels = array_of(values[weight.input[0]]).shape[0]
        del conv.input[2:]
        conv.input.append(f"{conv.name}:bias")
        model.graph.initializer.append(tensor_of(f"{conv.name}:bias", np.full(channels, NEXT_TO_NOTHING)))
    drop_unread_(model)
