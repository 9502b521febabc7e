"""From a quantized model to its integer reference model: the one that every engine's file is made from."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn

from wnq.attach import freeze_
from wnq.folding import merge_batchnorm_
from wnq.integer.building import deployed_embedding, deployed_layer
from wnq.integer.inputs import input_grid
from wnq.integer.layer import Computing, DeployedEmbedding, DeployedLayer, DeployedOutput
from wnq.integer.tables import input_table
from wnq.integer.weights import WeightForm, weight_form
from wnq.layers import BatchNorm
from wnq.plan import Plan
from wnq.prepared import deployed, float_weight, move_output_, weight_quantizer
from wnq.quantizer import FLOAT_BITS, Quantized, Quantizer
from wnq.readers import foldable_pairs

PLAIN = (*get_args(Computing), nn.Embedding)

INTEGER, CODEBOOK, FLOAT = "integer", "codebook", "float"


@dataclass(frozen=True)
class LayerRecord:
    """What became of one layer, as plain data.

    Attributes:
        name: its name in the model.
        kind: its class.
        form: of the weight: ``integer`` (int8), ``codebook`` (codes and levels, float arithmetic) or ``float``.
        bits: width of a weight's code; 32 for float.
        shape: of the weight.
        input: the input's integers, or why there are none.
        sums: ``integer`` where both sides of the sum are integers, else ``float``.
        batchnorm: the BatchNorm that is part of scale and bias now, or None.
        why: in one line.
        output: integers that training rounded the layer's output to, behind BatchNorm and ReLU where these follow; None for most.
    """

    name: str
    kind: str
    form: str
    bits: int
    shape: tuple[int, ...]
    input: str
    sums: str
    batchnorm: str | None
    why: str
    output: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return {**asdict(self), "shape": list(self.shape)}


@dataclass(frozen=True)
class Conversion:
    """A model of integers, and what became of each layer, in order."""

    model: nn.Module
    layers: tuple[LayerRecord, ...]

    @property
    def float_layers(self) -> tuple[LayerRecord, ...]:
        """The layers with parameters whose sums stay in floating point."""
        return tuple(record for record in self.layers if record.sums != INTEGER)


@torch.no_grad()
def convert(model: nn.Module, *inputs: Any) -> Conversion:
    """Return the integer reference model of a quantized model, on the CPU, in float32 and eval mode.

    Each quantized layer becomes a :class:`DeployedLayer` or :class:`DeployedEmbedding`: int8 weights, one float scale and one float
    bias a channel, with BatchNorm folded into both. A negative factor flips the integers, so that every scale is positive. Its
    outputs differ from the model's by the order of float roundings alone, until such a difference meets the next rounding.

    Args:
        model: a quantized model whose input quantizers have met a batch, a frozen one, or one that :func:`wnq.load` read. It is
            only read.
        inputs: what its forward takes; the smallest batch will do. It tells which BatchNorm reads which layer alone.

    Raises:
        ValueError: nothing in the model is quantized, or an input quantizer has not met a batch.
    """
    plan = _plan(model)
    model = merge_batchnorm_(copy.deepcopy(model)).cpu().float().eval()
    quantized = _codes(model)
    if not quantized and not any(_input_quantizer(layer) is not None for layer in model.modules()):
        raise ValueError(
            f"{type(model).__name__} is a float model; nothing can be converted to integers. Quantize it first: "
            "quantize_(model, make_plan(model, method))."
        )
    inputs = tuple(x.cpu() if isinstance(x, Tensor) else x for x in inputs)
    active = _active_outputs(model, inputs)
    pairs = {
        name: norm
        for name, norm in foldable_pairs(model, *inputs).items()
        if name not in active
        and _is_plain(model.get_submodule(name))
        and (name in quantized or _input_quantizer(model.get_submodule(name)) is not None)
    }
    freeze_(model)
    outputs = _deploy_outputs_(model)
    records: dict[str, LayerRecord] = {}
    for name, layer in list(model.named_modules()):
        quantizer = _input_quantizer(layer)
        if name not in quantized and quantizer is None:
            continue
        if not _is_plain(layer):
            records[name] = _kept(name, layer, quantizer)
            continue
        form = weight_form(quantized[name][0]) if name in quantized else None
        bits = quantized[name][1] if name in quantized else FLOAT_BITS
        if isinstance(layer, nn.Embedding):
            assert form is not None
            new: nn.Module = deployed_embedding(form, bits)
            records[name] = _record(name, layer, new, form, "indices")
        else:
            grid, reason = (None, "float, as planned") if quantizer is None else input_grid(quantizer)
            source: nn.Module | None = quantizer
            if quantizer is not None and grid is None:
                source = input_table(quantizer) or quantizer
                reason = f"{source if source is not quantizer else 'as trained'}, in floating point: {reason}"
            norm = cast("BatchNorm | None", model.get_submodule(pairs[name]) if name in pairs else None)
            output = cast(nn.Module, layer.output_module) if name in active else None
            new = deployed_layer(cast(Computing, layer), form, bits, norm, grid, source, output)
            records[name] = replace(_record(name, layer, new, form, str(grid or reason)), batchnorm=pairs.get(name))
            if norm is not None:
                _put(model, norm, nn.Identity())
        _put(model, layer, new)
        if layer is model:
            model = new
    for output in () if plan is None else plan.outputs:
        if output.layer in records:
            records[output.layer] = replace(records[output.layer], output=outputs.get(output.name))
    return Conversion(model, (*records.values(), *_planned_floats(plan, records)))


def _plan(model: nn.Module) -> Plan | None:
    plan = getattr(model, "wnq_plan", None)
    return plan if isinstance(plan, Plan) else None


def _input_quantizer(layer: nn.Module) -> Quantizer | None:
    if isinstance(layer, DeployedLayer):
        return None
    quantizer = getattr(layer, "input_quantizer", None)
    return quantizer if isinstance(quantizer, Quantizer) else None


def _deploy_outputs_(model: nn.Module) -> dict[str, str]:
    """Put integers in the place of the quantizers of outputs, in place; return module -> which."""
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "output_quantizer", None)
        if isinstance(quantizer, Quantizer):
            grid, reason = input_grid(quantizer)
            found[name] = str(grid or f"as trained, in floating point: {reason}")
            if grid is not None:
                module.output_quantizer = DeployedOutput(grid)
    return found


def _codes(model: nn.Module) -> dict[str, tuple[Quantized, int]]:
    """Return layer -> codes and width; layers that share a weight share the codes."""
    seen: dict[int, tuple[Quantized, int]] = {}
    found: dict[str, tuple[Quantized, int]] = {}
    for name, layer in model.named_modules():
        quantizer = weight_quantizer(layer)
        if quantizer is not None:
            weight = float_weight(layer)
            if id(weight) not in seen:
                seen[id(weight)] = deployed(quantizer, weight.detach()), quantizer.bits
            found[name] = seen[id(weight)]
    return found


def _is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes what its class of torch's does, so that another module can stand in for it."""
    kind = next((kind for kind in PLAIN if isinstance(layer, kind)), None)
    if kind is None or (isinstance(layer, nn.Embedding) and layer.max_norm is not None):
        return False
    return all(getattr(type(layer), name, None) is getattr(kind, name, None) for name in ("forward", "_conv_forward"))


