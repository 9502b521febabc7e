"""A comparison: what it runs, what it remembers, and that its results say what happened."""

import csv
import dataclasses
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from wnq.compare import CellState, Comparison, Contender, cells_of, check, compare
from wnq.compare.cells import recipe_of, recommended_changes
from wnq.compare.definition import comparison_from, merged
from wnq.compare.jobs import Images, part_of, read_outcome
from wnq.compare.workers import StreamWorker
from wnq.data import Dataset, load_data
from wnq.methods import MethodInfo, list_methods
from wnq.recipe import Recipe, load_recipe, recipe_from, run_recipe
from wnq.train import Interrupted, TrainConfig

TABLES: dict[str, Any] = {
    "model": {"name": "digits_mlp"},
    "data": {"limit": 100},
    "train": {"epochs": 1, "batch_size": 50, "lr": 0.05, "warmup_epochs": 0.0},
}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=100)


def make_recipe(**train: Any) -> Recipe:
    return recipe_from({**TABLES, "train": {**TABLES["train"], **train}})


def make(
    *methods: str, widths: Any = ((2, 2),), seeds: Any = (0,), recipe: Recipe | None = None, **more: Any
) -> Comparison:
    contenders = tuple(Contender(name, name) for name in methods or ("wnq",))
    return Comparison(recipe or make_recipe(), contenders, tuple(widths), tuple(seeds), **more)


def states(results: dict[str, Any]) -> dict[str, str]:
    return {cell["name"]: cell["state"] for cell in results["cells"]}


# One whole comparison, which several tests read


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("compare") / "deep" / "er"
    comparison = Comparison(
        make_recipe(epochs=2),
        (Contender("wnq", "wnq"), Contender("detached", "wnq", {"max_gain": 0.0}), Contender("twn", "twn"),
         Contender("lsq", "lsq")),
        ((2, 2), (3, 3), None),
        (0, 1, 2),
    )  # fmt: skip
    seen: list[CellState] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    results = compare(comparison, out, data=data, watch=seen.append)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    return SimpleNamespace(out=out, comparison=comparison, results=results, seen=seen)


def test_every_cell_is_there_and_what_is_not_defined_is_said(ran: SimpleNamespace) -> None:
    found = states(ran.results)
    undefined = {f"twn-w3a3-s{seed}" for seed in range(3)}
    assert {name for name, state in found.items() if state == "not defined"} == undefined
    assert {state for name, state in found.items() if name not in undefined} == {"done"}
    # Three floats; at their natural widths all but twn stand where they stood before.
    assert len(found) == 3 + 3 * (4 * 2 + 1)
    assert not any((ran.out / name).exists() for name in undefined)
    assert [state.state for state in ran.seen if state.cell.name == "twn-w3a3-s0"] == ["not defined"]
    told = [state.state for state in ran.seen if state.cell.name == "wnq-w2a2-s1"]
    assert told[:2] == ["waiting", "running"]
    assert told[-1] == "done"
    assert any(state.progress is not None and state.progress.epoch == 2 for state in ran.seen)


def test_a_cell_is_the_run_that_its_recipe_makes_by_hand(ran: SimpleNamespace, data: Dataset, tmp_path: Path) -> None:
    base = make_recipe(epochs=2, seed=1)
    _, start = run_recipe(base, tmp_path / "float", data=data)
    by_hand = recipe_from(
        {
            **base.to_json(),
            "model": {**TABLES["model"], "start": str(tmp_path / "float")},
            "quantize": {"method": "wnq", "options": {"w_bits": 2, "a_bits": 2, "max_gain": 0.0}},
        }
    )
    _, quantized = run_recipe(by_hand, tmp_path / "quantized", data=data)
    cells = {cell["name"]: cell for cell in ran.results["cells"]}
    assert cells["float-s1"]["accuracy"] == start.val.accuracy
    assert cells["detached-w2a2-s1"]["accuracy"] == quantized.val.accuracy
    history = json.loads((ran.out / "detached-w2a2-s1" / "result.json").read_text())["history"]
    assert [row["val_loss"] for row in history] == [row["val_loss"] for row in quantized.history]
    assert (ran.out / "detached-w2a2-s1" / "model.safetensors").exists()


