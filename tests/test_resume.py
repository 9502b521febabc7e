import contextlib
import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers_resume import CASES, make_case, train
from wnq.data import load_data
from wnq.procedures import get_procedure
from wnq.train import TrainConfig, fit

TIMINGS = ("seconds", "images_per_second")

# Processes are forked from a server that has imported everything: a start costs milliseconds instead of seconds.
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["helpers_resume"])


@pytest.fixture(autouse=True, scope="module")
def running_server():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # a forked process cannot use the GPU of its parent
        forkserver.ensure_running()


class Training:
    """A run in a process of its own."""

    def __init__(self, case: str, out: Path) -> None:
        self.reports, sending = server.Pipe(duplex=False)
        self.process = server.Process(target=train, args=(case, out, sending), daemon=True)
        self.process.start()
        sending.close()

    def wait_for(self, count: int) -> list[Any]:
        """Return the first ``count`` reports, or all of them if the run ends before."""
        received: list[Any] = []
        while len(received) < count:
            try:
                received.append(self.reports.recv())
            except EOFError:
                break
        return received

    def end(self, sent: signal.Signals | None = None) -> list[Any]:
        """Send a signal, wait for the process to end and return the reports that were left."""
        if sent is not None and self.process.pid is not None:
            with contextlib.suppress(ProcessLookupError):  # it ended by itself
                os.kill(self.process.pid, sent)
        left = self.wait_for(10_000)
        self.process.join()
        return left


def finish(case: str, out: Path) -> dict[str, Any]:
    assert Training(case, out).end()[-1] == "done"
    return torch.load(out / "final.pt", weights_only=True)


