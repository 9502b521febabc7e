"""The trainer: one readable loop for float and quantized models, on one process or many."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wnq.data import Augment, Batches, Dataset
from wnq.files import write_text
from wnq.integer import round_biases_
from wnq.metrics import Metrics, evaluate
from wnq.procedures import Procedure, looked_ahead
from wnq.train.batchnorm import reestimate_batchnorm_
from wnq.train.checkpoint import TrainState, load_checkpoint, remove_leftovers, save_checkpoint
from wnq.train.config import TrainConfig, schedule
from wnq.train.interrupt import Interrupted, catching_interrupt
from wnq.train.loss import training_loss
from wnq.train.optimizer import make_optimizer
from wnq.train.processes import plain_accelerator, share_buffers, sum_up
from wnq.train.progress import Progress, TrainResult
from wnq.train.tails import make_recorder

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Interrupted", "Progress", "TrainConfig", "TrainResult", "TrainingDivergedError", "fit"]

logger = logging.getLogger(__name__)


class TrainingDivergedError(RuntimeError):
    """The loss is NaN or infinite."""


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
        on_step: called on the main process after every step.

    Raises:
        TrainingDivergedError: the loss became NaN or infinite.
        Interrupted: Ctrl-C; with ``out``, the checkpoint is written first.
        ValueError: distillation without a teacher, a procedure that does not fit the model or the settings, a
            checkpoint that does not fit, or several processes with fewer images than a batch.
        ModuleNotFoundError: the extra ``train`` is not installed.
    """
    if config.distill_weight > 0 and teacher is None:
        raise ValueError("distill_weight is above 0 but there is no teacher: pass the float twin.")
    if procedure is not None and config.compile and not procedure.compiles:
        raise ValueError(
            f"procedure {procedure.settings['name']!r} cannot watch a compiled model: set compile = false."
        )
    folder = None if out is None else Path(out)
    return _Run(model, data, config, teacher, procedure, folder, accelerator or plain_accelerator(), on_step).go(resume)


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
        if self.processes > 1 and len(data.train) < config.batch_size:
            raise ValueError(
                f"batch_size {config.batch_size} is more than the {len(data.train)} training images, which "
                f"{self.processes} processes cannot share evenly. Use a smaller batch or one process."
            )
        device = cast(torch.device, accelerator.device)
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device, memory_format=layout)  # pyright: ignore[reportCallIssue]
        self.teacher = None if teacher is None else teacher.to(device, memory_format=layout).eval()  # pyright: ignore[reportCallIssue]
        share: dict[str, Any] = {
            "mean": data.mean,
            "std": data.std,
            "device": device,
            "rank": accelerator.process_index,
            "world_size": self.processes,
            "channels_last": config.channels_last,
        }
        self.train = Batches(
            data.train,
            config.batch_size,
            augment=Augment(config.crop_padding, config.flip) if config.crop_padding or config.flip else None,
            shuffle=True,
            seed=config.seed,
            drop_last=len(data.train) >= config.batch_size,
            **share,
        )
        self.val = Batches(data.val, max(config.batch_size, 256 * self.processes), **share)
        self.steps = self.train.steps_per_epoch
        self.images_per_step = min(config.batch_size, len(data.train))
        self.procedure = (procedure or Procedure()).to(device)
        self.procedure.start_(self.model, self.teacher)
        self.optimizer = make_optimizer(self.model, self.procedure, config)
        if self.processes > 1 and any(p.requires_grad for p in self.procedure.parameters()):
            raise ValueError(
                f"procedure {self.procedure.settings['name']!r} trains parameters of its own, whose gradients "
                f"{self.processes} processes do not share: use one process."
            )
        self.peaks: list[float] = [group["lr"] for group in self.optimizer.param_groups]
        self.average = None
        if config.ema_decay > 0:
            self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self.models = {"model": self.model, "average": self.average, "procedure": procedure}
        # What a checkpoint must have been written with. Runs without a procedure do not mention one.
        self.settings = dataclasses.asdict(config) | ({} if procedure is None else {"procedure": procedure.settings})
        self.state = TrainState()
        if not config.record_every:
            del self.settings["record_every"]  # checkpoints from before it was a setting go on
        self.recorder = make_recorder(self.model, config.record_every, out, accelerator)

    def go(self, resume: bool) -> TrainResult:
        checkpoint = None if self.out is None else self.out / "checkpoint.pt"
        if resume and checkpoint is not None and checkpoint.exists():
            remove_leftovers(checkpoint, checkpoint.with_name("metrics.jsonl"))
            self.state = load_checkpoint(checkpoint, self.settings, optimizer=self.optimizer, **self.models)
            logger.info("resumed at epoch %d, step %d", self.state.epoch, self.state.step)
        if self.recorder is not None:
            self.recorder.resume_after(self._steps_done)
        prepared, self.stepper = self.accelerator.prepare(self.model, self.optimizer)
        network: nn.Module = torch.compile(prepared, fullgraph=True) if self.config.compile else prepared  # pyright: ignore[reportAssignmentType]
        val: Metrics | None = None
        with catching_interrupt() as interrupted:
            while self.state.epoch < self.config.epochs:
                val = self._epoch(network, interrupted)
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
        images = self.steps * self.images_per_step * self.config.epochs
        return TrainResult(val, self.state.history, self.state.seconds, images / max(self.state.seconds, 1e-9))

    @property
    def _steps_done(self) -> int:
        return self.state.epoch * self.steps + self.state.step

    def _evaluate(self, model: nn.Module) -> Metrics:
        return evaluate(model, self.val.epoch(0), bf16=self.config.bf16)

    def _share_buffers(self) -> None:
        if self.processes > 1:
            share_buffers(self.models.values())

    def _epoch(self, network: nn.Module, interrupted: Callable[[], bool]) -> Metrics | None:
        state, config = self.state, self.config
        network.train()
        self.procedure.start_epoch_(self.model, state.epoch, config.epochs)
        begin = time.perf_counter()
        done_before, resumed_at = state.seconds, state.step
        for images, labels in self.train.epoch(state.epoch, start_step=state.step):
            loss, correct = self._step(network, images, labels)
            seen, stop = len(labels), interrupted()
            if self.processes > 1:
                loss, correct, seen, stop = sum_up(loss, correct, seen, stop, images.device)
            state.step += 1
            state.loss_sum += loss
            state.correct += correct
            state.seen += seen
            if not math.isfinite(loss):
                raise TrainingDivergedError(
                    f"the loss is {loss} at epoch {state.epoch + 1}, step {state.step}. Lower lr or quantizer_lr, "
                    "lengthen warmup_epochs, or start from a trained float model."
                )
            state.seconds = done_before + time.perf_counter() - begin
            self._report(begin, resumed_at)
            if stop or (config.checkpoint_steps and state.step % config.checkpoint_steps == 0):
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

    def _step(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, int]:
        rate = schedule(self._steps_done, self.steps, self.config)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        loss, logits = self._gradients(network, images, labels)
        if self.procedure.looks_ahead:
            with looked_ahead(self.optimizer):
                self._gradients(network, images, labels)
        if self.recorder is not None:
            self.recorder.after_backward(self._steps_done + 1)
        self.stepper.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.procedure.after_step_(self.model, self._steps_done + 1)
        return loss.item(), int((logits.argmax(1) == labels).sum())

    def _gradients(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient of a batch in the parameters; return loss and logits."""
        config = self.config
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            with self.procedure.watching(self.model):
                logits = network(images).float()
            with torch.no_grad():
                twin = None if self.teacher is None or not config.distill_weight else self.teacher(images).float()
            loss = self.procedure.loss(training_loss(logits, labels, config, twin), self.model, images, labels)
        self.stepper.zero_grad()
        self.accelerator.backward(loss)
        if config.clip_grad_norm:
            parameters = [*self.model.parameters(), *self.procedure.parameters()]
            self.accelerator.clip_grad_norm_(parameters, config.clip_grad_norm)
        return loss, logits

    def _report(self, begin: float, resumed_at: int, val: Metrics | None = None) -> None:
        if self.on_step is None or not self.accelerator.is_main_process:
            return
        state = self.state
        seconds = (time.perf_counter() - begin) / max(1, state.step - resumed_at)
        left = (self.config.epochs - state.epoch) * self.steps - state.step
        self.on_step(
            Progress(
                state.epoch + 1,
                self.config.epochs,
                state.step,
                self.steps,
                state.loss_sum / max(1, state.step),
                100 * state.correct / max(1, state.seen),
                self.images_per_step / max(seconds, 1e-9),
                left * seconds,
                val,
            )
        )

    def _end_epoch(self, val: Metrics | None, seconds: float, resumed_at: int) -> None:
        state = self.state
        self._report(time.perf_counter() - seconds, resumed_at, val)
        row: dict[str, Any] = {
            "epoch": state.epoch + 1,
            "lr": self.optimizer.param_groups[0]["lr"],
            "loss": state.loss_sum / max(1, state.step),
            "accuracy": 100 * state.correct / max(1, state.seen),
            "val_loss": None if val is None else val.loss,
            "val_accuracy": None if val is None else val.accuracy,
            "seconds": round(seconds, 3),
            "images_per_second": round((state.step - resumed_at) * self.images_per_step / max(seconds, 1e-9), 1),
        }
        state.history.append(row)
        self.accelerator.log({k: v for k, v in row.items() if v is not None}, step=state.epoch + 1)
        state.epoch += 1
        state.step, state.loss_sum, state.correct, state.seen = 0, 0.0, 0, 0
        self._save()

    def _save(self) -> None:
        if self.out is None:
            return
        if self.accelerator.is_main_process:
            # Metrics first: were they second, a run killed in between would end without its last row.
            write_text(self.out / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in self.state.history))
            path = self.out / "checkpoint.pt"
            save_checkpoint(path, self.state, self.settings, optimizer=self.optimizer, **self.models)
        self.accelerator.wait_for_everyone()
