"""The exponential average of the weights."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class Average(AveragedModel):
    """torch's average of a model's parameters, updated without a word between host and device.

    torch's own update sends its counter to the device at every step, and the host waits for that.

    Args:
        model: on its device.
        decay: share of the average that a step keeps, 0 to 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model)
        self._move = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Move the parameters toward those of ``model``, or set them at the first call; take over the buffers."""
        first = not bool(self.n_averaged)  # the counter stays on the host
        kinds: dict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]] = {}
        for mine, current in zip(self.module.parameters(), model.parameters(), strict=True):
            own, its = kinds.setdefault((mine.device, mine.dtype), ([], []))
            own.append(mine)
            its.append(current)
        for own, its in kinds.values():
            if not first:
                self._move(own, its, 0)  # pyright: ignore[reportArgumentType] - the counter is not read
                continue
            for mine, current in zip(own, its, strict=True):
                mine.copy_(current)
        for mine, current in zip(self.module.buffers(), model.buffers(), strict=True):
            mine.copy_(current)
        self.n_averaged.add_(1)
