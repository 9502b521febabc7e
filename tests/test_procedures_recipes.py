"""Procedures and stages in recipes, and the examples of the documentation."""

import json
import re
import signal
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wnq import get_plan, quantized_layers
from wnq.data import Batches, Dataset, load_data
from wnq.prepared import float_weight
from wnq.procedures.admm import ADMM
from wnq.recipe import (
    Recipe,
    build,
    load_recipe,
    load_run,
    procedure_of,
    recipe_from,
    resolve,
    run_recipe,
    stage_recipes,
)
from wnq.recipe.weights import load_float_weights_
from wnq.train import Interrupted
from wnq.train.progress import Progress

PAGE = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=128)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Path:
    """A float run."""
    folder = tmp_path_factory.mktemp("float")
    run_recipe(recipe_from({"data": {"limit": 128}, "train": TRAIN}), folder, data=data)
    return folder


TRAIN: dict[str, Any] = {"epochs": 2, "batch_size": 32, "lr": 0.05}


def make_recipe(**tables: Any) -> Recipe:
    return recipe_from({"data": {"limit": 128}, "train": TRAIN, **tables})


STAGES = [
    {"quantize": {"options": {"w_bits": 4, "a_bits": 32}}},
    {"quantize": {"options": {"a_bits": 32}}, "train": {"epochs": 1}},
    {"train": {"lr": 0.01}},
]
QUANTIZE = {"method": "dorefa", "options": {"w_bits": 2, "a_bits": 2}}


def logits(model: nn.Module, data: Dataset) -> torch.Tensor:
    return model(next(Batches(data.val, 64, mean=data.mean, std=data.std).epoch(0))[0])


# The [procedure] table


def test_procedure_of_a_recipe_trains_and_loads_again(tmp_path: Path, data: Dataset, start: Path):
    recipe = make_recipe(
        model={"start": str(start)}, quantize={"method": "elbnn"}, procedure={"name": "admm", "options": {"rho": 0.3}}
    )
    procedure = procedure_of(recipe.procedure)
    assert isinstance(procedure, ADMM) and procedure.rho == 0.3
    assert recipe_from(json.loads(json.dumps(recipe.to_json()))) == recipe
    model, result = run_recipe(recipe, tmp_path / "run", data=data)
    _, loaded = load_run(tmp_path / "run")
    assert torch.equal(logits(loaded, data), logits(model, data))
    written = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert "projected_0" in written["models"]["procedure"]
    again, same = run_recipe(recipe, tmp_path / "run", data=data, resume=True)
    assert torch.equal(logits(again, data), logits(model, data)) and same.val == result.val
    other = make_recipe(model={"start": str(start)}, quantize={"method": "elbnn"}, procedure={"name": "admm"})
    with pytest.raises(ValueError, match=r"\[procedure\] options: \{'rho': 0.3\} then, \{\} now"):
        run_recipe(other, tmp_path / "run", data=data, resume=True)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"nam": "admm"}, r"\[procedure\] has no key 'nam'. Did you mean 'name'\?"),
        ({"name": 3}, r"\[procedure\] name must be a string, got 3"),
        ({"options": {}}, r"\[procedure\] needs a name, such as name = 'admm'"),
        ({"name": "adm"}, r"unknown procedure 'adm'. Did you mean 'admm'\?"),
        ({"name": "admm", "options": {"rhoo": 1}}, r"has no option 'rhoo'. Did you mean 'rho'\?"),
        ({"name": "guided"}, r"procedure 'guided' needs \[model\] start: the float twin's weights"),
    ],
)
def test_bad_procedure_tables_are_explained(table: dict[str, Any], words: str, data: Dataset):
    with pytest.raises(ValueError, match=words):
        build(resolve(make_recipe(quantize=QUANTIZE, procedure=table), data))


# Stages


