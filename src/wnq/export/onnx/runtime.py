"""What ONNX Runtime needs beyond the plain file to run every convolution in integers, and to round no bias wrongly.

Its ``QLinearConv`` must be followed by a quantization, and adds an int32 bias in units of input step times weight scale.

- Clips and poolings between a convolution and its quantization go behind it (:mod:`wnq.export.onnx.ahead`).
- A convolution whose output nothing quantizes gets an 8-bit quantization behind it, its range taken from calibration data. After a
  training with ``residual_bits=8`` there are none: what training rounded stands there already.
- *Gain*: integers times g and scale over g are the same weights with a bias unit g times finer.
- *Search*: integer biases and scales with which sums pass the same thresholds of the next quantization as with the exact biases
  (:mod:`wnq.export.onnx.biases`).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from wnq.export.onnx.ahead import quantize_ahead_
from wnq.export.onnx.biases import Biases, best_biases, integer_biases
from wnq.export.onnx.graph import (
    array_of,
    constant_of,
    drop_unread_,
    initializers,
    readers_of,
    replace_initializers_,
    tensor_of,
)
from wnq.export.onnx.split import input_bounds, join_codes_
from wnq.integer.biases import largest_gain

ENDS = 1e-4
"""Share of calibration values on either side that an 8-bit range may cut off."""


def tune_(model: Any, calibration: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """Change a fast model for ONNX Runtime, in place, and return what to tell the user."""
    notes: list[str] = []
    join_codes_(model)
    quantize_ahead_(model, _integer_convolutions(model))
    added = _quantize_outputs_(model, calibration) if calibration else []
    if added:
        notes.append(
            f"8-bit values, calibrated on {sum(len(batch[0]) for batch in calibration)} inputs, behind {len(added)} convolutions "
            f"that nothing quantizes: {listed(added)}."
        )
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    new: dict[str, list[Any]] = {}
    wrong = searched = 0
    for conv in [node for node in model.graph.node if node.op_type == "Conv"]:
        bounds = input_bounds(conv, made, values)
        if bounds is None:
            continue
        following = _next_quantization(model, conv)
        if following is None:
            continue  # it runs in float, and its float bias is exact
        largest = bounds[1]
        dequantize = made[conv.input[1]]
        weight, scale = array_of(values[dequantize.input[0]]), array_of(values[dequantize.input[1]])
        gain: int | None = largest_gain(int(np.abs(weight.astype(np.int32)).max(initial=0)), largest)
        if len(readers_of(model, dequantize.input[0])) > 1:
            gain = None
        step = array_of(constant_of(made[conv.input[0]].input[1], values, made))
        found = _integer_biases(model, conv, following, made, values, weight, scale, room=gain, largest_input=largest)
        wrong, searched = wrong + int(found.missed.sum()), searched + int(found.asked.sum())
        gains = found.gain.reshape(-1, *[1] * (weight.ndim - 1))
        new[dequantize.input[0]] = [tensor_of(dequantize.input[0], (weight.astype(np.int32) * gains).astype(np.int8))]
        scale = (found.unit / float(step)).astype(np.float32)
        _own_scale_(model, dequantize, conv.name, scale, new)
        _set_bias_(model, conv, found.bias, (step * scale).astype(np.float32), new)
    replace_initializers_(model, new)
    drop_unread_(model)
    if searched:
        notes.append(
            f"Integer biases: {wrong} of {searched} thresholds lie between other sums than in the reference."
            + (" wnq.integer.round_biases_ at the end of training leaves none." if wrong else "")
        )
    return notes


def _integer_convolutions(model: Any) -> list[Any]:
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    return [conv for conv in convolutions if input_bounds(conv, made, values) is not None]


def listed(names: Sequence[str]) -> str:
    """Return the first six names, and how many there are."""
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")


def _next_quantization(model: Any, conv: Any) -> Any | None:
    """Return the one QuantizeLinear that reads a convolution's output, behind a ReLU or not; None if others read it too."""
    name = conv.output[0]
    for _ in range(2):
        readers = readers_of(model, name)
        if len(readers) != 1 or name in {value.name for value in model.graph.output}:
            return None
        if readers[0].op_type == "QuantizeLinear":
            return readers[0]
        if readers[0].op_type != "Relu":
            return None
        name = readers[0].output[0]
    return None


