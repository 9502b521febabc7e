"""Training runs for ``test_resume.py``, in processes of their own that may be killed."""

import copy
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from wnq import get_method, make_plan, quantize_
from wnq.data import load_data
from wnq.models import build_model
from wnq.procedures import Procedure, get_procedure
from wnq.train import Interrupted, TrainConfig, fit

COMMON = {"epochs": 3, "batch_size": 32, "checkpoint_steps": 3, "lr": 0.05, "crop_padding": 1, "flip": True}
CASES: dict[str, tuple[str | None, dict]] = {
    "float": (None, {"eval_every": 2}),
    "ema": ("wnq", {"ema_decay": 0.9, "bn_batches": 3}),
    "lsq": ("lsq", {"optimizer": "adamw", "lr": 1e-3, "clip_grad_norm": 1.0, "quantizer_weight_decay": 1e-4}),
    "dropout": ("wnq", {"label_smoothing": 0.1}),
    "rounded": ("wnq", {"ema_decay": 0.9}),
    "distilled": ("wnq", {"distill_weight": 0.5}),
    "admm": ("elbnn", {"bn_batches": 3, "ema_decay": 0.9}),
    "guided": ("wnq", {"clip_grad_norm": 1.0}),
}
PROCEDURES: dict[str, dict] = {"admm": {"every": 5}, "guided": {"joint": True}}


def make_case(case: str) -> tuple[nn.Module, nn.Module | None, TrainConfig]:
    method, settings = CASES[case]
    torch.manual_seed(3)
    model = build_model("digits_cnn")
    if case == "dropout":
        model = nn.Sequential(*list(model)[:-1], nn.Dropout(0.3), list(model)[-1])
    teacher = copy.deepcopy(model) if case in ("distilled", "guided") else None
    if method is not None:
        quantize_(model, make_plan(model, get_method(method), residual_bits=8 if case == "rounded" else 32))
    return model, teacher, TrainConfig(**{**COMMON, **settings})


def make_procedure(case: str) -> Procedure | None:
    return get_procedure(case, **PROCEDURES[case]) if case in PROCEDURES else None


def train(case: str, out: Path, reports: Connection) -> None:
    """Train, resuming if there is something to resume; report every step, and at the end leave ``final.pt``."""
    torch.set_num_threads(1)
    model, teacher, config = make_case(case)
    data = load_data("digits", limit=256)
    if (out / "checkpoint.pt").exists():
        torch.rand(7)  # numbers drawn before do not matter to a resumed run
    try:
        result = fit(
            model, data, config, teacher=teacher, procedure=make_procedure(case), out=out, resume=True,
            on_step=lambda progress: reports.send((progress.epoch, progress.step)),
        )  # fmt: skip
    except Interrupted:
        reports.send("interrupted")
        return
    torch.save({"model": model.state_dict(), "history": result.history, "val": vars(result.val)}, out / "final.pt")
    reports.send("done")


if "pytest" not in sys.modules:
    # In the server: a first step imports what torch, accelerate and scikit-learn load late.
    fit(build_model("digits_mlp"), load_data("digits", limit=16), TrainConfig(epochs=1, batch_size=16))
