"""`wnq report` and `wnq stats` on anyone's checkpoint: files, folders, shards, several of them, mistakes, memory."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wnq import cli
from wnq.models import build_model

pytest.importorskip("matplotlib")
pytest.importorskip("jinja2")


@pytest.fixture
def wnq(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run a command line in an empty folder; return exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return int(exit_.value.code or 0), out, err

    return run


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
    assert not list(Path().glob("*.html"))


def state(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = np.random.default_rng(seed)
    weights = {
        "stem.conv": (8, 3, 3, 3),
        "blocks.0.attn.q_proj": (24, 16),
        "blocks.1.attn.q_proj": (16, 24),
        "head": (10, 16),
    }
    found = {f"{name}.weight": generator.standard_t(4, shape) * 0.1 for name, shape in weights.items()}
    found |= {"head.bias": np.zeros(10), "norm.weight": np.ones((16,))}
    return {name: torch.from_numpy(array).float() for name, array in found.items()}


LAYERS = ["stem.conv", "blocks.0.attn.q_proj", "blocks.1.attn.q_proj", "head"]


def write(kind: str) -> Path:
    tensors = state()
    if kind in (".safetensors", ".pt", ".pth", ".bin", ".ckpt"):
        path = Path(f"net{kind}")
        save_file(tensors, path) if kind == ".safetensors" else torch.save({"model": tensors, "epoch": 1}, path)
        return path
    folder = Path("net")
    folder.mkdir()
    if kind == "folder":
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = list(tensors)
    parts = {f"model-{k}.safetensors": names[k::2] for k in (0, 1)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, own in parts.items() for name in own}}))
    return index if kind == "index" else folder


@pytest.mark.parametrize("kind", [".safetensors", ".pt", ".pth", ".bin", ".ckpt", "folder", "shards", "index"])
def test_stats_of_any_checkpoint_without_a_network(wnq, kind: str):
    path = write(kind)
    rows = json.loads(good(wnq("stats", path, "--json", "--csv", "deep/t.csv")))
    assert sorted(row["name"] for row in rows) == sorted(LAYERS)
    tensors = state()
    with Path("deep/t.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for row, written in zip(rows, table, strict=True):
        values = np.abs(tensors[f"{row['name']}.weight"].double().numpy())
        crest = values.max() / np.sqrt((values**2).mean())
        assert row["crest"] == pytest.approx(crest, rel=1e-12)
        assert float(written["crest"]) == row["crest"]
        assert written["shape"] == "x".join(map(str, values.shape))
        assert written["bits"] == ""
    assert "crest" in good(wnq("stats", path))


@pytest.mark.parametrize("kind", [".pt", "shards"])
def test_report_of_a_checkpoint_writes_page_table_plots_and_numbers(wnq, kind: str):
    path = write(kind)
    command = [
        "report",
        path,
        "--out",
        "new/r.html",
        "--csv",
        "r.csv",
        "--plots",
        "plots",
        "--bits",
        "3,2",
        "--layers",
        "h*",
    ]
    out = json.loads(good(wnq(*command, "--json")))
    assert out["models"] == ["net"]
    assert (out["focus"], out["bits"]) == (3, [2, 3])
    assert sorted(layer["name"] for layer in out["evidence"][0]["layers"]) == sorted(LAYERS)
    assert [said["topic"] for said in out["answer"]][:2] == ["Cost", "Where"]
    page = Path("new/r.html").read_text(encoding="utf-8")
    assert re.findall(r"<summary><code>([^<]+)</code>", page) == ["head"]
    assert "4 of 6 tensors are weights" in page
    assert Path("r.csv").read_text().count("\n") == 1 + len(LAYERS)
    names = ["crest", "l3-head-histogram", "l3-head-tail", "prediction", "remedies", "widths-0"]
    if kind == "shards":  # whose tensors come in the order of the files
        names = [
            re.sub("l3", f"l{[layer['name'] for layer in out['evidence'][0]['layers']].index('head')}", n)
            for n in names
        ]
    assert sorted(path.name for path in Path("plots").iterdir()) == [
        f"{n}.{e}" for n in sorted(names) for e in ("png", "svg")
    ]
    assert sorted(out["plots"]) == sorted(str(path) for path in Path("plots").iterdir())


def test_report_says_the_answer_on_the_screen(wnq):
    out = good(wnq("report", write(".safetensors"), "--bits", "4", "--layers", "head"))
    assert "Cost: At 4 bits, with each layer's range set by its largest weight, the rounding error of net is" in out
    assert "written to report.html" in out


def test_two_checkpoints_side_by_side_are_matched_by_name(wnq):
    save_file(state(0), "before.safetensors")
    after = {name: tensor.clamp(-0.2, 0.2) for name, tensor in state(0).items()}
    torch.save(after, "after.pt")
    command = [
        "report",
        "before.safetensors",
        "after.pt",
        "--json",
        "--bits",
        "4",
        "--layers",
        "head",
        "--layers",
        "stem*",
    ]
    out = json.loads(good(wnq(*command)))
    assert out["models"] == ["before", "after"]
    crests = [[layer["crest"] for layer in model["layers"]] for model in out["evidence"]]
    page = Path("report.html").read_text(encoding="utf-8")
    assert "What changed against before" in page
    lower = sum(b < a for a, b in zip(*crests, strict=True))
    assert f"<b>{lower}</b> of 4 layers" in page
    drawn = re.findall(r"<summary><code>([^<]+)</code>", page)
    assert sorted(drawn) == ["head", "stem.conv"]


def test_a_checkpoint_beside_a_packed_file_and_a_network(wnq):
    from wnq import artifact
    from wnq.attach import quantize_
    from wnq.methods import get_method
    from wnq.plan import make_plan

    model = build_model("digits_mlp")
    save_file(model.state_dict(), "float.safetensors")
    artifact.save(quantize_(model, make_plan(model, get_method("wnq", w_bits=2))), "packed.wnq.safetensors")
    layer = json.loads(good(wnq("stats", "float.safetensors", "--json")))[0]["name"]
    out = json.loads(good(wnq("report", "float.safetensors", "packed.wnq.safetensors", "--json", "--layers", layer)))
    assert [model["values_only"] for model in out["evidence"]] == [False, True]
    assert [layer["name"] for layer in out["evidence"][0]["layers"]] == [
        layer["name"] for layer in out["evidence"][1]["layers"]
    ]
    network = json.loads(good(wnq("stats", "float.safetensors", "--model", "digits_mlp", "--json")))
    assert {row["kind"] for row in network} == {"Linear"}


def test_a_usual_name_of_a_file_is_told_with_its_folder(wnq):
    for name in ("first", "second"):
        Path(name).mkdir()
        save_file({"a.weight": state()["head.weight"]}, f"{name}/model.safetensors")
    out = json.loads(
        good(wnq("report", "first/model.safetensors", "second/model.safetensors", "--bits", "4", "--json"))
    )
    assert out["models"] == ["first/model", "second/model"]


def test_nan_weights_are_named_and_left_out(wnq):
    tensors = state()
    tensors["head.weight"][0, 0] = float("nan")
    torch.save(tensors, "net.pt")
    out = json.loads(good(wnq("report", "net.pt", "--bits", "4", "--layers", "head", "--json")))
    assert out["answer"][0]["topic"] == "Damage"
    assert "head of net (1 of 160)" in out["answer"][0]["text"]
    assert "nonfinite" in good(wnq("stats", "net.pt"))


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["missing.pt"], 1, ["missing.pt does not exist"]),
        (["text.pt"], 1, ["text.pt"]),
        (["empty"], 1, ["empty holds no checkpoint"]),
        (["biases.safetensors"], 1, ["biases.safetensors holds no weights to round"]),
        (["net.pt", "--bits", "4,9"], 2, ["--bits must be widths from 1 to 8", "'4,9'"]),
        (["net.pt", "--bits", "1", "--grid", "symmetric"], 2, ["--bits must be widths from 2 to 8"]),
        (["net.pt", "--grid", "fulll"], 2, ["--grid must be one of 'full', 'symmetric', got 'fulll'"]),
        (["net.pt", "--focus", "5"], 2, ["--focus must be one of --bits 2,3,4,8, got 5"]),
        (["net.pt", "--layers", "haed"], 2, ["--layers 'haed' matches no layer. Did you mean 'head'?"]),
        (["net.pt", "--layers", "head", "--all-plots"], 2, ["exclude each other"]),
        (["net.pt", "--bits", "4", "--layers", "head", "--out", "text.pt/r.html"], 1, ["cannot write text.pt/r.html"]),
    ],
)
def test_mistakes_are_told_in_one_sentence(wnq, arguments: list[str], code: int, words: list[str]):
    torch.save(state(), "net.pt")
    Path("text.pt").write_text("no checkpoint")
    Path("empty").mkdir()
    save_file({"bias": torch.ones(4)}, "biases.safetensors")
    bad(wnq("report", *arguments), code, *words)


def test_same_target_twice_keeps_its_paths_apart(wnq):
    save_file(state(), "net.safetensors")
    torch.save(state(), "net.pt")
    out = json.loads(good(wnq("report", "net.safetensors", "net.pt", "--bits", "4", "--layers", "head", "--json")))
    assert out["models"] == ["net.safetensors", "net.pt"]


MEASURE = """
import re, sys
from pathlib import Path
from wnq.cli import main
try:
    main(sys.argv[1:])
finally:  # unlike getrusage, it knows nothing of the process that started this one
    print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1], file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is measured as Linux tells it")
def test_memory_is_bounded_by_the_largest_tensor_and_not_by_the_file(tmp_path: Path):
    largest = 16 * 2**20  # bytes, as bfloat16
    weight = torch.randn(1024, largest // 2048, generator=torch.Generator().manual_seed(0)).bfloat16()
    for k in range(2):
        shard = {f"layers.{j}.weight": weight.roll(j, 0) for j in range(4 * k, 4 * k + 4)}
        save_file(shard, tmp_path / f"model-{k}.safetensors")
    command = [sys.executable, "-c", MEASURE, "report", str(tmp_path), "--bits", "4", "--layers", "layers.0"]
    done = subprocess.run([*command, "--out", str(tmp_path / "r.html")], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    # Three times the tensor, and what the program itself takes; the files are 128 MiB.
    assert int(done.stderr.split()[-1]) < 1024 * (3 * 16 + 300), done.stderr
