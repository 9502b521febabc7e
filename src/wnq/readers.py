"""Who reads the output of a layer: which BatchNorm alone does, and where no input quantizer alone does."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from wnq.layers import FUSED, INDEX_INPUT, BatchNorm, channel_axis

TRANSPARENT = (nn.Identity, nn.modules.dropout._DropoutNd)  # pyright: ignore[reportPrivateUsage]
"""Modules that change nothing in eval mode."""

RECTIFIERS = (nn.ReLU, nn.ReLU6)
RECTIFYING = {torch.relu, torch.relu_, nn.functional.relu, nn.functional.relu_, nn.functional.relu6, "relu", "relu_"}

PICKERS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Flatten)
PICKING = {torch.flatten, torch.permute, "flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze"}
"""What picks values or moves them does not care whether they are rounded before or after."""

SHAPE_ONLY = {"size", "dim", "numel", "type", "shape", "dtype", "device", "ndim"}


class _Readers(TorchFunctionMode):
    """Counts, for each watched tensor, the operations that make a new tensor of it."""

    def __init__(self) -> None:
        super().__init__()
        self.watched: dict[int, Tensor] = {}
        self.count: Counter[int] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(part, Tensor) for part in _flat(result)):
            read = {id(part) for part in _flat((args, kwargs or {})) if isinstance(part, Tensor)}
            self.count.update(read & self.watched.keys())
        return result


def _flat(value: Any) -> list[Any]:
    if isinstance(value, list | tuple):
        return [part for entry in cast("tuple[Any, ...]", value) for part in _flat(entry)]
    if isinstance(value, dict):
        return [part for entry in cast("dict[Any, Any]", value).values() for part in _flat(entry)]
    return [value]


@torch.no_grad()
def foldable_pairs(model: nn.Module, *inputs: Any) -> dict[str, str]:
    """Return layer -> BatchNorm wherever folding changes nothing: both run once, and nothing else reads the layer's output.

    The model runs once, in eval mode.

    Args:
        model: any module; it is left as it was.
        inputs: what its forward takes; the smallest batch will do.
    """
    names = {module: name for name, module in model.named_modules()}
    runs: Counter[nn.Module] = Counter()
    made: dict[int, nn.Module] = {}
    pairs: list[tuple[nn.Module, nn.Module, int]] = []
    readers = _Readers()

    def after(module: nn.Module, _: Any, output: Any) -> None:
        runs[module] += 1
        if isinstance(output, Tensor):
            made[id(output)] = module
            readers.watched[id(output)] = output  # keeping the tensor keeps its id

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        runs[module] += 1
        if args and id(args[0]) in made:
            pairs.append((made[id(args[0])], module, id(args[0])))

    def is_layer(module: nn.Module) -> bool:
        rounded = hasattr(module, "output_quantizer")  # then a BatchNorm reads rounded values, and stays where it is
        return channel_axis(module) is not None and not isinstance(module, INDEX_INPUT) and not rounded

    handles = [m.register_forward_hook(after) for m in model.modules() if is_layer(m)]
    handles += [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, BatchNorm)]
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with readers:
            result = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    returned = {id(part) for part in _flat(result)}
    return {
        names[layer]: names[norm]
        for layer, norm, tensor in pairs
        if readers.count[tensor] == 1
        and tensor not in returned
        and runs[layer] == 1
        and runs[norm] == 1
        and cast(BatchNorm, norm).running_var is not None
    }


class _Tracer(fx.Tracer):
    """Looks into containers and blocks, not into layers."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, FUSED) or next(m.children(), None) is None or super().is_leaf_module(m, "")


def unrounded_outputs(model: nn.Module, layers: Collection[str], rounding: Collection[str]) -> dict[str, str]:
    """Return module -> layer wherever a layer's output is read by anything but one layer that rounds its input.

    The module is where its values are final: the layer, or the BatchNorm behind it, or the ReLU behind those. Outputs of the model
    are left out. Nothing is computed: the forward is followed symbolically (:mod:`torch.fx`).

    Args:
        model: any module; it is only read.
        layers: names of the layers in question.
        rounding: names of the layers that round their inputs.

    Raises:
        ValueError: the forward cannot be followed.
    """
    found: dict[str, str] = {}
    for layer, end in _ends(model, layers):
        if end.reader not in rounding and not end.returned:
            found[end.place] = layer
    return found


def only_readers(model: nn.Module, layers: Collection[str]) -> dict[str, str]:
    """Return layer -> the module that alone reads its output, behind BatchNorm, ReLU, and what picks values or moves them.

    Raises:
        ValueError: the forward cannot be followed.
    """
    return {layer: end.reader for layer, end in _ends(model, layers) if end.reader}


@dataclass(frozen=True)
class _End:
    """Where a layer's values are final, whether the model returns them, and the one module that reads them, if it is one."""

    place: str
    returned: bool
    reader: str


def _ends(model: nn.Module, layers: Collection[str]) -> list[tuple[str, _End]]:
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # a forward may raise anything when it meets a symbol
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise ValueError(
            f"residual_bits: torch.fx cannot follow the forward of {type(model).__name__}: {reason}. List the outputs yourself, "
            'dataclasses.replace(plan, outputs=(OutputPlan("module", "convolution"), …)), or leave residual_bits at 32.'
        ) from error
    modules = dict(model.named_modules())
    runs = Counter(node.target for node in graph.nodes if node.op == "call_module")
    nodes = [node for node in graph.nodes if node.op == "call_module" and node.target in layers]
    return [(str(node.target), _end(node, modules, runs)) for node in nodes]


def _end(node: fx.Node, modules: dict[str, nn.Module], runs: "Counter[Any]") -> _End:
    def module_of(reader: fx.Node | None) -> nn.Module | None:
        return modules.get(str(reader.target)) if reader is not None and reader.op == "call_module" else None

    def reader_of(value: fx.Node) -> fx.Node | None:
        """Return what alone reads a value, modules that change nothing aside."""
        readers = [user for user in value.users if not _reads_shape(user)]
        while len(readers) == 1 and isinstance(module_of(readers[0]), TRANSPARENT):
            readers = [user for user in readers[0].users if not _reads_shape(user)]
        return readers[0] if len(readers) == 1 else None

    last, reader = node, reader_of(node)
    if (
        reader is not None
        and isinstance(module_of(reader), BatchNorm)
        and runs[node.target] == runs[reader.target] == 1
    ):
        last, reader = reader, reader_of(reader)
    if reader is not None and (isinstance(module_of(reader), RECTIFIERS) or reader.target in RECTIFYING):
        if reader.op == "call_module" and runs[reader.target] == 1:
            last = reader
        reader = reader_of(reader)
    while reader is not None and (isinstance(module_of(reader), PICKERS) or reader.target in PICKING):
        reader = reader_of(reader)
    name = str(reader.target) if reader is not None and reader.op == "call_module" else ""
    return _End(str(last.target), any(user.op == "output" for user in last.users), name)


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in SHAPE_ONLY
    return node.op == "call_function" and node.target is getattr and node.args[1] in SHAPE_ONLY
