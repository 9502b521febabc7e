"""What a dialect is: a way to write an integer reference model as a file, and the engine that proves it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from wnq.integer import Conversion

FLAVOURS = ("fast", "small")
"""int8 weights, or weights at their true width. An engine computes the same with both."""


@dataclass(frozen=True)
class Options:
    """What a user may choose; a dialect reads what concerns it.

    Attributes:
        flavour: ``fast`` or ``small``.
        calibration: batches of inputs, for 8-bit values behind convolutions that nothing quantizes; without any these stay float.
        vnni: the file is for processors with VNNI alone.
    """

    flavour: str = "fast"
    calibration: Sequence[tuple[Tensor, ...]] = ()
    vnni: bool = False


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        bytes: of the file: ``file`` for all of it, and by part.
        notes: what a user must know, one sentence each.
        details: of the format, such as its version.
        blocked: linear layer with a float input -> bits of a stored weight; such products have an accuracy level.
        write_float: writes the same network without quantization, for a fair comparison of speed, and returns its bytes; None
            where the dialect cannot say it.
    """

    bytes: dict[str, int]
    notes: tuple[str, ...] = ()
    details: dict[str, Any] = field(default_factory=dict[str, Any])
    blocked: dict[str, int] = field(default_factory=dict[str, int])
    write_float: Callable[[Path], int] | None = None


Write = Callable[[Conversion, tuple[Any, ...], Path, Options], Written]
"""``(conversion, inputs, path, options) -> what was written``. The file is written whole or not at all; ``inputs`` is a small
batch, whose first dimension stays variable.

Raises ``ValueError`` for a model that the dialect cannot say, with the layer and what to do; ``OSError`` if the disk fails."""


@dataclass(frozen=True)
class Dialect:
    """One kind of file.

    Attributes:
        engine: that runs it in the proof; a key of :data:`wnq.export.engines.ENGINES`.
        ending: of its files.
        where: of its writer, ``module:function``; imported when it is needed, with whatever packages it needs.
        flavours: that it has.
        about: one line.
    """

    engine: str
    ending: str
    where: str
    about: str
    flavours: tuple[str, ...] = FLAVOURS

    def writer(self) -> Write:
        """Return what writes it."""
        module, _, function = self.where.partition(":")
        return getattr(import_module(module), function)


DIALECTS = {
    "onnx": Dialect(
        "onnxruntime",
        ".onnx",
        "wnq.export.onnx.writing:for_onnxruntime",
        "a Q/DQ file for ONNX Runtime, all in integers",
    ),
    "openvino": Dialect("openvino", ".onnx", "wnq.export.onnx.writing:for_openvino", "a Q/DQ file for OpenVINO"),
    "torch": Dialect("torch", ".pt2", "wnq.export.program.writing:for_torch", "a program for torch.compile"),
    "executorch": Dialect(
        "executorch",
        ".pte",
        "wnq.export.program.executorch:for_executorch",
        "a program for ExecuTorch with XNNPACK, as on phones",
        ("fast",),
    ),
    "qonnx": Dialect(
        "qonnx",
        ".onnx",
        "wnq.export.qonnx.writing:write_qonnx",
        "a QONNX file for FPGA flows, such as FINN and hls4ml",
        ("fast",),
    ),
}
"""What ``wnq export --to`` takes."""
