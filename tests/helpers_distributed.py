"""What ``test_distributed.py`` runs, on one process or, under torchrun, on two; each leaves its results in a file."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from wnq import get_method, make_plan, param_groups, quantize_
from wnq.attach import quantizer_parameters
from wnq.data import Batches, Dataset, load_data
from wnq.metrics import evaluate
from wnq.models import build_model
from wnq.recipe import recipe_from, run_recipe
from wnq.starting import across_processes
from wnq.train import Interrupted, ProcessLostError, TrainConfig, TrainingDivergedError, fit, plain_accelerator
from wnq.train.progress import Progress

SETTINGS = {"epochs": 2, "batch_size": 64, "lr": 0.05, "ema_decay": 0.0}


def make_model(name: str, method: str | None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build_model(name).to(dtype)
    # Levels times levels often add up to exactly 0, and without a bias rounding errors then decide for the ReLU.
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.uniform_(layer.bias, -0.1, 0.1)
    if method is not None:
        quantize_(model, make_plan(model, get_method(method)))
    return model


def trained(data: Dataset, name: str, method: str | None, **settings: Any) -> dict[str, Any]:
    model = make_model(name, method)
    start = {key: value.clone() for key, value in model.state_dict().items()}
    after_six: dict[str, torch.Tensor] = {}

    def keep(progress: Progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            after_six.update({key: value.clone() for key, value in model.state_dict().items()})

    result = fit(model, data, TrainConfig(**{**SETTINGS, **settings}), on_step=keep)
    return {
        "start": start,
        "after_six": after_six,
        "model": model.state_dict(),
        "val": vars(result.val),
        "history": result.history,
    }


class ToDouble(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double()


def exact(data: Dataset, method: str | None) -> dict[str, Any]:
    """Train in float64 throughout."""
    model = torch.nn.Sequential(ToDouble(), make_model("digits_mlp", method, torch.float64))
    result = fit(model, data, TrainConfig(**{**SETTINGS, "clip_grad_norm": 5.0}))
    return {"model": model[1].state_dict(), "loss": result.history[-1]["loss"], "val": vars(result.val)}


def sharded(data: Dataset, method: str, rank: int, world_size: int) -> dict[str, Any]:
    """Train in float64 in a loop of one's own, with every weight divided among the processes: see docs/distributed.md."""
    model = make_model("digits_mlp", method, torch.float64)
    scalars = quantizer_parameters(model)
    if world_size > 1:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (world_size,))
        for layer in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
            fully_shard(layer, mesh=mesh, ignored_params=set(scalars))
        fully_shard(model, mesh=mesh, ignored_params=set(scalars))

        def share(parameter: torch.Tensor) -> None:
            parameter.grad.copy_(across_processes(parameter.grad))

        for parameter in scalars:
            parameter.register_post_accumulate_grad_hook(share)
    optimizer = torch.optim.SGD(param_groups(model, lr=0.05, weight_decay=1e-3), momentum=0.9)
    batches = Batches(
        data.train, 64, mean=data.mean, std=data.std, shuffle=True, drop_last=True, rank=rank, world_size=world_size
    )
    for images, labels in batches.epoch(0):
        optimizer.zero_grad()
        F.cross_entropy(model(images.double()), labels).backward()
        optimizer.step()
    state = model.state_dict()
    parts = sum(t.to_local().shape != t.shape for t in state.values() if hasattr(t, "to_local"))
    return {
        "model": {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in state.items()},
        "divided": parts,
    }


class Dying(torch.nn.Module):
    """Ends its process in the third step, and, started again from the checkpoint after the second, in the seventh."""

    def __init__(self, mark: Path, dies: bool) -> None:
        super().__init__()
        self.mark, self.dies, self.left = mark, dies, 5 if mark.exists() else 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        if self.dies and self.left == 0:
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def dying(folder: Path) -> None:
    """Train as ``wnq`` in :func:`main` does, with a last process that dies."""
    accelerator = plain_accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    data = load_data("digits", limit=257)
    model = torch.nn.Sequential(Dying(folder / "died", rank == world_size - 1), make_model("digits_mlp", "wnq"))
    try:
        fit(model, data, TrainConfig(**SETTINGS, checkpoint_steps=2), out=folder / "run", resume=True)
    except ProcessLostError as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(1)


