"""One step of training: from a batch to moved weights, without waiting for the device."""

import contextlib
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from wnq.procedures import Procedure, looked_ahead
from wnq.quantizer import compute_dtype
from wnq.recorder import TailRecorder
from wnq.starting import StartsFromData
from wnq.together import layers_together, rounded_together
from wnq.train.average import Average
from wnq.train.config import TrainConfig, schedule
from wnq.train.loss import training_loss

if TYPE_CHECKING:
    from accelerate import Accelerator


class TrainStep:
    """What every step of a run shares.

    Args:
        model: maps normalised images ``(B, C, H, W)`` to logits ``(B, classes)``.
        optimizer: over its parameters, with their peak learning rates.
        config: the settings.
        steps_per_epoch: which the learning rate follows.
        accelerator: knows the device and the other processes.
        procedure: started already.
        teacher: the float twin, in eval mode; needed where ``distill_weight`` > 0.
        average: of the weights.
        recorder: of the tails.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        *,
        steps_per_epoch: int,
        accelerator: "Accelerator",
        procedure: Procedure | None = None,
        teacher: nn.Module | None = None,
        average: Average | None = None,
        recorder: TailRecorder | None = None,
    ) -> None:
        self.model, self.optimizer, self.config, self.accelerator = model, optimizer, config, accelerator
        self.steps_per_epoch, self.teacher, self.average, self.recorder = steps_per_epoch, teacher, average, recorder
        self.procedure = procedure or Procedure()
        self._peaks: list[float] = [group["lr"] for group in optimizer.param_groups]
        prepared, self._stepper = accelerator.prepare(model, optimizer)
        self._plain: nn.Module = prepared
        self._started = not config.compile
        # Between processes each gradient travels as soon as it is there; those of weights rounded together come at the end.
        alone = config.compile or config.compact_activations or accelerator.num_processes > 1
        alone = alone or not layers_together(model)
        self._rounding = contextlib.nullcontext if alone else partial(rounded_together, model)
        self.network: nn.Module = prepared
        """The model as it is called: shared between the processes, and compiled."""
        if config.compile:
            self.network = torch.compile(prepared, fullgraph=True)  # pyright: ignore[reportAttributeAccessIssue]

    def take(self, images: Tensor, labels: Tensor, done: int) -> tuple[Tensor, Tensor]:
        """Take one step, and return the loss before it and the logits.

        Args:
            images: ``(B, C, H, W)``, this process's share.
            labels: int64, ``(B,)``.
            done: steps of the run before this one.
        """
        self.set_rate(done)
        loss, logits = self.gradients(images, labels)
        if self.procedure.looks_ahead:
            with looked_ahead(self.optimizer):
                self.gradients(images, labels)
        if self.recorder is not None:
            self.recorder.after_backward(done + 1)
        self.update()
        self.procedure.after_step_(self.model, done + 1)
        return loss, logits

    def rates(self, done: int) -> list[float]:
        """Return the learning rate of every group of parameters at the step after ``done`` steps."""
        rate = schedule(done, self.steps_per_epoch, self.config)
        return [peak * rate for peak in self._peaks]

    def set_rate(self, done: int) -> None:
        """Set the learning rates of the step after ``done`` steps."""
        for group, rate in zip(self.optimizer.param_groups, self.rates(done), strict=True):
            group["lr"] = rate

    def gradients(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Leave the gradient of a batch in the parameters; return loss and logits, without gradient."""
        if not self._started:
            # A quantizer that starts from its first batch does so eagerly: the code before it would be compiled for one step.
            self._started = all(module.ready for module in self.model.modules() if isinstance(module, StartsFromData))
        with self._rounding():
            loss, logits = self.loss(self.network if self._started else self._plain, images, labels)
            self._stepper.zero_grad()
            self.accelerator.backward(loss)
        if self.config.clip_grad_norm:
            parameters = [*self.model.parameters(), *self.procedure.parameters()]
            self.accelerator.clip_grad_norm_(parameters, self.config.clip_grad_norm)
        return loss.detach(), logits.detach()

    def loss(self, network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return loss and logits of a batch."""
        config = self.config
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=config.bf16):
            with self.procedure.watching(self.model):
                logits = network(images)
                logits = logits.to(compute_dtype(logits))
            with torch.no_grad():
                twin = None if self.teacher is None or not config.distill_weight else self.teacher(images)
                twin = None if twin is None else twin.to(compute_dtype(twin))
            loss = training_loss(logits, labels, config, twin)
            return self.procedure.loss(loss, self.model, images, labels), logits

    def update(self) -> None:
        """Move the weights along the gradients that are there, and the average after them."""
        self._stepper.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
