"""wnq's normalizer in front of torch's own pruning (about ten seconds).

python examples/normalize_then_prune.py

The mask goes on the weight that the normalizer reads; ``max_abs`` and ``tanh`` map zero to zero, so what is pruned stays pruned
(``standardize`` subtracts the mean and would fill the zeros again). Expect little: the gradient through the maximum feeds on
rounding, and here nothing is rounded. The crest factor rises because most weights become zero.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import prune

from wnq.data import load_data
from wnq.normalizers import normalize_
from wnq.train import TrainConfig, fit

LAYER = "4"
PRUNED = 0.95


def network() -> nn.Module:
    """Return a perceptron whose middle layer, ``LAYER``, is the one to prune."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, 10),
    )


def crest(weight: torch.Tensor) -> float:
    """Return max|w| / rms(w)."""
    return (weight.abs().max() / weight.square().mean().sqrt()).item()


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    training = TrainConfig(epochs=6, batch_size=64, lr=0.1, weight_decay=1e-3, eval_every=1000)
    start = network()
    accuracy = fit(start, data, training).val.accuracy
    before = crest(start.get_submodule(LAYER).weight.detach())
    print(f"float: accuracy {accuracy:.2f} %, crest factor {before:.2f}")

    for normalized in (False, True):
        model = copy.deepcopy(start)
        layer = model.get_submodule(LAYER)
        if normalized:
            normalize_(layer)
            prune.l1_unstructured(layer.parametrizations.weight, "original", PRUNED)
        else:
            prune.l1_unstructured(layer, "weight", PRUNED)
        accuracy = fit(model, data, training).val.accuracy
        model.eval()(data.val.images[:1].float())  # torch's pruning writes the masked weight when the layer runs
        weight = layer.weight.detach()
        label = "with the normalizer" if normalized else "torch's pruning alone"
        print(
            f"{(weight == 0).float().mean():.1%} zeros, {label}: accuracy {accuracy:.2f} %, "
            f"crest factor {before:.2f} -> {crest(weight):.2f}, of the weights left {crest(weight[weight != 0]):.2f}"
        )


if __name__ == "__main__":
    main()
