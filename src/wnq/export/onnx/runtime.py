"""What ONNX Runtime needs beyond the plain file to run every convolution in integers, and to round no bias wrongly.

Its ``QLinearConv`` must be followed by a quantization, and adds an int32 bias in units of input step times weight scale.

- A convolution whose output nothing quantizes gets an 8-bit quantization behind it, its range taken from calibration data.
- *Gain*: integers times g and scale over g are the same weights with a bias unit g times finer.
- *Search*: of the integer biases around the rounded one, the one with which the fewest sums pass a threshold of the next
  quantization that they should not, or fail to pass one that they should.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from wnq.export.onnx.graph import array_of, initializers, readers_of, replace_initializers_, tensor_of

PAIR_LIMIT = 32767
"""Processors without VNNI add two products in 16 bits: 2 * (largest input) * (largest weight) must not exceed this."""

INT32 = 2**31 - 1


def tune_(model: Any, calibration: Sequence[tuple[Tensor, ...]]) -> list[str]:
    """Change a fast model for ONNX Runtime, in place, and return what to tell the user."""
    notes: list[str] = []
    added = _quantize_outputs_(model, calibration) if calibration else []
    if added:
        notes.append(
            f"8-bit values, calibrated on {sum(len(batch[0]) for batch in calibration)} inputs, behind {len(added)} convolutions "
            f"that nothing quantizes: {_some(added)}."
        )
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    new: dict[str, list[Any]] = {}
    wrong = searched = 0
    for conv in [node for node in model.graph.node if node.op_type == "Conv"]:
        parts = _integer_parts(conv, made, values)
        if parts is None:
            continue
        largest, _ = parts
        dequantize = made[conv.input[1]]
        weight, scale = array_of(values[dequantize.input[0]]), array_of(values[dequantize.input[1]])
        peak = int(np.abs(weight.astype(np.int32)).max()) if weight.size else 0
        room = min(127, PAIR_LIMIT // (2 * largest))
        gain = max(1, room // peak) if peak else 1
        if len(readers_of(model, dequantize.input[0])) > 1:
            gain = 1
        scale = (scale / np.float32(gain)).astype(np.float32)
        bias, missed, asked = _integer_bias(model, conv, made, values, weight, scale, gain)
        wrong, searched = wrong + missed, searched + asked
        new[dequantize.input[0]] = [tensor_of(dequantize.input[0], (weight.astype(np.int32) * gain).astype(np.int8))]
        _own_scale_(model, dequantize, conv.name, scale, new)
        step = array_of(values[made[conv.input[0]].input[1]])
        _set_bias_(model, conv, bias, (step * scale).astype(np.float32), new)
    replace_initializers_(model, new)
    used = {source for node in model.graph.node for source in node.input}
    replace_initializers_(model, {value.name: [] for value in model.graph.initializer if value.name not in used})
    if searched:
        notes.append(f"Integer biases: {wrong} of {searched} thresholds lie between other sums than in the reference.")
    unsafe = saturating(model)
    if unsafe:
        notes.append(
            f"On processors without VNNI the sums of {len(unsafe)} layers can saturate (2 x largest input x largest weight exceeds "
            f"{PAIR_LIMIT}): {_some(unsafe)}. Give them 7-bit inputs or 7-bit symmetric weights if that matters."
        )
    else:
        notes.append(
            f"No sum saturates on processors without VNNI: 2 x largest input x largest weight <= {PAIR_LIMIT}."
        )
    return notes


def saturating(model: Any) -> list[str]:
    """Return the layers whose sums can saturate on processors without VNNI, see :data:`PAIR_LIMIT`."""
    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    found: list[str] = []
    for node in model.graph.node:
        parts = _integer_parts(node, made, values) if node.op_type in ("Conv", "MatMul") else None
        if parts is not None:
            weight = array_of(values[made[node.input[1]].input[0]])
            if weight.size and 2 * parts[0] * int(np.abs(weight.astype(np.int32)).max()) > PAIR_LIMIT:
                found.append(node.name)
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f", … ({len(names)})" if len(names) > 6 else "")


def _integer_parts(conv: Any, made: dict[str, Any], values: dict[str, Any]) -> tuple[int, Any] | None:
    """Return the largest stored integer of a product's input, and the input's dequantization; None if it has none."""
    source, weight = made.get(conv.input[0]), made.get(conv.input[1])
    if source is None or weight is None or {source.op_type, weight.op_type} != {"DequantizeLinear"}:
        return None
    if weight.input[0] not in values:
        return None
    return _bounds(source, made, values)[1], source


def _constant(name: str, values: dict[str, Any], made: dict[str, Any]) -> Any:
    """Return the TensorProto of an initializer or a Constant node."""
    if name in values:
        return values[name]
    return next(attribute.t for attribute in made[name].attribute if attribute.name == "value")


def _bounds(dequantize: Any, made: dict[str, Any], values: dict[str, Any]) -> tuple[int, int]:
    """Return the smallest and largest stored integer of an input: those of a clip, else those of its type."""
    source = made.get(dequantize.input[0])
    if source is not None and source.op_type == "Clip":
        low, high = (int(array_of(_constant(name, values, made))) for name in source.input[1:3])
        return low, high
    bounds = np.iinfo(array_of(_constant(dequantize.input[2], values, made)).dtype)
    return int(bounds.min), int(bounds.max)


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


def _integer_bias(
    model: Any, conv: Any, made: dict[str, Any], values: dict[str, Any], weight: Any, scale: Any, gain: int
) -> tuple[Any, int, int]:
    """Return the integer bias of each channel, how many thresholds are still wrong, and how many there are."""
    step = float(array_of(_constant(made[conv.input[0]].input[1], values, made)))
    unit = step * scale.astype(np.float64)
    # The exporter drops biases that are all zero.
    bias = array_of(values[conv.input[2]]).astype(np.float64) if len(conv.input) > 2 else np.zeros(len(unit))
    exact = bias / unit
    rounded = np.clip(np.rint(exact), -INT32, INT32)
    following = _next_quantization(model, conv)
    if following is None:
        return rounded.astype(np.int32), 0, 0
    out = float(array_of(_constant(following.input[1], values, made)))
    zero = int(array_of(_constant(following.input[2], values, made)))
    (clip,) = readers_of(model, following.output[0])[:1] or (None,)
    kind = np.iinfo(array_of(_constant(following.input[2], values, made)).dtype)
    low, high = int(kind.min), int(kind.max)
    if clip is not None and clip.op_type == "Clip":
        low, high = (int(array_of(_constant(name, values, made))) for name in clip.input[1:3])
    thresholds = (np.arange(low, high) - zero + 0.5) * out
    # Sums are multiples of the gain; each threshold lies between two of them, and must do so with the integer bias too.
    wanted = np.ceil((thresholds[None, :] / unit[:, None] - exact[:, None]) / gain)
    reach = np.arange(-gain, gain + 1)
    reach = reach[np.argsort(np.abs(reach), kind="stable")]
    missed = np.full(len(unit), np.inf)
    best = rounded.copy()
    largest = np.abs(weight.astype(np.int64)).reshape(len(unit), -1).sum(1) * 256
    reachable = np.abs(wanted) <= largest[:, None] + 1
    for shift in reach:
        got = np.ceil((thresholds[None, :] / unit[:, None] - (rounded + shift)[:, None]) / gain)
        count = ((got != wanted) & reachable).sum(1)
        better = count < missed
        best[better], missed[better] = (rounded + shift)[better], count[better]
    return np.clip(best, -INT32, INT32).astype(np.int32), int(missed.sum()), int(reachable.sum())


def _own_scale_(model: Any, dequantize: Any, layer: str, scale: Any, new: dict[str, list[Any]]) -> None:
    """Give a weight's dequantization a scale that no other one reads."""
    name = f"{layer}.scale:gain"
    new[name] = [tensor_of(name, scale)]
    dequantize.input[1] = name


def _set_bias_(model: Any, conv: Any, bias: Any, scale: Any, new: dict[str, list[Any]]) -> None:
    """Make a convolution's bias an int32 with a scale, which must be the float32 product that the engine assumes."""
    from onnx import helper

    name = f"{conv.name}:bias"
    zeros = f"{name}:zero"
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

    values = initializers(model)
    made = {name: node for node in model.graph.node for name in node.output}
    places: dict[str, str] = {}
    for conv in [node for node in model.graph.node if node.op_type == "Conv"]:
        if _integer_parts(conv, made, values) is None or _next_quantization(model, conv) is not None:
            continue
        if conv.output[0] not in {value.name for value in model.graph.output}:
            places[conv.output[0]] = conv.name
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
    """Return the smallest and largest value (zero among them) of each named value over the calibration data."""
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
            found[name] = min(low, float(value.min())), max(high, float(value.max()))
    return found
