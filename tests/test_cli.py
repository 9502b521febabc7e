"""The command line: every command's help, output, sentences and exit codes, and a real Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wnq import cli, methods
from wnq.models import build_model

COMMANDS = [
    *("demo", "methods", "plan", "train", "evaluate", "compare", "settle", "sensitivity", "stats", "report"),
    *("pack", "inspect", "unpack", "export", "bench"),
]

FLOAT = '[model]\nname = "digits_cnn"\n[data]\nlimit = 200\n[train]\nepochs = 1\nbatch_size = 50\n'
QUANTIZED = """
[model]
name = "digits_cnn"
start = "float"
[data]
limit = 200
[quantize]
options = { w_bits = 3, a_bits = 3 }
[train]
epochs = 1
batch_size = 50
"""


@pytest.fixture(autouse=True)
def _one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipes, the runs ``float`` and ``quantized``, ``model.wnq.safetensors`` and ``bad.safetensors``."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "float.toml").write_text(FLOAT)
    (folder / "quantized.toml").write_text(QUANTIZED)
    (folder / "bad.safetensors").write_bytes(bytes(range(256)))
    here = Path.cwd()
    os.chdir(folder)
    try:
        for command in (
            ["train", "float.toml", "--out", "float"],
            ["train", "quantized.toml", "--out", "quantized"],
            ["pack", "quantized"],
        ):
            with pytest.raises(SystemExit) as exit_:
                cli.main(command)
            assert exit_.value.code == 0
    finally:
        os.chdir(here)
    return folder


@pytest.fixture
def wnq(capsys: pytest.CaptureFixture[str]):
    """Run a command line in this process; return exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


@pytest.fixture
def inside(trained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(trained)
    return trained


def good(result: tuple[int, str, str]) -> str:
    code, out, err = result
    assert code == 0, err
    return out


def bad(result: tuple[int, str, str], code: int, *words: str) -> None:
    assert result[0] == code, result
    assert result[1] == ""
    lines = result[2].strip().splitlines()
    assert len(lines) == 1, result[2]
    assert lines[0].startswith("wnq: error: ")
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("command", [*COMMANDS[:-1], "bench infer", "bench train"])
def test_help_shows_an_example_and_the_common_options(wnq, command: str) -> None:
    out = good(wnq(*command.split(), "--help"))
    assert re.search(rf"Examples?:\n +wnq {command}\b", out)
    for option in ("--json", "--seed", "--debug"):
        assert option in out


def test_the_commands_are_the_public_verbs(wnq) -> None:
    listed = good(wnq("--help")).split("Commands:\n")[1].split("\n\n")[0]
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == COMMANDS


def test_version(wnq) -> None:
    assert re.fullmatch(r"wnq \d+\.\d+\S*\n", good(wnq("--version")))


def test_methods(wnq) -> None:
    assert "arXiv:1907.00593" in good(wnq("methods"))
    rows = json.loads(good(wnq("methods", "--json")))["methods"]
    assert next(row for row in rows if row["name"] == "wnq")["options"]["max_gain"] == 1.0
    assert next(row for row in rows if row["name"] == "twn")["w_bits"] == [2]
    assert "weight_decay x 0.25 at 2 bits" in good(wnq("methods", "lsq"))
    page = good(wnq("methods", "wnq"))
    assert "Differences from the paper" in page
    assert "max_gain" in page
    assert "References" in json.loads(good(wnq("methods", "wnq", "--json")))["docstring"]
    bad(wnq("methods", "wnqq"), 2, "unknown method 'wnqq'", "'wnq'")


def test_plan_is_shown_saved_and_what_was_asked(wnq, tmp_path: Path) -> None:
    from wnq import Plan

    path = tmp_path / "plan.json"
    options = [
        "--w-bits",
        2,
        "--a-bits",
        2,
        "--option",
        "max_gain=0.5",
        "--keep-float",
        "6",
        "--override",
        "3=lsq:w_bits=4",
    ]
    out = good(wnq("plan", "digits_cnn", *options, "--num-classes", 7, "--save", path))
    assert "7x64" in out
    assert "kept float as asked" in out
    plan = Plan.load(path)
    assert {layer.name: (layer.method.name, layer.method.w_bits) for layer in plan.layers} == {
        "0": ("wnq", 8), "3": ("lsq", 4), "11": ("wnq", 8),
    }  # fmt: skip
    data = json.loads(good(wnq("plan", "digits_cnn", *options, "--num-classes", 7, "--json")))
    assert Plan.from_json(data["plan"]) == plan
    assert data["totals"]["layers"] == 3
    none = json.loads(good(wnq("plan", "digits_cnn", "--first-last-bits", "none", "--json")))
    assert {row["w_bits"] for row in none["rows"] if row["method"] == "wnq"} == {3}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["resnet2"], ["unknown model 'resnet2'", "resnet20"]),
        (["digits_cnn", "--method", "lqs"], ["unknown method 'lqs'", "'lsq'"]),
        (["digits_cnn", "--w-bits", "9"], ["bits", "9"]),
        (["digits_cnn", "--w-bits", "x"], ["--w-bits"]),
        (["digits_cnn", "--option", "max_gian=1"], ["'max_gian'", "'max_gain'"]),
        (["digits_cnn", "--option", "max_gain"], ["KEY=VALUE"]),
        (["digits_cnn", "--override", "9=lsq"], ["'9' matches no quantizable layer"]),
        (["digits_cnn", "--override", "3"], ["PATTERN=METHOD"]),
        (["digits_cnn", "--first-last-bits", "few"], ["integer or none"]),
        (["digits_cnn", "--model-option", "depth=3"], ["does not take depth"]),
        (["digits_cnn", "--seed", "-1"], ["--seed"]),
        (["digits_cnn", "--bogus"], ["--bogus"]),
        ([], ["model"]),
    ],
)
def test_what_is_typed_wrong_is_one_sentence_and_2(wnq, arguments: list[str], words: list[str]) -> None:
    bad(wnq("plan", *arguments), 2, *words)


