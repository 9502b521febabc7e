"""What quantization costs, layer by layer: the change of loss and accuracy with only one layer quantized, or only one left float.

Each layer and width is measured twice on the same data: ``max``, max scaling as the weights are, tail included, and ``clip``, the
range with the least squared error of the weights, which is about what remains once a tail is gone. The difference of the two,
:attr:`Row.gap`, says where normalization can pay; before any retraining it is the most that it can buy.

Nothing is trained and the model is only read: a quantized weight takes a layer's place for one forward call at a time
(``torch.func.functional_call``), so the float weights need no restoring. Loss is compared sample by sample with the float model's,
and every change comes with the standard error of that paired difference. A NaN or infinite loss is counted, never averaged: the
change is then NaN. Changes of single layers add up to that of a whole plan only roughly; see ``docs/sensitivity.md``.

``records`` are the numbers, ``prober`` measures any choice of layers, ``measuring`` all of them in turn, ``storing`` is the file,
``summary`` the words. :mod:`wnq.allocation` makes a plan of it.
"""

from wnq.sensitivity.measuring import measure_sensitivity
from wnq.sensitivity.prober import Outcome, Prober, cross_entropy, largest_is_label, paired
from wnq.sensitivity.records import (
    MATERIAL,
    NOISE,
    SCOPES,
    SMALL_LOSS,
    VARIANTS,
    Change,
    Layer,
    Row,
    Sensitivity,
    Settings,
    quantizable_layers,
)
from wnq.sensitivity.rounding import quantized_weight
from wnq.sensitivity.storing import load_sensitivity, save_sensitivity

__all__ = [
    "MATERIAL",
    "NOISE",
    "SCOPES",
    "SMALL_LOSS",
    "VARIANTS",
    "Change",
    "Layer",
    "Outcome",
    "Prober",
    "Row",
    "Sensitivity",
    "Settings",
    "cross_entropy",
    "largest_is_label",
    "load_sensitivity",
    "measure_sensitivity",
    "paired",
    "quantizable_layers",
    "quantized_weight",
    "save_sensitivity",
]