def test_table_is_what_numpy_makes_of_the_runs(ran: SimpleNamespace) -> None:
    import numpy as np

    def values(name: str) -> np.ndarray:
        paths = [ran.out / f"{name}-s{seed}" / "result.json" for seed in range(3)]
        return np.array([json.loads(path.read_text())["val_accuracy"] for path in paths])

    rows = {(row["label"], row["bits"]): row for row in ran.results["table"]}
    assert len(rows) == 12
    for label, bits in (("wnq", "W2A2"), ("twn", "natural"), ("lsq", "W3A3")):
        row, found = rows[label, bits], values(f"{label}-{bits.lower() if bits != 'natural' else 'w2a32'}")
        assert row["mean"] == pytest.approx(found.mean(), abs=1e-9)
        assert row["std"] == pytest.approx(found.std(ddof=1), abs=1e-9)
        assert row["drop"] == pytest.approx((values("float") - found).mean(), abs=1e-9)
    assert rows["wnq", "natural"]["mean"] == rows["wnq", "W3A3"]["mean"]
    assert (rows["twn", "natural"]["w_bits"], rows["twn", "natural"]["a_bits"]) == (2, 32)
    assert rows["twn", "W3A3"]["mean"] is None
    assert "w_bits must be 2" in rows["twn", "W3A3"]["undefined"]
    assert ran.results["float"]["mean"] == pytest.approx(values("float").mean(), abs=1e-9)


def test_json_is_what_was_returned_and_complete(ran: SimpleNamespace) -> None:
    written = json.loads((ran.out / "results.json").read_text())
    assert written == json.loads(json.dumps(ran.results))
    assert comparison_from(written["comparison"]) == ran.comparison
    assert written["environment"]["torch"] == torch.__version__
    assert written["images"] == {"training": 100, "evaluation": 100}
    for cell in written["cells"]:
        if cell["state"] == "done":
            assert recipe_from(cell["recipe"]).train.seed == cell["seed"]
            assert cell["epochs"] == 2
            assert cell["best_accuracy"] >= cell["accuracy"]
            assert cell["best_epoch"] in (1, 2)
            assert cell["environment"]["threads"] == 1


def test_csv_has_a_row_a_cell(ran: SimpleNamespace) -> None:
    rows = list(csv.DictReader((ran.out / "results.csv").read_text().splitlines()))
    assert len(rows) == len(ran.results["cells"])
    row = next(row for row in rows if row["name"] == "detached-w2a2-s2")
    cell = next(cell for cell in ran.results["cells"] if cell["name"] == "detached-w2a2-s2")
    assert float(row["accuracy"]) == cell["accuracy"]
    assert json.loads(row["options"]) == {"max_gain": 0.0}
    assert (row["w_bits"], row["a_bits"], row["seed"], row["lr"]) == ("2", "2", "2", "0.05")
    undefined = next(row for row in rows if row["name"] == "twn-w3a3-s0")
    assert (undefined["state"], undefined["accuracy"]) == ("not defined", "")
    assert "w_bits must be 2" in undefined["reason"]


def test_markdown_shows_the_table_and_where_its_settings_come_from(ran: SimpleNamespace) -> None:
    page = (ran.out / "results.md").read_text()
    row = next(row for row in ran.results["table"] if (row["label"], row["bits"]) == ("wnq", "W2A2"))
    assert f"| `wnq` | {row['mean']:.2f} ± {row['std']:.2f}; drop {row['drop']:+.2f}; rank" in page
    assert "| `twn` |" in page
    assert "| not defined |" in page
    assert "| W2A32 |" in page.split("## natural")[1]
    source = MethodInfo.of("lsq").recommended.source
    assert f"- Recommended setting of lsq at W2A2: weight_decay x 0.25 ({source})." in page
    assert "Not defined: twn at W3A3" in page
    cells = [line.count(" | ") for line in page.split("## W2A2")[1].split("##")[0].splitlines() if line.startswith("|")]
    assert len(set(cells)) == 1


