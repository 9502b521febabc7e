"""From an integer reference model to a program of ``torch.export``, with a dynamic batch."""

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from wnq.export.program.graph import merge_clips_

METADATA = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "from_node")
"""What the exporter notes at every operator: paths and names of the machine that wrote the file."""


def register_operators() -> None:
    """Register the operators ``quantized_decomposed``, which torch does on this import alone."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")


def trace_program(model: nn.Module, inputs: tuple[Any, ...], *, largest_batch: int | None = None) -> Any:
    """Return the ``ExportedProgram`` of a model in the form of :func:`wnq.export.program.layers.program_form`.

    Args:
        model: in eval mode.
        inputs: what its forward takes; the batch is the first dimension of each tensor.
        largest_batch: the batch may not exceed; None for any.

    Raises:
        ValueError: the model cannot be traced.
    """
    register_operators()
    # A batch of one would be taken for a constant, and one below 16 for a bound: torch asks whether there are as many, to pick a
    # convolution, and ExecuTorch's passes would hold the batch to the answer.
    inputs = tuple(_examples(x, largest_batch or 2) if isinstance(x, Tensor) else x for x in inputs)
    batch = torch.export.Dim("batch", min=1, max=largest_batch)
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        try:
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False).run_decompositions({})
        except Exception as error:
            line = next((line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__)
            raise ValueError(
                f"{type(model).__name__} cannot be traced: {line[:300].rstrip('.')}. Write that part of the model in another way; "
                "a forward must not depend on the values of its inputs, and the batch must stay the first dimension."
            ) from error
    merge_clips_(program)
    return program


def _examples(x: Tensor, count: int) -> Tensor:
    """Return a batch of ``count``, of storage of its own."""
    return torch.cat([x] * -(-count // len(x)))[:count].clone() if x.ndim and len(x) else x.clone()


def strip_(program: Any) -> None:
    """Take out what does not change a program's results: notes at its operators, and the inputs it was traced with."""
    for node in program.graph_module.graph.nodes:
        for key in METADATA:
            node.meta.pop(key, None)
    program.example_inputs = None
