"""The benchmark of training steps: what its parts are, its ratios, its memory, and the command."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from wnq.cli import main
from wnq.data import Dataset, ImageData
from wnq.speed import TrainArm, measure_training, training_arms
from wnq.speed import training as training_module
from wnq.train import TrainConfig
from wnq.train.step import TrainStep


def images(count: int = 32) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    split = ImageData(pixels, torch.arange(count) % 10, tuple("0123456789"))
    return Dataset(split, split, (0.5,), (0.25,))


class Slow(nn.Module):
    """Takes at least so many seconds, and so many bytes."""

    def __init__(self, seconds: float, mib: int = 0) -> None:
        super().__init__()
        self.seconds, self.mib, self.layer = seconds, mib, nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.seconds)
        more = torch.ones(self.mib * 2**18)  # 4 bytes each
        return self.layer(x.flatten(1)) + more.sum() * 0


def test_a_slow_model_is_found_to_be_slow_and_to_be_most_of_the_step() -> None:
    arms = [TrainArm("float", Slow(0.01)), TrainArm("quantized", Slow(0.03))]
    before = [p.clone() for p in arms[0].model.parameters()]
    found = measure_training(arms, images(), TrainConfig(batch_size=16), seconds=0.0, memory=False)
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["float", "quantized"] and found["memory"] is None
    for name, floor in (("float", 10), ("quantized", 30)):
        row = rows[name]
        assert floor <= row["p5_ms"] <= row["step_ms"] <= row["p95_ms"]
        assert row["parts_ms"]["model"] >= floor
        assert max(row["parts_ms"][part] for part in ("data", "optimizer", "accounting")) < floor
        assert row["images_per_second"] == pytest.approx(16_000 / row["step_ms"])
        assert row["not_model_low"] <= row["not_model"] <= row["not_model_high"]
        assert row["rounds"] >= 7 and row["peak_mib"] is None and row["base"] == "float"
    assert rows["float"]["times_float"] == 1
    assert rows["quantized"]["times_float"] > 1.2
    assert all(torch.equal(a, b) for a, b in zip(before, arms[0].model.parameters(), strict=True)), "copied"


def test_time_outside_the_model_is_not_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """An optimizer that sleeps twice as long as the model leaves it a third of the step."""
    update = TrainStep.update

    def slow(self: Any) -> None:
        time.sleep(0.04)
        update(self)

    monkeypatch.setattr(TrainStep, "update", slow)
    found = measure_training(
        [TrainArm("float", Slow(0.02))], images(), TrainConfig(batch_size=16), seconds=0.0, memory=False
    )
    row = found["rows"][0]
    assert row["parts_ms"]["optimizer"] >= 40
    assert 0.4 < row["not_model"] < 0.9


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_that_of_the_steps_alone() -> None:
    batch = torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.int64)
    config = TrainConfig(batch_size=4)
    peak = training_module.peak(Slow(0.0, mib=150), config, batch, torch.device("cpu"))
    assert peak is not None and 150 <= peak < 350, (
        "what torch itself takes at its first step: tens of MiB, with CUDA built in 135"
    )


def test_steps_that_the_device_takes_alone_are_measured_part_by_part() -> None:
    """On the CPU nothing is captured, but what would be is what runs."""
    arms = training_arms(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), Slow(0.01), captured=True)[2:]
    found = measure_training(arms, images(), TrainConfig(batch_size=16), seconds=0.0, memory=False)
    rows = {row["arm"]: row for row in found["rows"]}
    assert list(rows) == ["float, graph", "quantized, graph"]
    assert rows["quantized, graph"]["base"] == "float, graph" and rows["quantized, graph"]["times_float"] > 1
    assert rows["quantized, graph"]["parts_ms"]["model"] >= 10 > rows["quantized, graph"]["parts_ms"]["optimizer"]


def test_compiled_arms_are_compared_with_the_compiled_float_one() -> None:
    arms = training_arms(nn.Identity(), nn.ReLU(), compiled=True)
    assert [(arm.name, arm.compiled) for arm in arms] == [
        ("float", False), ("quantized", False), ("float, compiled", True), ("quantized, compiled", True)
    ]  # fmt: skip
    names = [arm.name for arm in training_arms(nn.Identity(), nn.ReLU(), compiled=True, captured=True)]
    assert names[::2] == ["float", "float, graph", "float, compiled, graph"]
    taken = {f"{arm.name}/{part}": [float(i + 1)] * 7 for i, arm in enumerate(arms) for part in training_module.PARTS}
    row = training_module._row(arms[3], arms, taken, 8, None)
    assert (row["base"], row["times_float"]) == ("float, compiled", 4 / 3)


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as end:
        main(["bench", "train", *arguments])
    code: Any = end.value.code
    return int(code)


FAST = ("--seconds", "0.1", "--no-memory")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "speed.json"
    options = ("--num-classes", "10", "--bits", "2/4", "--set", "train.batch_size=8", "--out", str(out), "--json")
    assert run("digits_cnn", *FAST, *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(out.read_text())
    assert (found["input"], found["batch_size"]) == ([1, 8, 8], 8)
    assert found["quantize"] == {"method": "wnq", "options": {"w_bits": 2, "a_bits": 4}}
    assert [row["arm"] for row in found["rows"]] == ["float", "quantized"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[model]\nname = "digits_mlp"\n[data]\nlimit = 64\n[quantize]\nmethod = "lsq"\n[train]\nbatch_size = 16\n'
    )
    assert run(str(recipe), *FAST) == 0
    text = capsys.readouterr().out
    assert "batch 16, " in text and "quantized" in text and "Memory: not measured." in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("digits_cnn", "--bits", "3"), "--bits must be W/A, such as 4/4, got '3'."),
        (("digits_cnn", "--size", "8x8"), "--size must be channels x height x width, such as 3x224x224, got '8x8'."),
        (("digits_cnn", "--set", "train.batchsize=4"), "has no key 'batchsize'. Did you mean 'batch_size'"),
        (("RECIPE", "--bits", "3/3"), "says itself how it quantizes"),
        (("RECIPE", "--size", "1x8x8"), "says itself which images it takes."),
        (("digit_cnn",), "unknown model 'digit_cnn'. Did you mean 'digits_cnn'"),
    ],
)
def test_mistakes(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[quantize]\nmethod = "wnq"\n')
    assert run(*(str(recipe) if word == "RECIPE" else word for word in arguments), *FAST) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_missing_recipe_and_too_large_a_batch_are_failures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none.toml")) == 1
    assert "none.toml does not exist." in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"batch_size 64 is more than the 32 training images\."):
        measure_training([TrainArm("float", Slow(0))], images(), TrainConfig(batch_size=64))
