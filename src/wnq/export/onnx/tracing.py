"""From an integer reference model to an ONNX model: one file for ONNX Runtime, OpenVINO and everything that reads Q/DQ."""

import contextlib
import logging
import warnings
from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor, nn

from wnq.export.onnx.graph import tidy_
from wnq.export.onnx.layers import onnx_form
from wnq.export.onnx.operators import translations

OPSET, IR_VERSION = 21, 10
"""What the file asks for. Newer ones are refused by engines that are in use; 21 is the first with 4-bit integers."""


def trace(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """Return the fast ONNX model of an integer reference model, as an ``onnx.ModelProto``, with a dynamic batch.

    Args:
        model: of a :class:`wnq.integer.Conversion`.
        inputs: what its forward takes, tensors with the batch as first dimension.

    Raises:
        ValueError: the model cannot be traced, or an operator has no ONNX form; with its layer, where that is known.
        ModuleNotFoundError: the extra ``onnx`` is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{error.name} is not installed: pip install "wnq[onnx]".', name=error.name) from None
    # A batch of one would be taken for a constant.
    inputs = tuple(_at_least_two(x) for x in inputs)
    names = ["input"] if len(inputs) == 1 else [f"input{i}" for i in range(len(inputs))]
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs)
    exported: Any = None
    with _quiet(), torch.no_grad():
        try:
            exported = torch.export.export(onnx_form(model), inputs, dynamic_shapes=shapes, strict=False)
            program = torch.onnx.export(
                exported, inputs, dynamo=True, opset_version=OPSET, external_data=False,
                input_names=names, custom_translation_table=translations(), verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise ValueError(_explained(error, model, exported)) from error
    assert program is not None
    proto = program.model_proto
    proto.ir_version = IR_VERSION
    for number, value in enumerate(proto.graph.output):
        _rename_output_(proto, value.name, "output" if len(proto.graph.output) == 1 else f"output{number}")
    tidy_(proto)
    onnx.checker.check_model(proto)
    return proto


def _at_least_two(x: Any) -> Any:
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim and x.shape[0] == 1 else x


def _rename_output_(proto: Any, old: str, new: str) -> None:
    for node in proto.graph.node:
        node.output[:] = [new if name == old else name for name in node.output]
        node.input[:] = [new if name == old else name for name in node.input]
    for value in proto.graph.output:
        if value.name == old:
            value.name = new


@contextlib.contextmanager
def _quiet() -> Generator[None]:
    """Keep the exporter's own chatter off the screen while the block runs."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _explained(error: Exception, model: nn.Module, exported: Any) -> str:
    """Return what failed, where and what to do, in one sentence."""
    causes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        causes.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    text = " ".join(causes)
    operator = _between(text, "No ONNX function found for <OpOverload(op='", "'")
    failed = operator or _between(text, "call_function[target=torch.ops.", "]").removesuffix(".default")
    layer = _layer_of(exported, failed) if exported is not None and failed else ""
    where = f" in layer {layer!r}" if layer else ""
    if operator:
        return (
            f"operator {operator}{where} has no ONNX form. Replace it in the model by operators of torch.nn.functional that have "
            "one, or keep that part out of the exported model."
        )
    line = next((line for line in reversed(causes) if line.strip()), type(error).__name__).strip().splitlines()[0]
    what = (
        f"operator {failed}{where} of {type(model).__name__} cannot be written"
        if failed
        else f"{type(model).__name__} cannot be traced"
    )
    return (
        f"{what}: {line[:300].rstrip('.')}. Write that part of the model in another way; a forward must not depend on the values "
        "of its inputs, and the batch must stay the first dimension."
    )


def _between(text: str, before: str, after: str) -> str:
    _, found, rest = text.partition(before)
    return rest.partition(after)[0] if found else ""


def _layer_of(exported: Any, operator: str) -> str:
    """Return the module that an operator of a traced program stands in; empty for the model itself."""
    for program in (exported, exported.run_decompositions()):
        for node in program.graph.nodes:
            if str(node.target).startswith(operator):
                paths = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
                return str(paths[-1]).removeprefix("L['self'].").removeprefix("L['self']") if paths else ""
    return ""
