"""The float twin of a Q/DQ model: the same graph without quantization, for a fair comparison of speed in the same engine."""

import copy
from typing import Any

from wnq.export.onnx.graph import array_of, drop_unread_, initializers, replace_initializers_, tensor_of


def float_twin(model: Any) -> Any:
    """Return a copy of a fast model with float32 weights and no quantization of inputs; its outputs are those of another net."""
    import numpy as np

    model = copy.deepcopy(model)
    values = initializers(model)
    same: dict[str, str] = {}
    new: dict[str, list[Any]] = {}
    kept: list[Any] = []
    nodes: list[Any] = list(model.graph.node)
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.input[0] in values:
            integers, scale = array_of(values[node.input[0]]), array_of(values[node.input[1]])
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            if scale.ndim:
                scale = scale.reshape([-1 if d == axis else 1 for d in range(integers.ndim)])
            name = f"{node.output[0]}:float"
            new[name] = [tensor_of(name, (integers * scale).astype(np.float32))]
            same[str(node.output[0])] = name
        elif node.op_type in ("QuantizeLinear", "DequantizeLinear") or (
            node.op_type == "Clip" and len(node.input) == 3 and _codes(node, same)
        ):
            source = str(node.input[0])
            same[str(node.output[0])] = same.get(source, source)
        else:
            node.input[:] = [same.get(name, name) for name in node.input]
            kept.append(node)
    del model.graph.node[:]
    model.graph.node.extend(kept)
    replace_initializers_(model, new)
    drop_unread_(model)
    return model


def _codes(node: Any, same: dict[str, str]) -> bool:
    """Whether a clip is that of codes, behind a quantization."""
    return node.input[0] in same