def test_stages_override_key_by_key():
    stages = [*STAGES, {"quantize": {"method": "lsq"}}, {"procedure": {"name": "admm"}}]
    recipe = make_recipe(quantize=QUANTIZE, procedure={"name": "guided", "options": {"joint": False}}, stages=stages)
    first, second, third, other, last = stage_recipes(recipe)
    assert [stage.quantize.options for stage in (first, second, third, other) if stage.quantize] == [
        {"w_bits": 4, "a_bits": 32},
        {"w_bits": 2, "a_bits": 32},
        {"w_bits": 2, "a_bits": 2},
        {},
    ]
    assert [stage.train.epochs for stage in (first, second, third)] == [2, 1, 2]
    assert [stage.train.lr for stage in (first, second, third)] == [0.05, 0.05, 0.01]
    assert first.procedure == recipe.procedure and last.procedure is not None
    assert (last.procedure.name, last.procedure.options) == ("admm", {})
    assert not any(stage.stages for stage in (first, second, third)) and first.data == recipe.data
    assert stage_recipes(third) == [third]
    assert recipe_from(json.loads(json.dumps(recipe.to_json()))) == recipe


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({}, "stages must be an array"),
        ([3], r"stages\[0\] must be a table, got 3"),
        ([{}, {"trian": {}}], r"stages\[1\] has no key 'trian'. Did you mean 'train'\?"),
        ([{"model": {}}], r"stages\[0\] has no key 'model'"),
        ([{"train": 3}], r"stages\[0\]: \[train\] must be a table, got 3"),
        ([{"train": {"epoch": 3}}], r"stages\[0\]: \[train\] has no key 'epoch'. Did you mean 'epochs'\?"),
        ([{"train": {"lr": -1}}], r"stages\[0\]: \[train\] lr must be greater than 0"),
        ([{"quantize": {"options": 2}}], r"stages\[0\]: \[quantize\] options must be a table, got 2"),
    ],
)
def test_bad_stages_are_explained(stages: Any, words: str):
    with pytest.raises(ValueError, match=words):
        make_recipe(quantize=QUANTIZE, stages=stages)


def test_mistake_in_a_later_stage_is_found_before_anything_is_trained(tmp_path: Path, data: Dataset):
    recipe = make_recipe(quantize=QUANTIZE, stages=[*STAGES, {"quantize": {"options": {"w_bits": 11}}}])
    with pytest.raises(ValueError, match=r"w_bits must be an integer from 1 to 8 .* got 11"):
        run_recipe(recipe, tmp_path / "run", data=data)
    assert not (tmp_path / "run").exists()


def test_stages_run_one_after_the_other(tmp_path: Path, data: Dataset, start: Path):
    recipe = make_recipe(model={"start": str(start)}, quantize=QUANTIZE, stages=STAGES)
    out = tmp_path / "run"
    model, result = run_recipe(recipe, out, data=data)
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"stage1", "stage2"}
    hidden = [get_plan(load_run(folder)[1]).layers[1].method for folder in (out / "stage1", out / "stage2", out)]
    assert [(method.w_bits, method.a_bits) for method in hidden] == [(4, 32), (2, 32), (2, 2)]
    assert len(result.history) == 2
    # The same by hand: three runs, each started from the float weights of the one before.
    before: Path | None = None
    for index, stage in enumerate(stage_recipes(resolve(recipe, data))):
        folder = tmp_path / f"by-hand-{index}"
        if before is not None:
            bare = build(resolve(make_recipe(), data))[0]
            load_float_weights_(bare, before)
            torch.save(bare.state_dict(), tmp_path / "between.pt")
            tables = stage.to_json()
            tables["model"]["start"] = str(tmp_path / "between.pt")
            stage = recipe_from(tables)
        by_hand, _ = run_recipe(stage, folder, data=data)
        before = folder
    for (name, value), other in zip(model.state_dict().items(), by_hand.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    again, loaded = load_run(out)
    assert again == resolve(recipe, data) and torch.equal(logits(loaded, data), logits(model, data))
    with pytest.raises(ValueError, match="holds a run already"):
        run_recipe(recipe, out, data=data)


def test_float_weights_are_taken_from_a_quantized_run(tmp_path: Path, data: Dataset):
    for method in ("lsq", "wnq"):
        recipe = make_recipe(quantize={"method": method, "options": {"a_bits": 3}})
        trained, _ = run_recipe(recipe, tmp_path / method, data=data)
        bare, _ = build(resolve(make_recipe(), data))
        load_float_weights_(bare, tmp_path / method)
        for name, layer, _ in quantized_layers(trained):
            assert torch.equal(bare.get_submodule(name).weight, float_weight(layer))
        state = trained.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in bare.state_dict().items() if name in state)