def test_pictures_show_methods_and_floats(ran: SimpleNamespace) -> None:
    png = (ran.out / "accuracy.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 10_000
    ElementTree.parse(ran.out / "accuracy.svg")
    from wnq.compare.chart import figure_of

    axes = figure_of(ran.results).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["W2A2", "W3A3", "W2A32"]
    texts = [text.get_text() for text in axes.figure.legends[0].get_texts()]
    assert texts == ["float", "wnq", "detached", "twn", "lsq"]
    drawn = sorted(float(y) for container in axes.containers for y in container.lines[0].get_ydata())
    expected = {
        (r["label"], r["w_bits"], r["a_bits"]): r["mean"] for r in ran.results["table"] if r["mean"] is not None
    }
    assert drawn == pytest.approx(sorted(expected.values()))
    lines = [line for container in axes.containers for line in container.lines[2]]
    assert len(lines) == len(axes.containers)


def test_nothing_finished_is_run_again(ran: SimpleNamespace, data: Dataset) -> None:
    before = {path: path.stat().st_mtime_ns for path in ran.out.glob("*/*")}
    results = compare(ran.comparison, ran.out, data=data, watch=lambda s: s.progress and pytest.fail("trained"))
    assert {path: path.stat().st_mtime_ns for path in ran.out.glob("*/*")} == before
    assert results["table"] == ran.results["table"]


# Adding to a comparison, and what may not change


def test_methods_widths_and_seeds_can_be_added(tmp_path: Path, data: Dataset) -> None:
    compare(make("wnq"), tmp_path, data=data)
    results = compare(make("minmax", widths=((3, 3),), seeds=(1,)), tmp_path, data=data)
    assert {name for name, state in states(results).items() if state == "done"} == {
        "float-s0", "wnq-w2a2-s0", "float-s1", "minmax-w3a3-s1",
    }  # fmt: skip
    assert states(results)["wnq-w3a3-s1"] == "not run"
    rows = {(row["label"], row["bits"]): row for row in results["table"]}
    assert len(rows) == 4
    assert rows["minmax", "W2A2"]["mean"] is None
    page = (tmp_path / "results.md").read_text()
    assert "| `minmax` | not run | " in page
    assert "(1 of 2; 1 not run)" in page
    assert "Not run yet: 6 of 10 cells." in page
    assert "No ranks: with one seed" in page


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe": make_recipe(lr=0.1)}, "recipe.train.lr: 0.05 then, 0.1 now"),
        ({"recommended": False}, "recommended: True then, False now"),
        ({"sweep": {"lr": (0.1,)}}, "sweep.lr: None then, [0.1] now"),
        ({"float_train": TrainConfig(epochs=3)}, "float_train: None then"),
        ({"contenders": (Contender("wnq", "wnq", {"max_gain": 0.5}),)}, "wnq: wnq {} then, wnq {'max_gain': 0.5} now"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(change: dict[str, Any], words: str) -> None:
    then = make("wnq")
    with pytest.raises(ValueError, match="the comparison changed") as caught:
        merged(then, dataclasses.replace(then, **change))
    assert words in str(caught.value)
    moved = dataclasses.replace(then.recipe, data=dataclasses.replace(then.recipe.data, folder="elsewhere"))
    assert merged(then, dataclasses.replace(then, recipe=moved)).recipe == moved


def test_a_refused_comparison_leaves_the_folder_alone(tmp_path: Path, data: Dataset) -> None:
    compare(make("wnq"), tmp_path, data=data)
    before = (tmp_path / "compare.json").read_bytes()
    with pytest.raises(ValueError, match=r"cannot continue .*compare\.json: .*recipe\.train\.lr: 0\.05 then, 0\.1 now"):
        compare(make("wnq", recipe=make_recipe(lr=0.1)), tmp_path, data=data)
    assert (tmp_path / "compare.json").read_bytes() == before
    (tmp_path / "compare.json").write_text('{"format": 9}')
    with pytest.raises(ValueError, match="format 9 of a comparison"):
        compare(make("wnq"), tmp_path, data=data)
    with pytest.raises(ValueError, match="holds a run already"):
        compare(make("wnq"), tmp_path / "float-s0", data=data)


def test_a_second_comparison_in_the_folder_waits_outside(tmp_path: Path, data: Dataset) -> None:
    def again(_: CellState) -> None:
        with pytest.raises(ValueError, match="another process runs a comparison"):
            compare(make("wnq"), tmp_path, data=data)

    compare(make("wnq"), tmp_path, data=data, watch=again)


# What is wrong with a comparison


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: make("wnqq"), "unknown method 'wnqq'"),
        (lambda: Contender("a", "wnq", {"max_gian": 1}), "no option 'max_gian'. Did you mean 'max_gain'"),
        (lambda: Contender("a", "wnq", {"w_bits": 2}), "w_bits is not an option of a compared method"),
        (lambda: Contender("a/b", "wnq"), "label 'a/b'"),
        (lambda: Contender("float", "wnq") and make("wnq", "wnq"), "'wnq' twice"),
        (lambda: Comparison(make_recipe(), (Contender("float", "wnq"),), ((2, 2),)), "'float' twice (or it is taken)"),
        (lambda: make(widths=((2, 2), (2, 2))), "'W2A2' twice"),
        (lambda: make(widths=((2, 9),)), "1 to 8, or 32 for float, got 9"),
        (lambda: make(widths=()), "at least one width"),
        (lambda: make(seeds=(-1,)), "must not be negative"),
        (lambda: make(sweep={"lrr": (1,)}), "cannot sweep train.lrr. Did you mean 'lr'"),
        (lambda: make(sweep={"seed": (1,)}), "cannot sweep train.seed"),
        (lambda: make(sweep={"lr": (0.1, 0.1)}), "values that differ"),
        (lambda: make(sweep={"lr": (-1.0,)}), "lr must be greater than 0"),
        (lambda: make(held_out=1.0), "held_out"),
        (lambda: make(recipe=recipe_from({**TABLES, "quantize": {"plan": "p.json"}})), "[quantize] plan"),
        (
            lambda: make(recipe=recipe_from({**TABLES, "model": {"start": "x"}}), float_train=TrainConfig()),
            "they are not trained",
        ),
    ],
)
def test_what_does_not_fit_together_is_explained(build: Any, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        build()
    assert words in str(caught.value)


def test_what_fits_no_run_is_found_before_any(data: Dataset) -> None:
    wrong_option = Comparison(make_recipe(), (Contender("wnq", "wnq", {"grid": "foo"}),), ((2, 2),))
    no_layer = make(recipe=recipe_from({**TABLES, "quantize": {"keep_float": ["nope"]}}))
    no_start = make(recipe=recipe_from({**TABLES, "model": {"name": "digits_mlp", "start": "no-{seed}"}}), seeds=(3,))
    for comparison, error, words in (
        (
            make("twn", widths=((3, 3),)),
            ValueError,
            "no method is defined at any of the widths. twn: method 'twn': w_bits",
        ),
        (wrong_option, ValueError, "wnq: grid must be"),
        (no_layer, ValueError, "matches no quantizable layer"),
        (no_start, FileNotFoundError, "the start no-3 does not exist"),
    ):
        with pytest.raises(error) as caught:
            check(comparison, data)
        assert words in str(caught.value)


def test_a_width_of_the_inputs_that_a_method_does_not_define_is_no_error(data: Dataset) -> None:
    from wnq.activations import list_inputs

    narrow = next(info for info in list_inputs() if set(range(1, 9)) - set(info.widths))
    missing = min(set(range(1, 9)) - set(narrow.widths))
    contender = Contender("x", "minmax", {"activation": narrow.name})
    comparison = Comparison(make_recipe(), (contender, Contender("lsq", "lsq")), ((2, missing), (2, narrow.widths[0])))
    check(comparison, data)
    cells = {cell.name: cell.undefined for cell in cells_of(comparison)}
    assert str(missing) in cells[f"x-w2a{missing}-s0"]
    assert cells[f"x-w2a{narrow.widths[0]}-s0"] == ""


def test_a_normalizer_that_a_method_refuses_is_not_defined(data: Dataset) -> None:
    refusing = next((info.name for info in list_methods() if info.no_normalizer), None)
    if refusing is None:
        pytest.skip("every method takes a normalizer")
    both = tuple(Contender(name, name, {"normalize": "max_abs"}) for name in (refusing, "lsq"))
    comparison = Comparison(make_recipe(), both, (None,))
    check(comparison, data)
    undefined = {cell.label: cell.undefined for cell in cells_of(comparison) if cell.kind == "method"}
    assert "takes no normalizer" in undefined[refusing]
    assert undefined["lsq"] == ""


# Training settings


def test_recommended_settings_are_factors_of_the_recipe() -> None:
    comparison = make("lsq", "wnq", widths=((2, 2), (3, 3), (4, 4)), recipe=make_recipe(weight_decay=1e-3))
    decays = {
        cell.name: recipe_of(cell, comparison, Path("x"), {}).train.weight_decay
        for cell in cells_of(comparison)
        if cell.kind == "method"
    }
    assert decays == {
        "lsq-w2a2-s0": 2.5e-4, "lsq-w3a3-s0": 5e-4, "lsq-w4a4-s0": 1e-3,
        "wnq-w2a2-s0": 1e-3, "wnq-w3a3-s0": 1e-3, "wnq-w4a4-s0": 1e-3,
    }  # fmt: skip
    plain = dataclasses.replace(comparison, recommended=False)
    assert {recipe_of(cell, plain, Path("x"), {}).train.weight_decay for cell in cells_of(plain)} == {1e-3}


def test_every_recommended_factor_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    from wnq.methods.registry import Recommended

    advice = Recommended(lr=0.5, weight_decay=2.0, quantizer_lr=0.1, quantizer_weight_decay=0.25, source="Sec. 9")
    info = dataclasses.replace(MethodInfo.of("wnq"), recommended=advice)
    monkeypatch.setattr(MethodInfo, "of", staticmethod(lambda name: info))
    train = TrainConfig(lr=0.2, weight_decay=1e-3, quantizer_lr=0.5)
    changes = {row["setting"]: row for row in recommended_changes(Contender("wnq", "wnq"), (2, 2), train)}
    assert {name: row["to"] for name, row in changes.items()} == pytest.approx(
        {"lr": 0.1, "weight_decay": 2e-3, "quantizer_lr": 0.05, "quantizer_weight_decay": 5e-4}
    )
    assert {row["source"] for row in changes.values()} == {"Sec. 9"}
    assert changes["lr"]["factor"] == 0.5
    comparison = make("wnq", recipe=dataclasses.replace(make_recipe(), train=train))
    used = recipe_of(cells_of(comparison)[-1], comparison, Path("x"), {}).train
    assert (used.lr, used.quantizer_weight_decay) == pytest.approx((0.1, 5e-4))


def test_first_and_last_layers_and_exceptions_are_the_recipes(data: Dataset, tmp_path: Path) -> None:
    exception = {"pattern": "3", "options": {"w_bits": 4}}
    tables = {**TABLES, "quantize": {"method": "bwn", "first_last_bits": 32, "override": [exception]}}
    comparison = make("minmax", recipe=recipe_from(tables))
    compare(comparison, tmp_path, data=data)
    plan = json.loads((tmp_path / "minmax-w2a2-s0" / "plan.json").read_text())
    assert {(layer["name"], layer["method"], layer["options"]["w_bits"]) for layer in plan["layers"]} == {
        ("3", "minmax", 4)
    }
    assert load_recipe(tmp_path / "float-s0" / "recipe.json").quantize is None
    assert "The first and the last layer stay float" in (tmp_path / "results.md").read_text()


def test_stages_may_not_choose_the_method() -> None:
    for stage, words in (
        ({"quantize": {"method": "lsq"}}, "method"),
        ({"quantize": {"options": {"w_bits": 4}}}, "w_bits"),
    ):
        with pytest.raises(ValueError, match=rf"stages\[0\] sets \[quantize\] {words}"):
            make(recipe=recipe_from({**TABLES, "stages": [stage]}))


def test_stages_are_the_methods_not_the_float_networks(data: Dataset, tmp_path: Path) -> None:
    recipe = recipe_from({**TABLES, "stages": [{"quantize": {"options": {"w_bits": 4}}}, {"train": {"epochs": 2}}]})
    results = compare(make("wnq", recipe=recipe), tmp_path, data=data)
    assert set(states(results).values()) == {"done"}
    assert not (tmp_path / "float-s0" / "stage1").exists()
    first = json.loads((tmp_path / "wnq-w2a2-s0" / "stage1" / "plan.json").read_text())
    last = json.loads((tmp_path / "wnq-w2a2-s0" / "plan.json").read_text())
    assert [plan["layers"][1]["options"]["w_bits"] for plan in (first, last)] == [4, 2]
    assert any("in the recipe's 2 stages" in note for note in results["notes"])


def test_float_starts_can_have_their_own_training(data: Dataset, tmp_path: Path) -> None:
    comparison = make("wnq", float_train=TrainConfig(epochs=3, batch_size=25, distill_weight=0.5))
    results = compare(comparison, tmp_path, data=data)
    cells = {cell["name"]: cell for cell in results["cells"]}
    assert (cells["float-s0"]["epochs"], cells["wnq-w2a2-s0"]["epochs"]) == (3, 1)
    assert cells["float-s0"]["recipe"]["train"]["distill_weight"] == 0


def test_given_starts_are_evaluated_not_trained(data: Dataset, tmp_path: Path) -> None:
    found = {}
    for seed in (0, 1):
        _, result = run_recipe(make_recipe(seed=seed, epochs=2), tmp_path / f"start-{seed}", data=data)
        found[seed] = result.val.accuracy
    recipe = recipe_from({**TABLES, "model": {"name": "digits_mlp", "start": str(tmp_path / "start-{seed}")}})
    results = compare(make("wnq", recipe=recipe, seeds=(0, 1)), tmp_path / "out", data=data)
    assert results["float"]["accuracies"] == found
    assert not (tmp_path / "out" / "float-s0" / "checkpoint.pt").exists()
    run = load_recipe(tmp_path / "out" / "wnq-w2a2-s1" / "recipe.json")
    assert run.model.start == str(tmp_path / "start-1")
    shared = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, start=str(tmp_path / "start-0")))
    one = compare(make("wnq", recipe=shared, seeds=(0, 1)), tmp_path / "one", data=data)
    assert one["float"]["accuracies"] == {0: found[0], 1: found[0]}
    assert any("One float network was given" in note for note in one["notes"])


