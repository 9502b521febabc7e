"""Float inputs computed anew: the output of a ReLU behind BatchNorm, from what BatchNorm saves for its own backward pass.

The graph that autograd builds says how a tensor came about, so no layer needs to be known: ``relu(bn(z))`` and
``relu(bn(z) + shortcut)``. Only nodes further up the graph are held, never a node's own output: nothing refers to itself.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

KEY = "wnq.compact"
"""Where a ReLU's node keeps its :class:`Rebuilt`."""

LONGEST = 4
"""Outputs in a row that are rebuilt from one another; the next one is kept. While one is rebuilt, all below it are held."""

BATCHNORM = {"NativeBatchNormBackward0": "_saved_eps", "CudnnBatchNormBackward0": "_saved_epsilon"}


def _normalized(node: Any) -> Tensor:
    """Return the output of a BatchNorm in training, from its node."""
    bias = node.next_functions[2][0].variable
    eps = getattr(node, BATCHNORM[node.name()])
    return torch.batch_norm(
        node._saved_input, node._saved_weight, bias, None, None, True, 0.0, eps, torch.backends.cudnn.enabled
    )


def _is_batchnorm(node: Any) -> bool:
    if node is None or node.name() not in BATCHNORM or not getattr(node, "_saved_training", True):
        return False
    bias = node.next_functions[2][0]
    return node._saved_weight is not None and bias is not None and hasattr(bias, "variable")


class Rebuilt:
    """The output of a ReLU, which is not kept.

    Args:
        normalization: the node of the BatchNorm before it.
        shortcut: the node of what was added in between: another BatchNorm or a ReLU; None if nothing was.
    """

    def __init__(self, normalization: Any, shortcut: Any | None) -> None:
        self._normalization, self._shortcut = normalization, shortcut
        below = _rebuilt(shortcut)
        self.length = 1 if below is None else 1 + below.length
        self._value: Tensor | None = None

    def value(self, *, last: bool = False) -> Tensor:
        """Return the output; it is kept until it was asked for with ``last``."""
        value = self._compute(last=last) if self._value is None else self._value
        self._value = None if last else value
        return value

    @torch.no_grad()
    def _compute(self, *, last: bool) -> Tensor:
        value = _normalized(self._normalization)
        if self._shortcut is not None:
            below = _rebuilt(self._shortcut)
            if _is_batchnorm(self._shortcut):
                value += _normalized(self._shortcut)
            else:
                value += self._shortcut._saved_result if below is None else below.value(last=last)
        return value.relu_()


def _rebuilt(node: Any | None) -> Rebuilt | None:
    return None if node is None else node.metadata.get(KEY)


def _recipe(relu: Any) -> Rebuilt | None:
    (source, _), *_ = relu.next_functions
    if _is_batchnorm(source):
        return Rebuilt(source, None)
    if source is None or source.name() != "AddBackward0" or source._saved_alpha != 1:
        return None
    added = [node for node, _ in source.next_functions]
    for normalization, shortcut in (added, added[::-1]):
        known = shortcut is not None and (shortcut.name() == "ReluBackward0" or _is_batchnorm(shortcut))
        if _is_batchnorm(normalization) and known:
            return Rebuilt(normalization, shortcut)
    return None


def rebuild(relu: Any, *, check: bool) -> Rebuilt | None:
    """Stop a ReLU's node from keeping its output, and return what gives it back; None where it must be kept.

    Args:
        relu: a ``ReluBackward0``, just made: its backward pass is the last one to ask for the output.
        check: compare with the output, bit for bit, and leave the node as it is where they differ.
    """
    known = _rebuilt(relu)
    if known is not None:
        return known
    found = _recipe(relu)
    if found is None or found.length > LONGEST:
        return None
    if check and not torch.equal(found.value(last=True), relu._saved_result):
        return None
    if not forget(relu._raw_saved_result, lambda: found.value(last=True)):
        return None
    relu.metadata[KEY] = found
    return found


def _nothing(_: Tensor) -> None:
    """Keep nothing of a saved tensor."""


def forget(saved: Any, restore: Callable[[], Tensor]) -> bool:
    """Put ``restore`` in the place of a tensor that a node saved; False if someone else has packed it already."""
    try:
        saved.register_hooks(_nothing, lambda _: restore())  # pyright: ignore[reportUnknownLambdaType]
    except RuntimeError:  # within torch.autograd.graph.saved_tensors_hooks or a checkpoint
        return False
    return True
