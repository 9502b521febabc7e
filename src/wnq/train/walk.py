"""The steps of an epoch: queued by the host piece by piece, or each as one piece that the device takes alone."""

import contextlib
from collections.abc import Generator, Iterator

import torch
from torch import Tensor

from wnq.data import Batches, StreamedBatches
from wnq.procedures import Procedure
from wnq.train.account import Account
from wnq.train.captured import Captured
from wnq.train.step import TrainStep


class QueuedWalk:
    """Takes the steps of a run as they are written.

    Args:
        step: one of them.
        batches: what they are taken on.
        account: what they come to.
    """

    def __init__(self, step: TrainStep, batches: Batches | StreamedBatches, account: Account) -> None:
        self.step, self.batches, self.account = step, batches, account

    def steps(self, epoch: int, start: int) -> Iterator[None]:
        """Take a step of an epoch at each turn, from step ``start`` on."""
        done = epoch * self.batches.steps_per_epoch + start
        for images, labels in self.batches.epoch(epoch, start_step=start):
            self.account.add(*self.step.take(images, labels, done), labels)
            done += 1
            yield


class CapturedWalk:
    """Takes the same steps; all of a step, from the choice of its images to the note of its loss, is one CUDA graph.

    The device counts the steps, and looks up images, crops and learning rate by its count. On other devices the steps are the same
    and nothing is captured.

    Args:
        step: one of them.
        batches: what they are taken on, all of one size.
        account: what they come to.
        device: of them all.
    """

    def __init__(self, step: TrainStep, batches: Batches, account: Account, device: torch.device) -> None:
        self.step, self.batches, self.account, self.device = step, batches, account, device
        self.images = min(batches.batch_size, len(batches))
        self._offsets = torch.arange(self.images, device=device)
        self._count = torch.zeros(1, dtype=torch.int64, device=device)
        self._draws = batches.draw(0)
        groups = len(step.optimizer.param_groups)
        self._schedule = torch.zeros(batches.steps_per_epoch, groups, device=device)
        self._rates = torch.zeros(groups, device=device)
        self._once = Captured(self._take, device)

    def steps(self, epoch: int, start: int) -> Iterator[None]:
        """Take a step of an epoch at each turn, from step ``start`` on."""
        done, count = epoch * self.batches.steps_per_epoch, self.batches.steps_per_epoch
        self._count.fill_(start)
        for mine, drawn in zip(vars(self._draws).values(), vars(self.batches.draw(epoch)).values(), strict=True):
            mine.copy_(drawn)
        self._schedule.copy_(torch.tensor([self.step.rates(done + number) for number in range(count)]))
        for number in range(start, count):
            self.step.set_rate(done + number)
            self._once()
            self.account.count(self.images)
            yield

    def _take(self) -> None:
        images, labels = self.batches.pick(self._draws, self._count * self.images + self._offsets)
        self._rates.copy_(self._schedule.index_select(0, self._count)[0])
        loss, logits = self.step.gradients(images, labels)
        with rates_on_device(self.step.optimizer, self._rates):
            self.step.update()
        self.account.note(loss, logits, labels)
        self._count += 1


@contextlib.contextmanager
def rates_on_device(optimizer: torch.optim.Optimizer, rates: Tensor) -> Generator[None]:
    """Let the optimizer read its learning rates where a captured step finds them, if that is not the host.

    Args:
        optimizer: has rates on the host, which are there again afterwards.
        rates: float32, one for each group of parameters, on the device of the parameters.
    """
    if rates.device.type == "cpu":
        yield
        return
    groups = optimizer.param_groups
    before: list[float] = [group["lr"] for group in groups]
    for group, rate in zip(groups, rates, strict=True):
        group |= {"lr": rate, "fused": True, "foreach": False}
        group |= {"capturable": True} if "capturable" in group else {}
    try:
        yield
    finally:
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate


def walk_of(
    step: TrainStep, batches: Batches | StreamedBatches, account: Account, procedure: Procedure | None = None
) -> QueuedWalk | CapturedWalk:
    """Return the way that the step's settings ask for.

    Args:
        step: one of a run.
        batches: of the run.
        account: of the run.
        procedure: that the run was given.

    Raises:
        ValueError: ``cuda_graph`` with something that a graph cannot hold.
    """
    if not step.config.cuda_graph:
        return QueuedWalk(step, batches, account)
    processes = step.accelerator.num_processes
    if procedure is not None:
        reason = f"procedure {procedure.settings['name']!r} acts on the host between the steps"
    elif processes > 1:
        reason = f"{processes} processes agree with each other in every step"
    elif isinstance(batches, Batches):
        return CapturedWalk(step, batches, account, step.accelerator.device)
    else:
        reason = "the images are streamed by the host"
    raise ValueError(f"cuda_graph captures steps that the device can take alone, but {reason}: set cuda_graph = false.")
