"""The tables of a recipe, and what they mean: data, plan, procedure, stages."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wnq.data import Dataset, load_data
from wnq.methods import Method, get_method
from wnq.plan import Plan, make_plan
from wnq.procedures import Procedure, get_procedure
from wnq.recipe.schema import check_keys, check_table, check_type, from_table
from wnq.train import TrainConfig


@dataclasses.dataclass(frozen=True)
class ModelSection:
    """``[model]``: what is trained and where it starts."""

    name: str = "digits_cnn"
    """In-house name, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` or ``package.module:factory``."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Passed to the model's factory; ``num_classes`` and ``in_channels`` of in-house models come from the data."""
    start: str | None = None
    """Float weights to start from: a ``.safetensors`` or ``.pt`` state dict, or the folder of an earlier run."""


@dataclasses.dataclass(frozen=True)
class DataSection:
    """``[data]``: which images. The fields are those of :func:`wnq.load_data`."""

    name: str = "digits"
    folder: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    val_split: str | None = None
    val_share: float | None = None
    size: int | None = None
    limit: int | None = None
    stream: bool = False
    """Read images while training instead of holding them in memory; with ``size``, ``resize`` and ``workers``."""
    resize: int | None = None
    workers: int | None = None


@dataclasses.dataclass(frozen=True)
class QuantizeSection:
    """``[quantize]``: which method, where."""

    method: str = "wnq"
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Of the method, for example ``{ w_bits = 2, a_bits = 2 }``."""
    first_last_bits: int | None = 8
    keep_float: tuple[str, ...] = ()
    residual_bits: int = 32
    """8 rounds what ends a residual branch, for engines of integers; 32 leaves it float. See :func:`wnq.make_plan`."""
    override: tuple[dict[str, Any], ...] = ()
    """Exceptions: tables with ``pattern``, and ``method`` and ``options`` as above."""
    plan: str | None = None
    """A plan file to use instead of all of the above."""


@dataclasses.dataclass(frozen=True)
class ProcedureSection:
    """``[procedure]``: a training procedure, see :mod:`wnq.procedures`."""

    name: str = ""
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Of the procedure, for example ``{ rho = 0.01 }``."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe. Without ``quantize`` it trains the float model."""

    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    quantize: QuantizeSection | None = None
    procedure: ProcedureSection | None = None
    stages: tuple[dict[str, Any], ...] = ()
    """``[[stages]]``: changes of the tables above, run one after the other, each from the weights of the one before."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; :func:`recipe_from` reverses it."""
        return dataclasses.asdict(self)


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe from a TOML file (or a run's ``recipe.json``).

    Raises:
        ValueError: the file is missing or malformed, or a key is unknown (with the closest one) or of the wrong type.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the recipe {path}: {getattr(error, 'strerror', None) or error}.") from None
    try:
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"recipe {path} is malformed: {error}.") from None
    return recipe_from(data, where=str(path))


def recipe_from(data: Mapping[str, Any], *, where: str = "recipe") -> Recipe:
    """Build a recipe from nested tables.

    Raises:
        ValueError: as :func:`load_recipe`.
    """
    check_table(data, where)
    check_keys(data, (*SECTIONS, "stages"), where)
    built = {
        name: from_table(SECTIONS[name], table, f"{where}: [{name}]")
        for name, table in data.items()
        if table is not None and name != "stages"
    }
    stages = check_type(data.get("stages", ()), tuple[dict[str, Any], ...], f"{where}: stages")
    recipe = Recipe(**built, stages=stages)
    stage_recipes(recipe, where=where)
    return recipe


SECTIONS: dict[str, type[Any]] = {
    "model": ModelSection,
    "data": DataSection,
    "train": TrainConfig,
    "quantize": QuantizeSection,
    "procedure": ProcedureSection,
}

STAGED = {"train": "", "quantize": "method", "procedure": "name"}
"""What a stage may change, and the key that the options belong to: under another name none are inherited."""


def stage_recipes(recipe: Recipe, *, where: str = "recipe") -> list[Recipe]:
    """Return a recipe without stages for each stage, or the recipe itself if it has none.

    Raises:
        ValueError: as :func:`load_recipe`.
    """
    if not recipe.stages:
        return [recipe]
    base = {name: table for name, table in recipe.to_json().items() if name != "stages"}
    recipes: list[Recipe] = []
    for index, stage in enumerate(recipe.stages):
        here = f"{where}: stages[{index}]"
        check_keys(stage, STAGED, here)
        changed = dict(base)
        for name, table in stage.items():
            old, new = dict(base[name] or {}), check_table(table, f"{here}: [{name}]")
            if new.get(STAGED[name], old.get(STAGED[name])) != old.get(STAGED[name]):
                old.pop("options", None)
            both = [old["options"], new["options"]] if "options" in old and "options" in new else []
            merged = {"options": {**both[0], **check_table(both[1], f"{here}: [{name}] options")}} if both else {}
            changed[name] = {**old, **new, **merged}
        recipes.append(recipe_from(changed, where=here))
    return recipes


def procedure_of(section: ProcedureSection | None) -> Procedure | None:
    """Return a fresh procedure as a ``[procedure]`` table says; None without the table.

    Raises:
        ValueError: unknown name or option (with the closest ones), or a value out of range.
    """
    if section is None:
        return None
    if not section.name:
        raise ValueError("[procedure] needs a name, such as name = 'admm'.")
    return get_procedure(section.name, **section.options)


def plan_of(section: QuantizeSection, model: nn.Module) -> Plan:
    """Return the plan that a ``[quantize]`` table means for a model."""
    if section.plan is not None:
        return Plan.load(section.plan)
    return make_plan(
        model,
        get_method(section.method, **section.options),
        first_last_bits=section.first_last_bits,
        keep_float=section.keep_float,
        override=overrides_of(section),
        residual_bits=section.residual_bits,
    )


def overrides_of(section: QuantizeSection) -> dict[str, Method]:
    """Return the exceptions of a ``[quantize]`` table: pattern -> method."""
    override: dict[str, Method] = {}
    for index, entry in enumerate(section.override):
        where = f"[quantize] override[{index}]"
        check_keys(entry, ("pattern", "method", "options"), where)
        if "pattern" not in entry:
            raise ValueError(f"{where} needs a pattern, such as pattern = 'layer3.*', got {entry!r}.")
        pattern: str = check_type(entry["pattern"], str, f"{where} pattern")
        method: str = check_type(entry.get("method", section.method), str, f"{where} method")
        options: dict[str, Any] = check_type(entry.get("options", {}), dict, f"{where} options")
        inherited = section.options if method == section.method else {}
        override[pattern] = get_method(method, **{**inherited, **options})
    return override


def data_of(section: DataSection, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Load the images of a ``[data]`` table."""
    return load_data(progress=progress, **dataclasses.asdict(section))
