import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from wnq.recipe import load_run

SCRIPT = Path(__file__).with_name("helpers_distributed.py")
TIMINGS = ("seconds", "images_per_second")


def launch(command: list[str], folder: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    log = folder / "log.txt"
    with log.open("w") as output:
        arguments = [*command, str(SCRIPT), str(folder)]
        process = subprocess.Popen(arguments, env=environment, stdout=output, stderr=output)
        try:
            code = process.wait(timeout=180)
        except subprocess.TimeoutExpired:  # processes that wait for each other
            process.terminate()  # torchrun ends its processes, which are in sessions of their own
            code = process.wait()
    assert code == 0, log.read_text()[-4000:]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    launch([sys.executable], folder)
    return torch.load(folder / "rank0.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    launch([sys.executable, *torchrun], folder)
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
    assert first["stopped_at"] == second["stopped_at"] == 3
    whole = two[0]["wnq"]
    assert_equal_states(first["model"], whole["model"])
    assert without_timings(first["history"]) == without_timings(whole["history"])


def test_main_process_alone_reports_and_saves(two: tuple[dict, dict], folder_of_two: Path):
    assert two[0]["reports"] == 2 * (4 + 1) and two[1]["reports"] == 0
    _, model = load_run(folder_of_two / "recipe")
    assert_equal_states(model.state_dict(), two[0]["recipe"]["model"])


def test_batch_larger_than_the_data_is_refused(two: tuple[dict, dict], one: dict):
    assert one["refusal"] == ""
    words = "batch_size 512 is more than the 257 training images, which 2 processes cannot share evenly. Use a smaller"
    assert all(words in result["refusal"] for result in two)
