"""wnq's normalizer in front of torchao's quantization-aware training (about ten seconds).

python examples/normalize_then_torchao.py

torchao scales by the largest magnitude of a row. With ``normalize_`` in front, training also sees how the weights depend on
the layer's largest one, and shortens their tail. Put the normalizer in after ``quantize_``: torchao swaps the layer.
"""

import copy
import sys

import torch
from torch import nn

from wnq.data import load_data
from wnq.normalizers import normalize_
from wnq.train import TrainConfig, fit

try:
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
except ImportError:
    sys.exit("This example needs torchao: pip install torchao")

LAYER = "4"


def network() -> nn.Module:
    """Return a perceptron whose middle layer, ``LAYER``, is the one to quantize."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, 10),
    )


def crest(model: nn.Module) -> float:
    """Return max|w| / rms(w) of the layer."""
    weight = model.get_submodule(LAYER).weight.detach()
    return (weight.abs().max() / weight.square().mean().sqrt()).item()


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    training = TrainConfig(epochs=6, batch_size=64, lr=0.1, weight_decay=1e-3, eval_every=1000)
    start = network()
    accuracy = fit(start, data, training).val.accuracy
    print(f"float: accuracy {accuracy:.2f} %, crest factor {crest(start):.2f}")

    two_bits = IntxFakeQuantizeConfig(torch.int2, "per_channel", is_symmetric=True)
    for normalized in (False, True):
        model = copy.deepcopy(start)
        quantize_(model, QATConfig(weight_config=two_bits, step="prepare"), filter_fn=lambda _, name: name == LAYER)
        if normalized:
            normalize_(model.get_submodule(LAYER))
        accuracy = fit(model, data, training).val.accuracy
        label = "with the normalizer" if normalized else "torchao alone"
        print(f"2 bits, {label}: accuracy {accuracy:.2f} %, crest factor {crest(start):.2f} -> {crest(model):.2f}")


if __name__ == "__main__":
    main()
