"""Which BatchNorm can be folded into which layer: the one that alone reads the layer's output."""

from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from wnq.folding import BatchNorm
from wnq.layers import INDEX_INPUT, channel_axis


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

    The model runs once, in eval mode, in which it must be. Unlike :func:`wnq.folding.batchnorm_pairs` this sees transposed
    convolutions, and an output that a shortcut reads as well, as in pre-activation networks.
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
        return channel_axis(module) is not None and not isinstance(module, INDEX_INPUT)

    handles = [m.register_forward_hook(after) for m in model.modules() if is_layer(m)]
    handles += [m.register_forward_pre_hook(before) for m in model.modules() if isinstance(m, BatchNorm)]
    try:
        with readers:
            result = model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
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
