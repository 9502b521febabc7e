"""wnq's normalizer in front of brevitas' weight quantizers (about fifteen seconds).

python examples/normalize_then_brevitas.py

brevitas' default quantizer scales by the largest magnitude and differentiates through it, as wnq does: it shortens the tail by
itself, and a normalizer in front adds nothing. With brevitas' learned scale the tail stays, and the normalizer does little
about it.
"""

import copy
import sys

import torch
from torch import nn

from wnq.data import load_data
from wnq.normalizers import normalize_
from wnq.train import TrainConfig, fit

try:
    from brevitas.inject.enum import ScalingImplType
    from brevitas.nn import QuantLinear
    from brevitas.quant import Int8WeightPerTensorFloat
except ImportError:
    sys.exit("This example needs brevitas: pip install brevitas")

LAYER = 4


class LearnedScale(Int8WeightPerTensorFloat):
    """The default, but with a trained scale that starts at the largest magnitude."""

    scaling_impl_type = ScalingImplType.PARAMETER_FROM_STATS


def network() -> nn.Sequential:
    """Return a perceptron whose middle layer, ``LAYER``, is the one to quantize."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(64, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU()),
        nn.Linear(256, 10),
    )


def crest(model: nn.Sequential) -> float:
    """Return max|w| / rms(w) of the layer."""
    weight = model[LAYER].weight.detach()
    return (weight.abs().max() / weight.square().mean().sqrt()).item()


def main() -> None:
    torch.set_num_threads(1)
    data = load_data("digits")
    training = TrainConfig(epochs=6, batch_size=64, lr=0.1, weight_decay=1e-3, eval_every=1000)
    start = network()
    accuracy = fit(start, data, training).val.accuracy
    print(f"float: accuracy {accuracy:.2f} %, crest factor {crest(start):.2f}")

    for quantizer, name in ((Int8WeightPerTensorFloat, "brevitas' default"), (LearnedScale, "brevitas' learned scale")):
        for normalized in (False, True):
            model = copy.deepcopy(start)
            layer = QuantLinear(256, 256, bias=False, weight_quant=quantizer, weight_bit_width=3)
            layer.load_state_dict(
                start[LAYER].state_dict(), strict=False
            )  # the quantizer's own states keep their start
            model[LAYER] = normalize_(layer) if normalized else layer
            accuracy = fit(model, data, training).val.accuracy
            label = f"{name}, with the normalizer" if normalized else f"{name} alone"
            print(f"3 bits, {label}: accuracy {accuracy:.2f} %, crest factor {crest(start):.2f} -> {crest(model):.2f}")


if __name__ == "__main__":
    main()
