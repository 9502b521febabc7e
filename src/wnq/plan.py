"""The plan: which layer gets which method. Plain data, made from a model, printed, edited, saved as JSON."""

import fnmatch
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from wnq.files import write_text
from wnq.layers import CHANNEL_AXIS, CONVOLUTIONS, FUSED, channel_axis
from wnq.methods import Method, get_method
from wnq.names import did_you_mean
from wnq.quantizer import FLOAT_BITS, check_bits
from wnq.readers import unrounded_outputs

OUTPUT_BITS = 8
"""Width of the outputs that are rounded for an integer engine; 32 leaves them float."""


@dataclass(frozen=True)
class LayerPlan:
    """One quantized layer.

    Attributes:
        name: its name in ``model.named_modules()``.
        kind: its class, for example ``Conv2d``.
        shape: the shape of its weight.
        method: what it gets.
        tied_to: the earlier layer whose weight it shares, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    method: Method
    tied_to: str | None = None

    @property
    def parameters(self) -> int:
        """Number of weights (0 where they belong to another layer)."""
        size = 0 if self.tied_to else 1
        for length in self.shape:
            size *= length
        return size

    @property
    def size_kib(self) -> float:
        """Size of the weights at the planned width, in KiB (1024 bytes)."""
        return self.parameters * self.method.w_bits / 8 / 1024


@dataclass(frozen=True)
class FloatLayer:
    """One layer left in floating point, and why."""

    name: str
    kind: str
    parameters: int
    reason: str

    @property
    def size_kib(self) -> float:
        """Size of its parameters as float32, in KiB."""
        return self.parameters * 4 / 1024


@dataclass(frozen=True)
class OutputPlan:
    """One output that is rounded in training because an integer engine rounds it.

    Attributes:
        name: the module whose output it is, in ``model.named_modules()``: a convolution, or the BatchNorm or ReLU behind it.
        layer: the convolution.
        bits: width, 2 to 8.
    """

    name: str
    layer: str
    bits: int = OUTPUT_BITS

    def __post_init__(self) -> None:
        check_bits(self.bits, where=f"bits of output {self.name!r}", low=2)


@dataclass(frozen=True)
class Plan:
    """What :func:`wnq.quantize_` will do to a model: every layer with parameters stands in one of the first two lists."""

    layers: tuple[LayerPlan, ...]
    floats: tuple[FloatLayer, ...]
    outputs: tuple[OutputPlan, ...] = ()

    def __getitem__(self, name: str) -> Method:
        """Return the method of a layer.

        Raises:
            KeyError: the plan does not quantize such a layer.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer.method
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; :meth:`from_json` reverses it."""
        return {
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "shape": list(layer.shape),
                    "method": layer.method.name,
                    "options": dict(layer.method.options),
                    "tied_to": layer.tied_to,
                }
                for layer in self.layers
            ],
            "floats": [vars(layer) for layer in self.floats],
            "outputs": [vars(output) for output in self.outputs],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> "Plan":
        """Rebuild a plan.

        Raises:
            ValueError: a key is missing or of the wrong type, or a method or option is unknown.
        """
        try:
            layers = tuple(
                LayerPlan(
                    str(entry["name"]),
                    str(entry["kind"]),
                    tuple(int(length) for length in entry["shape"]),
                    get_method(str(entry["method"]), **dict(entry["options"])),
                    None if entry.get("tied_to") is None else str(entry["tied_to"]),
                )
                for entry in data["layers"]
            )
            floats = tuple(
                FloatLayer(str(e["name"]), str(e["kind"]), int(e["parameters"]), str(e["reason"]))
                for e in data["floats"]
            )
            outputs = tuple(
                OutputPlan(str(e["name"]), str(e["layer"]), int(e["bits"])) for e in data.get("outputs", ())
            )
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a plan: {type(error).__name__} {error}; expected 'layers' and 'floats' as Plan.to_json() writes them."
            ) from None
        return Plan(layers, floats, outputs)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_text(path, json.dumps(self.to_json(), indent=2) + "\n")

    @staticmethod
    def load(path: str | Path) -> "Plan":
        """Read a plan that :meth:`save` wrote.

        Raises:
            ValueError: the file is missing or no plan.
        """
        try:
            return Plan.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"cannot read the plan {path}: {error}.") from None


def make_plan(
    model: nn.Module,
    method: Method,
    *,
    first_last_bits: int | None = 8,
    keep_float: Sequence[str] = (),
    override: Mapping[str, Method] | None = None,
    residual_bits: int = FLOAT_BITS,
) -> Plan:
    """Decide what every layer of a model gets. The model is only read.

    Args:
        model: any module.
        method: what the layers get, from :func:`wnq.get_method`.
        first_last_bits: width of the weights and inputs of the first and the last layer, in order of registration: 1 to 8, 32 for
            float, None to treat them as all others. They use max scaling on the symmetric grid, which fits int8, with
            a learned input step, whatever the method, so that methods compare on the layers between.
        keep_float: shell wildcards of layers to leave in floating point.
        override: shell wildcard -> method, for exceptions and mixed widths; later entries win over earlier ones and over
            the rule of the first and last layer.
        residual_bits: 8 rounds what convolutions put out wherever a quantized input is not its only reader, as at the ends of
            residual branches: engines that run a convolution in integers only with rounded outputs then compute the trained
            function. 32 leaves these outputs float. The places are found by following the forward with :mod:`torch.fx`.

    Raises:
        ValueError: nothing to quantize, the model is quantized already, a pattern matches no layer (with the closest names), or
            with ``residual_bits`` the forward cannot be followed.
    """
    if residual_bits not in (OUTPUT_BITS, FLOAT_BITS):
        raise ValueError(f"residual_bits must be {OUTPUT_BITS}, or {FLOAT_BITS} for float, got {residual_bits!r}.")
    override = override or {}
    named = list(_walk(model))
    names = [name for name, _, reason in named if reason is None]
    for option, patterns in (("keep_float", keep_float), ("override", override)):
        for pattern in patterns:
            _require_match(option, pattern, names)
    layers: list[LayerPlan] = []
    floats: list[FloatLayer] = []
    owners: dict[int, LayerPlan] = {}
    for name, module, reason in named:
        kind = type(module).__name__
        if reason is None and any(fnmatch.fnmatchcase(name, pattern) for pattern in keep_float):
            reason = "kept float as asked"
        chosen = _choose(name, names, method, first_last_bits, override) if reason is None else None
        if chosen is not None and chosen.weight is None and chosen.input is None:
            reason, chosen = "32 bits as asked", None
        if chosen is None:
            floats.append(
                FloatLayer(name, kind, _own_parameters(module, fused=isinstance(module, FUSED)), reason or "")
            )
            continue
        weight: Any = module.weight
        owner = owners.get(id(weight))
        entry = LayerPlan(
            name, kind, tuple(weight.shape), owner.method if owner else chosen, owner.name if owner else None
        )
        owners.setdefault(id(weight), entry)
        layers.append(entry)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has nothing to quantize: no {', '.join(sorted(k.__name__ for k in CHANNEL_AXIS))} "
            f"is left after keep_float={list(keep_float)!r}."
        )
    return Plan(tuple(layers), tuple(floats), _outputs(model, layers) if residual_bits == OUTPUT_BITS else ())


def _outputs(model: nn.Module, layers: Sequence[LayerPlan]) -> tuple[OutputPlan, ...]:
    """Find the outputs of convolutions that an integer engine would have to round."""
    rounding = {entry.name for entry in layers if entry.method.input is not None}
    weighted = [entry.name for entry in layers if entry.method.weight is not None and entry.name in rounding]
    integer = [name for name in weighted if isinstance(model.get_submodule(name), CONVOLUTIONS)]
    return tuple(OutputPlan(*place) for place in unrounded_outputs(model, integer, rounding).items())


def boundary_method(method: Method, bits: int) -> Method:
    """Return what the first and last layer get beside ``method``: symmetric max scaling with its gain, detached if it has none."""
    check = FLOAT_BITS if bits == FLOAT_BITS else check_bits(bits, where="first_last_bits (or 32 for float)")
    return get_method(
        "wnq",
        w_bits=check if method.w_bits != FLOAT_BITS else FLOAT_BITS,
        a_bits=check if method.a_bits != FLOAT_BITS else FLOAT_BITS,
        grid="symmetric" if bits > 1 else "full",
        max_gain=method.options.get("max_gain", 0.0),
    )


def _choose(
    name: str, names: Sequence[str], method: Method, first_last_bits: int | None, override: Mapping[str, Method]
) -> Method:
    chosen = method
    if first_last_bits is not None and name in (names[0], names[-1]):
        chosen = boundary_method(method, first_last_bits)
    for pattern, exception in override.items():
        if fnmatch.fnmatchcase(name, pattern):
            chosen = exception
    return chosen


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield every module that owns parameters, with the reason why it cannot be quantized, or None if it can."""
    skipped: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in skipped):
            continue
        if hasattr(module, "parametrizations"):
            raise ValueError(
                f"layer {name!r} is parametrized already. Make the plan from the float model, before quantize_ or torch's own "
                "parametrizations (weight_norm, spectral_norm) are attached."
            )
        if isinstance(module, FUSED):
            skipped.append(f"{name}." if name else "")
            yield name, module, f"the weights of {type(module).__name__} are fused or recurrent: not supported yet"
        elif channel_axis(module) is not None:
            yield name, module, None
        elif next(module.parameters(recurse=False), None) is not None:
            kind = type(module).__name__
            yield name, module, "normalization" if "Norm" in kind else f"{kind} has no weight quantizer"


def _own_parameters(module: nn.Module, *, fused: bool) -> int:
    return sum(p.numel() for p in module.parameters(recurse=fused) if not isinstance(p, nn.UninitializedParameter))


def _require_match(option: str, pattern: str, names: Sequence[str]) -> None:
    if any(fnmatch.fnmatchcase(name, pattern) for name in names):
        return
    hint = did_you_mean(pattern, names)
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    raise ValueError(f"{option} pattern {pattern!r} matches no quantizable layer.{hint} {len(names)} layers: {shown}")
