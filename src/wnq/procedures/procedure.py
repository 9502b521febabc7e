"""What a training procedure can do: a module that the training loop calls at certain moments."""

import json
from collections.abc import Generator, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Procedure(nn.Module):
    """Base class: every moment of a run, with nothing to do at any.

    :func:`wnq.fit` calls the methods in this order; a loop of one's own does the same::

        procedure.start_(model)
        for epoch in range(epochs):
            procedure.start_epoch_(model, epoch, epochs)
            for images, labels in batches:
                with procedure.watching(model):
                    logits = model(images)
                loss = procedure.loss(F.cross_entropy(logits, labels), model, images, labels)
                ...  # backward and optimizer step; where it looks ahead, see looked_ahead
                procedure.after_step_(model, step)
            procedure.after_epoch_(model, epoch, epochs)
        procedure.finish_(model)

    Whatever outlives a step is a buffer, a parameter or a submodule, made in :meth:`start_`: ``fit`` keeps it in the
    checkpoint. Parameters that require a gradient are trained along with the model's.
    """

    name: str = ""
    """Of the registered procedure."""

    options: Mapping[str, Any] = MappingProxyType({})
    """Every option with its value."""

    looks_ahead: bool = False
    """The gradient is taken one plain step ahead: extragradient, see :func:`wnq.procedures.looked_ahead`."""

    needs_teacher: bool = False
    """It cannot start without the float twin."""

    compiles: bool = True
    """It works on a compiled model; one that watches layers does not."""

    def start_(self, model: nn.Module, teacher: nn.Module | None = None) -> None:
        """Prepare once, before the first step, and before a checkpoint is read: buffers must have their final shapes.

        Args:
            model: the model as it will be trained, on its device.
            teacher: the float twin, if there is one.

        Raises:
            ValueError: the model is not one that the procedure can train.
        """

    def start_epoch_(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Learn which epoch begins, counted from 0; called again for the running epoch where a run is resumed."""

    def watching(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return the context that the model's forward pass of a training step runs in."""
        return nullcontext()

    def loss(self, loss: Tensor, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a step, given that of the task; called once after each forward pass."""
        return loss

    def after_step_(self, model: nn.Module, step: int) -> None:
        """Act after an optimizer step; ``step`` counts those of the whole run, this one included."""

    def after_epoch_(self, model: nn.Module, epoch: int, epochs: int) -> None:
        """Act after the last step of an epoch, before it is evaluated."""

    def finish_(self, model: nn.Module) -> None:
        """Act after the last epoch, before BatchNorm statistics are re-estimated."""

    @property
    def settings(self) -> dict[str, Any]:
        """Name and options in plain JSON types; a checkpoint belongs to a run with the same ones."""
        return json.loads(json.dumps({"name": self.name or type(self).__name__, "options": dict(self.options)}))

    def extra_repr(self) -> str:
        """Show the options in ``print(procedure)``."""
        return ", ".join(f"{key}={value!r}" for key, value in self.options.items())


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Generator[None]:
    """Remove hooks at the end. Given as a generator, they are set at the beginning, not before."""
    with ExitStack() as hooks:
        for handle in handles:
            hooks.enter_context(handle)
        yield
