"""Extragradient: the gradient of a step is taken one step ahead."""

import contextlib
from collections.abc import Generator

import torch


@contextlib.contextmanager
def looked_ahead(optimizer: torch.optim.Optimizer) -> Generator[None]:
    r"""Within the context the parameters stand one plain gradient step ahead; at its end they stand where they stood.

    :math:`W^p = W - \eta (\nabla f(W) + \lambda W)`, with each group's learning rate and weight decay and the gradients
    that the parameters hold. A second backward pass inside gives :math:`\nabla f(W^p)`, which the optimizer then applies
    at W::

        gradient_of(batch)
        with looked_ahead(optimizer):
            optimizer.zero_grad()
            gradient_of(batch)
        optimizer.step()

    References:
        G. M. Korpelevich, The extragradient method for finding saddle points and other problems, Matecon 12, 1976.
    """
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    with torch.no_grad():
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    kept.append((p, p.detach().clone()))
                    p.sub_(group["lr"] * (p.grad + group["weight_decay"] * p))
    try:
        yield
    finally:
        with torch.no_grad():
            for p, before in kept:
                p.copy_(before)
