"""BatchNorm statistics of the final weights."""

import torch
from torch import nn

from wnq.data import Batches, StreamedBatches
from wnq.starting import across_processes


@torch.no_grad()
def reestimate_batchnorm_(
    model: nn.Module, train: Batches | StreamedBatches, batches: int, *, bf16: bool = False
) -> None:
    """Replace the running statistics of every BatchNorm by the plain average over some training batches, in place.

    Running averages trail behind weights that still jump between levels; this takes them at the final weights. The
    processes of a distributed job average theirs.

    Args:
        model: any module; one without BatchNorm is left alone.
        train: batches of epoch 0 are used.
        batches: how many, at most an epoch.
        bf16: run under bfloat16 autocast, as in training.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]  # pyright: ignore[reportPrivateUsage]
    norms = [module for module in norms if module.track_running_stats]
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    was_training = model.training
    model.eval()
    for module in norms:
        module.reset_running_stats()
        module.momentum = None
        module.train()
    for step, (images, _) in enumerate(train.epoch(0)):
        if step == batches:
            break
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=bf16):
            model(images)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        for statistic in (module.running_mean, module.running_var):
            assert statistic is not None
            statistic.copy_(across_processes(statistic))
    model.train(was_training)
