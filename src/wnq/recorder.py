"""What training does to tails: statistics, errors and the gradient at the maximum of every layer, each so many steps.

    recorder = TailRecorder(model, path="tails.jsonl")
    for step, batch in enumerate(batches, 1):
        loss(model, batch).backward()
        recorder.after_backward(step)
        optimizer.step()
        optimizer.zero_grad()

:mod:`wnq.integrations` has the same for the loops of others.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from wnq.attach import quantized_layers
from wnq.files import write_text
from wnq.prepared import deployed, float_weight
from wnq.quantizer import Quantizer
from wnq.tails import error_stats, tensor_stats
from wnq.tails.pieces import CHUNK, DEVICE_CHUNK

EVERY = 100
"""Steps between two records, unless the user says otherwise."""
SHARE = 0.008
"""Share of the wall time that recording may take, unless the user says how often to record: below 1 % by other clocks, too."""


@dataclass(frozen=True)
class TailRecord:
    """One layer at one step. The statistics are those of :class:`wnq.tails.TensorStats` and :class:`wnq.tails.ErrorStats`."""

    step: int
    """Optimizer steps, counted from 1; the weights are those before that step is taken."""
    layer: str
    bits: int
    nonfinite: int
    """NaN and infinite weights. Where there are any, the errors are NaN."""
    peak: float
    """max|w|."""
    rms: float
    crest: float
    kurtosis: float
    tail_mass: float
    relative_error: float
    """Of the layer's own quantizer."""
    law_error: float
    """Rounding error that the law predicts from the step; NaN for unevenly spaced levels."""
    pull: float
    """sign(w) dL/dw at the largest weight, the mean over ties. Above zero, descent moves it toward zero. NaN without gradient."""
    gradient_rms: float
    """Root mean square of dL/dw over the layer. NaN without gradient."""
    rescaled_error: float = math.nan
    """The error after the best common factor: what compares methods that leave magnitudes to a BatchNorm."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types: NaN and infinity become None."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


Sink = Callable[[int, list[TailRecord]], None]
"""Called with the step and its records, one a layer."""


class TailRecorder:
    """Records every quantized layer each ``every`` steps, between the backward pass and the optimizer's step.

    Nothing in the model, the gradients or the random numbers changes. Under ``torch.compile`` and DistributedDataParallel it
    sees the model inside; of several processes the first one records, and the others do nothing.

    Args:
        model: a model with quantized layers.
        every: steps between two records. None: 100, and a record is passed over where it would bring all since the first to
            more than 0.8 % of the time since then, as in networks whose steps are shorter than their weights' statistics. The
            first step is always recorded, so that the start is known.
        path: JSON-lines file, a line a layer, written as the records come; None keeps no file. The first record begins it
            anew, unless :meth:`resume_after` was called.
        sinks: called after each record, for example :func:`wnq.integrations.to_tensorboard`.

    Raises:
        ValueError: ``every`` is below 1, no layer is quantized, or a weight is sharded over processes.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        every: int | None = None,
        path: str | Path | None = None,
        sinks: Iterable[Sink] = (),
    ) -> None:
        if every is not None and every < 1:
            raise ValueError(f"every must be at least 1 step, got {every}.")
        self.model, self.sinks = _inner(model), list(sinks)
        if not _whole_layers(self.model):
            raise ValueError(
                f"{type(self.model).__name__} has no quantized layer to record. Attach a plan first: wnq.quantize_(model, plan)."
            )
        self.every, self.limit = (EVERY, SHARE) if every is None else (every, None)
        self.path = None if path is None else Path(path)
        self._resumed = False
        self._last = 0
        self._spent, self._counted, self._since = 0.0, 0, math.nan

    @property
    def share(self) -> float:
        """Share of the wall time since the first record that the later ones took, 0 to 1; NaN before the first."""
        elapsed = time.perf_counter() - self._since
        return self._spent / elapsed if elapsed > 0 else math.nan

    def due(self, step: int) -> bool:
        """Return whether a step, counted from 1, is recorded."""
        return step == 1 or (step % self.every == 0 and self._affordable())

    def _affordable(self) -> bool:
        """Whether one more record, as dear as those so far, stays within the limit; the second one shows what one costs."""
        if self.limit is None or not self._counted:
            return True
        return self._spent * (1 + 1 / self._counted) <= self.limit * (time.perf_counter() - self._since)

    def after_backward(self, step: int) -> list[TailRecord]:
        """Record if the step is due; call it when the gradients are there and the weights have not moved yet.

        Args:
            step: optimizer steps, counted from 1. A second call of one step records nothing.

        Returns:
            One record a layer; nothing if the step is not due.

        Raises:
            OSError: the file cannot be written.
        """
        if step == self._last or not self.due(step) or not _is_first_process():
            return []
        if next(self.model.parameters()).device.type != "cpu":
            torch.accelerator.synchronize()  # the backward pass is not recording's time
        begin = time.perf_counter()
        records = record_layers(self.model, step)
        if self.path is not None:
            self._append(self.path, records)
        for sink in self.sinks:
            sink(step, records)
        end = time.perf_counter()
        if math.isnan(self._since):  # the first record also pays for what every first call pays for
            self._since = end
        else:
            self._spent += end - begin
            self._counted += 1
        self._last = step
        return records

    def _append(self, path: Path, records: list[TailRecord]) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a" if self._resumed else "w", encoding="utf-8") as file:
                file.write(_lines(records))
        except OSError as error:
            raise OSError(
                f"cannot write {path}: {error.strerror or error}. Free some space or choose another folder."
            ) from None
        self._resumed = True

    def resume_after(self, step: int) -> None:
        """Go on with the file of a run that was stopped: keep its records up to a step, drop later ones.

        A line that a killed process left half written is dropped as well. Step 0 begins the file anew.

        Raises:
            ValueError: the file holds something else than records.
        """
        self._last = step
        if self.path is None or not self.path.exists() or not _is_first_process():
            return
        kept = [row for row in read_records(self.path) if row.step <= step] if step else []
        write_text(self.path, _lines(kept))
        self._resumed = True