def _active_outputs(model: nn.Module, inputs: Sequence[Any]) -> set[str]:
    """Return the layers whose output module changes anything in eval mode."""
    active: set[str] = set()
    names = {id(layer.output_module): name for name, layer in model.named_modules() if hasattr(layer, "output_module")}

    def compare(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if output is not args[2] and not torch.equal(output, args[2]):
            active.add(names[id(module)])

    handles = [m.register_forward_hook(compare) for m in model.modules() if id(m) in names]
    try:
        if handles:
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return active


def _record(name: str, layer: nn.Module, new: nn.Module, form: WeightForm | None, source: str) -> LayerRecord:
    assert isinstance(new, DeployedLayer | DeployedEmbedding)
    integer = new.is_integer if isinstance(new, DeployedLayer) else new.weight is not None
    if new.weight is not None:
        kind, why = INTEGER, f"integers from {int(new.weight.min())} to {int(new.weight.max())}"
        if not integer:
            why += "; the sums are of floats, because the input is not one of integers"
    elif form is None:
        kind, why = FLOAT, "the plan leaves its weights in floating point"
    else:
        flipped = "negative BatchNorm factors turn -128 into 128, which int8 does not hold"
        kind, why = CODEBOOK, f"codes and a table of levels, summed in floating point: {form.why or flipped}"
    shape = tuple(float_weight(layer).shape)
    return LayerRecord(name, _kind(layer), kind, new.bits, shape, source, INTEGER if integer else FLOAT, None, why)


def _kept(name: str, layer: nn.Module, quantizer: Quantizer | None) -> LayerRecord:
    source = "as trained" if quantizer is not None else "float, as planned"
    why = (
        f"kept as a {_kind(layer)} with its quantized values in floating point: its class computes in a way of its own"
    )
    shape = tuple(float_weight(layer).shape)
    return LayerRecord(name, _kind(layer), FLOAT, FLOAT_BITS, shape, source, FLOAT, None, why)


def _kind(layer: nn.Module) -> str:
    return type(layer).__name__.removeprefix("Parametrized")


def _planned_floats(plan: Plan | None, records: Mapping[str, LayerRecord]) -> list[LayerRecord]:
    """Return the layers that the plan leaves float, BatchNorms that were folded left out."""
    if plan is None:
        return []
    folded = {record.batchnorm for record in records.values()}
    return [
        LayerRecord(entry.name, entry.kind, FLOAT, FLOAT_BITS, (), "float, as planned", FLOAT, None, entry.reason)
        for entry in plan.floats
        if entry.name not in folded
    ]


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all its names; what it puts out is rounded as before."""
    move_output_(old, new)
    for name in [name for name, module in model.named_modules(remove_duplicate=False) if module is old and name]:
        path, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(path), attribute, new)
