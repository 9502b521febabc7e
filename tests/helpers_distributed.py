"""What ``test_distributed.py`` runs, on one process or, under torchrun, on two; each leaves its results in a file."""

import signal
import sys
from pathlib import Path
from typing import Any

import torch

from wnq import get_method, make_plan, quantize_
from wnq.data import Batches, Dataset, load_data
from wnq.metrics import evaluate
from wnq.models import build_model
from wnq.recipe import recipe_from, run_recipe
from wnq.train import Interrupted, TrainConfig, fit, plain_accelerator
from wnq.train.progress import Progress

SETTINGS = {"epochs": 2, "batch_size": 64, "lr": 0.05, "ema_decay": 0.0}


def make_model(name: str, method: str | None) -> torch.nn.Module:
    torch.manual_seed(1)
    model = build_model(name)
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
    result = fit(model, data, TrainConfig(**{**SETTINGS, **settings}))
    return {"start": start, "model": model.state_dict(), "val": vars(result.val), "history": result.history}


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
    torch.set_num_threads(1)
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
        "evaluated": evaluated(data, rank, world_size),
        "recipe": {"model": recipe_model.state_dict(), "val": vars(recipe_result.val)},
        "reports": len(reports),
        "refusal": refusal,
    }
    torch.save(results, folder / f"rank{rank}.pt")
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
