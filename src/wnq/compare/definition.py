"""What is compared: plain data, checked, remembered by the comparison's folder."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from wnq.methods import Method, MethodInfo, get_method
from wnq.names import did_you_mean
from wnq.quantizer import FLOAT_BITS
from wnq.recipe import QuantizeSection, Recipe, recipe_from
from wnq.train import TrainConfig

FORMAT = 1

Width = tuple[int, int]
"""Bits of weights and inputs; 32 is float."""

NATURAL = "natural"
"""The width at which each method stands by its own defaults."""


def width_name(width: Width | None) -> str:
    """Return ``W2A2``, or ``natural``."""
    return NATURAL if width is None else f"W{width[0]}A{width[1]}"


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method with its options but for the widths, under a label of its own.

    Raises:
        ValueError: a label that cannot be a folder's name, an unknown method or option, or an option that --bits sets.
    """

    label: str
    method: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w.+=:\-]*", self.label):
            raise ValueError(
                f"label {self.label!r} must begin with a letter or digit and hold letters, digits and . + - _ = : only."
            )
        known = MethodInfo.of(self.method).options
        for option in self.options:
            if option in ("w_bits", "a_bits"):
                raise ValueError(
                    f"{self.label}: {option} is not an option of a compared method; the widths are its own."
                )
            if option not in known:
                raise ValueError(
                    f"method {self.method!r} has no option {option!r}.{did_you_mean(option, known)} "
                    f"It takes: {', '.join(known)}."
                )

    @property
    def slug(self) -> str:
        """The label as part of a folder's name."""
        return self.label.replace(":", "-")

    def width(self, width: Width | None) -> Width:
        """Return the width that is meant: the method's defaults for None."""
        known = MethodInfo.of(self.method).options
        return (int(known["w_bits"]), int(known["a_bits"])) if width is None else width

    def build(self, width: Width) -> Method:
        """Return the method.

        Raises:
            ValueError: the method does not define the width, or an option is out of range.
        """
        method = get_method(self.method, **{**self.options, "w_bits": width[0], "a_bits": width[1]})
        if method.input is not None:
            method.input()
        return method

    @property
    def takes_no_normalizer(self) -> bool:
        """Whether a normalizer was asked for that the method refuses."""
        return self.options.get("normalize", "none") != "none" and bool(MethodInfo.of(self.method).no_normalizer)

    def undefined(self, width: Width) -> str:
        """Return why the method is not defined at a width; empty if it is."""
        try:
            self.build(width)
        except ValueError as error:
            return str(error)
        return ""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Everything that a comparison's numbers depend on, but for the machine.

    Attributes:
        recipe: model, data, and the training that every method gets. Its ``[quantize]`` says what happens to the first and
            last layer and to exceptions; method and options come from the contenders. Its ``[model] start`` is the float
            start, with ``{seed}`` where it differs by seed; without it the starts are trained.
        contenders: the methods.
        widths: at which; None stands for each method's defaults.
        seeds: of start, data order and augmentation; the sweep uses the first.
        float_train: how the float starts are trained; by default as the recipe says.
        recommended: whether each method's recommended settings are applied to the recipe's.
        sweep: key of ``[train]`` -> values that are tried for every method at every width.
        held_out: share of the training images that the sweep is judged by and does not train on.

    Raises:
        ValueError: two of the same, an empty list, or something that does not fit together.
    """

    recipe: Recipe
    contenders: tuple[Contender, ...]
    widths: tuple[Width | None, ...]
    seeds: tuple[int, ...] = (0,)
    float_train: TrainConfig | None = None
    recommended: bool = True
    sweep: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict[str, tuple[Any, ...]])
    held_out: float = 0.1

    def __post_init__(self) -> None:
        slugs = ["float", "sweep-float", *(contender.slug for contender in self.contenders)]
        for what, values in (("methods", slugs), ("widths", self.widths), ("seeds", self.seeds)):
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                shown = width_name(twice[0]) if what == "widths" else twice[0]  # pyright: ignore[reportArgumentType]
                hint = " Give one of them a label, as in mine=wnq:max_gain=0.5." if what == "methods" else ""
                raise ValueError(f"the {what} name {shown!r} twice (or it is taken).{hint}")
        for what, values in (("method", self.contenders), ("width", self.widths), ("seed", self.seeds)):
            if not values:
                raise ValueError(f"a comparison needs at least one {what}.")
        for width in self.widths:
            for bits in width or ():
                if not 1 <= bits <= 8 and bits != FLOAT_BITS:
                    raise ValueError(f"a width must be 1 to 8, or 32 for float, got {bits} in {width_name(width)}.")
        if min(self.seeds) < 0:
            raise ValueError(f"seeds must not be negative, got {min(self.seeds)}.")
        if self.recipe.quantize is not None and self.recipe.quantize.plan is not None:
            raise ValueError(
                "the recipe's [quantize] plan names one method for every layer, so none can be compared by it."
            )
        if self.recipe.model.start is not None and self.float_train is not None:
            raise ValueError(
                "the recipe's [model] start says where the float weights are, so they are not trained: leave out either it "
                "or the float training's own settings."
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie between 0 and 1, got {self.held_out}.")
        self._check_stages()
        self._check_sweep()

    def _check_stages(self) -> None:
        for index, stage in enumerate(self.recipe.stages):
            table = stage.get("quantize", {})
            taken = [key for key in ("method", "plan") if key in table]
            if index == len(self.recipe.stages) - 1:
                taken += [key for key in ("w_bits", "a_bits") if key in table.get("options", {})]
            if taken:
                raise ValueError(
                    f"the recipe's stages[{index}] sets [quantize] {' and '.join(taken)}, which is what a comparison varies: "
                    "leave it out."
                )

    def _check_sweep(self) -> None:
        known = [field.name for field in dataclasses.fields(TrainConfig) if field.name != "seed"]
        tables = self.recipe.to_json()
        for key, values in self.sweep.items():
            if key not in known:
                hint = did_you_mean(key, known)
                raise ValueError(f"cannot sweep train.{key}.{hint} The keys are: {', '.join(known)}.")
            if len(set(values)) != len(values) or not values:
                raise ValueError(f"the sweep of train.{key} needs values that differ, got {list(values)!r}.")
            for value in values:
                recipe_from({**tables, "train": {**tables["train"], key: value}}, where="sweep")

    @property
    def section(self) -> QuantizeSection:
        """What all methods share: first and last layer, exceptions."""
        return self.recipe.quantize or QuantizeSection()

    def contender(self, label: str) -> Contender:
        """Return the contender of a label."""
        return next(contender for contender in self.contenders if contender.label == label)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; :func:`comparison_from` reverses it."""
        return {
            "format": FORMAT,
            "recipe": self.recipe.to_json(),
            "contenders": [dataclasses.asdict(contender) for contender in self.contenders],
            "widths": [None if width is None else list(width) for width in self.widths],
            "seeds": list(self.seeds),
            "float_train": None if self.float_train is None else dataclasses.asdict(self.float_train),
            "recommended": self.recommended,
            "sweep": {key: list(values) for key, values in self.sweep.items()},
            "held_out": self.held_out,
        }


