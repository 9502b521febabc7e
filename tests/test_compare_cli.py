"""``wnq compare``: what may be typed, what is shown, and its exit codes."""

import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from wnq import cli
from wnq.cli.board import Board
from wnq.cli.compare import contenders_of, sweep_of, widths_of
from wnq.cli.screen import Screen
from wnq.compare import Cell, CellState, Contender, Outcome
from wnq.train import Progress

RECIPE = """
[model]
name = "digits_mlp"
[data]
limit = 100
[train]
epochs = 1
batch_size = 50
lr = 0.05
"""


@pytest.fixture
def wnq(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run ``wnq compare`` in this process, in a folder with a recipe; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main(["compare", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


# What may be typed


def test_methods_are_spelled_with_options_and_labels() -> None:
    assert contenders_of("wnq, detached=wnq:max_gain=0,lsq:ewgs=0.01:activation=pact") == (
        Contender("wnq", "wnq"),
        Contender("detached", "wnq", {"max_gain": 0}),
        Contender("lsq:ewgs=0.01:activation=pact", "lsq", {"ewgs": 0.01, "activation": "pact"}),
    )
    assert contenders_of("lsq:ewgs=0.01")[0].slug == "lsq-ewgs=0.01"


def test_a_normalizer_for_all_changes_label_and_options_where_none_is_named() -> None:
    assert contenders_of("lsq,a=minmax,dorefa:normalize=none", "max_abs:0.5") == (
        Contender("lsq+max_abs:0.5", "lsq", {"normalize": "max_abs", "normalize_gain": 0.5}),
        Contender("a+max_abs:0.5", "minmax", {"normalize": "max_abs", "normalize_gain": 0.5}),
        Contender("dorefa:normalize=none", "dorefa", {"normalize": "none"}),
    )
    assert contenders_of("lsq", "standardize")[0].options == {"normalize": "standardize"}


def test_widths_and_sweeps_are_spelled() -> None:
    assert widths_of("2/2, 3/32,natural") == ((2, 2), (3, 32), None)
    assert sweep_of(["train.lr=0.02,0.05", "train.optimizer=sgd,adamw"]) == {
        "lr": (0.02, 0.05),
        "optimizer": ("sgd", "adamw"),
    }
    assert sweep_of(None) == {}


def test_help_has_examples_and_says_what_seeds_are(wnq) -> None:
    code, out, _ = wnq("--help")
    assert code == 0
    assert re.search(r"Examples?:\n +wnq compare\b", out)
    assert "3 means 0, 1 and 2" in re.sub(r"\s+", " ", out)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["r.toml", "--methods", "wnqq", "--bits", "2/2"], 2, ["unknown method 'wnqq'", "Did you mean 'wnq'"]),
        (["r.toml", "--methods", "wnq:max_gian=1", "--bits", "2/2"], 2, ["'max_gian'", "'max_gain'"]),
        (["r.toml", "--methods", "wnq:max_gain", "--bits", "2/2"], 2, ["KEY=VALUE"]),
        (["r.toml", "--methods", "wnq:grid=foo", "--bits", "2/2"], 2, ["grid must be one of"]),
        (["r.toml", "--methods", "wnq,,lsq", "--bits", "2/2"], 2, ["--methods must be"]),
        (["r.toml", "--methods", "=wnq", "--bits", "2/2"], 2, ["--methods must be"]),
        (["r.toml", "--methods", "wnq,wnq", "--bits", "2/2"], 2, ["'wnq' twice", "label"]),
        (["r.toml", "--methods", "wnq", "--bits", "2"], 2, ["--bits must be W/A"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/9"], 2, ["1 to 8", "9"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--seeds", "0"], 2, ["--seeds"]),
        (["r.toml", "--methods", "twn", "--bits", "3/3"], 2, ["no method is defined", "w_bits must be 2"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--sweep", "lr=1"], 2, ["--sweep must be train.KEY"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--sweep", "train.lr"], 2, ["--sweep must be train.KEY"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--sweep", "train.lrr=1,2"], 2, ["cannot sweep", "'lr'"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--normalize", "maxabs"], 2, ["'maxabs'", "'max_abs'"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--normalize", "max_abs:x"], 2, ["--normalize must be"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--set", "train.epoch=2"], 2, ["'epoch'", "'epochs'"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--set", "model.start=nope"], 1, ["nope does not exist"]),
        (
            ["r.toml", "--methods", "wnq", "--bits", "2/2", "--float-recipe", "nope.toml"],
            1,
            ["nope.toml does not exist"],
        ),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--float-recipe", "other.toml"], 2, ["[model] name must be"]),
        (["nope.toml", "--methods", "wnq", "--bits", "2/2"], 1, ["nope.toml does not exist"]),
        (["r.toml", "--bits", "2/2"], 2, ["--methods"]),
        (["r.toml", "--methods", "wnq", "--bits", "2/2", "--out", "r.toml/deeper"], 1, ["cannot write"]),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(wnq, arguments: list[str], code: int, words: list[str]) -> None:
    Path("other.toml").write_text(RECIPE.replace("digits_mlp", "digits_cnn"))
    got, out, err = wnq(*arguments)
    assert got == code, err
    assert out == ""
    assert err.startswith("wnq: error: ")
    assert len(err.strip().splitlines()) == 1, err
    assert [word for word in words if word not in err] == [], err
    assert not Path("runs").exists()


# What is shown


def test_json_alone_is_on_stdout_and_the_seed_is_the_first(wnq) -> None:
    code, out, err = wnq(
        "r.toml", "--methods", "wnq,twn", "--bits", "3/3", "--seeds", 2, "--seed", 4, "--out", "c", "--json"
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["out"] == "c"
    assert [cell["name"] for cell in data["cells"] if cell["kind"] == "float"] == ["float-s4", "float-s5"]
    written = json.loads(Path("c/results.json").read_text())
    assert {key: data[key] for key in written} == written
    lines = err.splitlines()
    assert "wnq-w3a3-s4  running" in lines
    assert any(re.fullmatch(r"wnq-w3a3-s5  done  \d+\.\d\d %", line) for line in lines)
    assert any(line.startswith("twn-w3a3-s4  not defined: ") for line in lines)
    assert "\x1b" not in err


def test_the_table_and_its_footer(wnq) -> None:
    Path("long.toml").write_text(RECIPE.replace("epochs = 1", "epochs = 2"))
    code, out, err = wnq("r.toml", "--methods", "lsq,twn", "--bits", "3/3", "--seeds", 2, "--float-recipe", "long.toml")
    assert code == 0, err
    results = json.loads(Path("runs/compare-r/results.json").read_text())
    row = results["table"][0]
    assert f"{row['mean']:.2f} ± {row['std']:.2f}" in out
    assert "not defined" in out
    assert "Recommended setting of lsq at W3A3: weight_decay x 0.5" in out
    assert "The float networks were trained 2 epochs, by settings of their own." in out
    assert "Everything is in runs/compare-r" in out
    code, out, _ = wnq("r.toml", "--methods", "lsq", "--bits", "3/3", "--seeds", 2, "--epochs-float", 3)
    assert code == 1, "the float starts were trained otherwise"
    assert wnq("r.toml", "--methods", "lsq", "--bits", "3/3", "--no-recommended", "--out", "n", "--seeds", 1)[0] == 0
    recipe = json.loads(Path("n/lsq-w3a3-s0/recipe.json").read_text())
    assert recipe["train"]["weight_decay"] == 5e-4


def test_nothing_finished_is_a_failure_with_the_first_reason(wnq) -> None:
    options = ["--set", "train.lr=1e30", "--set", "train.warmup_epochs=0", "--set", "train.epochs=3", "--seeds", 1]
    code, out, err = wnq("r.toml", "--methods", "wnq", "--bits", "2/2", "--out", "c", *options)
    assert (code, out) == (1, "")
    last = err.strip().splitlines()[-1]
    assert last.startswith("wnq: error: nothing finished; the runs are in c. float-s0 diverged: the loss is")
    assert last.endswith("(1 more did not finish.)")
    assert Path("c/results.md").exists()


def cell_state(name: str, state: str, outcome: Outcome | None = None, progress: Progress | None = None) -> CellState:
    return CellState(Cell(name, "method", "wnq", (2, 2), 0), state, outcome, progress)


def test_board_shows_every_cell_and_on_a_small_terminal_first_what_runs() -> None:
    screen = Screen()
    screen.notes = Console(file=io.StringIO(), force_terminal=True, width=100, height=12, color_system=None)
    board = Board(screen)
    with board.shown() as watch:
        for index in range(20):
            watch(cell_state(f"done-{index}", "done", Outcome("done", accuracy=90.0 + index / 10)))
        watch(cell_state("mine", "running", progress=Progress(3, 8, 1, 2, 0.5, 91.0, 1000.0, 5.0)))
        watch(cell_state("bad", "diverged", Outcome("diverged", "the loss is nan")))
        text = Console(file=io.StringIO(), width=100, height=12)
        text.print(board.table())
    lines = text.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines[0].split()[:4] == ["▸", "mine", "epoch", "3/8"]
    assert lines[1].split()[:3] == ["✗", "bad", "diverged:"]
    assert len(lines) <= 12
    assert lines[-1].strip() == "21 of 22 runs, 13 not shown"
    assert "mine" in screen.notes.file.getvalue()  # type: ignore[attr-defined]
