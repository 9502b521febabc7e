"""The tables of a recipe, and what they mean: data, plan."""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from wnq.data import Dataset, load_data
from wnq.methods import get_method
from wnq.plan import Plan, make_plan
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


@dataclasses.dataclass(frozen=True)
class QuantizeSection:
    """``[quantize]``: which method, where."""

    method: str = "wnq"
    options: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])
    """Of the method, for example ``{ w_bits = 2, a_bits = 2 }``."""
    first_last_bits: int | None = 8
    keep_float: tuple[str, ...] = ()
    override: tuple[dict[str, Any], ...] = ()
    """Exceptions: tables with ``pattern``, and ``method`` and ``options`` as above."""
    plan: str | None = None
    """A plan file to use instead of all of the above."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole recipe. Without ``quantize`` it trains the float model."""

    model: ModelSection = dataclasses.field(default_factory=ModelSection)
    data: DataSection = dataclasses.field(default_factory=DataSection)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    quantize: QuantizeSection | None = None

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
    sections: dict[str, type[Any]] = {
        "model": ModelSection,
        "data": DataSection,
        "train": TrainConfig,
        "quantize": QuantizeSection,
    }
    check_table(data, where)
    check_keys(data, sections, where)
    built = {
        name: from_table(sections[name], table, f"{where}: [{name}]")
        for name, table in data.items()
        if table is not None
    }
    return Recipe(**built)


def plan_of(section: QuantizeSection, model: nn.Module) -> Plan:
    """Return the plan that a ``[quantize]`` table means for a model."""
    if section.plan is not None:
        return Plan.load(section.plan)
    override: dict[str, Any] = {}
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
    return make_plan(
        model,
        get_method(section.method, **section.options),
        first_last_bits=section.first_last_bits,
        keep_float=section.keep_float,
        override=override,
    )


def data_of(section: DataSection, progress: Callable[[int, int], None] | None = None) -> Dataset:
    """Load the images of a ``[data]`` table."""
    return load_data(progress=progress, **dataclasses.asdict(section))
