import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers_distributed import SETTINGS, make_model
from wnq.data import load_data
from wnq.recipe import load_run
from wnq.train import TrainConfig, fit
from wnq.train.processes import check_engine

SCRIPT = Path(__file__).with_name("helpers_distributed.py")
TIMINGS = ("seconds", "images_per_second")


def launch(command: list[str], folder: Path, *more: str, code: int = 0) -> str:
    """Run the script, which must end with this exit code, and return what it wrote."""
    # Restarted processes must not meet the addresses of those before them: pytorch/pytorch issue 135712.
    fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    environment = {**os.environ, **fresh, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "log.txt"
    with log.open("w") as output:
        arguments = [*command, str(SCRIPT), str(folder), *more]
        process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output)
        try:
            ended = process.wait(timeout=180)
        except subprocess.TimeoutExpired:  # processes that wait for each other
            process.terminate()  # torchrun ends its processes, which are in sessions of their own
            ended = process.wait()
    text = log.read_text()
    assert ended == code, text[-4000:]
    return text


def torchrun(*options: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *options]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    launch([sys.executable], folder)
    return torch.load(folder / "rank0.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch(torchrun(), folder)
    return folder


@pytest.fixture(scope="module")
def two(folder_of_two: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    first, second = (torch.load(folder_of_two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["world_size"] == second["world_size"] == 2
    return first, second


def assert_equal_states(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def without_timings(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in history]


@pytest.mark.parametrize("run", ["float", "wnq", "batchnorm", "interrupted", "recipe"])
def test_both_processes_end_with_the_same_model_and_numbers(two: tuple[dict, dict], run: str):
    first, second = two[0][run], two[1][run]
    assert_equal_states(first["model"], second["model"])
    assert first.get("val") == second.get("val")
    assert without_timings(first.get("history", [])) == without_timings(second.get("history", []))


def test_two_processes_train_as_one(one: dict, two: tuple[dict, dict]):
    alone, together = one["float"], two[0]["float"]
    for name, value in alone["model"].items():
        # Only the order of float32 sums differs: 8 steps of errors near 1e-7 of weights near 0.1.
        torch.testing.assert_close(together["model"][name], value, rtol=0, atol=2e-6)
    for row, other in zip(alone["history"], together["history"], strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-5) and row["lr"] == other["lr"]
        assert row["accuracy"] == pytest.approx(other["accuracy"], abs=0.5)  # one image may sit on the boundary


# One step differs by the order of float32 sums. Over 8 steps such a difference can carry a value over a level's edge,
# which changes single gradients; gradients scaled wrongly by the number of processes would change the way by half.
@pytest.mark.parametrize(("run", "bound"), [("step", 1e-5), ("wnq", 0.05)])
def test_quantized_processes_decide_together_and_train_as_one(
    one: dict, two: tuple[dict, dict], run: str, bound: float
):
    alone, together = one[run], two[0][run]
    offsets = [name for name in alone["model"] if name.endswith("offset")]
    assert len(offsets) == 3
    for name in offsets:  # signed for the images, unsigned after a ReLU: what one process decided on the whole batch
        assert torch.equal(together["model"][name], alone["model"][name])
        assert bool(together["model"][name.replace("offset", "initialized")])
    for name, value in alone["model"].items():
        if name.endswith(("original", "bias", "step")):
            moved = (value - alone["start"][name]).norm()
            assert (together["model"][name] - value).norm() < bound * moved, name


def test_metrics_are_sums_over_the_processes(one: dict, two: tuple[dict, dict]):
    for split in ("uneven", "smallest"):
        alone, first, second = (result["evaluated"][split] for result in (one, *two))
        assert first == second
        assert (first["accuracy"], first["images"]) == (alone["accuracy"], alone["images"]) and alone["images"] % 2 == 1
        # The same float32 losses of the images, added in another order.
        assert first["loss"] == pytest.approx(alone["loss"], rel=1e-6)


def test_interrupt_of_one_process_stops_both_after_the_same_step(two: tuple[dict, dict]):
    first, second = (result["interrupted"] for result in two)
    # The signal comes in the third step; they agree when the steps are read, at the latest at the epoch's end.
    assert first["stopped_at"] == second["stopped_at"] and 3 <= first["stopped_at"] <= 4
    whole = two[0]["wnq"]
    assert_equal_states(first["model"], whole["model"])
    assert without_timings(first["history"]) == without_timings(whole["history"])


def test_a_bad_loss_of_one_process_is_traced_by_all(one: dict, two: tuple[dict, dict], folder_of_two: Path):
    message = two[0]["diverged"]
    assert message == two[1]["diverged"] and message.startswith("the loss is nan at epoch 2, step 3. ")
    path = folder_of_two / "diverged" / "checkpoint.pt"
    assert f"The first that is not finite is the output of layer '1'. The last good checkpoint is {path}." in message
    assert one["diverged"].partition(" The last")[0] == message.partition(" The last")[0]


def test_main_process_alone_reports_and_saves(two: tuple[dict, dict], folder_of_two: Path):
    assert two[0]["reports"] == 2 * (4 + 1) and two[1]["reports"] == 0
    _, model = load_run(folder_of_two / "recipe")
    assert_equal_states(model.state_dict(), two[0]["recipe"]["model"])


def test_batch_larger_than_the_data_is_refused(two: tuple[dict, dict], one: dict):
    assert one["refusal"] == ""
    words = "batch_size 512 is more than the 257 training images, which 2 processes cannot share evenly. Use a smaller"
    assert all(words in result["refusal"] for result in two)


@pytest.mark.parametrize("method", ["None", "wnq", "lsq", "jacob"])
def test_in_double_precision_two_processes_are_one(one: dict, two: tuple[dict, dict], method: str):
    """Weights, learned steps, averaged ranges and losses; between the processes bit for bit."""
    alone, first, second = (result["exact"][method] for result in (one, *two))
    assert_equal_states(first["model"], second["model"])
    assert (first["loss"], first["val"]) == (second["loss"], second["val"])
    for name, value in alone["model"].items():
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-10)
    assert first["loss"] == pytest.approx(alone["loss"], abs=1e-10)
    learned = [name for name in alone["model"] if name.endswith(("step", "low", "high"))]
    assert len(learned) == {"None": 0, "wnq": 3, "lsq": 4, "jacob": 4}[method]


@pytest.mark.parametrize("method", ["wnq", "lsq", "jacob"])
def test_sharded_weights_train_as_whole_ones(one: dict, two: tuple[dict, dict], method: str):
    """FSDP2: the quantizer sees the gathered weight, so that a maximum is that of the whole."""
    alone, first, second = (result["sharded"][method] for result in (one, *two))
    assert first["divided"] == second["divided"] > 0 == alone["divided"]
    for name, value in alone["model"].items():
        assert torch.equal(first["model"][name], second["model"][name])
        torch.testing.assert_close(first["model"][name], value, rtol=0, atol=1e-10)


def test_a_killed_process_ends_the_job_with_a_sentence_and_a_usable_checkpoint(two: tuple[dict, dict], tmp_path: Path):
    """One is killed in step 3, the job restarts by itself from the checkpoint, one is killed in step 7, and that ends it."""
    text = launch(torchrun("--max-restarts", "1", "--monitor-interval", "1"), tmp_path, "dying", code=1)
    path = tmp_path / "run" / "checkpoint.pt"
    lines = [line for line in text.splitlines() if "another of the 2 processes" in line]
    why = "another of the 2 processes has ended or does not answer, so this one cannot go on."
    assert len(lines) == 2
    assert all(line.startswith(f"rank 0: {why} The last good checkpoint is {path}. Look for") for line in lines)
    content = torch.load(path, weights_only=True)
    state, saved = json.loads(content["state"]), content["models"]["model"]
    assert (state["epoch"], state["step"]) == (1, 2)
    never_stopped = two[0]["wnq"]["after_six"]
    assert_equal_states({name.removeprefix("1."): t for name, t in saved.items()}, never_stopped)
    model = torch.nn.Sequential(torch.nn.Identity(), make_model("digits_mlp", "wnq"))
    config = TrainConfig(**SETTINGS, checkpoint_steps=2)
    result = fit(model, load_data("digits", limit=257), config, out=tmp_path / "run", resume=True)
    assert [row["epoch"] for row in result.history] == [1, 2]


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_an_engine_that_divides_the_model_is_refused(engine: str):
    accelerator = SimpleNamespace(distributed_type=f"DistributedType.{engine}")
    with pytest.raises(
        ValueError, match=rf"DistributedDataParallel.*but accelerate is set to {engine}: use accelerate"
    ):
        check_engine(accelerator)
