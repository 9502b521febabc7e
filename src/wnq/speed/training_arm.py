"""One way to train, whose steps can be taken part by part."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from wnq.compact import compact_activations_
from wnq.data import Augment, Batches, Dataset, ImageData, StreamedBatches, batches_of
from wnq.procedures import Procedure
from wnq.train import TrainConfig
from wnq.train.account import Account
from wnq.train.captured import Captured
from wnq.train.optimizer import make_optimizer
from wnq.train.step import TrainStep
from wnq.train.walk import rates_on_device, walk_of

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TrainArm:
    """One way to train.

    Attributes:
        name: such as ``quantized, compiled``.
        model: what is trained; it is copied.
        compiled: whether it is compiled.
        captured: whether its steps are captured into a CUDA graph.
    """

    name: str
    model: nn.Module
    compiled: bool = False
    captured: bool = False


class RunningArm:
    """A network in training, one part of the step at a time. Every part waits for the device."""

    def __init__(self, model: nn.Module, data: Dataset, config: TrainConfig, accelerator: "Accelerator") -> None:
        self.device: torch.device = accelerator.device
        batches = batches_for(data, config, self.device)
        self.train_step, self.account = prepared(model, config, accelerator)
        walk = walk_of(self.train_step, batches, self.account)
        self.steps, self.batches = endless(walk.steps), endless(batches.epoch)
        images, labels = next(self.batches)
        self.fixed = images.clone(), labels.clone()
        loss, logits = self.train_step.gradients(*self.fixed)
        self.noted = loss.clone(), logits.clone()
        parts = {"model": self._model, "optimizer": self.train_step.update, "accounting": self._note}
        if config.cuda_graph and isinstance(batches, Batches):
            self._parameters = [p for p in self.train_step.model.parameters() if p.grad is not None]
            self._gradients = [p.grad.clone() for p in self._parameters if p.grad is not None]
            self._rates = torch.tensor(self.train_step.rates(0), device=self.device)
            drawn, first = batches.draw(0), torch.arange(config.batch_size, device=self.device)
            parts |= {"data": lambda: batches.pick(drawn, first), "optimizer": self._update}
        self._parts = {name: Captured(part, self.device) if config.cuda_graph else part for name, part in parts.items()}

    def step(self) -> None:
        next(self.steps)
        self._read()

    def model(self) -> None:
        self._parts["model"]()
        self._wait()

    def data(self) -> None:
        self._parts["data"]() if "data" in self._parts else next(self.batches)
        self._wait()

    def optimizer(self) -> None:
        self.train_step.set_rate(0)
        self._parts["optimizer"]()
        self._wait()

    def accounting(self) -> None:
        self._parts["accounting"]()
        self.account.count(len(self.fixed[1]))
        self._read()

    def _model(self) -> None:
        self.train_step.gradients(*self.fixed)

    def _update(self) -> None:
        # Each graph has its own memory: what another one leaves in the gradients may be gone when this one is replayed.
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        with rates_on_device(self.train_step.optimizer, self._rates):
            self.train_step.update()

    def _note(self) -> None:
        self.account.note(*self.noted, self.fixed[1])

    def _read(self) -> None:
        if self.account.due:
            self.account.read()
        self._wait()

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


def prepared(model: nn.Module, config: TrainConfig, accelerator: "Accelerator") -> tuple[TrainStep, Account]:
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    own: Any = copy.deepcopy(model)
    own = own.to(accelerator.device, memory_format=layout).train()
    if config.compact_activations:
        compact_activations_(own)

    optimizer = make_optimizer(own, Procedure(), config)
    step = TrainStep(own, optimizer, config, steps_per_epoch=1000, accelerator=accelerator)
    return step, Account(accelerator.device)


def batches_for(data: Dataset, config: TrainConfig, device: torch.device) -> Batches | StreamedBatches:
    return batches_of(
        data.train, config.batch_size, mean=data.mean, std=data.std, augment=Augment(config.crop_padding, config.flip),
        shuffle=True, seed=config.seed, drop_last=True, device=device, channels_last=config.channels_last,
    )  # fmt: skip


def endless(epoch: Callable[[int, int], Iterator[T]]) -> Iterator[T]:
    """Return what one epoch after the other yields."""
    for number in itertools.count():
        yield from epoch(number, 0)


def random_images(shape: Sequence[int], count: int, classes: int) -> Dataset:
    """Return images of one shape ``(C, H, W)`` with labels, all drawn at random, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, *shape), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    split = ImageData(images, labels, tuple(map(str, range(classes))))
    return Dataset(split, split, (0.5,) * shape[0], (0.25,) * shape[0])