def interrupting(at: int):
    """Ctrl-C after so many reports."""
    seen: list[Progress] = []

    def on_step(progress: Progress) -> None:
        seen.append(progress)
        if len(seen) == at:
            signal.raise_signal(signal.SIGINT)

    return seen, on_step


def test_interrupted_stages_resume_and_finished_ones_are_not_run_again(
    tmp_path: Path, data: Dataset, start: Path, ctrl_c_raises: None
):
    recipe = make_recipe(
        model={"start": str(start)}, quantize=QUANTIZE, stages=[*STAGES, {"procedure": {"name": "guided"}}]
    )
    whole, result = run_recipe(recipe, tmp_path / "whole", data=data)
    out = tmp_path / "run"
    # An epoch has 4 steps and reports 5 times: stages 1 to 4 report 10, 5, 10 and 10 times. One more step ends what Ctrl-C met.
    for index, at in enumerate((3, 8, 5, 8)):
        _, on_step = interrupting(at)
        with pytest.raises(Interrupted):
            run_recipe(recipe, out, data=data, on_step=on_step, resume=index > 0)
        done = [(out / f"stage{stage}" / "result.json").exists() for stage in (1, 2, 3)]
        assert done == [[False] * 3, [True, False, False], [True, True, False], [True] * 3][index]
        with pytest.raises(ValueError, match="holds a run already"):
            run_recipe(recipe, out, data=data)
        with pytest.raises(ValueError, match="holds no finished run"):
            load_run(out)
    times = [(out / f"stage{stage}" / "result.json").stat().st_mtime_ns for stage in (1, 2, 3)]
    seen, on_step = interrupting(-1)
    resumed, same = run_recipe(recipe, out, data=data, resume=True, on_step=on_step)
    assert 0 < len(seen) < 10
    assert times == [(out / f"stage{stage}" / "result.json").stat().st_mtime_ns for stage in (1, 2, 3)]
    assert torch.equal(logits(resumed, data), logits(whole, data)) and same.val == result.val
    fewer = make_recipe(model={"start": str(start)}, quantize=QUANTIZE, stages=STAGES)
    with pytest.raises(ValueError, match=r"the settings changed \(\[\[stages\]\] differ\)"):
        run_recipe(fewer, out, data=data, resume=True)


# The documentation


def examples() -> list[str]:
    blocks = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return [block for block in blocks if "[procedure]" in block or "[[stages]]" in block]


def test_the_page_shows_every_procedure():
    shown = {tomllib.loads(block).get("procedure", {}).get("name") for block in examples()}
    assert shown == {"admm", "distribution_loss", "guided", None}


@pytest.mark.parametrize("index", range(4))
def test_examples_of_the_page_run(index: int, tmp_path: Path, data: Dataset, start: Path):
    path = tmp_path / "example.toml"
    path.write_text(examples()[index])
    tables = load_recipe(path).to_json()
    for table in (tables, *tables["stages"]):
        if "train" in table:
            table["train"]["epochs"] = 1
    if tables["model"]["start"] is not None:
        tables["model"]["start"] = str(start)
    tables["data"]["limit"] = 128
    run_recipe(recipe_from(tables), tmp_path / "run", data=data)
    _, loaded = load_run(tmp_path / "run")
    assert torch.isfinite(logits(loaded, data)).all()
