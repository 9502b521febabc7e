"""What a file says about itself: the model's name, the plan and how each weight is stored, checked entry by entry.

The JSON is compact because it counts in the size of small models: every distinct method, kind of layer and reason
to leave a layer float is written once and referred to by its number.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

from wnq.artifact.bundle import is_shape
from wnq.artifact.coding import Coding, Stored, read_coding
from wnq.artifact.container import FORMAT_VERSION, ArtifactError
from wnq.methods import Method, get_method
from wnq.plan import FloatLayer, LayerPlan, OutputPlan, Plan

_T = TypeVar("_T")

_MOST = 1 << 10
"""Methods that a file may have; each one is built before anything else is known of the file."""


@dataclass(frozen=True)
class Manifest:
    """The metadata of an artifact.

    Attributes:
        plan: the plan that the model was quantized by.
        stored: layer -> how its weight is stored; layers with a float weight or another's weight are absent.
        aliases: key of the model's float state_dict -> the key whose tensor it shares.
        dtype: floating-point type of the quantized weights in the model, for example ``float32``.
        coding: how the codes are coded.
        version: of the format.
        model: ``{"name": …, "options": …}`` of :func:`wnq.models.registered_model`; None for a model from elsewhere.
    """

    plan: Plan
    stored: Mapping[str, Stored]
    aliases: Mapping[str, str]
    dtype: str
    model: Mapping[str, Any] | None
    coding: Coding = field(default_factory=Coding)
    version: int = FORMAT_VERSION

    def to_json(self) -> dict[str, Any]:
        """Return JSON types; :meth:`from_json` reverses it."""
        methods: list[dict[str, Any]] = []
        kinds: list[dict[str, Any]] = []
        layers: list[list[Any]] = []
        for layer in self.plan.layers:
            method = {"name": layer.method.name, "options": dict(layer.method.options)}
            if method not in methods:
                methods.append(method)
            kind = {"kind": layer.kind, "shape": list(layer.shape), "method": methods.index(method)}
            if layer.name in self.stored:
                kind |= {
                    key: value for key, value in asdict(self.stored[layer.name]).items() if key != "shift" or value
                }
            if kind not in kinds:
                kinds.append(kind)
            layers.append([layer.name, kinds.index(kind)] + ([] if layer.tied_to is None else [layer.tied_to]))
        reasons = sorted({(left.kind, left.reason) for left in self.plan.floats})
        floats = [[left.name, left.parameters, reasons.index((left.kind, left.reason))] for left in self.plan.floats]
        names = [layer.name for layer in self.plan.layers]
        outputs = [[output.name, names.index(output.layer), output.bits] for output in self.plan.outputs]
        return {
            "plan": {
                "methods": methods,
                "kinds": kinds,
                "layers": layers,
                "reasons": [list(reason) for reason in reasons],
                "floats": floats,
                **({"outputs": outputs} if outputs else {}),
            },
            "aliases": dict(self.aliases),
            "coder": self.coding.to_json(),
            "dtype": self.dtype,
            "model": None if self.model is None else dict(self.model),
        }

    @staticmethod
    def from_json(document: Mapping[str, Any], *, where: str) -> "Manifest":
        """Check and rebuild a manifest from a file's metadata.

        Args:
            document: what :func:`wnq.artifact.container.read_artifact` returned.
            where: the file, for messages.

        Raises:
            ArtifactError: a key is missing, unknown or of the wrong type, or a value is out of range.
        """
        reader = _Reader(where)
        known = ("plan", "aliases", "dtype", "model", "format", "format_version", "sha256")
        version = reader.get(document, "format_version", int)
        coding = Coding()
        if version > 1:
            known += ("coder",)
            try:
                coding = read_coding(document.get("coder"))
            except ValueError as error:
                raise reader.fail(str(error)) from None
        reader.keys(document, "the metadata", known)
        plan = reader.get(document, "plan", dict)
        reader.keys(plan, "plan", ("methods", "kinds", "layers", "reasons", "floats", "outputs"))
        methods = [reader.method(entry) for entry in reader.few(plan, "methods")]
        layers: dict[str, LayerPlan] = {}
        stored: dict[str, Stored] = {}
        kinds = reader.get(plan, "kinds", list)
        for value in reader.get(plan, "layers", list):
            name, kind, tied_to = reader.named(value, kinds)
            layer = reader.layer(name, kind, tied_to, methods, layers)
            layers[layer.name] = layer
            if "bits" in kind or "axis" in kind:
                stored[layer.name] = reader.stored(kind, layer)
        model = document.get("model")
        if model is not None:
            model = reader.mapping(model, "model", ("name", "options"))
            model = {"name": reader.get(model, "name", str), "options": reader.get(model, "options", dict)}
        return Manifest(
            plan=Plan(tuple(layers.values()), reader.floats(plan), reader.outputs(plan, list(layers))),
            stored=stored,
            aliases={
                k: reader.typed(v, str, f"aliases[{k!r}]") for k, v in reader.get(document, "aliases", dict).items()
            },
            dtype=reader.get(document, "dtype", str),
            model=model,
            coding=coding,
            version=version,
        )


class _Reader:
    """Takes typed values out of untrusted JSON; every complaint names the file and the key."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, problem: str) -> ArtifactError:
        return ArtifactError(f"{self.where}: {problem}; the file is damaged or was not written by wnq.save.")

    def typed(self, value: Any, kind: type[_T] | tuple[type[_T], ...], what: str) -> _T:
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:  # exact, because True is an int to isinstance
            expected = " or ".join(k.__name__ for k in kinds)
            raise self.fail(f"{what} must be {expected}, got {type(value).__name__}")
        return value

    def get(self, source: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
        if key not in source:
            raise self.fail(f"the metadata has no {key!r}")
        return self.typed(source[key], kind, repr(key))

    def few(self, source: Mapping[str, Any], key: str) -> list[Any]:
        entries = self.get(source, key, list)
        if len(entries) > _MOST:
            raise self.fail(f"{key!r} has {len(entries):,} entries, more than {_MOST:,}")
        return entries

    def keys(self, source: Mapping[str, Any], what: str, known: tuple[str, ...]) -> None:
        if unknown := sorted(source.keys() - set(known)):
            raise self.fail(f"{what} has the unknown key {unknown[0]!r}; known: {', '.join(known)}")

    def mapping(self, value: Any, what: str, known: tuple[str, ...]) -> dict[str, Any]:
        entry = self.typed(value, dict, what)
        self.keys(entry, what, known)
        return entry

    def method(self, value: Any) -> Method:
        entry = self.mapping(value, "a method", ("name", "options"))
        try:
            return get_method(self.get(entry, "name", str), **self.get(entry, "options", dict))
        except (ValueError, TypeError, ArithmeticError) as error:
            raise ArtifactError(f"{self.where}: {error}") from None

    def named(self, value: Any, kinds: list[Any]) -> tuple[str, dict[str, Any], str | None]:
        """Return the name of a layer, its shared description, and the layer that it is tied to."""
        tied = isinstance(value, list) and len(value) == 3
        name, index, *owner = self.row(value, (str, int, str) if tied else (str, int), "a layer")
        if not 0 <= index < len(kinds):
            raise self.fail(f"layer {name!r} has kind number {index} of {len(kinds)}")
        kind = self.mapping(kinds[index], "a kind of layer", ("kind", "shape", "method", "bits", "axis", "shift"))
        return name, kind, owner[0] if owner else None

    def layer(
        self,
        name: str,
        row: Mapping[str, Any],
        tied_to: str | None,
        methods: list[Method],
        earlier: Mapping[str, LayerPlan],
    ) -> LayerPlan:
        shape = tuple(self.get(row, "shape", list))
        index = self.get(row, "method", int)
        if name in earlier:
            raise self.fail(f"layer {name!r} stands twice in the plan")
        if not shape or not is_shape(list(shape)):
            raise self.fail(f"layer {name!r} has the impossible shape {str(shape)[:80]}")
        if not 0 <= index < len(methods):
            raise self.fail(f"layer {name!r} has method number {index} of {len(methods)}")
        if tied_to is not None and (tied_to not in earlier or earlier[tied_to].shape != shape):
            raise self.fail(f"layer {name!r} is tied to {tied_to!r}, which is no earlier layer of its shape")
        return LayerPlan(name, self.get(row, "kind", str), shape, methods[index], tied_to)

    def stored(self, row: Mapping[str, Any], layer: LayerPlan) -> Stored:
        bits, axis = self.get(row, "bits", int), self.get(row, "axis", int)
        if not 1 <= bits <= 8:
            raise self.fail(f"layer {layer.name!r} must have 1 to 8 bits, got {bits}")
        if not 0 <= axis < len(layer.shape):
            raise self.fail(f"layer {layer.name!r} of {len(layer.shape)} dimensions has channel axis {axis}")
        shift = self.get(row, "shift", int) if "shift" in row else 0
        if not 0 <= shift < 2**bits:
            raise self.fail(f"layer {layer.name!r} at {bits} bits has its codes shifted by {shift!r:.40}")
        return Stored(bits, axis, shift)

    def floats(self, plan: Mapping[str, Any]) -> tuple[FloatLayer, ...]:
        reasons = [self.row(row, (str, str), "a reason") for row in self.get(plan, "reasons", list)]
        found: list[FloatLayer] = []
        for value in self.get(plan, "floats", list):
            name, parameters, index = self.row(value, (str, int, int), "a float layer")
            if not 0 <= index < len(reasons):
                raise self.fail(f"float layer {name!r} has reason number {index} of {len(reasons)}")
            found.append(FloatLayer(name, reasons[index][0], parameters, reasons[index][1]))
        return tuple(found)

    def outputs(self, plan: Mapping[str, Any], layers: list[str]) -> tuple[OutputPlan, ...]:
        found: dict[str, OutputPlan] = {}
        for value in self.few(plan, "outputs") if "outputs" in plan else ():
            name, index, bits = self.row(value, (str, int, int), "a rounded output")
            if not 0 <= index < len(layers):
                raise self.fail(f"rounded output {name!r} has layer number {index} of {len(layers)}")
            if not 2 <= bits <= 8:
                raise self.fail(f"rounded output {name!r} must have 2 to 8 bits, got {bits}")
            if name in found:
                raise self.fail(f"rounded output {name!r} stands twice in the plan")
            found[name] = OutputPlan(name, layers[index], bits)
        return tuple(found.values())

    def row(self, value: Any, kinds: tuple[type, ...], what: str) -> list[Any]:
        row = self.typed(value, list, what)
        if [type(item) for item in row] != list(kinds):
            raise self.fail(f"{what} must be a list of {', '.join(k.__name__ for k in kinds)}, got {row!r:.80}")
        return row
