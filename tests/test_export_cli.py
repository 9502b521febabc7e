"""``wnq export``: what it writes, prints and returns."""

import json

import pytest
import torch

import wnq
from wnq import cli

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A packed file of digits_cnn, calibrated and not trained."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = wnq.build_model("digits_cnn")
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
    wnq.calibrate_(model, torch.randn(32, 1, 8, 8, generator=torch.Generator().manual_seed(0))).eval()
    path = tmp_path_factory.mktemp("export") / "m.safetensors"
    wnq.save(model, path)
    return path


def run(*arguments):
    with pytest.raises(SystemExit) as exit_:
        cli.main([*map(str, arguments)])
    return exit_.value.code


def test_export_writes_the_file_and_its_proof(packed, tmp_path, capsys):
    out = tmp_path / "deploy"
    code = run(
        "export",
        packed,
        "--data",
        "digits",
        "--small",
        "--out",
        out,
        "--images",
        60,
        "--require-agreement",
        5,
        "--json",
    )
    printed = json.loads(capsys.readouterr().out)
    assert code == 0 and printed == json.loads((out / "model.onnx.proof.json").read_text())
    assert sorted(path.name for path in out.iterdir()) == ["model.onnx", "model.onnx.proof.json"]
    assert printed["inputs"] == 60 and printed["operators"]["integer"] == printed["operators"]["products"] == 4
    assert printed["bytes"]["file"] == (out / "model.onnx").stat().st_size
    assert (
        printed["bytes"]["weights_entropy"] <= printed["bytes"]["weights_true_width"] <= printed["bytes"]["weights"] + 8
    )
    assert printed["accuracy"]["float"] is None and printed["accuracy"]["trained"] == printed["accuracy"]["reference"]
    assert [row["batch"] for row in printed["latency"]] == [1, 32] and all(r["runs"] >= 5 for r in printed["latency"])
    assert [row["sums"] for row in printed["layers"]] == ["integer"] * 4


def test_too_little_agreement_fails(packed, tmp_path, capsys):
    """In ONNX Runtime an untrained net of 3 bits does not agree everywhere; the proof says so, and the file stays for a look."""
    code = run("export", packed, "--data", "digits", "--out", tmp_path, "--images", 350, "--require-agreement", 100)
    said = capsys.readouterr()
    proof = json.loads((tmp_path / "model.onnx.proof.json").read_text())
    if proof["engine_vs_trained"]["agreement"] < 100:
        assert code == 1 and "--require-agreement asks for 100 %" in said.err and "Traceback" not in said.err
    else:
        assert code == 0
    assert "products run in integers in onnxruntime" in said.out and "Float layers left: none" in said.out


def test_mistakes(packed, tmp_path, capsys):
    assert run("export", packed, "--to", "onyx", "--data", "digits") == 2
    assert "--to must be one of 'onnx'" in capsys.readouterr().err
    assert run("export", tmp_path / "none") == 1
    assert run("export", packed, "--out", tmp_path / "x") == 2
    assert "pass --data" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_float_model_is_refused(tmp_path, capsys):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    save_file(wnq.build_model("digits_cnn").state_dict(), tmp_path / "float.safetensors")
    code = run(
        "export", tmp_path / "float.safetensors", "--model", "digits_cnn", "--data", "digits", "--out", tmp_path / "x"
    )
    assert code == 1 and "is a float model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
