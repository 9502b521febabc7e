"""A recipe: one TOML file that says model, data, quantization and training; and the folder that running it leaves.

A run's folder holds ``recipe.json`` (everything resolved), ``plan.json``, ``metrics.jsonl``, ``checkpoint.pt``,
``model.safetensors`` (the trained state) and ``result.json``. Of a recipe with stages it is that of the last one; those
before are runs in its subfolders ``stage1``, ``stage2``, and so on.
"""

import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from wnq.attach import input_signs, quantize_
from wnq.data import Dataset, unreadable_images
from wnq.environment import environment
from wnq.files import replacing, write_text
from wnq.models import build_model
from wnq.plan import Plan
from wnq.recipe.sections import Recipe, data_of, load_recipe, plan_of, procedure_of, stage_recipes
from wnq.recipe.unreadable import remembering_unreadable
from wnq.recipe.weights import load_float_weights_, load_weights_
from wnq.train import Progress, TrainResult, fit, plain_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

logger = logging.getLogger(__name__)

_building = threading.Lock()
"""First weights come from the process's generator: threads build one after the other."""

MAY_CHANGE = {("data", "folder"), ("data", "workers")}
"""What a resumed run may have other than before: the images stay the same."""


def resolve(recipe: Recipe, data: Dataset) -> Recipe:
    """Fill in what the data say: ``num_classes`` and ``in_channels`` of an in-house model."""
    if ":" in recipe.model.name:
        return recipe
    options = {
        "num_classes": len(data.train.classes),
        "in_channels": data.train.shape[0],
        **recipe.model.options,
    }
    return dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, options=options))


def build(recipe: Recipe, start: Path | None = None) -> tuple[nn.Module, nn.Module | None]:
    """Build a resolved recipe's model, started and quantized, and the float twin (None if nothing needs one).

    Args:
        recipe: a recipe without stages, or the base of one with stages.
        start: the run to start from instead of ``[model] start``, which the twin is still read from.

    Raises:
        ValueError: anything in the recipe that does not fit the model or the data.
    """
    with _building:
        return _built(recipe, start)


def _built(recipe: Recipe, start: Path | None) -> tuple[nn.Module, nn.Module | None]:
    model = _float_model(recipe)
    if start is not None:
        load_float_weights_(model, start)
    elif recipe.model.start is not None:
        load_weights_(model, recipe.model.start)
    teacher = None
    procedure = procedure_of(recipe.procedure)
    if recipe.train.distill_weight > 0 or (procedure is not None and procedure.needs_teacher):
        if recipe.model.start is None:
            if procedure is not None and procedure.needs_teacher:
                raise ValueError(f"procedure {procedure.name!r} needs [model] start: the float twin's weights.")
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
    if not resume and ((out / "checkpoint.pt").exists() or any(out.glob("stage*/checkpoint.pt"))):
        raise ValueError(f"{out} holds a run already. Resume it (--resume) or choose another output folder.")
    data = data or data_of(recipe.data)
    recipe = resolve(recipe, data)
    accelerator = accelerator or plain_accelerator()
    *earlier, last = stage_recipes(recipe)
    if earlier:
        # A mistake in a later stage is found now.
        for stage in (*earlier, last):
            build(stage)
        _write_or_check(recipe, out, "stage1/checkpoint.pt", accelerator)
    start = None
    for index, stage in enumerate(earlier, 1):
        folder = out / f"stage{index}"
        if not (resume and (folder / "result.json").exists()):
            logger.info("stage %d of %d", index, len(earlier) + 1)
            _train(stage, stage, folder, start, resume, data, accelerator, on_step)
            accelerator.wait_for_everyone()
            accelerator.free_memory()
        start = folder
    return _train(last, recipe, out, start, resume, data, accelerator, on_step)


def _train(
    stage: Recipe,
    recipe: Recipe,
    out: Path,
    start: Path | None,
    resume: bool,
    data: Dataset,
    accelerator: "Accelerator",
    on_step: Callable[[Progress], None] | None,
) -> tuple[nn.Module, TrainResult]:
    """Train one stage into a folder, which remembers it as ``recipe``."""
    model, teacher = build(stage, start)
    _write_or_check(recipe, out, "checkpoint.pt", accelerator)
    main = accelerator.is_main_process
    with remembering_unreadable(out / "unreadable.json", data, resume=resume, writes=main):
        result = fit(
            model, data, stage.train, teacher=teacher, procedure=procedure_of(stage.procedure),
            out=out, resume=resume, accelerator=accelerator, on_step=on_step,
        )  # fmt: skip
    model.eval()
    unreadable = unreadable_images(data.train, data.val)
    if main:
        _save_run(recipe, model, result, out, unreadable)
    return model, result


def _write_or_check(recipe: Recipe, out: Path, begun: str, accelerator: "Accelerator") -> None:
    """Write the recipe into a folder, or check that it is the one there, if that run has begun."""
    if (out / begun).exists() and (out / "recipe.json").exists():
        _check_same_recipe(recipe, out / "recipe.json")
    elif accelerator.is_main_process:
        write_text(out / "recipe.json", json.dumps(recipe.to_json(), indent=2) + "\n")


def _check_same_recipe(recipe: Recipe, path: Path) -> None:
    """A checkpoint cannot tell 2 bits from 3; the recipe beside it can. Only where the images lie and who reads them may change."""
    then, now = load_recipe(path).to_json(), recipe.to_json()
    changes: list[str] = []
    if then.pop("stages") != now.pop("stages"):
        changes.append("[[stages]] differ")
    for section in now:
        old, new = then[section] or {}, now[section] or {}
        for key in sorted(old.keys() | new.keys()):
            if (section, key) not in MAY_CHANGE and old.get(key) != new.get(key):
                changes.append(f"[{section}] {key}: {old.get(key)!r} then, {new.get(key)!r} now")
    if changes:
        raise ValueError(
            f"cannot resume {path.parent}: the settings changed ({'; '.join(changes)}). Use another output folder."
        )


def _save_run(recipe: Recipe, model: nn.Module, result: TrainResult, out: Path, unreadable: Mapping[str, str]) -> None:
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
    if unreadable:
        content["unreadable"] = {"count": len(unreadable), "images": dict(unreadable)}
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
