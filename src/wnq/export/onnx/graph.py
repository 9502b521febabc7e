"""An ONNX graph, tidied: what an engine needs, and names of layers instead of the exporter's notes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

PRODUCTS = ("Conv", "ConvTranspose", "MatMul", "Gemm")
"""Operators that hold a layer's weights."""

REBUILDING = ("DequantizeLinear", "Cast", "Gather", "GatherElements", "Reshape", "Transpose", "Mul")
"""Operators between a stored weight and its product."""


def tidy_(model: Any) -> Any:
    """Strip a model of everything that does not change its results, in place, and give each product its layer's name.

    Values get short names; inputs, outputs and initializers keep theirs, which are those of the layers.
    """
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    model.producer_name, model.producer_version, model.doc_string, graph.doc_string = "wnq", "", "", ""
    graph.name = "wnq"
    _name_initializers_(graph)
    kept = {value.name for value in (*graph.input, *graph.output, *graph.initializer)}
    short: dict[str, str] = {name: name for name in kept} | {"": ""}
    for node in graph.node:
        for name in node.output:
            if name not in short:
                short[name] = f"v{len(short)}"
    for node in graph.node:
        del node.metadata_props[:]
        node.doc_string, node.name = "", ""
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short[name] for name in node.output]
    made = {name: node for node in graph.node for name in node.output}
    initial = {value.name for value in graph.initializer}
    named: set[str] = {""}
    for node in graph.node:
        if node.op_type in PRODUCTS:
            name = layer_of(node, made, initial)
            node.name = name if name not in named else ""  # names are unique; a layer that runs twice keeps its first
            named.add(name)
    for value in (*graph.input, *graph.output):
        del value.metadata_props[:]
        value.doc_string = ""
    for value in graph.initializer:
        value.doc_string = ""
        del value.metadata_props[:]
    return model


def _name_initializers_(graph: Any) -> None:
    """Call initializers without a layer ``c0``, ``c1``, …; the exporter's names for them are as long as they are arbitrary."""
    new: dict[str, str] = {}
    for value in graph.initializer:
        if "." not in value.name:
            new[value.name] = f"c{len(new)}"
            value.name = new[value.name]
    for node in graph.node:
        node.input[:] = [new.get(name, name) for name in node.input]


def layer_of(node: Any, made: Mapping[str, Any], initial: set[str]) -> str:
    """Return the layer whose weight a product reads, through the operators that scale or look it up; empty if it reads none."""
    names = list(node.input[1:2])
    while names:
        name = names.pop()
        if name in initial and name.endswith(".weight"):
            return name.removesuffix(".weight")
        if name in made and made[name].op_type in REBUILDING:
            names += made[name].input
    return ""


def shorten_names_(model: Any, kept: tuple[str, ...]) -> None:
    """Give short names to all values but inputs, outputs and initializers that end in one of ``kept``, in place.

    In a small file names would else take a quarter of the bytes.
    """
    graph = model.graph
    stays = {value.name for value in (*graph.input, *graph.output)} | {""}
    everything = {value.name: None for value in graph.initializer}
    everything |= {name: None for node in graph.node for name in (*node.input, *node.output)}
    stays |= {name for name in everything if name.endswith(kept)}
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    short = {name: name for name in stays}
    for name in everything:
        if name not in short:
            number = len(short)
            short[name] = "v" + "".join(digits[number // 36**power % 36] for power in (4, 3, 2, 1, 0)).lstrip("0")
    for value in graph.initializer:
        value.name = short[value.name]
    for node in graph.node:
        node.input[:] = [short[name] for name in node.input]
        node.output[:] = [short[name] for name in node.output]


def initializers(model: Any) -> dict[str, Any]:
    """Return name -> TensorProto."""
    return {value.name: value for value in model.graph.initializer}


def array_of(value: Any) -> "np.ndarray[Any, Any]":
    """Return a TensorProto's numbers."""
    from onnx import numpy_helper

    return numpy_helper.to_array(value)


def tensor_of(name: str, array: Any) -> Any:
    """Return numbers as a TensorProto."""
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(array, order="C"), name)


def replace_initializers_(model: Any, new: Mapping[str, list[Any]]) -> None:
    """Put tensors (none, one or several) in the place of initializers, in place."""
    kept = [value for value in model.graph.initializer if value.name not in new]
    added = [value for values in new.values() for value in values]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept + added)


def prepend_nodes_(model: Any, nodes: list[Any]) -> None:
    """Put nodes before all others, in place."""
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + rest)


def readers_of(model: Any, name: str) -> list[Any]:
    """Return the nodes that read a value."""
    return [node for node in model.graph.node if name in node.input]


def constant_of(name: str, values: Mapping[str, Any], made: Mapping[str, Any]) -> Any:
    """Return the TensorProto of an initializer or a Constant node."""
    if name in values:
        return values[name]
    return next(attribute.t for attribute in made[name].attribute if attribute.name == "value")


def drop_unread_(model: Any) -> None:
    """Take out nodes whose outputs nothing reads, and initializers likewise."""
    ends = {value.name for value in model.graph.output}
    while True:
        read = {name for node in model.graph.node for name in node.input} | ends
        unread = [node for node in model.graph.node if not any(name in read for name in node.output)]
        if not unread:
            break
        for node in unread:
            model.graph.node.remove(node)
    replace_initializers_(model, {value.name: [] for value in model.graph.initializer if value.name not in read})


def require(opset: int, ir_version: int, model: Any) -> None:
    """Raise the versions that a model asks for to at least these, in place."""
    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    entry.version = max(entry.version, opset)
    model.ir_version = max(model.ir_version, ir_version)