# The sweep


def test_sweep_is_judged_on_held_out_training_images(data: Dataset, tmp_path: Path) -> None:
    comparison = make("wnq", "minmax", seeds=(0, 1), sweep={"lr": (1e-6, 0.05), "momentum": (0.9,)}, held_out=0.2)
    results = compare(comparison, tmp_path, data=data)
    cells = {cell["name"]: cell for cell in results["cells"]}
    tried = [name for name, cell in cells.items() if cell["kind"] == "sweep"]
    assert tried == [f"sweep-{m}-w2a2-lr={lr},momentum=0.9-s0" for m in ("wnq", "minmax") for lr in ("1e-06", "0.05")]
    part = part_of(data, 0.2)
    assert len(part.train) + len(part.val) == 100
    whole = {tuple(image.flatten().tolist()) for image in data.train.images}
    assert all(tuple(image.flatten().tolist()) in whole for image in part.val.images), "held out of the training images"
    assert cells["sweep-float-s0"]["images"] == len(part.val)
    for label in ("wnq", "minmax"):
        by_value = {lr: cells[f"sweep-{label}-w2a2-lr={lr},momentum=0.9-s0"]["accuracy"] for lr in ("1e-06", "0.05")}
        best = float(max(by_value, key=lambda lr: by_value[lr]))
        for seed in (0, 1):
            cell = cells[f"{label}-w2a2-s{seed}"]
            assert cell["values"] == {"lr": best, "momentum": 0.9}
            assert cell["recipe"]["train"]["lr"] == best
            assert cell["images"] == 100
    assert cells["sweep-wnq-w2a2-lr=0.05,momentum=0.9-s0"]["recipe"]["model"]["start"].endswith("sweep-float-s0")
    assert cells["wnq-w2a2-s0"]["recipe"]["model"]["start"] == str(tmp_path / "float-s0")
    page = (tmp_path / "results.md").read_text()
    assert "tried lr = 1e-06, 0.05, momentum = 0.9 on seed 0" in page
    assert "20 % of the training images held out" in page
    assert "Chosen: wnq at W2A2: lr=" in page


