"""One run of a comparison in this process, and what its folder says of it afterwards."""

import contextlib
import dataclasses
import json
import math
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from wnq.data import Dataset, ImageData, batches_of
from wnq.data.images import channel_statistics, hold_out
from wnq.environment import environment
from wnq.files import write_text
from wnq.metrics import evaluate
from wnq.recipe import DataSection, Recipe, build, data_of, recipe_from, resolve, run_recipe
from wnq.train import Interrupted, Progress, TrainingDivergedError

FAILURE = "failure.json"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a cell came to.

    Attributes:
        state: ``done``, ``diverged`` (final), ``failed`` (tried again by the next run), ``not defined``, ``not run``.
        reason: why it is not done.
        accuracy: after the last epoch, in percent.
        best_accuracy: of the best epoch that was evaluated.
        best_epoch: which that is; 0 where nothing was trained.
        epochs: trained.
        images: that the accuracy was measured on.
        seconds: of training and evaluation.
        recipe: resolved.
        environment: where it ran.
    """

    state: str
    reason: str = ""
    accuracy: float | None = None
    best_accuracy: float | None = None
    best_epoch: int | None = None
    epochs: int | None = None
    images: int | None = None
    seconds: float | None = None
    recipe: dict[str, Any] | None = None
    environment: dict[str, Any] | None = None

    @property
    def final(self) -> bool:
        """Whether running it again would change nothing."""
        return self.state in ("done", "diverged", "not defined")


@dataclasses.dataclass(frozen=True)
class Job:
    """What is run for one cell.

    Attributes:
        folder: of the run.
        recipe: not resolved yet.
        held_out: share of the training images to be evaluated on in place of the validation images; 0: none.
        trained: whether the recipe is trained; else its start is evaluated.
    """

    folder: Path
    recipe: Recipe
    held_out: float = 0.0
    trained: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON types; :func:`job_from` reverses it."""
        return {**vars(self), "folder": str(self.folder), "recipe": self.recipe.to_json()}


def job_from(data: dict[str, Any]) -> Job:
    """Build a job from what :meth:`Job.to_json` returned."""
    return Job(Path(data["folder"]), recipe_from(data["recipe"]), data["held_out"], data["trained"])


class Images:
    """The images of a comparison, read once a process."""

    def __init__(self, data: Dataset | None = None) -> None:
        self.data = data
        self.held: dict[float, Dataset] = {}

    def of(self, section: DataSection, held_out: float) -> Dataset:
        """Return the images of a ``[data]`` table, or a part of its training images with the rest of them held out."""
        if self.data is None:
            self.data = data_of(section)
        if not held_out:
            return self.data
        if held_out not in self.held:
            self.held[held_out] = part_of(self.data, held_out)
        return self.held[held_out]


def part_of(data: Dataset, share: float) -> Dataset:
    """Return training images with a share of them, always the same ones, held out as validation images."""
    kept, held = hold_out(data.train.labels, share)
    train = data.train.select(kept)
    mean, std = channel_statistics(train.images) if isinstance(train, ImageData) else (data.mean, data.std)
    return Dataset(train, data.train.select(held), mean, std)


def run_job(job: Job, images: Images, on_step: Callable[[Progress], None] | None = None) -> Outcome:
    """Run a job, or go on with it; whatever goes wrong in it is its outcome.

    Raises:
        Interrupted: Ctrl-C; a checkpoint is written.
        OSError: the folder cannot be written.
    """
    begin = time.perf_counter()
    (job.folder / FAILURE).unlink(missing_ok=True)
    try:
        data = images.of(job.recipe.data, job.held_out)
        if job.trained:
            _follow_start(job)
            run_recipe(job.recipe, job.folder, resume=True, data=data, on_step=on_step)
        else:
            _evaluate_start(job, data)
    except Interrupted:
        raise
    except Exception as error:
        state = "diverged" if isinstance(error, TrainingDivergedError) else "failed"
        # Another's message may begin with nothing but a number: name its kind.
        own = isinstance(error, TrainingDivergedError | ValueError | OSError)
        reason = " ".join(str(error).split()) if own else f"{type(error).__name__}: {error}"
        fail(job.folder, state, reason, time.perf_counter() - begin, traceback.format_exc())
    return read_outcome(job.folder)


def fail(folder: Path, state: str, reason: str, seconds: float | None = None, trace: str = "") -> None:
    """Record in a cell's folder that its run failed."""
    content = {"state": state, "reason": reason, "seconds": seconds, "traceback": trace, "environment": environment()}
    write_text(folder / FAILURE, json.dumps(content, indent=2) + "\n")


def _follow_start(job: Job) -> None:
    """Let an unfinished run know its start where it lies now: the comparison may have been moved, or entered from elsewhere."""
    now = job.recipe.model.start
    for path in (*job.folder.glob("recipe.json"), *job.folder.glob("stage*/recipe.json")):
        written = json.loads(path.read_text(encoding="utf-8"))
        then = written["model"]["start"]
        if then != now and then and now and Path(then).name == Path(now).name:
            written["model"]["start"] = now
            write_text(path, json.dumps(written, indent=2) + "\n")


def _evaluate_start(job: Job, data: Dataset) -> None:
    recipe = resolve(job.recipe, data)
    model, _ = build(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    batches = batches_of(data.val, 256, mean=data.mean, std=data.std, device=device)
    metrics = evaluate(model.to(device), batches.epoch(0), bf16=recipe.train.bf16)
    content = {
        "val_accuracy": metrics.accuracy,
        "val_loss": metrics.loss,
        "val_images": metrics.images,
        "seconds": round(time.perf_counter() - begin, 2),
        "history": [],
        "recipe": recipe.to_json(),
        "environment": environment(),
    }
    write_text(job.folder / "recipe.json", json.dumps(recipe.to_json(), indent=2) + "\n")
    write_text(job.folder / "result.json", json.dumps(content, indent=2) + "\n")


def read_outcome(folder: Path) -> Outcome:
    """Return what a cell's folder says of it.

    Raises:
        ValueError: a file in it is damaged.
    """
    try:
        with contextlib.suppress(FileNotFoundError):
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            evaluated = [row for row in result["history"] if row["val_accuracy"] is not None]
            if not math.isfinite(result["val_loss"]):
                # The last steps can spoil the weights after the loss was looked at for the last time.
                reason = f"the loss on the evaluation images is {result['val_loss']} after the last epoch."
                return Outcome("diverged", reason, seconds=result["seconds"], environment=result["environment"])
            last = {"epoch": len(result["history"]), "val_accuracy": result["val_accuracy"]}
            best = max([*evaluated, last], key=lambda row: row["val_accuracy"])
            return Outcome(
                "done",
                accuracy=last["val_accuracy"],
                best_accuracy=best["val_accuracy"],
                best_epoch=best["epoch"],
                epochs=len(result["history"]),
                images=result["val_images"],
                seconds=result["seconds"],
                recipe=result["recipe"],
                environment=result["environment"],
            )
        with contextlib.suppress(FileNotFoundError):
            failure = json.loads((folder / FAILURE).read_text(encoding="utf-8"))
            kept = ("state", "reason", "seconds", "environment")
            return Outcome(**{key: failure[key] for key in kept})
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}). Remove it to run it again.") from None
    return Outcome("not run")
