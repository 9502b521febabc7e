"""A recipe: one TOML file that says model, data, quantization and training; and the folder that running it leaves.

A run's folder holds ``recipe.json`` (everything resolved), ``plan.json``, ``metrics.jsonl``, ``checkpoint.pt``,
``model.safetensors`` (the trained state) and ``result.json``.
"""

import dataclasses
import json
import logging
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from wnq.attach import input_signs, quantize_
from wnq.data import Dataset, load_data
from wnq.environment import environment
from wnq.files import replacing, write_text
from wnq.methods import get_method
from wnq.models import build_model
from wnq.plan import Plan, make_plan
from wnq.schema import check_keys, check_table, check_type, from_table
from wnq.train import Progress, TrainConfig, TrainResult, fit, plain_accelerator
from wnq.weights import load_weights_

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)


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


def resolve(recipe: Recipe, data: Dataset) -> Recipe:
    """Fill in what the data say: ``num_classes`` and ``in_channels`` of an in-house model."""
    if ":" in recipe.model.name:
        return recipe
    options = {
        "num_classes": len(data.train.classes),
        "in_channels": data.train.images.shape[1],
        **recipe.model.options,
    }
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options=options))


def build(recipe: Recipe) -> tuple[nn.Module, nn.Module | None]:
    """Build a resolved recipe's model, started and quantized, and the float twin for distillation (None without).

    Raises:
        ValueError: anything in the recipe that does not fit the model or the data.
    """
    model = _float_model(recipe)
    if recipe.model.start is not None:
        load_weights_(model, recipe.model.start)
    teacher = None
    if recipe.train.distill_weight > 0:
        if recipe.model.start is None:
            raise ValueError("[train] distill_weight needs [model] start: the float twin that is distilled from.")
        teacher = _float_model(recipe)
        load_weights_(teacher, recipe.model.start)
        teacher.requires_grad_(False)
    if recipe.quantize is not None:
        quantize_(model, plan_of(recipe.quantize, model))
    return model, teacher


def _float_model(recipe: Recipe) -> nn.Module:
    torch.manual_seed(recipe.train.seed)
    return build_model(recipe.model.name, **recipe.model.options)


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


def run_recipe(
    recipe: Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    data: Dataset | None = None,
    accelerator: "Accelerator | None" = None,
    on_step: Callable[[Progress], None] | None = None,
) -> tuple[nn.Module, TrainResult]:
    """Train a recipe into a folder and return the model in eval mode with its result.

    Args:
        recipe: the recipe.
        out: the run's folder, made if missing.
        resume: continue an unfinished run; a finished one is loaded. Without it, a folder that holds a run is an error.
        data: the images, if they are loaded already.
        accelerator: see :func:`wnq.fit`.
        on_step: see :func:`wnq.fit`.

    Raises:
        ValueError: bad recipe, or the folder holds a run already, or one of another recipe.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    if (out / "checkpoint.pt").exists() and not resume:
        raise ValueError(f"{out} holds a run already. Resume it (--resume) or choose another output folder.")
    data = data or data_of(recipe.data)
    recipe = resolve(recipe, data)
    model, teacher = build(recipe)
    accelerator = accelerator or plain_accelerator()
    if (out / "checkpoint.pt").exists() and (out / "recipe.json").exists():
        _check_same_recipe(recipe, out / "recipe.json")
    elif accelerator.is_main_process:
        write_text(out / "recipe.json", json.dumps(recipe.to_json(), indent=2) + "\n")
    result = fit(
        model, data, recipe.train, teacher=teacher, out=out, resume=resume, accelerator=accelerator, on_step=on_step
    )
    model.eval()
    if accelerator.is_main_process:
        _save_run(recipe, model, result, out)
    return model, result


def _check_same_recipe(recipe: Recipe, path: Path) -> None:
    """A checkpoint cannot tell 2 bits from 3; the recipe beside it can. Only where the images lie may change."""
    then, now = load_recipe(path).to_json(), recipe.to_json()
    changes: list[str] = []
    for section in now:
        old, new = then[section] or {}, now[section] or {}
        for key in sorted(old.keys() | new.keys()):
            if (section, key) != ("data", "folder") and old.get(key) != new.get(key):
                changes.append(f"[{section}] {key}: {old.get(key)!r} then, {new.get(key)!r} now")
    if changes:
        raise ValueError(
            f"cannot resume {path.parent}: the settings changed ({'; '.join(changes)}). Use another output folder."
        )


def _save_run(recipe: Recipe, model: nn.Module, result: TrainResult, out: Path) -> None:
    from safetensors.torch import save_file

    plan = getattr(model, "wnq_plan", None)
    if isinstance(plan, Plan):
        plan.save(out / "plan.json")
    else:
        (out / "plan.json").unlink(missing_ok=True)
    # Copies, because the format refuses tied weights, and loading wants every name.
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    with replacing(out / "model.safetensors") as temporary:
        save_file(state, temporary)
    content = {
        "val_accuracy": result.val.accuracy,
        "val_loss": result.val.loss,
        "val_images": result.val.images,
        "seconds": round(result.seconds, 2),
        "images_per_second": round(result.images_per_second, 1),
        "history": result.history,
        "recipe": recipe.to_json(),
        "inputs": input_signs(model),
        "environment": environment(),
    }
    write_text(out / "result.json", json.dumps(content, indent=2) + "\n")


def load_run(folder: str | Path) -> tuple[Recipe, nn.Module]:
    """Rebuild the trained model of a run's folder, in eval mode.

    Raises:
        ValueError: the folder holds no finished run, or its files do not fit together.
    """
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        raise ValueError(
            f"{folder} holds no finished run: model.safetensors is missing. "
            f"Train one with wnq train RECIPE --out {folder}."
        )
    recipe = load_recipe(folder / "recipe.json")
    model = build_model(recipe.model.name, **recipe.model.options)
    if (folder / "plan.json").exists():
        quantize_(model, Plan.load(folder / "plan.json"))
    load_weights_(model, folder)
    return recipe, model.eval()
