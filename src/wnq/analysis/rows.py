"""One row of evidence a layer: the statistics of its float weight and of what its quantizer makes of it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wnq.attach import get_plan, quantized_layers
from wnq.layers import channel_axis
from wnq.methods import get_method
from wnq.plan import make_plan
from wnq.prepared import float_weight
from wnq.quantizer import Quantized, Quantizer
from wnq.tails import TensorStats, error_stats, tensor_stats


@dataclass(frozen=True)
class LayerStats:
    """One row of evidence. The statistics are defined in :class:`TensorStats` and :class:`ErrorStats`."""

    name: str
    kind: str
    """Class of the layer; of a tensor that has none, its type."""
    shape: tuple[int, ...]
    parameters: int
    nonfinite: int
    rms: float
    crest: float
    kurtosis: float
    tail_mass: float
    outlier_energy: float
    method: str | None = None
    bits: int | None = None
    relative_error: float | None = None
    rescale: float | None = None
    rescaled_error: float | None = None
    law_error: float | None = None
    zeros: float | None = None
    entropy: float | None = None
    levels_used: int | None = None


class Layer(NamedTuple):
    """One weight of a model."""

    name: str
    kind: str
    axis: int
    """The dimension of its output channels."""
    weight: Tensor
    """The float weight."""
    quantizer: Quantizer | None = None
    """None for a float layer."""
    method: str | None = None
    frozen: bool = False
    """Whether the weight holds quantized values only."""

    def codes(self) -> Quantized | None:
        """Return what the quantizer makes of it; None for a float layer and for a weight with NaN or infinity."""
        finite = self.quantizer is not None and bool(torch.isfinite(self.weight).all())
        return self.quantizer.quantize(self.weight) if finite and self.quantizer is not None else None

    def row(self, stats: TensorStats, codes: Quantized | None) -> LayerStats:
        """Return the row, with the statistics of :attr:`weight` and what :meth:`codes` returned."""
        numbers = asdict(stats)
        for unwanted in ("peak", "nan", "infinite"):
            del numbers[unwanted]
        errors = asdict(error_stats(self.weight, codes)) if codes is not None else {}
        bits = None if self.quantizer is None else self.quantizer.bits
        shape = tuple(self.weight.shape)
        return LayerStats(self.name, self.kind, shape, **numbers, method=self.method, bits=bits, **errors)


def quantized_weights(model: nn.Module) -> list[Layer]:
    """Return the quantized layers of a model, tied weights once, in order."""
    methods = _method_names(model)
    return [
        Layer(
            name,
            _kind(layer),
            quantizer.axis,
            float_weight(layer).detach(),
            quantizer,
            methods.get(name, type(quantizer).__name__),
            not parametrize.is_parametrized(layer, "weight"),
        )
        for name, layer, quantizer in quantized_layers(model)
    ]


def float_weights(model: nn.Module) -> list[Layer]:
    """Return the layers of a float model that a plan would quantize, tied weights once, in order.

    Raises:
        ValueError: the model is quantized already, or has no such layer.
    """
    names = [planned.name for planned in make_plan(model, get_method("wnq")).layers if planned.tied_to is None]
    layers = [(name, model.get_submodule(name)) for name in names]
    return [Layer(name, _kind(own), channel_axis(own) or 0, float_weight(own).detach()) for name, own in layers]


def _kind(layer: nn.Module) -> str:
    # torch gives a parametrized layer a class of its own, made at run time.
    return next(cls.__name__ for cls in type(layer).__mro__ if not cls.__name__.startswith("Parametrized"))


def _method_names(model: nn.Module) -> dict[str, str]:
    try:
        return {entry.name: entry.method.name for entry in get_plan(model).layers}
    except ValueError:
        return {}


def layer_stats(model: nn.Module) -> list[LayerStats]:
    """Return one row for each quantized layer, tied weights once, in model order.

    A weight with NaN or infinity has no codes: its row counts them and leaves the quantization columns None. The method
    is the one in the model's plan, or the quantizer's class if the model carries none. A frozen layer has only its
    quantized values left: analyse before :func:`wnq.attach.freeze_`.
    """
    return [layer.row(tensor_stats(layer.weight), layer.codes()) for layer in quantized_weights(model)]


def weight_stats(model: nn.Module) -> list[LayerStats]:
    """Return the same rows for a float model: every layer that a plan would quantize, quantization columns None.

    Raises:
        ValueError: the model is quantized already, or has no such layer.
    """
    return [layer.row(tensor_stats(layer.weight), None) for layer in float_weights(model)]


def stats_rows(stats: Iterable[LayerStats]) -> list[dict[str, object]]:
    """Return rows that ``json.dumps(..., allow_nan=False)`` accepts: NaN and infinity become None, the shape a list."""
    return [plain(asdict(row)) for row in stats]


def plain(value: Any) -> Any:
    """Return dictionaries, lists and numbers as JSON can say them: NaN and infinity become None, tuples lists."""
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