def test_unknown_command(wnq) -> None:
    bad(wnq("quantise"), 2, "quantise")


def test_trained_run_is_evaluated_measured_and_packed(wnq, inside: Path) -> None:
    result = json.loads((inside / "quantized" / "result.json").read_text())
    row = json.loads(good(wnq("evaluate", "quantized", "--json")))
    assert row["accuracy"] == pytest.approx(result["val_accuracy"], abs=1e-9)
    packed = json.loads(
        good(wnq("evaluate", "model.wnq.safetensors", "--data", "digits", "--data-option", "limit=200", "--json"))
    )
    assert packed["accuracy"] == row["accuracy"]
    assert packed["images"] == 200
    assert "accuracy" in good(wnq("evaluate", "quantized"))


def test_stats_of_every_kind_of_target(wnq, inside: Path) -> None:
    rows = json.loads(good(wnq("stats", "quantized", "--json")))
    assert [row["name"] for row in rows] == ["0", "3", "6", "11"]
    assert all(row["relative_error"] > 0 for row in rows)
    assert json.loads(good(wnq("stats", "float", "--json")))[0]["bits"] is None
    code, out, err = wnq("stats", "model.wnq.safetensors")
    assert code == 0
    assert "crest" in out
    assert "quantized values only" in err
    torch.save(build_model("digits_mlp").state_dict(), "mlp.pt")
    rows = json.loads(good(wnq("stats", "mlp.pt", "--model", "digits_mlp", "--json")))
    assert len(rows) == 3
    bad(wnq("stats", "mlp.pt", "--model", "digits_cnn"), 1, "mlp.pt", "does not fit")
    bad(wnq("stats", "mlp.pt", "--model", "digits_cmm"), 2, "unknown model")


def test_report_of_one_run_compares_it_with_its_start(wnq, inside: Path) -> None:
    data = json.loads(good(wnq("report", "quantized", "--json")))
    assert data["models"] == ["float", "quantized"]
    assert "<svg" in Path("report.html").read_text(encoding="utf-8")
    several = json.loads(
        good(wnq("report", "float", "quantized", "model.wnq.safetensors", "--out", "x/r.html", "--json"))
    )
    assert several["models"] == ["float", "quantized", "model.wnq"]
    assert Path("x/r.html").exists()


