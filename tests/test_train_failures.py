"""What becomes of a run that goes wrong, and how rarely one that goes well waits for the device."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from wnq import get_method, make_plan, quantize_
from wnq.cli import main
from wnq.data import Dataset, load_data
from wnq.metrics import evaluate
from wnq.models import build_model
from wnq.train import OutOfMemoryError, TrainConfig, TrainingDivergedError, fit
from wnq.train import account as account_module
from wnq.train.average import Average


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=128)


class At(nn.Module):
    """Passes its input on; at one forward pass in training mode, counted from 1 over all resumptions, it does something to it."""

    def __init__(self, at: int, what: str) -> None:
        super().__init__()
        self.at, self.what, self.calls = at, what, 0
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        self.count += 1
        self.calls += 1
        if self.count != self.at:
            return x
        if self.what == "gradient":
            x.register_hook(lambda g: g * float("inf"))
            return x
        return x * float(self.what)


def network(at: int, what: str, method: str | None = "wnq") -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), At(at, what), nn.Linear(16, 10)]
    model = nn.Sequential(*layers)
    return model if method is None else quantize_(model, make_plan(model, get_method(method), first_last_bits=None))


def diverged(model: nn.Module, data: Dataset, out: Path | None, **settings: Any) -> str:
    with pytest.raises(TrainingDivergedError) as caught:
        fit(model, data, TrainConfig(epochs=3, batch_size=16, lr=0.05, **settings), out=out)
    return str(caught.value)


@pytest.fixture
def rare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reading after the first step and at the end of an epoch, however fast the machine is."""
    monkeypatch.setattr(account_module, "READ_SECONDS", 1e9)


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("what", ["nan", "inf"])
def test_a_bad_loss_is_traced_to_its_step_and_layer(
    rare: None, data: Dataset, tmp_path: Path, what: str, kept: bool
) -> None:
    """Read steps later, from the checkpoint of the epoch before or from a copy in memory."""
    model = network(11, what, method=None)
    message = diverged(model, data, tmp_path if kept else None)
    assert message.startswith("the loss is nan at epoch 2, step 3. Lower lr")
    assert "The first that is not finite is the output of layer '3'." in message
    path = tmp_path / "checkpoint.pt"
    assert message.endswith(f"The last good checkpoint is {path}." if kept else "No checkpoint was written.")
    assert model[3].calls == 16 + 3, "noticed at the end of the epoch, then 3 steps again"
    if kept:
        content = torch.load(path, weights_only=True)
        state = json.loads(content["state"])
        assert (state["epoch"], state["step"]) == (1, 0)
        assert all(bool(t.isfinite().all()) for t in content["models"]["model"].values())


def test_a_bad_loss_of_the_first_epoch_is_traced_too(rare: None, data: Dataset, tmp_path: Path) -> None:
    """And one in a quantizer is said to be there: an infinite input is clipped, NaN is not."""
    message = diverged(network(6, "nan"), data, tmp_path)
    assert "at epoch 1, step 6." in message
    assert "the output of layer '3'" in message
    assert message.endswith("No checkpoint was written.")
    assert not (tmp_path / "checkpoint.pt").exists()
    model = network(0, "nan")
    model[4].input_quantizer.register_forward_hook(lambda m, _, y: y * float("nan") if model[3].count == 2 else None)
    assert "the rounded input of layer '4'" in diverged(model, data, tmp_path)


def test_a_weight_that_an_update_spoils_is_named(rare: None, data: Dataset, tmp_path: Path) -> None:
    """The gradient is infinite at step 4: the loss is bad at step 5 only. The input is rounded before the weight is read."""
    for method, expected in (("wnq", "the input quantizer of layer '1'"), (None, "'weight' of layer '1'")):
        message = diverged(network(4, "gradient", method), data, tmp_path)
        assert "at epoch 1, step 5." in message
        assert f"The first that is not finite is {expected}." in message
    model = network(4, "gradient", None)
    quantize_(model, make_plan(model, get_method("wnq", a_bits=32), first_last_bits=None))
    assert "The first that is not finite is the weight of layer '1'." in diverged(model, data, tmp_path)


@pytest.mark.parametrize("settings", [{}, {"checkpoint_steps": 4}])
def test_spoilt_weights_are_not_saved(data: Dataset, tmp_path: Path, settings: dict[str, int]) -> None:
    """The loss of the last step before a checkpoint is finite, the weights after it are not."""
    step = settings.get("checkpoint_steps", 8)
    message = diverged(network(step, "gradient"), data, tmp_path, **settings)
    assert message.startswith(f"weights are not finite after the update at epoch 1, step {step}. ")
    assert "The first that is not finite is 'bias' of layer '1'." in message
    assert not (tmp_path / "checkpoint.pt").exists()


def test_infinity_by_design_is_no_divergence(data: Dataset) -> None:
    model = network(0, "nan")
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    assert len(fit(model, data, TrainConfig(epochs=1, batch_size=16, lr=0.05)).history) == 1


# Waiting for the device


