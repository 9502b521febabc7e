"""The integer reference model: what every exported file is made from, and what its accuracy is reported on.

>>> import torch, wnq
>>> model = wnq.build_model("digits_cnn")
>>> _ = wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=2)))
>>> images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
>>> _ = wnq.calibrate_(model, images)
>>> conversion = convert(model, images)
>>> {record.sums for record in conversion.layers}
{'integer'}
>>> bool((conversion.model(images) - model.eval()(images)).abs().max() < 1e-4)
True
"""

from wnq.integer.biases import round_biases_
from wnq.integer.convert import Conversion, LayerRecord, convert
from wnq.integer.inputs import InputGrid, input_grid
from wnq.integer.layer import DeployedEmbedding, DeployedLayer, DeployedOutput

__all__ = [
    "Conversion",
    "DeployedEmbedding",
    "DeployedLayer",
    "DeployedOutput",
    "InputGrid",
    "LayerRecord",
    "convert",
    "input_grid",
    "round_biases_",
]
