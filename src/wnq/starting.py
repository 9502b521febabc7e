"""Quantizers whose state starts from what they meet: a weight, or an input's first training batch."""

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from wnq.quantizer import Quantizer, compute_dtype


def across_processes(value: Tensor, reduce: Literal["mean", "sum", "max", "min"] = "mean") -> Tensor:
    """Return the mean, sum, maximum or minimum of a statistic over the processes of a job, if it has several."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    operations = {"max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
    dist.all_reduce(value, op=operations.get(reduce, dist.ReduceOp.SUM))
    return value / dist.get_world_size() if reduce == "mean" else value


def started(build: Callable[[], Quantizer]) -> Callable[[Tensor, int], Quantizer]:
    """Return a builder of weight quantizers: on the weight's device, along its axis, with a state set from the weight."""

    def build_for(weight: Tensor, axis: int) -> Quantizer:
        quantizer = build().to(weight.device)
        quantizer.axis = axis
        quantizer.reset_(weight)
        return quantizer

    return build_for


class StartsFromData(Quantizer):
    """A quantizer whose state :meth:`start_` sets: from the weight, or once, from an input's first training batch.

    Args:
        is_weight: the tensor is a weight rather than an activation.
    """

    initialized: Tensor

    def __init__(self, *, is_weight: bool = False) -> None:
        super().__init__()
        self.is_weight = is_weight
        self.register_buffer("initialized", torch.tensor(False))
        self._ready = False

    def start_(self, x: Tensor) -> None:
        """Set the state from ``x``, which has :func:`wnq.quantizer.compute_dtype`, without gradient."""
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether the state has its starting values."""
        if not self._ready and not torch.compiler.is_compiling():
            self._ready = bool(self.initialized)
        return self._ready

    def mark_ready_(self) -> None:
        """The state has its starting values now."""
        self.initialized.fill_(True)
        self._ready = True

    def check_ready(self) -> None:
        """Raise ``RuntimeError`` if there was no tensor to start from yet."""
        if not self.ready:
            raise RuntimeError(
                "this quantizer has not met any data to start from: run one batch in training mode first, "
                "or call wnq.calibrate_(model, batch)."
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # Now, not at the first use: that may be inside a compiled step, where the buffer cannot be read.
        self._ready = not self.initialized.is_meta and bool(self.initialized)

    @torch.no_grad()
    def _begin_(self, x: Tensor) -> None:
        self.start_(x.detach().to(compute_dtype(x)))
        self.mark_ready_()

    def reset_(self, x: Tensor) -> None:
        """Start a weight's state from the weight, anew."""
        if self.is_weight:
            self._begin_(x)

    def observe_(self, x: Tensor) -> None:
        """Start an input's state from the first batch; later batches change nothing."""
        if not self.is_weight and not self.ready:
            self._begin_(x)