def test_a_value_that_diverges_loses_the_sweep_and_all_that_do_end_it(data: Dataset, tmp_path: Path) -> None:
    start = tmp_path / "start"
    run_recipe(make_recipe(), start, data=data)
    train = {**TABLES["train"], "epochs": 3}  # in a few steps more the loss shows it
    recipe = recipe_from({**TABLES, "model": {"name": "digits_mlp", "start": str(start)}, "train": train})
    results = compare(make("wnq", recipe=recipe, sweep={"lr": (1e30, 0.01)}), tmp_path / "a", data=data)
    cells = {cell["name"]: cell for cell in results["cells"]}
    assert cells["sweep-wnq-w2a2-lr=1e+30-s0"]["state"] == "diverged"
    assert cells["wnq-w2a2-s0"]["recipe"]["train"]["lr"] == 0.01
    assert "sweep-float-s0" not in cells
    assert any("may have been trained on that part" in note for note in results["notes"])
    results = compare(make("wnq", recipe=recipe, sweep={"lr": (1e30, 1e29)}), tmp_path / "b", data=data)
    assert states(results)["wnq-w2a2-s0"] == "failed"
    assert any("no value of the sweep finished for wnq at W2A2" in note for note in results["notes"])


# Cells that do not end well


def test_a_diverged_cell_is_final_and_costs_its_method_the_rank(data: Dataset, tmp_path: Path) -> None:
    start = tmp_path / "start"
    run_recipe(make_recipe(), start, data=data)
    recipe = recipe_from({**TABLES, "model": {"name": "digits_mlp", "start": str(start)}})
    comparison = make("wnq", "minmax", recipe=recipe, seeds=(0, 1))
    folder = tmp_path / "out" / "minmax-w2a2-s1"
    folder.mkdir(parents=True)
    content = {"state": "diverged", "reason": "the loss is nan", "seconds": 1.0, "traceback": "", "environment": {}}
    (folder / "failure.json").write_text(json.dumps(content))
    results = compare(comparison, tmp_path / "out", data=data)
    assert states(results)["minmax-w2a2-s1"] == "diverged", "not run again"
    wnq, minmax = results["table"]
    assert (wnq["label"], minmax["label"]) == ("wnq", "minmax"), "behind, whatever its other seed says"
    assert minmax["rank"] is None
    page = (tmp_path / "out" / "results.md").read_text()
    assert "(1 of 2; 1 diverged)" in page
    assert "Diverged: minmax-w2a2-s1: the loss is nan" in page


