"""Fused CUDA kernels, in Triton, of the two roundings that every quantized layer runs: few launches instead of some 40.

``rounding`` rounds inputs to a step, ``maximum`` weights by the largest of them. The plain operations define the values: the
kernels give the same, bit for bit, and stand back wherever :func:`usable` says no, so that nothing depends on Triton being there.
"""

import functools
import importlib.util
import os
import warnings
from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Triton runs its kernels on the CPU, slowly: for tests without a GPU."""

_on = os.environ.get("WNQ_KERNELS", "1") != "0"


@contextmanager
def disabled() -> Generator[None]:
    """Run the plain operations within the block; ``WNQ_KERNELS=0`` in the environment does so for the whole process.

    A backward pass runs what its forward pass ran.
    """
    global _on
    before, _on = _on, False
    try:
        yield
    finally:
        _on = before


@functools.cache
def available() -> bool:
    """Return whether Triton is there and builds a kernel here; tried once a process."""
    if importlib.util.find_spec("triton") is None or not (INTERPRETED or torch.version.cuda):
        return False
    from wnq.kernels import rounding

    one = torch.ones((), device="cpu" if INTERPRETED else "cuda")
    try:
        rounding.forward(one, one, 0.0, 1.0, None)
    except Exception as error:  # what is missing, a C compiler for one, decides which
        warnings.warn(f"Triton is installed but builds no kernel here, so plain operations run: {error}", stacklevel=2)
        return False
    return True


def usable(x: Tensor) -> bool:
    """Return whether the kernels can take ``x``: CUDA, float32 or half precision, dense, not empty, and not being compiled."""
    if torch.compiler.is_compiling() or not (x.is_cuda or INTERPRETED) or not _on or x.dtype not in DTYPES:
        return False
    if type(x) not in (Tensor, nn.Parameter) or torch.jit.is_tracing() or x.numel() == 0:  # pyright: ignore[reportPrivateImportUsage]
        return False
    if not (x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)):
        return False
    # Triton launches on the current device.
    return available() and (not x.is_cuda or x.get_device() == torch.cuda.current_device())


def ordered_as(tensor: Tensor, x: Tensor) -> Tensor:
    """Return ``tensor``, or a copy of it, with its elements in memory in the order of those of ``x``, which is dense."""
    if tensor.stride() == x.stride():
        return tensor
    strides = zip(x.shape, tensor.stride(), x.stride(), strict=True)
    if all(ours == theirs for size, ours, theirs in strides if size > 1):
        return tensor
    return torch.empty_like(x, dtype=tensor.dtype).copy_(tensor)