class Spoiling(torch.nn.Module):
    """Gives NaN at one forward pass of a training step, in one process."""

    def __init__(self, at: int, spoils: bool) -> None:
        super().__init__()
        self.at, self.spoils = at, spoils
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        self.count += 1
        return x * float("nan") if self.spoils and self.count == self.at else x


def diverged(data: Dataset, out: Path, rank: int, world_size: int) -> str:
    """The last process meets NaN in step 3 of epoch 2."""
    model = torch.nn.Sequential(make_model("digits_mlp", "wnq"), Spoiling(7, rank == world_size - 1))
    try:
        fit(model, data, TrainConfig(**SETTINGS), out=out)
    except TrainingDivergedError as error:
        return str(error)
    return ""


def interrupted(data: Dataset, out: Path, rank: int) -> dict[str, Any]:
    """Ctrl-C reaches the last process only; then the run is resumed."""
    last = plain_accelerator().num_processes - 1
    config = TrainConfig(**SETTINGS)
    steps: list[int] = []

    class Noticing(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps.append(len(steps))
            if len(steps) == 3 and rank == last:
                signal.raise_signal(signal.SIGINT)
            return x

    model = torch.nn.Sequential(Noticing(), make_model("digits_mlp", "wnq"))
    try:
        fit(model, data, config, out=out)
    except Interrupted:
        stopped_at = len(steps)
    else:
        stopped_at = -1
    model = torch.nn.Sequential(torch.nn.Identity(), make_model("digits_mlp", "wnq"))
    result = fit(model, data, config, out=out, resume=True)
    return {"stopped_at": stopped_at, "model": model[1].state_dict(), "history": result.history}


def evaluated(data: Dataset, rank: int, world_size: int) -> dict[str, Any]:
    model = make_model("digits_mlp", None)
    share = {"mean": data.mean, "std": data.std, "rank": rank, "world_size": world_size}
    # Batches of 2 leave one image for the last batch: the first rank gets none of it.
    return {
        "uneven": vars(evaluate(model, Batches(data.val, 100, **share).epoch(0))),
        "smallest": vars(evaluate(model, Batches(data.val, 2, **share).epoch(0))),
    }


def main(folder: Path) -> None:
    accelerator = plain_accelerator()
    rank, world_size = accelerator.process_index, accelerator.num_processes
    data = load_data("digits", limit=257)
    tables = {"model": {"name": "digits_cnn"}, "data": {"limit": 257}, "train": SETTINGS, "quantize": {"method": "lsq"}}
    recipe_model, recipe_result = run_recipe(recipe_from(tables), folder / "recipe", data=data)
    reports: list[Progress] = []
    fit(make_model("digits_mlp", None), data, TrainConfig(**SETTINGS), on_step=reports.append)
    try:
        fit(make_model("digits_mlp", None), data, TrainConfig(batch_size=512))
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    results = {
        "world_size": world_size,
        "float": trained(data, "digits_mlp", None, clip_grad_norm=1.0, label_smoothing=0.1),
        "wnq": trained(data, "digits_mlp", "wnq"),
        "step": trained(data, "digits_mlp", "wnq", epochs=1, batch_size=256, warmup_epochs=0),
        "batchnorm": trained(data, "digits_cnn", "wnq", ema_decay=0.9, bn_batches=2),
        "interrupted": interrupted(data, folder / "interrupted", rank),
        "exact": {str(method): exact(data, method) for method in (None, "wnq", "lsq", "jacob")},
        "sharded": {method: sharded(data, method, rank, world_size) for method in ("wnq", "lsq", "jacob")},
        "diverged": diverged(data, folder / "diverged", rank, world_size),
        "evaluated": evaluated(data, rank, world_size),
        "recipe": {"model": recipe_model.state_dict(), "val": vars(recipe_result.val)},
        "reports": len(reports),
        "refusal": refusal,
    }
    torch.save(results, folder / f"rank{rank}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    torch.set_num_threads(1)
    dying(Path(sys.argv[1])) if sys.argv[2:] == ["dying"] else main(Path(sys.argv[1]))
