"""The demonstration, shortened: its files, keys and proofs. What its numbers say is for the full one."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wnq import demo
from wnq.artifact import inspect_file, load
from wnq.data import load_data

ROW = {"name", "method", "w_bits", "a_bits", "accuracy", "crest_before", "crest_after", "relative_error", "bytes"}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("demo") / "deep" / "er"
    seen: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        demo.run_demo(out, seed=3, fast=True, on_step=lambda name, _: seen.append(name))
    finally:
        torch.set_num_threads(threads)
    return SimpleNamespace(out=out, seen=seen, results=json.loads((out / "results.json").read_text()))


def test_rows_have_exactly_the_promised_keys_and_arms(ran: SimpleNamespace) -> None:
    rows = ran.results["rows"]
    assert all(row.keys() == ROW for row in rows)
    assert [(row["name"], row["method"], row["w_bits"], row["a_bits"]) for row in rows] == [
        ("float", "float", 32, 32),
        ("wnq-w3a3", "wnq", 3, 3),
        ("detached-w3a3", "wnq", 3, 3),
        ("minmax-w3a3", "minmax", 3, 3),
        ("wnq-w2a2", "wnq", 2, 2),
        ("detached-w2a2", "wnq", 2, 2),
        ("minmax-w2a2", "minmax", 2, 2),
    ]
    assert len({row["crest_before"] for row in rows}) == 1, "all arms start from one network"
    assert rows[0]["relative_error"] == 0
    assert all(row["relative_error"] > 0 for row in rows[1:])


def test_progress_names_every_arm_in_order(ran: SimpleNamespace) -> None:
    assert list(dict.fromkeys(ran.seen)) == ["start", *(arm.name for arm in demo.ARMS)]


def test_every_file_is_there_and_its_size_is_the_reported_one(ran: SimpleNamespace) -> None:
    files = {path.name for path in ran.out.iterdir()}
    assert {"results.json", "report.html", "README.txt", "float.safetensors"} <= files
    for row, proof in zip(ran.results["rows"], ran.results["proofs"], strict=True):
        path = ran.out / proof["file"]
        assert row["name"] == proof["name"]
        assert path.stat().st_size == row["bytes"]
        if row["method"] != "float":
            assert inspect_file(path).sha256 == proof["sha256"]
    assert "wnq-w2a2" in (ran.out / "report.html").read_text(encoding="utf-8")


def test_every_proof_is_bit_for_bit(ran: SimpleNamespace) -> None:
    assert len(ran.results["proofs"]) == len(demo.ARMS)
    images = len(load_data("digits").val)
    assert all(p["equal"] and p["max_difference"] == 0 and p["images"] == images for p in ran.results["proofs"])


def test_the_proof_can_fail(ran: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoiled(path: Path) -> torch.nn.Module:
        model = load(path)
        with torch.no_grad():
            next(model.parameters()).view(-1)[0] += 1e-3
        return model

    data = load_data("digits")
    model = load(ran.out / "wnq-w3a3.wnq.safetensors")
    assert demo.pack_and_prove(demo.ARMS[1], model, data, tmp_path)["equal"]
    monkeypatch.setattr(demo, "load", spoiled)
    proof = demo.pack_and_prove(demo.ARMS[1], model, data, tmp_path)
    assert not proof["equal"]
    assert proof["max_difference"] > 0


def test_settings_and_environment_are_recorded(ran: SimpleNamespace) -> None:
    results = ran.results
    assert (results["seed"], results["fast"]) == (3, True)
    assert results["config"]["training"]["seed"] == 3
    assert results["config"]["images"]["validation"] == len(load_data("digits").val)
    assert results["environment"]["torch"] == torch.__version__


def test_the_callers_random_state_is_left_alone() -> None:
    data = load_data("digits")
    before = torch.get_rng_state()
    demo.float_start(data, dataclasses.replace(demo.START, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_claim_that_fails_says_so() -> None:
    rows = [
        {"name": name, "accuracy": accuracy, "crest_after": crest, "relative_error": error}
        for name, accuracy, crest, error in [
            ("float", 99.0, 4.0, 0.0),
            *((f"{arm}-w{b}a{b}", 97.0, 4.0, 0.1) for b in (2, 3) for arm in ("wnq", "detached", "minmax")),
        ]
    ]
    claims = demo.check_claims(rows, [{"equal": True}, {"equal": False}])
    assert not any(claim["holds"] for claim in claims)
    assert all(text.startswith("Does not hold: ") for text in demo.sentences(claims))


def test_an_unwritable_folder_is_found_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot write"):
        demo.run_demo(tmp_path / "file" / "demo", on_step=lambda *_: pytest.fail("trained"))
