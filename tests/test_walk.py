"""Steps that the device takes alone equal those that the host takes; where there is a GPU, they are captured there."""

import contextlib
import math

import pytest
import torch
from torch import nn

from wnq import get_method, make_plan, quantize_
from wnq.data import Dataset, load_data
from wnq.models import build_model
from wnq.procedures import get_procedure
from wnq.train import Interrupted, TrainConfig, fit
from wnq.train.captured import WARM_UP, Captured

ON_GPU = torch.cuda.is_available()
COMMON = {"epochs": 2, "batch_size": 32, "lr": 0.05, "crop_padding": 1, "flip": True}
CASES = {
    "float": (None, {}),
    "wnq": ("wnq", {"ema_decay": 0.9, "bn_batches": 3}),
    "lsq": ("lsq", {"optimizer": "adamw", "lr": 1e-3, "clip_grad_norm": 1.0}),
    "distilled": ("wnq", {"distill_weight": 0.5, "label_smoothing": 0.1, "warmup_epochs": 0.5}),
    "one batch": ("dorefa", {"batch_size": 1000, "epochs": 7}),
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=256)


def made(method: str | None, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model("digits_cnn")
    return model if method is None else quantize_(model, make_plan(model, get_method(method)))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            tensor, other[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("case", CASES)
def test_the_steps_of_the_device_are_those_of_the_host(data: Dataset, case: str):
    method, settings = CASES[case]
    found = []
    for cuda_graph in (False, True):
        model = made(method)
        config = TrainConfig(**{**COMMON, **settings, "cuda_graph": cuda_graph})
        result = fit(model, data, config, teacher=made(None, seed=1) if config.distill_weight else None)
        found.append((model.state_dict(), result))
    (plain, before), (alone, after) = found
    assert len(after.history) == COMMON["epochs"] or case == "one batch"
    if not ON_GPU:
        same(plain, alone, 0)
        keys = ("epoch", "lr", "loss", "accuracy", "val_loss", "val_accuracy")
        assert [[row[key] for key in keys] for row in before.history] == [
            [r[key] for key in keys] for r in after.history
        ]
        return
    # A GPU adds up in another order with other convolution algorithms, and rounding multiplies the difference.
    for one, other in zip(before.history, after.history, strict=True):
        assert one["lr"] == other["lr"]
        assert math.isclose(one["loss"], other["loss"], rel_tol=0.05), (one, other)


def test_a_run_that_stops_in_the_middle_of_an_epoch_goes_on_there(data: Dataset, tmp_path):
    config = TrainConfig(**COMMON, checkpoint_steps=3, cuda_graph=True)
    whole = made("wnq")
    history = fit(whole, data, config).history

    def stop(progress) -> None:
        if (progress.epoch, progress.step) == (2, 5):
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt, Interrupted):
        fit(made("wnq"), data, config, out=tmp_path, on_step=stop)
    resumed = made("wnq", seed=5)
    again = fit(resumed, data, config, out=tmp_path, resume=True).history
    assert [row["epoch"] for row in again] == [1, 2]
    if not ON_GPU:
        same(whole.state_dict(), resumed.state_dict(), 0)
        assert again[-1]["loss"] == history[-1]["loss"]
    assert math.isclose(again[-1]["loss"], history[-1]["loss"], rel_tol=0.05)


def test_what_a_graph_cannot_hold_is_named(data: Dataset):
    with pytest.raises(ValueError, match=r"procedure 'admm' acts on the host.*set cuda_graph = false"):
        fit(made("elbnn"), data, TrainConfig(**COMMON, cuda_graph=True), procedure=get_procedure("admm"))
    with pytest.raises(ValueError, match=r"record_every.*cuda_graph = false"):
        TrainConfig(cuda_graph=True, record_every=5)


def test_captured_work_runs_once_a_call():
    device = torch.device("cuda" if ON_GPU else "cpu")
    total = torch.zeros((), device=device)
    calls = []

    def work() -> None:
        calls.append(None)
        total.add_(1)

    once = Captured(work, device)
    for _ in range(WARM_UP + 4):
        once()
    assert total.item() == WARM_UP + 4
    assert len(calls) == (WARM_UP + 1 if ON_GPU else WARM_UP + 4)


@pytest.mark.skipif(not ON_GPU, reason="only a GPU captures")
def test_work_that_waits_for_the_device_goes_on_as_written(caplog: pytest.LogCaptureFixture):
    total = torch.zeros((), device="cuda")
    seen = []
    once = Captured(lambda: seen.append(total.add_(1).item()), torch.device("cuda"))
    for _ in range(WARM_UP + 3):
        once()
    assert seen == [*range(1, WARM_UP + 4)]
    assert sum("cannot be captured" in record.getMessage() for record in caplog.records) == 1