def assert_same_run(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["model"].keys() == other["model"].keys()
    assert [name for name, t in one["model"].items() if not torch.equal(t, other["model"][name])] == []
    histories = [[{k: v for k, v in row.items() if k not in TIMINGS} for row in run["history"]] for run in (one, other)]
    assert len(histories[0]) == 3 and histories[0] == histories[1]
    assert one["val"] == other["val"]


_uninterrupted: dict[str, dict[str, Any]] = {}


def uninterrupted(case: str, tmp_path: Path) -> dict[str, Any]:
    if case not in _uninterrupted:
        _uninterrupted[case] = finish(case, tmp_path / "uninterrupted")
    return _uninterrupted[case]


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment_and_resumed_equals_uninterrupted(case: str, tmp_path: Path):
    whole = uninterrupted(case, tmp_path)
    moments = random.Random(f"moments of {case}")
    out = tmp_path / "killed"
    kills = 0
    for _ in range(4):
        run = Training(case, out)
        # A checkpoint comes every 3 steps, so 4 to 9 steps always get further; a step takes some milliseconds.
        received = run.wait_for(moments.randint(4, 9))
        time.sleep(moments.random() * 0.02)
        left = run.end(signal.SIGKILL)
        assert "interrupted" not in received + left
        kills += run.process.exitcode == -signal.SIGKILL
    assert kills >= 2
    killed = finish(case, out)
    assert_same_run(killed, whole)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows == killed["history"]
    assert [path.name for path in out.glob(".*")] == []


@pytest.mark.parametrize("case", ["float", "ema"])
def test_interrupted_and_resumed_equals_uninterrupted(case: str, tmp_path: Path):
    whole = uninterrupted(case, tmp_path)
    out = tmp_path / "interrupted"
    done = 0
    for count in (2, 7):
        run = Training(case, out)
        received = run.wait_for(count)
        received += run.end(signal.SIGINT)
        assert received[-1] == "interrupted" and run.process.exitcode == 0
        # Ctrl-C ends the step it meets and saves there, whatever checkpoint_steps says: no step is done twice.
        steps = [report for report in dict.fromkeys(received) if report != "interrupted"]
        assert steps[0] == (done // 8 + 1, done % 8 + 1)
        done += len(steps)
        state = json.loads(torch.load(out / "checkpoint.pt", weights_only=True)["state"])
        assert 8 * state["epoch"] + state["step"] == done
    assert_same_run(finish(case, out), whole)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path):
    whole = uninterrupted("ema", tmp_path)
    out = tmp_path / "again"
    first = finish("ema", out)
    (out / "metrics.jsonl").rename(out / "metrics-before.jsonl")
    again = finish("ema", out)
    assert_same_run(first, whole)
    assert_same_run(again, whole)
    assert again["history"] == first["history"]


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_half_written_file_is_passed_over_and_removed(kept: float, tmp_path: Path):
    whole = uninterrupted("float", tmp_path)
    out = tmp_path / "run"
    run = Training("float", out)
    run.wait_for(5)
    run.end(signal.SIGKILL)
    content = (out / "checkpoint.pt").read_bytes()
    halves = [out / ".checkpoint.pt.abcdefgh.tmp", out / ".metrics.jsonl.abcdefgh.tmp"]
    for half in halves:
        half.write_bytes(content[: int(kept * len(content))])
    other = out / ".notes.tmp"
    other.write_text("not ours")
    assert_same_run(finish("float", out), whole)
    assert not any(half.exists() for half in halves) and other.exists()


# Checkpoints that do not fit


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint of the case "lsq" after 4 steps."""
    out = tmp_path_factory.mktemp("stopped")
    run = Training("lsq", out)
    run.wait_for(4)
    run.end(signal.SIGKILL)
    return (out / "checkpoint.pt").read_bytes()


def resume_error(out: Path, case: str = "lsq", **changes: Any) -> str:
    model, _, config = make_case(case)
    config = TrainConfig(**{**vars(make_case("lsq")[2]), **changes}) if changes or case != "lsq" else config
    with pytest.raises(ValueError) as caught:
        fit(model, load_data("digits", limit=256), config, out=out, resume=True)
    message = str(caught.value)
    assert message.startswith(f"cannot resume from {out / 'checkpoint.pt'}: ")
    return message


def test_changed_settings_are_named(stopped: bytes, tmp_path: Path):
    (tmp_path / "checkpoint.pt").write_bytes(stopped)
    message = resume_error(tmp_path, lr=0.5, seed=4)
    assert "the settings changed (lr: 0.001 then, 0.5 now, seed: 0 then, 4 now)" in message
    assert message.endswith("Use another output folder.")


def test_another_procedure_is_named(tmp_path: Path):
    model, teacher, config = make_case("guided")
    run = Training("guided", tmp_path)
    run.wait_for(4)
    run.end(signal.SIGKILL)
    data = load_data("digits", limit=256)
    with pytest.raises(ValueError, match=r"the settings changed \(procedure: \{.*'joint': True.* then, None now\)"):
        fit(model, data, config, out=tmp_path, resume=True)
    fixed = get_procedure("guided", joint=False)
    with pytest.raises(ValueError, match=r"then, \{.*'joint': False"):
        fit(model, data, config, teacher=teacher, procedure=fixed, out=tmp_path, resume=True)


def test_checkpoint_of_another_model_is_refused(stopped: bytes, tmp_path: Path):
    (tmp_path / "checkpoint.pt").write_bytes(stopped)
    message = resume_error(tmp_path, case="float")
    assert "it holds another model or quantization" in message and "parametrizations.weight.original" in message
    assert message.endswith("Use another output folder.")


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "flipped"])
def test_damaged_checkpoint_is_refused(stopped: bytes, tmp_path: Path, damage: str):
    path = tmp_path / "checkpoint.pt"
    middle = len(stopped) // 2
    path.write_bytes(
        {
            "cut": stopped[:middle],
            "empty": b"",
            "text": b"epoch 3",
            "flipped": bytes([*stopped[:8], *(255 - b for b in stopped[8:64]), *stopped[64:]]),
        }[damage]
    )
    assert "not a readable checkpoint" in resume_error(tmp_path)
    assert "Remove it to start the run anew." in resume_error(tmp_path)


def test_checkpoint_cannot_run_code(tmp_path: Path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "attacked",))

    torch.save({"format": 1, "config": Attack()}, tmp_path / "checkpoint.pt")
    assert "not a readable checkpoint" in resume_error(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_checkpoint_of_a_later_version_is_refused(tmp_path: Path):
    torch.save({"format": 99, "settings": "in another place"}, tmp_path / "checkpoint.pt")
    message = resume_error(tmp_path)
    assert "checkpoint format 99, this version of wnq reads 1" in message and "the version that wrote it" in message


def test_without_resume_a_run_starts_anew(stopped: bytes, tmp_path: Path):
    (tmp_path / "checkpoint.pt").write_bytes(stopped)
    model, _, config = make_case("lsq")
    result = fit(model, load_data("digits", limit=256), config, out=tmp_path)
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