def record_layers(model: nn.Module, step: int) -> list[TailRecord]:
    """Measure every quantized layer now, tied weights once.

    Raises:
        ValueError: a weight is sharded over processes.
    """
    model = _inner(model)
    return [_record(step, name, layer, quantizer) for name, layer, quantizer in _whole_layers(model)]


@torch.no_grad()
def _record(step: int, name: str, layer: nn.Module, quantizer: Quantizer) -> TailRecord:
    original = float_weight(layer)
    weight = original.detach()
    stats = tensor_stats(weight)
    errors = None if stats.nonfinite else error_stats(weight, deployed(quantizer, weight))
    pull, spread = _gradient(weight, original.grad, stats.peak)
    return TailRecord(
        step=step,
        layer=name,
        bits=quantizer.bits,
        nonfinite=stats.nonfinite,
        peak=stats.peak,
        rms=stats.rms,
        crest=stats.crest,
        kurtosis=stats.kurtosis,
        tail_mass=stats.tail_mass,
        relative_error=math.nan if errors is None else errors.relative_error,
        law_error=math.nan if errors is None or errors.law_error is None else errors.law_error,
        pull=pull,
        gradient_rms=spread,
        rescaled_error=math.nan if errors is None else errors.rescaled_error,
    )


def _gradient(weight: Tensor, gradient: Tensor | None, peak: float) -> tuple[float, float]:
    """Return sign(w) dL/dw where |w| is the peak, and the root mean square of dL/dw, in pieces that fit a cache."""
    if gradient is None or not weight.numel():
        return math.nan, math.nan
    if weight.device.type == "mps":  # which has no float64
        weight, gradient = weight.cpu(), gradient.cpu()
    size = CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
    sums = torch.zeros(3, dtype=torch.float64, device=weight.device)
    for w, g in zip(weight.reshape(-1).split(size), gradient.reshape(-1).split(size), strict=True):
        exact, top = g.double(), w.abs() == peak
        pull = torch.where(top, exact * w.sign(), 0.0).sum()
        sums += torch.stack([top.sum().double(), pull, exact.square().sum()])
    ties, pull, square = sums.tolist()
    return pull / ties if ties else math.nan, math.sqrt(square / weight.numel())


def _inner(model: nn.Module) -> nn.Module:
    """Return the model that was compiled or given to data-parallel processes; its layers keep the names the user knows."""
    while True:
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = cast(nn.Module, model._orig_mod)
        else:
            return model


def _whole_layers(model: nn.Module) -> list[tuple[str, nn.Module, Quantizer]]:
    """Return name, layer and quantizer of every quantized layer; refuse weights of which this process has a part only."""
    layers = list(quantized_layers(model))
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    for name, layer, _ in layers:
        # A DTensor (fully_shard, tensor parallelism) or a parameter of DeepSpeed's ZeRO 3.
        if flat or any(hasattr(float_weight(layer), mark) for mark in ("full_tensor", "ds_id")):
            raise ValueError(
                f"the weight of {name} is sharded over processes: record it from a gathered copy of the model."
            )
    return layers


def _is_first_process() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _lines(records: Iterable[TailRecord]) -> str:
    return "".join(json.dumps(record.to_json(), allow_nan=False) + "\n" for record in records)


def read_records(path: str | Path) -> list[TailRecord]:
    """Return the records of a file, without a last line that is not whole.

    Raises:
        ValueError: the file is missing, or holds something else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the records {path}: {getattr(error, 'strerror', None) or error}.") from None
    found: list[TailRecord] = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_from_json(json.loads(line)))
        except (json.JSONDecodeError, TypeError) as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a record of tails ({error}).") from None
    return found


def _from_json(row: Mapping[str, Any]) -> TailRecord:
    values: dict[str, Any] = {key: math.nan if value is None else value for key, value in row.items()}
    return TailRecord(**values)
