"""``wnq sensitivity`` and ``wnq plan --budget``: from a float run to a packed file, sentences, and a real kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wnq import cli
from wnq.plan import Plan
from wnq.sensitivity import load_sensitivity

FLOAT = '[model]\nname = "digits_cnn"\n[data]\nlimit = 400\n[train]\nepochs = 4\nbatch_size = 50\nlr = 0.05\n'
PLANNED = """
[model]
name = "digits_cnn"
start = "float"
[data]
limit = 400
[quantize]
plan = "plan.json"
[train]
epochs = 1
batch_size = 50
lr = 0.02
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the run ``float`` and ``s.json``, measured on it."""
    folder = tmp_path_factory.mktemp("sensitivity")
    (folder / "float.toml").write_text(FLOAT)
    (folder / "planned.toml").write_text(PLANNED)
    here = Path.cwd()
    os.chdir(folder)
    try:
        for command in (
            ["train", "float.toml", "--out", "float", "--threads", "1"],
            ["sensitivity", "float", "--out", "s.json", "--bits", "2,3,4,8"],
        ):
            with pytest.raises(SystemExit) as exit_:
                cli.main(command)
            assert exit_.value.code == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def wnq(capsys, trained, monkeypatch):
    """Run a command line in the trained folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(trained)

    def run(*arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


def good(result):
    code, out, err = result
    assert code == 0, err
    return out


def bad(result, code, *words):
    assert result[:2] == (code, ""), result
    lines = result[2].strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("wnq: error: "), result[2]
    for word in words:
        assert word in lines[0], lines[0]


def test_from_a_float_run_to_a_packed_file(wnq, trained):
    out = good(
        wnq("plan", "float", "--budget", "2.6bits", "--sensitivity", "s.json", "--a-bits", 4, "--save", "plan.json",
            "--first-last-bits", "none")
    )  # fmt: skip
    plan = Plan.load("plan.json")
    weights, bits = ([f(e) for e in plan.layers] for f in (lambda e: e.parameters, lambda e: e.method.w_bits))
    mean = sum(w * b for w, b in zip(weights, bits, strict=True)) / sum(weights)
    assert len(set(bits)) > 1 and mean <= 2.6
    assert f"2.6bits: {mean:.3f} bits a weight in the 4 layers chosen (23,824 weights), " in out
    assert "2 bits everywhere, the largest uniform width that fits, to " in out and "3 bits, which take " in out
    assert "Proven: no other choice" in out
    good(wnq("train", "planned.toml", "--out", "planned"))
    assert Plan.load("planned/plan.json") == plan
    packed = json.loads(good(wnq("pack", "planned", "--out", "m.wnq.safetensors", "--json")))
    assert {layer["name"]: layer["bits"] for layer in packed["layers"]} == {
        e.name: e.method.w_bits for e in plan.layers
    }
    accuracy = json.loads(good(wnq("evaluate", "m.wnq.safetensors", "--data", "digits", "--json")))["accuracy"]
    assert accuracy > 50  # ten classes; it works


def test_what_is_measured_and_said(wnq, trained):
    data = json.loads(good(wnq("sensitivity", "float", "--out", "s.json", "--json")))
    found = load_sensitivity("s.json")
    assert found.complete and len(data["rows"]) == len(found.rows) == 16
    assert found.samples == 400 and found.about == {
        "target": "float", "data": "digits", "split": "train", "samples": 400, "seed": 0,
    }  # fmt: skip
    assert len(data["sentences"]) == 4 and data["complete"] is True and data["out"] == "s.json"
    # Nothing is left to measure, so the table is shown again; the most harmful layer stands first.
    out = good(wnq("sensitivity", "float", "--out", "s.json"))
    worst = max(found.layers, key=lambda layer: found.row("alone", layer.name, 2).max.loss_change)
    lines = out.splitlines()
    assert lines[2].split() == ["layer", "weights", "loss", "accuracy", "(points)", "removing", "the", "tail", "saves"]
    assert lines[3].split()[:2] == [worst.name, f"{worst.parameters:,}"]
    assert f"2 bits: '{worst.name}' hurts most (" in out
    assert "Next: wnq plan float --budget 3bits --sensitivity s.json" in out


def test_the_images_are_a_fixed_part_of_the_training_images(wnq, tmp_path):
    def digest(*options):
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        good(wnq("sensitivity", "float", "--bits", "8", "--layer", "11", "--out", out, *options))
        found = load_sensitivity(out)
        assert [row.key for row in found.rows] == [("alone", "11", 8)]
        return found.fingerprint["data"], found.samples

    first, other, val = (digest("--samples", 50, *more) for more in ([], ["--seed", 1], ["--split", "val"]))
    assert first == digest("--samples", 50, "--seed", 0)
    assert first[1] == other[1] == val[1] == 50 and len({first, other, val}) == 3


def test_float_weights_need_a_network_and_images(wnq):
    weights = "float/model.safetensors"
    for options in (
        ["--model", "digits_cnn"],
        ["--model", "digits_cnn", "--data", "digits", "--data-option", "limit=400"],
    ):
        result = wnq("sensitivity", weights, *options, "--out", "w.json", "--bits", "3", "--layer", "6")
        if "--data" not in options:
            bad(result, 2, "pass --data")
    assert load_sensitivity("w.json").rows[0] == load_sensitivity("s.json").row("alone", "6", 3)


def test_mistakes_of_sensitivity(wnq, trained):
    good(wnq("plan", "digits_cnn", "--save", "plan.json"))
    good(wnq("train", "planned.toml", "--out", "quantized"))
    bad(
        wnq("sensitivity", "quantized", "--out", "q.json"),
        2,
        "quantized already. Measure what it started from: wnq sensitivity float",
    )
    assert not Path("q.json").exists()
    bad(wnq("sensitivity", "nothing"), 1, "nothing does not exist")
    bad(wnq("sensitivity", "float", "--bits", "2,x"), 2, "--bits must be integers separated by commas")
    bad(wnq("sensitivity", "float", "--bits", "0"), 2, "from 1 to 8")
    bad(wnq("sensitivity", "float", "--grid", "half"), 2, "grid must be one of 'full', 'symmetric', got 'half'")
    bad(wnq("sensitivity", "float", "--split", "test"), 2, "--split must be train or val")
    bad(wnq("sensitivity", "float", "--out", "s.txt"), 2, "--out must end in .json")
    bad(wnq("sensitivity", "float", "--layer", "12"), 2, "matches no layer", "Did you mean '11'?")
    text = Path("s.json").read_bytes()
    bad(wnq("sensitivity", "float", "--out", "s.json", "--samples", 50), 1, "s.json holds measurements with other data")
    assert Path("s.json").read_bytes() == text


def test_mistakes_of_a_budget(wnq, trained):
    bad(
        wnq("plan", "float", "--budget", "3bits"),
        2,
        "run wnq sensitivity float --out sensitivity.json and add --sensitivity",
    )
    bad(wnq("plan", "resnet20", "--budget", "3bits"), 2, "wnq sensitivity WEIGHTS --model resnet20 --data NAME")
    bad(wnq("plan", "float", "--sensitivity", "s.json"), 2, "--sensitivity is for --budget")
    with_file = ("--sensitivity", "s.json")
    bad(wnq("plan", "float", "--budget", "3bits", "--w-bits", 2, *with_file), 2, "--budget chooses the widths")
    bad(wnq("plan", "float", "--budget", "3 bit bits", *with_file), 2, "a budget must be a positive number")
    bad(wnq("plan", "float", "--budget", "1bits", *with_file), 2, "at their smallest widths", "measure smaller widths")
    bad(wnq("plan", "float", "--budget", "1KiB", *with_file), 2, "not chosen alone take 1.64 KiB")
    bad(
        wnq("plan", "float", "--budget", "3bits", "--solver", "best", *with_file),
        2,
        "solver must be one of 'exact', 'greedy'",
    )
    bad(wnq("plan", "resnet20", "--budget", "3bits", *with_file), 2, "layer 'layer1.0.conv1' was not measured")
    bad(
        wnq("plan", "float", "--budget", "3bits", "--num-classes", 3, *with_file),
        2,
        "a run's folder and knows its network",
    )
    bad(wnq("plan", "float", "--budget", "3bits", "--sensitivity", "no.json"), 1, "no.json does not exist")
    bad(wnq("plan", "float", "--budget", "3bits", "--sensitivity", "plan.toml"), 1, "does not exist")
    bad(
        wnq("plan", "float", "--budget", "3bits", "--sensitivity", "float.toml"),
        2,
        "cannot read the measurements float.toml",
    )


@pytest.mark.parametrize("solver", ["exact", "greedy"])
def test_a_size_holds_for_all_that_the_table_adds_up(wnq, solver):
    data = json.loads(
        good(wnq("plan", "float", "--budget", "9KiB", "--sensitivity", "s.json", "--solver", solver, "--json"))
    )
    chosen = data["budget"]
    assert [choice["layer"] for choice in chosen["choices"]] == ["3", "6"]
    assert data["totals"]["kib"] == pytest.approx(chosen["kib"], abs=0.005) and chosen["kib"] <= 9
    # First and last layer at 8 bits, three BatchNorms in float32.
    assert chosen["outside_bits"] == (144 + 640) * 8 + 2 * (16 + 32 + 64) * 32
    assert chosen["capacity_bits"] == 9 * 8192 - chosen["outside_bits"]
    found = load_sensitivity("s.json")
    for choice in chosen["choices"]:
        row = found.row("alone", choice["layer"], choice["w_bits"])
        assert choice["loss_change"] == (row.clip if choice["normalized"] else row.max).loss_change
        assert (choice["tail"], choice["normalized"]) == (row.tail, row.tail != "costs")
    assert chosen["cost"] == pytest.approx(sum(abs(c["loss_change"]) for c in chosen["choices"]), rel=1e-12)
    for plain in chosen["uniform"]:
        assert not plain["fits"] or plain["cost"] >= chosen["cost"]
    assert {layer["options"]["a_bits"] for layer in data["plan"]["layers"]} == {32}


def test_measured_inputs_are_planned(wnq):
    good(wnq("sensitivity", "float", "--inputs", "--bits", "2,4", "--granularity", "channel", "--out", "i.json"))
    options = ("--budget", "3bits", "--sensitivity", "i.json", "--json")
    layers = json.loads(good(wnq("plan", "float", *options)))["plan"]["layers"]
    for layer in layers[1:-1]:
        assert layer["options"]["a_bits"] == layer["options"]["w_bits"] and layer["options"]["granularity"] == "channel"
    assert layers[0]["options"]["a_bits"] == 8
    bad(wnq("plan", "float", *options, "--a-bits", 3), 2, "measured the inputs at their layer's width")


def test_a_killed_and_an_interrupted_measurement_go_on(wnq, trained, tmp_path):
    out = tmp_path / "s.json"
    options = ["float", "--out", str(out), "--bits", "1,2,3,4,8", "--samples", "200", "--batch-size", "4"]
    rows = 0
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = subprocess.Popen(
            [sys.executable, "-c", "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
             "from wnq import cli; cli.main()", "sensitivity", *options],
            cwd=trained, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        deadline = time.monotonic() + 300
        while not (out.exists() and len(load_sensitivity(out).rows) > rows + 1):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(sent)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code, err
        part = load_sensitivity(out)
        assert rows + 1 < len(part.rows) < 20 and not part.complete
        rows = len(part.rows)
    assert err.strip() == f"wnq: stopped; what was measured is in {out}. The same command continues."
    bad(wnq("plan", "float", "--budget", "3bits", "--sensitivity", out), 2, "its measurements are unfinished")
    good(wnq("sensitivity", *options))
    whole = tmp_path / "whole" / "s.json"
    good(wnq("sensitivity", *options[:2], str(whole), *options[3:]))
    assert load_sensitivity(out) == load_sensitivity(whole)
