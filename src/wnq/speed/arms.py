"""The ways to run one network: PyTorch, eager and compiled, and every engine that wnq writes files for."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from wnq.export.dialect import DIALECTS, Options
from wnq.export.engines import open_engine, processor
from wnq.integer import Conversion, convert

Run = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Arm:
    """One way.

    Attributes:
        name: such as ``openvino integer``.
        engine: package and version.
        integer: whether it runs the quantized network; the others run the float one.
        run: takes the inputs as NumPy arrays.
    """

    name: str
    engine: str
    integer: bool
    run: Run


@dataclass(frozen=True)
class LeftOut:
    """A way that cannot be measured here, and why."""

    name: str
    why: str


def arms_of(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    folder: Path,
    *,
    float_model: nn.Module | None = None,
    engines: Iterable[str] | None = None,
    calibration: Sequence[tuple[Tensor, ...]] = (),
    vnni: bool | None = None,
    on_arm: Callable[[int, int], None] | None = None,
) -> tuple[list[Arm], list[LeftOut]]:
    """Make a network ready in every way.

    Args:
        model: quantized and calibrated; it is only read.
        inputs: a small batch.
        folder: for the files, which must stay until the last measurement.
        float_model: the same network in float, for PyTorch's ways; without it these are left out.
        engines: keys of :data:`wnq.export.DIALECTS`, and ``eager`` and ``compiled`` for PyTorch; by default all.
        calibration: see :class:`wnq.export.dialect.Options`; by default ``inputs``.
        vnni: whether files are for processors with VNNI alone; by default as this one is.
        on_arm: called with (done, in all).

    Returns:
        The ways that work, and those that do not.
    """
    wanted = list(engines) if engines is not None else ["eager", "compiled", *DIALECTS]
    conversion = convert(model, *inputs)
    options = Options("fast", calibration or [inputs], vnni=processor()["vnni"] if vnni is None else vnni)
    found: list[Arm] = []
    left: list[LeftOut] = []
    for i, name in enumerate(wanted):
        if name in DIALECTS:
            _from_files(name, conversion, inputs, folder, options, found, left)
        elif float_model is None:
            left.append(LeftOut(f"torch {name} float", "the float network is not known"))
        else:
            try:
                found += _from_torch(name, float_model, inputs)
            except Exception as error:  # torch.compile fails in many ways where there is no compiler
                left.append(LeftOut(f"torch {name} float", _first_line(error)))
        if on_arm is not None:
            on_arm(i + 1, len(wanted))
    return found, left


def _from_files(
    name: str,
    conversion: Conversion,
    inputs: tuple[Tensor, ...],
    folder: Path,
    options: Options,
    found: list[Arm],
    left: list[LeftOut],
) -> None:
    dialect = DIALECTS[name]
    path, twin = folder / f"{name}{dialect.ending}", folder / f"{name}-float{dialect.ending}"
    try:
        written = dialect.writer()(conversion, inputs, path, options)
        if written.write_float is None:
            left.append(LeftOut(dialect.engine, "it is run to check the file, not for speed"))
            return
        written.write_float(twin)
        for file, integer in ((twin, False), (path, True)):
            engine = open_engine(dialect.engine, file)
            label = f"{dialect.engine} {'integer' if integer else 'float'}"
            engine.run([x.numpy() for x in inputs])
            found.append(Arm(label, engine.version, integer, engine.run))
    except Exception as error:  # an engine's own errors have no common type; one that fails must not end the others
        left.append(LeftOut(dialect.engine, _first_line(error)))


def _from_torch(name: str, model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Arm]:
    model = model.eval()
    version = f"torch {torch.__version__}"
    if name == "eager":
        last = cast(Any, model).to(memory_format=torch.channels_last) if any(x.ndim == 4 for x in inputs) else model
        return [Arm("torch eager float", version, False, _torch_run(last, channels_last=True))]
    run = _torch_run(torch.compile(model, dynamic=False), freezing=True)
    run([x.numpy() for x in inputs])
    return [Arm("torch compiled float", version, False, run)]


def _torch_run(model: Callable[..., Any], *, channels_last: bool = False, freezing: bool = False) -> Run:
    def run(inputs: Sequence[Any]) -> Any:
        tensors = [torch.from_numpy(x) for x in inputs]
        if channels_last:
            tensors = [x.to(memory_format=torch.channels_last) if x.ndim == 4 else x for x in tensors]
        with torch.no_grad(), _frozen() if freezing else contextlib.nullcontext():
            return model(*tensors).numpy()

    return run


def _frozen() -> "contextlib.AbstractContextManager[Any]":
    from torch._inductor import config

    return config.patch(freezing=True)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
