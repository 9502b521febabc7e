"""The optimizer of a run."""

import torch
from torch import nn

from wnq.attach import param_groups
from wnq.procedures import Procedure
from wnq.train.config import TrainConfig


def make_optimizer(model: nn.Module, procedure: Procedure, config: TrainConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the settings name, over the model's parameters, its quantizers', and the procedure's."""
    groups = param_groups(
        model,
        lr=config.lr,
        weight_decay=config.weight_decay,
        quantizer_lr=config.lr * config.quantizer_lr,
        quantizer_weight_decay=config.quantizer_weight_decay,
    )
    if own := [p for p in procedure.parameters() if p.requires_grad]:
        groups.append({"params": own, "lr": config.lr, "weight_decay": config.weight_decay})
    fused = True if all(p.is_cuda for p in model.parameters()) else None
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, fused=fused)
    return torch.optim.AdamW(groups, fused=fused)