def _integer_biases(
    model: Any,
    conv: Any,
    following: Any,
    made: dict[str, Any],
    values: dict[str, Any],
    weight: Any,
    scale: Any,
    *,
    room: int | None,
    largest_input: int,
) -> Biases:
    """Return biases for a convolution in a graph and the quantization behind it; ``room`` is None where others share its weight."""
    step = float(array_of(constant_of(made[conv.input[0]].input[1], values, made)))
    unit = step * scale.astype(np.float64)
    # The exporter drops biases that are all zero.
    bias = array_of(values[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else np.zeros(len(unit))
    out = float(array_of(constant_of(following.input[1], values, made)))
    zero = array_of(constant_of(following.input[2], values, made))
    (clip,) = readers_of(model, following.output[0])[:1] or (None,)
    low, high = int(np.iinfo(zero.dtype).min), int(np.iinfo(zero.dtype).max)
    if clip is not None and clip.op_type == "Clip":
        low, high = (int(array_of(constant_of(name, values, made))) for name in clip.input[1:3])
    thresholds = (np.arange(low, high) - int(zero) + 0.5) * out
    largest = np.abs(weight.astype(np.int64)).reshape(len(unit), -1).sum(1) * largest_input
    if room is None:
        return integer_biases(bias, unit, thresholds, 1, largest)
    return best_biases(bias, unit, thresholds, room, largest)


def _own_scale_(model: Any, dequantize: Any, layer: str, scale: Any, new: dict[str, list[Any]]) -> None:
    """Give a weight's dequantization a scale that no other one reads."""
    name = f"{layer}.scale:gain"
    new[name] = [tensor_of(name, scale)]
    dequantize.input[1] = name


def _set_bias_(model: Any, conv: Any, bias: Any, scale: Any, new: dict[str, list[Any]]) -> None:
    """Make a convolution's bias an int32 with a scale, which must be the float32 product that the engine assumes."""
    from onnx import helper

    name = f"{conv.name}:bias"
    zeros = f"zeros{len(bias)}"  # one for all layers of that many channels
    parts = {name: bias, f"{name}:scale": scale, zeros: np.zeros(len(bias), np.int32)}
    for key, numbers in parts.items():
        new[key] = [tensor_of(key, numbers)]
    node = helper.make_node("DequantizeLinear", [name, f"{name}:scale", zeros], [f"{name}:float"], axis=0)
    del conv.input[2:]
    conv.input.append(f"{name}:float")
    model.graph.node.insert(0, node)


def _quantize_outputs_(model: Any, calibration: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """Put an 8-bit quantization behind each integer convolution whose output nothing quantizes, in place; return their layers."""
    from onnx import helper

    places: dict[str, str] = {}
    ends = {value.name for value in model.graph.output}
    for conv in _integer_convolutions(model):
        if _next_quantization(model, conv) is not None:
            continue
        name = conv.output[0]
        readers = readers_of(model, name)
        if len(readers) == 1 and readers[0].op_type == "Relu" and name not in ends:
            name = readers[0].output[0]  # behind the ReLU, where no level is spent on what it cuts off
        if name not in ends:
            places[name] = conv.name
    ranges = _ranges(model, list(places), calibration)
    for name, layer in places.items():
        low, high = ranges[name]
        step = np.float32(max(high - low, 1e-12) / 255)
        zero = np.uint8(np.clip(np.rint(-low / step), 0, 255))
        readers = readers_of(model, name)
        tensors = {f"{layer}:out:step": step, f"{layer}:out:zero": zero}
        model.graph.initializer.extend(tensor_of(key, np.asarray(number)) for key, number in tensors.items())
        codes, back = f"{name}:q", f"{name}:dq"
        nodes = [
            helper.make_node("QuantizeLinear", [name, *tensors], [codes]),
            helper.make_node("DequantizeLinear", [codes, *tensors], [back]),
        ]
        for reader in readers:
            reader.input[:] = [back if source == name else source for source in reader.input]
        place = next(i for i, node in enumerate(model.graph.node) if name in node.output)
        for node in reversed(nodes):
            model.graph.node.insert(place + 1, node)
    return list(places.values())


def _ranges(model: Any, names: list[str], calibration: Sequence[tuple[Tensor, ...]]) -> dict[str, tuple[float, float]]:
    """Return the range, with zero in it, of each named value over the calibration data, all but its :data:`ENDS`."""
    import copy

    import onnxruntime
    from onnx import TensorProto, helper

    if not names:
        return {}
    probe = copy.deepcopy(model)
    own = [value.name for value in probe.graph.input]
    probe.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict.fromkeys(names, (0.0, 0.0))
    for batch in calibration:
        results: Any = session.run(names, dict(zip(own, (x.numpy() for x in batch), strict=True)))
        for name, value in zip(names, results, strict=True):
            low, high = found[name]
            ends = np.quantile(value, (ENDS, 1 - ENDS))
            found[name] = min(low, float(ends[0])), max(high, float(ends[1]))
    return found
