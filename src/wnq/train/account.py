"""What the steps of training came to, kept on the device and read rarely: a reading is the only time the host waits for it."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

READ_SECONDS = 0.5
"""Between two readings, about."""
LONGEST = 1000
"""Steps between two readings at most."""


@dataclass(frozen=True)
class Reading:
    """What the steps since the last reading came to, over all processes.

    Attributes:
        losses: mean loss of every step, in nats.
        correct: images predicted right.
        seen: images.
        stop: whether any process has seen Ctrl-C.
        spoilt: whether the state of any process holds values that it must not.
    """

    losses: list[float]
    correct: int
    seen: int
    stop: bool
    spoilt: bool


class Account:
    """Losses and right answers of the steps since the last reading.

    A step only queues work on the device. All processes read after the same step, because a reading adds up over them: how many
    steps lie between two readings follows from the clock of the first process alone, which the others learn at each reading.

    Args:
        device: of the losses.
        processes: of the job.
        rank: of this process.
    """

    def __init__(self, device: torch.device, processes: int = 1, rank: int = 0) -> None:
        self.processes, self.rank = processes, rank
        self.stride = 1
        """Steps from one reading to the next."""
        self.exact = torch.float32 if device.type == "mps" else torch.float64  # the former has no doubles
        self._losses = torch.zeros(LONGEST, dtype=self.exact, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)
        self._correct = torch.zeros((), dtype=torch.int64, device=device)
        self._seen: list[int] = []
        self._since = time.perf_counter()

    @property
    def pending(self) -> int:
        """Steps that were not read yet."""
        return len(self._seen)

    @property
    def due(self) -> bool:
        """Whether it is time to read; the same on all processes."""
        return self.pending >= self.stride

    def begin(self) -> None:
        """Start the clock: what was done since the last reading was no training."""
        self._since = time.perf_counter()

    @torch.no_grad()
    def note(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note what a step came to: the part that is the device's. :meth:`count` is the host's.

        Args:
            loss: mean over this process's images, a scalar.
            logits: ``(B, classes)``.
            labels: int64, ``(B,)``.
        """
        self._losses.index_copy_(0, self._next, loss.to(self.exact).reshape(1))
        self._next += 1
        self._correct += (logits.argmax(1) == labels).sum()

    def count(self, images: int) -> None:
        """Count a step of so many images, which was noted."""
        self._seen.append(images)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Note a step and count it."""
        self.note(loss, logits, labels)
        self.count(len(labels))

    @torch.no_grad()
    def read(self, *, stop: bool = False, spoilt: Tensor | None = None) -> Reading:
        """Wait for the device, and return what the steps came to.

        Args:
            stop: whether this process has seen Ctrl-C.
            spoilt: a boolean scalar on the device; None: no.
        """
        count = self.pending
        losses, correct = self._losses[:count], self._correct.to(self.exact)
        bad = torch.zeros_like(correct) if spoilt is None else spoilt.to(self.exact)
        if self.processes == 1:
            *means, right, wrong = torch.cat([losses, torch.stack([correct, bad])]).tolist()
            images, stops, seconds = sum(self._seen), float(stop), time.perf_counter() - self._since
        else:
            own = torch.tensor(self._seen, dtype=self.exact, device=losses.device)
            clock = 0.0 if self.rank else time.perf_counter() - self._since
            told = torch.tensor([float(stop), clock], dtype=self.exact, device=losses.device)
            totals = torch.cat([losses * own, own, torch.stack([correct, bad]), told])
            dist.all_reduce(totals)
            *values, right, wrong, stops, seconds = totals.tolist()
            means = [a / b if b else 0.0 for a, b in zip(values[:count], values[count:], strict=True)]
            images = int(sum(values[count:]))
        self._seen.clear()
        self._correct.zero_()
        self._next.zero_()
        self.stride = min(LONGEST, max(1, round(count * READ_SECONDS / max(seconds, 1e-9))))
        self._since = time.perf_counter()
        return Reading(means, int(right), images, stops > 0, wrong > 0)


def spoilt(tensors: Iterable[Tensor]) -> Tensor | None:
    """Return whether any of them holds NaN or infinity, as a scalar on the device; None where there are none."""
    peaks = [torch.linalg.vector_norm(t.detach(), float("inf")).float() for t in tensors if t.numel()]
    if not peaks:
        return None
    return ~torch.stack([peak.to(peaks[0].device) for peak in peaks]).isfinite().all()
