"""ExecuTorch, with XNNPACK."""

import importlib
import json
import re
import tempfile
import warnings
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wnq.export.engines.engine import Operator

XNNPACK_PRODUCTS = ("XNNConv2d", "XNNDepthwiseConv2d", "XNNConvTranspose2d", "XNNFullyConnected")
OTHER_PRODUCTS = ("aten::convolution", "aten::linear", "aten::addmm", "aten::mm")
"""Products with stored weights: of XNNPACK's graph, and those that ExecuTorch's own kernels run."""


class ExecuTorch:
    """A ``.pte`` program on one thread of the CPU. Larger batches than it takes are run in parts.

    Args:
        path: a ``.pte`` file.
        accuracy_level: not used; programs have no packed weights with float inputs.
    """

    def __init__(self, path: Path, *, accuracy_level: int = 0) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "experimental"
            runtime: Any = importlib.import_module("executorch.runtime")
        importlib.import_module("executorch.extension.pybindings.portable_lib")._unsafe_reset_threadpool(1)
        self.version = f"executorch {version('executorch')}"
        self.settings: dict[str, str] = {}
        self._content = path.read_bytes()
        # The program must live as long as its methods, and the bytes as long as the program.
        self._program: Any = runtime.Runtime.get().load_program(self._content)
        self._method: Any = self._program.load_method("forward")
        self.largest_batch = int(self._method.metadata.input_tensor_meta(0).sizes()[0])

    def run(self, inputs: Sequence[Any]) -> Any:
        """Return the first output."""
        count = len(inputs[0])
        starts = range(0, count, self.largest_batch)
        parts = [[torch.from_numpy(x[at : at + self.largest_batch]).contiguous() for x in inputs] for at in starts]
        return np.concatenate([self._method.execute(part)[0].numpy() for part in parts])

    def operators(self) -> list[Operator]:
        """Return the products that the file gives to XNNPACK, by their types, and those of ExecuTorch's own kernels."""
        found: list[tuple[str, bool]] = []
        program = _contents(self._content)
        plan = next(plan for plan in program.execution_plan if plan.name == "forward")
        for instruction in plan.chains[0].instructions:
            call = instruction.instr_args
            if hasattr(call, "delegate_index"):
                data = program.backend_delegate_data[plan.delegates[call.delegate_index].processed.index].data
                found += _products(bytes(data))
            elif hasattr(call, "op_index"):
                name = plan.operators[call.op_index].name
                found += [(name, False)] if name in OTHER_PRODUCTS else []
        layers = self._program.load_method("layers").execute([])[0].split(",")
        # Neither keeps names; both keep the order of products.
        names = layers if len(layers) == len(found) else [""] * len(found)
        return [Operator(name, kind, integer) for name, (kind, integer) in zip(names, found, strict=True)]


def _contents(file: bytes) -> Any:
    """Return a file's program as data."""
    return importlib.import_module("executorch.exir._serialize._program").deserialize_pte_binary(file).program


def _products(delegate: bytes) -> list[tuple[str, bool]]:
    """Return kind of each product of an XNNPACK graph, and whether both of its sides are integers."""
    serialization = "executorch.backends.xnnpack.serialization"
    form: Any = importlib.import_module(f"{serialization}.xnnpack_graph_serialize").XNNHeader
    decompile: Any = importlib.import_module("executorch.exir._serialize._flatbuffer")._flatc_decompile
    header = form.from_bytes(delegate[: form.EXPECTED_LENGTH])
    graph = delegate[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        schema = resources.files(serialization) / "schema.fbs"
        (folder / "schema.fbs").write_bytes(schema.read_bytes())
        (folder / "graph.bin").write_bytes(graph)
        decompile(name, str(folder / "schema.fbs"), str(folder / "graph.bin"), ["--raw-binary"])
        text = (folder / "graph.json").read_text(encoding="utf-8")
    graph = json.loads(re.sub(r": (-?)inf\b", r": \1Infinity", text))  # flatc writes no JSON there
    types: dict[int, str] = {}
    for value in graph["xvalues"]:
        union = value["xvalue_union"]
        tensor = union.get("tensor_value", union)
        types[tensor["id_out"]] = tensor["datatype"]
    found: list[tuple[str, bool]] = []
    for node in graph["xnodes"]:
        kind, union = node["xnode_union_type"], node["xnode_union"]
        if kind in XNNPACK_PRODUCTS:
            sides = [types[union[key]] for key in ("input1_id", "filter_id") if key in union]
            found.append((kind.removeprefix("XNN"), all("int" in side for side in sides)))
    return found
