"""The trainer: one readable loop for float and quantized models, on one process or many."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from wnq.compact import compact_activations_
from wnq.data import Dataset
from wnq.integer import round_biases_
from wnq.metrics import Metrics, evaluate
from wnq.procedures import Procedure
from wnq.train.account import Account, spoilt
from wnq.train.average import Average
from wnq.train.batches import training_batches
from wnq.train.batchnorm import reestimate_batchnorm_
from wnq.train.checkpoint import TrainState
from wnq.train.config import TrainConfig
from wnq.train.divergence import TrainingDivergedError, finite_state, first_not_finite, in_words, told_by_any
from wnq.train.failures import explained
from wnq.train.interrupt import Interrupted, catching_interrupt
from wnq.train.kept import Kept, sentence
from wnq.train.optimizer import make_optimizer
from wnq.train.processes import all_of, check_engine, plain_accelerator, share_buffers
from wnq.train.progress import Pace, Progress, TrainResult
from wnq.train.step import TrainStep
from wnq.train.tails import make_recorder
from wnq.train.walk import walk_of

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Interrupted", "Progress", "TrainConfig", "TrainResult", "TrainingDivergedError", "fit"]

logger = logging.getLogger(__name__)

REPEATED_READINGS = 240
"""Longest repetition of steps in search of the layer that a NaN came from, in readings: about two minutes."""


def fit(
    model: nn.Module,
    data: Dataset,
    config: TrainConfig,
    *,
    teacher: nn.Module | None = None,
    procedure: Procedure | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    accelerator: "Accelerator | None" = None,
    on_step: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train a classifier in place, float or quantized.

    Data order and augmentation depend on ``(seed, epoch, step)`` alone, so a resumed run continues bit for bit, on the
    same number of processes and threads. Under ``accelerate launch`` or ``torchrun`` each process takes its share of
    every batch.

    Args:
        model: maps normalised images ``(B, C, H, W)`` to logits ``(B, classes)``.
        data: the images.
        config: the settings.
        teacher: the float twin, for ``distill_weight`` > 0 or a procedure that needs one.
        procedure: a fresh training procedure, from :func:`wnq.procedures.get_procedure`; None trains plainly.
        out: folder for ``checkpoint.pt``, ``metrics.jsonl`` and ``tails.jsonl``; None keeps everything in memory.
        resume: continue from the checkpoint in ``out`` if there is one.
        accelerator: an ``accelerate.Accelerator`` to use, for example one with trackers; by default a plain one.
        on_step: called on the main process after every step. Loss and accuracy are read from the device about twice a second
            and at the end of an epoch; in between they stay as they were.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite: at which step, in which layer, and what was kept. It is noticed
            at the next reading; nothing is saved in between.
        OutOfMemoryError: a batch does not fit into memory.
        ProcessLostError: another process of the job has ended.
        Interrupted: Ctrl-C; with ``out``, the checkpoint is written first. One process ends the running step. Several agree at
            the next reading, for all must end after the same step.
        ValueError: distillation without a teacher, a procedure that does not fit the model or the settings, a
            checkpoint that does not fit, several processes with fewer images than a batch, or an accelerator that shards the
            model.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    if config.distill_weight > 0 and teacher is None:
        raise ValueError("distill_weight is above 0 but there is no teacher: pass the float twin.")
    if procedure is not None and config.compile and not procedure.compiles:
        raise ValueError(
            f"procedure {procedure.settings['name']!r} cannot watch a compiled model: set compile = false."
        )
    folder = None if out is None else Path(out)
    accelerator = accelerator or plain_accelerator()
    check_engine(accelerator)
    with explained(config, accelerator.num_processes, lambda: sentence(folder)):
        return _Run(model, data, config, teacher, procedure, folder, accelerator, on_step).go(resume)


class _Run:
    """The parts of one run that its epochs share."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        config: TrainConfig,
        teacher: nn.Module | None,
        procedure: Procedure | None,
        out: Path | None,
        accelerator: "Accelerator",
        on_step: Callable[[Progress], None] | None,
    ) -> None:
        self.config, self.out, self.on_step, self.accelerator = config, out, on_step, accelerator
        self.processes = accelerator.num_processes
        device = cast(torch.device, accelerator.device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]
        if config.compact_activations:
            compact_activations_(self.model)
        self.teacher = None if teacher is None else teacher.to(device, memory_format=layout).eval()  # pyright: ignore[reportCallIssue]
        self.train, self.val = training_batches(data, config, accelerator)
        self.steps = self.train.steps_per_epoch
        self.pace = Pace(config.epochs, self.steps, min(config.batch_size, len(data.train)))
        self.procedure = (procedure or Procedure()).to(device)
        self.procedure.start_(self.model, self.teacher)
        self.optimizer = make_optimizer(self.model, self.procedure, config)
        if self.processes > 1 and any(p.requires_grad for p in self.procedure.parameters()):
            raise ValueError(
                f"procedure {self.procedure.settings['name']!r} trains parameters of its own, whose gradients "
                f"{self.processes} processes do not share: use one process."
            )
        self.average = Average(self.model, config.ema_decay) if config.ema_decay > 0 else None
        # What a checkpoint must have been written with. Runs without a procedure do not mention one.
        settings = dataclasses.asdict(config) | ({} if procedure is None else {"procedure": procedure.settings})
        self.models: dict[str, nn.Module | None] = {"model": model, "average": self.average, "procedure": procedure}
        self.kept = Kept(out, settings, self.optimizer, self.models)
        self.state = TrainState()
        self.recorder = make_recorder(self.model, config.record_every, out, accelerator)
        self.step = TrainStep(
            self.model, self.optimizer, config, steps_per_epoch=self.steps, accelerator=accelerator,
            procedure=self.procedure, teacher=self.teacher, average=self.average, recorder=self.recorder,
        )  # fmt: skip
        self.account = Account(device, self.processes, accelerator.process_index)
        self.walk = walk_of(self.step, self.train, self.account, procedure)

    def go(self, resume: bool) -> TrainResult:
        found = self.kept.resume() if resume else None
        if found is None:
            self.kept.copy(self.state)
        else:
            self.state = found
            logger.info("resumed at epoch %d, step %d", self.state.epoch, self.state.step)
        if self.recorder is not None:
            self.recorder.resume_after(self._steps_done)
        self.finite = finite_state(self.model)
        val: Metrics | None = None
        with catching_interrupt() as interrupted:
            while self.state.epoch < self.config.epochs:
                val = self._epoch(interrupted)
        self._share_buffers()
        if self.average is not None:
            self.model.load_state_dict(self.average.module.state_dict())
        self.procedure.finish_(self.model)
        if self.config.bn_batches:
            reestimate_batchnorm_(self.model, self.train, self.config.bn_batches, bf16=self.config.bf16)
        rounded = any(hasattr(module, "output_quantizer") for module in self.model.modules())
        if rounded:
            round_biases_(self.model, next(iter(self.val.epoch(0)))[0][:2])
        finished = self.average is not None or self.config.bn_batches or self.models["procedure"] is not None
        if val is None or finished or rounded:
            val = self._evaluate(self.model)
        images = self.steps * self.pace.images * self.config.epochs
        return TrainResult(val, self.state.history, self.state.seconds, images / max(self.state.seconds, 1e-9))

    @property
    def _steps_done(self) -> int:
        return self.state.epoch * self.steps + self.state.step

    def _evaluate(self, model: nn.Module) -> Metrics:
        return evaluate(model, self.val.epoch(0), bf16=self.config.bf16)

    def _share_buffers(self) -> None:
        if self.processes > 1:
            share_buffers(self.models.values(), self.accelerator.device)

    def _epoch(self, interrupted: Callable[[], bool]) -> Metrics | None:
        state, config = self.state, self.config
        self.step.network.train()
        self.procedure.start_epoch_(self.model, state.epoch, config.epochs)
        begin = time.perf_counter()
        done_before, resumed_at = state.seconds, state.step
        self.account.begin()
        for _ in self.walk.steps(state.epoch, state.step):
            state.step += 1
            stop = interrupted()
            saving = bool(config.checkpoint_steps) and state.step % config.checkpoint_steps == 0
            last = state.step == self.steps
            if self.account.due or saving or last or (stop and self.processes == 1):
                stop = self._read(stop)
            else:
                stop = False
            state.seconds = done_before + time.perf_counter() - begin
            self._report(begin, resumed_at)
            if stop or saving:
                self._save()
            if stop:
                raise Interrupted
        self.procedure.after_epoch_(self.model, state.epoch, config.epochs)
        last = state.epoch + 1 == config.epochs
        val = None
        if last or (state.epoch + 1) % config.eval_every == 0:
            self._share_buffers()
            val = self._evaluate(self.model if self.average is None else self.average.module)
        state.seconds = done_before + time.perf_counter() - begin
        self._end_epoch(val, time.perf_counter() - begin, resumed_at)
        return val

    def _read(self, stop: bool) -> bool:
        """Bring the state up to the last step; return whether any process has seen Ctrl-C."""
        state = self.state
        first = state.step - self.account.pending
        reading = self.account.read(stop=stop, spoilt=spoilt(self.finite.values()))
        for step, loss in enumerate(reading.losses, first + 1):
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss}", step, self._search(step))
            state.loss_sum += loss
        state.correct += reading.correct
        state.seen += reading.seen
        if reading.spoilt:
            spoilt_one = next((name for name, t in self.finite.items() if not bool(t.isfinite().all())), None)
            where = None if spoilt_one is None else in_words(spoilt_one)
            raise self._diverged("weights are not finite after the update", state.step, where)
        return reading.stop

    def _diverged(self, what: str, step: int, where: str | None) -> TrainingDivergedError:
        where = told_by_any(where)
        origin = "" if where is None else f" The first that is not finite is {where}."
        return TrainingDivergedError(
            f"{what} at epoch {self.state.epoch + 1}, step {step}. Lower lr or quantizer_lr, lengthen warmup_epochs, or start "
            f"from a trained float model.{origin} {sentence(self.out)}"
        )

    def _search(self, bad: int) -> str | None:
        """Repeat the steps since the last good state, up to the one with the bad loss, and see where it comes from.

        By the time a bad loss is read, the updates after it have spoilt every weight.
        """
        if not all_of(self.kept.at_hand, self.accelerator.device):
            return None
        epoch, at = self.state.epoch, self.kept.go_back()
        if at.epoch != epoch or bad - at.step > REPEATED_READINGS * self.account.stride:
            return None
        logger.info("the loss is not finite: repeating %d steps in search of the layer", bad - at.step)
        self.step.recorder = None
        self.step.network.train()
        self.procedure.start_epoch_(self.model, epoch, self.config.epochs)
        for step, (images, labels) in enumerate(self.train.epoch(epoch, start_step=at.step), at.step + 1):
            if step == bad:
                return first_not_finite(self.model, lambda x=images, y=labels: self.step.loss(self.model, x, y))
            self.step.take(images, labels, epoch * self.steps + step - 1)
        return None

    def _report(self, begin: float, resumed_at: int, val: Metrics | None = None) -> None:
        if self.on_step is not None and self.accelerator.is_main_process:
            seconds, pending = time.perf_counter() - begin, self.account.pending
            self.on_step(self.pace.progress(self.state, seconds, resumed_at=resumed_at, pending=pending, val=val))

    def _end_epoch(self, val: Metrics | None, seconds: float, resumed_at: int) -> None:
        state = self.state
        self._report(time.perf_counter() - seconds, resumed_at, val)
        row = self.pace.row(state, self.optimizer.param_groups[0]["lr"], seconds, resumed_at=resumed_at, val=val)
        state.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=state.epoch + 1)
        state.epoch += 1
        state.step, state.loss_sum, state.correct, state.seen = 0, 0.0, 0, 0
        self._save()

    def _save(self) -> None:
        self.kept.save(self.state, write=self.accelerator.is_main_process)
        if self.out is not None:
            self.accelerator.wait_for_everyone()