def comparison_from(data: Mapping[str, Any]) -> Comparison:
    """Build a comparison from what :meth:`Comparison.to_json` returned.

    Raises:
        ValueError: another version wrote it, or it is damaged.
    """
    if data.get("format") != FORMAT:
        raise ValueError(f"format {data.get('format')!r} of a comparison; this version of wnq reads {FORMAT}.")
    try:
        train = data["float_train"]
        return Comparison(
            recipe=recipe_from(data["recipe"]),
            contenders=tuple(Contender(**entry) for entry in data["contenders"]),
            widths=tuple(None if width is None else (int(width[0]), int(width[1])) for width in data["widths"]),
            seeds=tuple(data["seeds"]),
            float_train=None if train is None else recipe_from({"train": train}).train,
            recommended=data["recommended"],
            sweep={key: tuple(values) for key, values in data["sweep"].items()},
            held_out=data["held_out"],
        )
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(f"damaged ({type(error).__name__}: {error}).") from None


def merged(then: Comparison, now: Comparison) -> Comparison:
    """Return both comparisons in one: methods, widths and seeds may be added, nothing else may differ.

    Raises:
        ValueError: something else differs; the message says what.
    """
    changes = list(_changes("", then.to_json(), now.to_json()))
    for contender in now.contenders:
        old = next((c for c in then.contenders if c.label == contender.label), contender)
        if old != contender:
            changes.append(
                f"{contender.label}: {old.method} {dict(old.options)} then, {contender.method} "
                f"{dict(contender.options)} now (give it another label)"
            )
    if changes:
        raise ValueError(f"the comparison changed ({'; '.join(changes)}). Use another output folder.")
    return dataclasses.replace(
        now,
        contenders=_union(then.contenders, now.contenders),
        widths=_union(then.widths, now.widths),
        seeds=_union(then.seeds, now.seeds),
    )


def _union(then: Sequence[Any], now: Sequence[Any]) -> tuple[Any, ...]:
    return (*then, *(value for value in now if value not in then))


def _changes(where: str, then: Any, now: Any) -> list[str]:
    """Say what differs between two nested tables, but for what may be added and for where the images lie."""
    if where in ("contenders", "widths", "seeds", "recipe.data.folder") or then == now:
        return []
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        keys = [*then, *(key for key in now if key not in then)]
        names = {key: f"{where}.{key}".lstrip(".") for key in keys}
        return [text for key in keys for text in _changes(names[key], then.get(key), now.get(key))]
    return [f"{where}: {then!r} then, {now!r} now"]
