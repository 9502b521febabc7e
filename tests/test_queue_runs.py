"""The queue of runs on one device, with two processes and digits."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "queue_runs.py"
RECIPE = '[model]\nname = "digits_mlp"\n[data]\nlimit = 64\n[train]\nbatch_size = 32\n'


def queue(folder: Path, *options: str) -> tuple[int, list[str]]:
    command = [sys.executable, str(SCRIPT), "good.toml", "bad.toml", "--set", "train.epochs=1", "--out", "queue"]
    done = subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


def test_runs_end_one_by_one_and_a_second_start_goes_on(tmp_path: Path) -> None:
    """One run fails, which costs the other nothing; without time nothing is run."""
    (tmp_path / "good.toml").write_text(RECIPE)
    (tmp_path / "bad.toml").write_text(RECIPE + "lr = 1e30\n")
    code, lines = queue(tmp_path, "--minutes", "0")
    assert (code, lines) == (3, ["2 runs: 2 waiting, after 0 s"])
    code, lines = queue(tmp_path)
    assert code == 1
    assert sorted(lines[:4]) == ["bad-s0: failed", "bad-s0: running", "good-s0: done", "good-s0: running"]
    assert lines[:2] == ["good-s0: running", "bad-s0: running"], "side by side"
    good, bad = (json.loads((tmp_path / "queue" / f"{name}-s0.json").read_text()) for name in ("good", "bad"))
    assert good["state"] == "done" and good["val_images"] > 0 and good["recipe"]["train"]["epochs"] == 1
    assert (tmp_path / "queue" / "good-s0" / "model.safetensors").exists()
    assert bad["state"] == "failed" and bad["code"] == 1
    assert "the loss is" in bad["reason"] or "weights are not finite" in bad["reason"]
    code, lines = queue(tmp_path, "--minutes", "0")
    assert (code, lines) == (1, ["2 runs: 1 done, 1 failed, after 0 s"])
    (tmp_path / "queue" / "bad-s0.json").write_text('{"state": "done"}')
    assert queue(tmp_path) == (0, ["2 runs: 2 done, after 0 s"]), "nothing is run twice"