def test_report_of_a_run_whose_start_is_gone_shows_the_run_alone(
    wnq, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = wnq("report", trained / "quantized", "--json")
    assert code == 0
    assert json.loads(out)["models"] == ["quantized"]
    assert "does not exist here" in err


def test_inspect_and_unpack(wnq, inside: Path) -> None:
    sizes = json.loads(good(wnq("inspect", "model.wnq.safetensors", "--json")))
    assert sizes["file_bytes"] == Path("model.wnq.safetensors").stat().st_size
    assert sizes["ratio"] > 4
    assert sizes["sha256"] in good(wnq("inspect", "model.wnq.safetensors"))
    data = json.loads(good(wnq("unpack", "model.wnq.safetensors", "--json")))
    state = load_file("state.safetensors")
    assert data["tensors"] == len(state)
    build_model("digits_cnn").load_state_dict(state)
    assert len(state["3.weight"].unique()) <= 8


def test_resume_of_a_finished_run_and_set(wnq, inside: Path) -> None:
    data = json.loads(good(wnq("train", "float.toml", "--out", "float", "--resume", "--json")))
    assert len(data["history"]) == 1
    bad(wnq("train", "float.toml", "--out", "float"), 1, "holds a run already", "--resume")
    bad(wnq("train", "float.toml", "--out", "float", "--resume", "--set", "train.lr=0.2"), 1, "the settings changed")
    out = good(
        wnq("train", "float.toml", "--out", "w2", "--set", "quantize.options.w_bits=2", "--seed", 5, "--tensorboard")
    )
    assert "wnq pack w2" in out
    recipe = json.loads(Path("w2/recipe.json").read_text())
    assert (recipe["quantize"]["options"]["w_bits"], recipe["train"]["seed"]) == (2, 5)
    assert list(Path("w2").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    ("assign", "words"),
    [
        ("train.epoch=3", ["[train]", "'epoch'", "'epochs'"]),
        ("train.epochs=three", ["epochs must be", "'three'"]),
        ("train.epochs=-1", ["epochs must be greater than 0"]),
        ("epochs=3", ["SECTION.KEY=VALUE"]),
        ("train.lr.deep=3", ["'lr' is not a table"]),
        ("quantize.method=wnqq", ["unknown method"]),
        ('quantize.keep_float=["9"]', ["matches no quantizable layer"]),
        ("model.name=digits_cmm", ["unknown model"]),
        ("data.name=digitz", ["unknown data set", "'digits'"]),
    ],
)
def test_a_mistake_in_the_recipe_is_2_and_leaves_no_folder(wnq, inside: Path, assign: str, words: list[str]) -> None:
    bad(wnq("train", "float.toml", "--out", "mistake", "--set", assign), 2, *words)
    assert not Path("mistake").exists()


def test_missing_and_damaged_files_are_1(wnq, inside: Path) -> None:
    bad(wnq("train", "nope.toml"), 1, "nope.toml does not exist")
    bad(wnq("train", "float.toml", "--out", "n", "--set", "model.start=nope"), 1, "nope does not exist")
    for command in ("evaluate", "stats", "report", "pack", "inspect", "unpack"):
        bad(wnq(command, "nope"), 1, "nope does not exist")
    for command in ("evaluate", "stats", "inspect", "unpack"):
        bad(wnq(command, "bad.safetensors"), 1, "bad.safetensors", "not a safetensors file")
    data = bytearray(Path("model.wnq.safetensors").read_bytes())
    data[-5] ^= 1
    Path("flipped.safetensors").write_bytes(data)
    bad(wnq("inspect", "flipped.safetensors"), 1, "damaged")
    Path("empty").mkdir(exist_ok=True)
    bad(wnq("pack", "empty"), 1, "no finished run")
    bad(wnq("pack", "float", "--out", "f.safetensors"), 1, "no plan")
    bad(wnq("evaluate", "model.wnq.safetensors"), 2, "--data")
    bad(wnq("evaluate", "quantized", "--device", "toaster"), 2, "--device")
    bad(wnq("evaluate", "quantized", "--data-option", "limt=3"), 2, "'limit'")
    bad(wnq("pack", "quantized", "--out", "model.bin"), 2, ".safetensors")


def test_unwritable_places_are_1(wnq, inside: Path) -> None:
    under = "bad.safetensors/deeper"
    bad(wnq("plan", "digits_cnn", "--save", f"{under}/p.json", "--json"), 1, "cannot write")
    bad(wnq("pack", "quantized", "--out", f"{under}/m.safetensors"), 1, "cannot write")
    bad(wnq("unpack", "model.wnq.safetensors", "--out", f"{under}/m.safetensors"), 1, "cannot write")
    bad(wnq("report", "quantized", "--out", f"{under}/r.html"), 1, "cannot write")
    bad(wnq("train", "float.toml", "--out", under), 1, "cannot write")
    bad(wnq("demo", "--out", under), 1, "cannot write")


def test_divergence_is_one_sentence(wnq, inside: Path) -> None:
    code, _, err = wnq(
        "train", "float.toml", "--out", "diverged", "--set", "train.lr=1e30", "--set", "train.warmup_epochs=0"
    )
    assert code == 1
    assert "wnq: error: the loss is" in err


def test_an_unforeseen_error_is_one_line_and_debug_shows_where(wnq, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise KeyError("surprise")

    monkeypatch.setattr(methods, "list_methods", broken)
    bad(wnq("methods"), 1, "unexpected KeyError", "surprise", "--debug")
    code, _, err = wnq("methods", "--debug")
    assert code == 1
    assert "Traceback" in err


def test_text_in_brackets_is_shown_as_it_is(wnq) -> None:
    bad(wnq("plan", "digits_cnn", "--override", "[bold]=lsq"), 2, "[bold]")


def test_ctrl_c_saves_the_state_and_says_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / "long.toml").write_text(FLOAT.replace("epochs = 1", "epochs = 100000"))
    command = [
        sys.executable,
        "-m",
        "wnq.cli",
        "train",
        "long.toml",
        "--out",
        "a run",
        "--set",
        "train.momentum=0.5",
        "--threads",
        "1",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "a run" / "metrics.jsonl").exists():
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("wnq: stopped; the state is saved in a run.")
    assert last.endswith(
        "Continue with: wnq train long.toml --out 'a run' --resume --set train.momentum=0.5 --threads 1"
    )
    assert (tmp_path / "a run" / "checkpoint.pt").exists()
    assert out == ""
    assert "\x1b" not in err


def test_demo_fast_json(wnq, tmp_path: Path) -> None:
    data = json.loads(good(wnq("demo", "--out", tmp_path / "d", "--fast", "--seed", 1, "--json")))
    assert len(data["rows"]) == 7
    assert all(proof["equal"] for proof in data["proofs"])
    assert json.loads((tmp_path / "d" / "results.json").read_text())["seed"] == 1
    assert set(data["files"]) >= {"results.json", "report.html", "float.safetensors", "wnq-w2a2.wnq.safetensors"}


def test_the_command_line_itself_imports_nothing_heavy() -> None:
    stub = "pkg = types.ModuleType('wnq'); pkg.__path__ = [path]; sys.modules['wnq'] = pkg"
    code = f"import sys, types; path = {str(Path(cli.__file__).parents[1])!r}; {stub}; import wnq.cli; "
    code += "print([name for name in ('torch', 'numpy', 'accelerate', 'matplotlib') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_normalizer_in_front_of_a_method(wnq, tmp_path: Path) -> None:
    plan = json.loads(good(wnq("plan", "digits_cnn", "--method", "twn", "--normalize", "max_abs:0.3", "--json")))
    options = plan["plan"]["layers"][1]["options"]
    assert (options["normalize"], options["normalize_gain"]) == ("max_abs", 0.3)
    bad(wnq("plan", "digits_cnn", "--normalize", "maxabs"), 2, "normalize must be one of 'none', 'max_abs'")
    bad(wnq("plan", "digits_cnn", "--normalize", "max_abs:much"), 2, "must be NAME or NAME:GAIN with a number")
    recipe = tmp_path / "float.toml"
    recipe.write_text('[model]\nname = "digits_mlp"\n')
    bad(wnq("train", recipe, "--normalize", "max_abs"), 2, "has no [quantize] table")


def test_a_width_that_a_method_does_not_define_is_explained(wnq) -> None:
    bad(wnq("plan", "digits_cnn", "--method", "twn", "--w-bits", "3"), 2, "method 'twn': w_bits must be 2 (or 32")
    bad(wnq("plan", "digits_cnn", "--method", "lsq", "--w-bits", "1"), 2, "an integer from 2 to 8")