class Waits(TorchDispatchMode):
    """Counts what would make the host wait for a device: numbers read from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def test_an_epoch_waits_as_often_as_an_epoch_of_more_steps(
    rare: None, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[int, list[int]] = {}
    reads: list[int] = []
    read = account_module.Account.read
    monkeypatch.setattr(
        account_module.Account, "read", lambda self, **given: reads.append(self.pending) or read(self, **given)
    )
    for batch_size in (32, 8):
        model = build_model("digits_cnn")
        quantize_(model, make_plan(model, get_method("lsq")))
        config = TrainConfig(epochs=2, batch_size=batch_size, lr=0.01, ema_decay=0.9, clip_grad_norm=1.0, eval_every=2)
        reads.clear()
        with Waits() as waits:
            fit(model, data, config)
        counts[batch_size] = [waits.count, len(reads)]
        assert reads == [1, 128 // batch_size - 1, 128 // batch_size]
    # torch's fallback of AveragedModel's counter is on the host; it is asked once a step.
    own = {size: count - 2 * 128 // size for size, (count, _) in counts.items()}
    assert own[32] == own[8]


def test_evaluation_waits_at_its_end_alone(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """In inference mode numbers are read past the dispatcher: the methods that read them are counted."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, labels = data.train.images.float(), data.train.labels
    waits: list[str] = []
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__"):
        read = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda x, name=name, read=read: waits.append(name) or read(x))
    counts = []
    for size in (64, 8):
        waits.clear()
        evaluate(model, zip(images.split(size), labels.split(size), strict=True))
        counts.append(len(waits))
    assert counts[0] == counts[1] <= 2


@pytest.mark.parametrize("seconds", [1e9, 0.0])
def test_results_do_not_depend_on_when_they_are_read(
    data: Dataset, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Against sums kept by hand, in the same order."""
    monkeypatch.setattr(account_module, "READ_SECONDS", seconds)
    seen: list[tuple[float, int]] = []

    class Noting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            logits = super().forward(input)
            if self.training:
                self.logits = logits.detach()
            return logits

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), last := Noting(64, 10))
    config = TrainConfig(epochs=1, batch_size=16, lr=0.05, seed=3)
    from wnq.data import Batches

    batches = Batches(data.train, 16, mean=data.mean, std=data.std, shuffle=True, seed=3, drop_last=True)
    labels = [y for _, y in batches.epoch(0)]

    def note(progress: Any) -> None:
        if progress.val is None:
            y = labels[progress.step - 1]
            seen.append((nn.functional.cross_entropy(last.logits, y).item(), int((last.logits.argmax(1) == y).sum())))

    row = fit(model, data, config, on_step=note).history[0]
    assert row["loss"] == sum(loss for loss, _ in seen) / 8
    assert row["accuracy"] == 100 * sum(correct for _, correct in seen) / 128


def test_the_average_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).append(nn.Linear(3, 2).double())
    own, torchs = Average(model, 0.9), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.copy_(torch.randn(tensor.shape))
        own.update_parameters(model)
        torchs.update_parameters(model)
    assert own.state_dict().keys() == torchs.state_dict().keys()
    assert all(torch.equal(t, torchs.state_dict()[name]) for name, t in own.state_dict().items())


# Memory


class Hungry(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.error, self.layer = error, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        if self.error is not None:
            raise self.error
        return self.layer(x.flatten(1)) + torch.empty(10**15).sum()


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (None, "3725290.30 GiB"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 79 GiB."), "2.50 GiB"),
        (MemoryError(), None),
    ],
)
def test_too_little_memory_names_batch_size_and_switches(
    data: Dataset, tmp_path: Path, error: Exception | None, size: str | None
) -> None:
    with pytest.raises(OutOfMemoryError) as caught:
        fit(Hungry(error), data, TrainConfig(batch_size=32, channels_last=True), out=tmp_path)
    message = str(caught.value)
    asked = "" if size is None else f": {size} more were asked for"
    assert message.startswith(f"out of memory in training with batch_size 32{asked}. Use a smaller batch_size, or set ")
    assert "bf16 = true" in message and "channels_last" not in message
    assert message.endswith("No checkpoint was written.")


def test_another_runtime_error_stays_what_it_is(data: Dataset) -> None:
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        fit(Hungry(RuntimeError("shapes do not fit")), data, TrainConfig(batch_size=32))


def test_the_command_says_it_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("wnq.train.step.training_loss", lambda *_: torch.empty(10**15))
    (tmp_path / "recipe.toml").write_text('[model]\nname = "digits_mlp"\n[data]\nlimit = 64\n')
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("wnq: error: out of memory in training with batch_size 128") and error.count("\n") == 1


# Settings that came later


def test_a_checkpoint_without_a_later_setting_was_written_with_its_default(data: Dataset, tmp_path: Path) -> None:
    config = TrainConfig(epochs=1, batch_size=32)
    fit(network(0, "nan"), data, config, out=tmp_path)
    path = tmp_path / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    written = json.loads(content["config"])
    del written["record_every"]
    torch.save({**content, "config": json.dumps(written)}, path)
    assert len(fit(network(0, "nan"), data, config, out=tmp_path, resume=True).history) == 1
    with pytest.raises(ValueError, match=r"the settings changed \(record_every: 0 then, 5 now\)"):
        fit(network(0, "nan"), data, TrainConfig(epochs=1, batch_size=32, record_every=5), out=tmp_path, resume=True)