def test_all_diverged_is_shown_as_such(data: Dataset, tmp_path: Path) -> None:
    start = tmp_path / "start"
    run_recipe(make_recipe(), start, data=data)
    recipe = recipe_from(
        {
            **TABLES,
            "model": {"name": "digits_mlp", "start": str(start)},
            "train": {**TABLES["train"], "lr": 1e30, "epochs": 3},
        }
    )
    results = compare(make("wnq", recipe=recipe, seeds=(0, 1)), tmp_path / "out", data=data)
    assert set(states(results).values()) == {"done", "diverged"}
    assert results["table"][0]["mean"] is None
    assert "| `wnq` | diverged |" in (tmp_path / "out" / "results.md").read_text()
    failure = json.loads((tmp_path / "out" / "wnq-w2a2-s0" / "failure.json").read_text())
    assert "TrainingDivergedError" in failure["traceback"]
    assert read_outcome(tmp_path / "out" / "wnq-w2a2-s0").reason.startswith("the loss is")


def test_a_failed_cell_is_shown_does_not_stop_the_rest_and_is_tried_again(data: Dataset, tmp_path: Path) -> None:
    # An exception that only one of the methods can carry out.
    tables = {**TABLES, "quantize": {"override": [{"pattern": "3", "options": {"max_gain": 0.5}}]}}
    comparison = make("minmax", "wnq", recipe=recipe_from(tables))
    results = compare(comparison, tmp_path, data=data)
    assert states(results) == {"float-s0": "done", "minmax-w2a2-s0": "failed", "wnq-w2a2-s0": "done"}
    assert "Failed: minmax-w2a2-s0: method 'minmax' has no option 'max_gain'" in (tmp_path / "results.md").read_text()
    again: list[str] = []
    compare(
        comparison, tmp_path, data=data, watch=lambda s: again.append(s.cell.name) if s.state == "running" else None
    )
    assert again == ["minmax-w2a2-s0"]


