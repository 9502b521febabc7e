"""Quantizers whose state starts from what they meet: a weight, or an input's first training batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from wnq.quantizer import Quantizer, compute_dtype


def across_processes(value: Tensor, reduce: str = "mean") -> Tensor:
    """Return the ``"mean"``, ``"max"`` or ``"min"`` of a statistic over the processes of a job, if it has several."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    value = value.clone()
    if reduce == "mean":
        dist.all_reduce(value)
        return value / dist.get_world_size()
    dist.all_reduce(value, op=dist.ReduceOp.MAX if reduce == "max" else dist.ReduceOp.MIN)
    return value


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
