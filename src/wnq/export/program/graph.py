"""What stands in a program: its products, their layers and the quantization behind each; and what may change places."""

import math
from dataclasses import dataclass
from typing import Any

import torch

PRODUCTS = ("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose", "linear", "addmm", "matmul", "bmm", "mm")
"""Beginnings of the names of products."""

BETWEEN = ("max_pool1d", "max_pool2d", "view", "reshape", "flatten", "permute", "transpose", "dropout")
"""Operators that may as well work on rounded values: rounding never decreases, so it changes places with the largest of values."""


@dataclass(frozen=True)
class Following:
    """What reads a product's output.

    Attributes:
        nodes: operators behind it, each the only reader of the one before.
        quantization: the first quantization among them, or None.
        is_output: whether what the last of them gives is an output of the program.
    """

    nodes: tuple[Any, ...]
    quantization: Any
    is_output: bool

    @property
    def clips_at_zero(self) -> bool:
        """Whether a ReLU comes first."""
        return bool(self.nodes) and operator_name(self.nodes[0]) == "relu"


def operator_name(node: Any) -> str:
    """Return an operator's name without its library: ``onednn.qconv_pointwise.default`` is ``qconv_pointwise``."""
    return str(node.target).split(".")[1] if node.op == "call_function" and "." in str(node.target) else ""


def weighted_products(program: Any) -> list[tuple[str, Any]]:
    """Return layer and node of each product with stored weights, in order."""
    signature = program.graph_signature
    stored: dict[str, str] = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found: list[tuple[str, Any]] = []
    for node in program.graph_module.graph.nodes:
        if operator_name(node).startswith(PRODUCTS) and len(node.args) > 1:
            layer = _layer_of(node.args[1], stored)
            if layer is not None:
                found.append((layer, node))
    return found


def _layer_of(weight: Any, stored: dict[str, str]) -> str | None:
    """Return the layer that a weight is stored in; None for a computed one."""
    while weight.op != "placeholder":
        if not weight.all_input_nodes:
            return None
        weight = weight.all_input_nodes[0]
    name = stored.get(weight.name)
    return None if name is None else name.rpartition(".")[0].removesuffix("stored").rstrip(".")


def following(product: Any) -> Following:
    """Return what reads a product's output, up to a quantization or the first operator that is no mere step on the way to one."""
    nodes: list[Any] = []
    node = product
    while len(node.users) == 1:
        (node,) = node.users
        if node.op == "output":
            return Following(tuple(nodes), None, True)
        name = operator_name(node)
        if name == "quantize_per_tensor":
            return Following(tuple(nodes), node, False)
        if not name.startswith(("relu", "hardtanh", *BETWEEN)):
            return Following(tuple(nodes), None, False)
        nodes.append(node)
    return Following(tuple(nodes), None, any(reader.op == "output" for reader in node.users))


def merge_clips_(program: Any) -> None:
    """Make one clip of those that follow each other, ReLUs among them, in place: one is what an engine fuses."""
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        bounds, readers = _bounds(node), list(node.users)
        if bounds is None or not readers or not all(operator_name(reader) == "hardtanh" for reader in readers):
            continue
        for reader in readers:
            low, high = _bounds(reader) or (-1.0, 1.0)
            reader.args = (node.args[0], *(min(max(bound, low), high) for bound in bounds))
        graph.erase_node(node)
    program.graph_module.recompile()


def _bounds(node: Any) -> tuple[float, float] | None:
    """Return what an operator clips to, if that is all it does."""
    name, given = operator_name(node), [*node.args[1:], None, None][:2]
    if node.kwargs or not all(bound is None or isinstance(bound, int | float) for bound in given):
        return None
    whole = {"hardtanh": (-1.0, 1.0), "clamp": (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
    if name not in whole:
        return None
    low, high = (default if bound is None else float(bound) for bound, default in zip(given, whole[name], strict=True))
    return low, high


def quantize_ahead_(program: Any) -> None:
    """Quantize before poolings and changes of shape what a product gives, where it is quantized behind them, in place."""
    graph = program.graph_module.graph
    operators = torch.ops.quantized_decomposed
    for _, product in weighted_products(program):
        path = following(product)
        names = [operator_name(node) for node in path.nodes]
        first = next((i for i, name in enumerate(names) if name.startswith(BETWEEN)), None)
        if path.quantization is None or first is None or names[-1] != "hardtanh":
            continue
        moved, clip, quantize = path.nodes[first], path.nodes[-1], path.quantization
        source = moved.args[0]
        with graph.inserting_before(moved):
            clipped = graph.call_function(clip.target, (source, *clip.args[1:]))
            codes = graph.call_function(quantize.target, (clipped, *quantize.args[1:]))
            values = graph.call_function(operators.dequantize_per_tensor.default, (codes, *quantize.args[1:]))
        for new in (clipped, codes, values):
            new.meta["val"] = source.meta["val"] if new is not codes else source.meta["val"].to(quantize.args[5])
        moved.replace_input_with(source, values)
        clip.replace_all_uses_with(clip.args[0])
        graph.erase_node(clip)
    merge_clips_(program)


def dequantize_apart_(program: Any) -> None:
    """Give each reader of dequantized values a dequantization of its own, in place.

    By a reader XNNPACK's partitioner decides whether codes or values are read, and notes it at the dequantization: one that a clip
    and a float sum share would hand codes to the sum, and the file would not load.
    """
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if not operator_name(node).startswith("dequantize_per_tensor"):
            continue
        for reader in list(node.users)[1:]:
            with graph.inserting_before(reader):
                own = graph.node_copy(node)
            reader.replace_input_with(node, own)
    program.graph_module.recompile()