def test_a_run_whose_last_step_spoils_it_has_diverged_too(data: Dataset, tmp_path: Path) -> None:
    compare(make("wnq"), tmp_path, data=data)
    path = tmp_path / "wnq-w2a2-s0" / "result.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val_loss": float("nan"), "val_accuracy": 10.0}))
    results = compare(make("wnq"), tmp_path, data=data)
    assert states(results)["wnq-w2a2-s0"] == "diverged"
    assert results["table"][0]["mean"] is None


def test_a_damaged_result_is_named(data: Dataset, tmp_path: Path) -> None:
    compare(make("wnq"), tmp_path, data=data)
    (tmp_path / "wnq-w2a2-s0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"wnq-w2a2-s0 is damaged .* Remove it to run it again"):
        compare(make("wnq"), tmp_path, data=data)


# Stopping and going on


def interrupt_in(name: str) -> Any:
    def watch(state: CellState) -> None:
        if state.cell.name == name and state.progress is not None and state.progress.epoch == 2:
            signal.raise_signal(signal.SIGINT)

    return watch


def test_ctrl_c_leaves_a_valid_partial_table_and_a_moved_folder_goes_on(data: Dataset, tmp_path: Path) -> None:
    comparison = make("wnq", "minmax", seeds=(0, 1), recipe=make_recipe(epochs=4))
    with pytest.raises(Interrupted):
        compare(comparison, tmp_path / "a", data=data, watch=interrupt_in("wnq-w2a2-s0"))
    partial = json.loads((tmp_path / "a" / "results.json").read_text())
    assert states(partial) == {
        "float-s0": "done", "float-s1": "done", "wnq-w2a2-s0": "not run", "minmax-w2a2-s0": "not run",
        "wnq-w2a2-s1": "not run", "minmax-w2a2-s1": "not run",
    }  # fmt: skip
    assert "| `wnq` | not run |" in (tmp_path / "a" / "results.md").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    progress: list[CellState] = []
    resumed = compare(comparison, tmp_path / "b", data=data, watch=progress.append)
    first = next(s.progress for s in progress if s.cell.name == "wnq-w2a2-s0" and s.progress is not None)
    assert (first.epoch, first.step) != (1, 1), "the run began anew"
    whole = compare(comparison, tmp_path / "whole", data=data)
    assert [row["accuracies"] for row in resumed["table"]] == [row["accuracies"] for row in whole["table"]]


COMMAND = [
    sys.executable,
    "-m",
    "wnq.cli",
    "compare",
    "r.toml",
    "--methods",
    "wnq,minmax",
    "--bits",
    "2/2",
    "--out",
    "c",
]
RECIPE = """
[model]
name = "digits_mlp"
[data]
limit = 100
[train]
epochs = 40
batch_size = 50
lr = 0.05
"""


def start(folder: Path, *more: str) -> "subprocess.Popen[str]":
    (folder / "r.toml").write_text(RECIPE)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.Popen(
        [*COMMAND, *more], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: Any, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """Return the workers that a process has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            worker = b"wnq.compare.worker" in (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z" and worker:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_kill_9_costs_only_what_the_current_cell_did_since_its_checkpoint(tmp_path: Path, data: Dataset) -> None:
    process = start(tmp_path, "--seeds", "1", "--epochs-float", "1")
    rows = tmp_path / "c" / "wnq-w2a2-s0" / "metrics.jsonl"
    try:
        wait_for(lambda: rows.exists() and len(rows.read_text().splitlines()) > 2, process)
    finally:
        process.kill()
        process.communicate()
    assert not (tmp_path / "c" / "wnq-w2a2-s0" / "result.json").exists()
    partial = json.loads((tmp_path / "c" / "results.json").read_text())
    assert states(partial) == {"float-s0": "done", "wnq-w2a2-s0": "not run", "minmax-w2a2-s0": "not run"}
    comparison = comparison_from(json.loads((tmp_path / "c" / "compare.json").read_text()))
    begun = (tmp_path / "c" / "float-s0" / "result.json").stat().st_mtime_ns
    seen: list[CellState] = []
    resumed = compare(comparison, tmp_path / "c", data=data, watch=seen.append)
    assert (tmp_path / "c" / "float-s0" / "result.json").stat().st_mtime_ns == begun
    first = next(s.progress for s in seen if s.cell.name == "wnq-w2a2-s0" and s.progress is not None)
    assert first.epoch > 2, "the run began anew"
    whole = compare(comparison, tmp_path / "whole", data=data)
    assert resumed["table"] == whole["table"]
    assert not list((tmp_path / "c").rglob(".*.tmp"))


# Other processes


@pytest.mark.slow
def test_workers_come_to_the_same_and_one_that_dies_costs_its_cell_only(tmp_path: Path, data: Dataset) -> None:
    comparison = make("wnq", "minmax", recipe=make_recipe(epochs=15))
    killed: list[int] = []

    def kill(state: CellState) -> None:
        if state.cell.name == "wnq-w2a2-s0" and state.progress is not None and not killed:
            killed.extend(children(os.getpid()))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    if not Path("/proc/self/stat").exists():
        pytest.skip("finding the workers needs /proc")
    results = compare(comparison, tmp_path / "two", workers=2, data=data, watch=kill)
    assert killed
    assert states(results)["wnq-w2a2-s0"] == "failed"
    reason = read_outcome(tmp_path / "two" / "wnq-w2a2-s0").reason
    assert "the worker process ended unexpectedly (SIGKILL; worker-" in reason
    results = compare(comparison, tmp_path / "two", workers=2, data=data)
    assert set(states(results).values()) == {"done"}
    assert children(os.getpid()) == []
    alone = compare(comparison, tmp_path / "one", data=data)
    assert [row["accuracies"] for row in results["table"]] == [row["accuracies"] for row in alone["table"]]


def test_streams_come_to_the_same(tmp_path: Path, data: Dataset) -> None:
    comparison = make("wnq", "minmax", recipe=make_recipe(epochs=3))
    results = compare(comparison, tmp_path / "three", streams=3, data=data)
    assert set(states(results).values()) == {"done"}
    alone = compare(comparison, tmp_path / "one", data=data)
    assert [row["accuracies"] for row in results["table"]] == [row["accuracies"] for row in alone["table"]]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("cell")]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_says_so() -> None:
    events: Any = queue.SimpleQueue()
    worker = StreamWorker(0, Images(), events)
    worker.start("not a job")  # pyright: ignore[reportArgumentType]
    told, event = events.get(timeout=60)
    assert told is worker and event["event"] == "gone"
    assert "ended unexpectedly" in worker.why_gone(event["code"])


def test_processes_and_streams_exclude_each_other(tmp_path: Path, data: Dataset) -> None:
    with pytest.raises(ValueError, match=r"2 workers and 3 streams: .* not both"):
        compare(make("wnq"), tmp_path / "c", workers=2, streams=3, data=data)
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_raises")
def test_streams_stop_on_ctrl_c_with_their_state_saved(tmp_path: Path) -> None:
    process = start(tmp_path, "--streams", "2", "--seeds", "1", "--set", "train.epochs=100000", "--epochs-float", "1")
    try:
        wait_for((tmp_path / "c" / "wnq-w2a2-s0" / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert "--streams 2" in err.strip().splitlines()[-1]
    assert (tmp_path / "c" / "wnq-w2a2-s0" / "checkpoint.pt").exists()
    assert (tmp_path / "c" / "minmax-w2a2-s0" / "checkpoint.pt").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ctrl_c_raises")  # what ignores it hands that down to what it starts
def test_workers_stop_on_ctrl_c_with_their_state_saved(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("finding the workers needs /proc")
    process = start(tmp_path, "--workers", "2", "--seeds", "1", "--set", "train.epochs=100000", "--epochs-float", "1")
    try:
        wait_for((tmp_path / "c" / "wnq-w2a2-s0" / "metrics.jsonl").exists, process)
        workers = children(process.pid)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith(
        "wnq: stopped; the finished runs and the state of the others are saved in c. Continue with: wnq compare"
    )
    assert "--workers 2" in last
    assert last.endswith("--set train.epochs=100000")
    assert (tmp_path / "c" / "wnq-w2a2-s0" / "checkpoint.pt").exists()
    assert workers
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("finding the workers needs /proc")
    process = start(tmp_path, "--workers", "2", "--seeds", "1", "--set", "train.epochs=100000", "--epochs-float", "1")
    workers: list[int] = []
    try:
        wait_for((tmp_path / "c" / "wnq-w2a2-s0" / "metrics.jsonl").exists, process)
        workers = children(process.pid)
        process.kill()
        process.communicate()
        assert workers
        deadline = time.monotonic() + 20
        while any(running(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker goes on without its master"
            time.sleep(0.05)
    finally:
        process.kill()
        for pid in workers:
            if running(pid):
                os.kill(pid, signal.SIGKILL)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_guides_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "compare.md").read_text(encoding="utf-8")
    recipe, code = (re.search(rf"```{kind}\n(.*?)```", page, re.S)[1] for kind in ("toml", "python"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits.toml").write_text(recipe.replace("epochs = 20", "epochs = 1"))
    exec(compile(code.replace("(0, 1, 2)", "(0,)"), "compare", "exec"), {})
    assert len(capsys.readouterr().out.splitlines()) == 4
