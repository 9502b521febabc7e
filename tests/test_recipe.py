import dataclasses
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wnq import get_plan, make_plan, quantized_layers
from wnq.data import Batches, Dataset, load_data
from wnq.models import build_model
from wnq.plan import Plan
from wnq.recipe import Recipe, build, load_recipe, load_run, load_weights_, plan_of, recipe_from, resolve, run_recipe
from wnq.train import Interrupted, TrainConfig, TrainingDivergedError, fit
from wnq.train.progress import Progress

RECIPES = sorted((Path(__file__).parent.parent / "recipes").glob("*.toml"))


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=128)


def make_recipe(quantize: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **train: Any) -> Recipe:
    tables: dict[str, Any] = {"model": model or {}, "data": {"limit": 128}, "train": {**TRAIN, **train}}
    return recipe_from(tables if quantize is None else {**tables, "quantize": quantize})


TRAIN = {"epochs": 2, "batch_size": 32, "lr": 0.05}


def val_images(data: Dataset) -> torch.Tensor:
    return next(Batches(data.val, len(data.val), mean=data.mean, std=data.std).epoch(0))[0]


# Reading a recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_committed_recipe_can_be_built(path: Path):
    recipe = load_recipe(path)
    options = {"num_classes": 100, "in_channels": 3, **recipe.model.options}
    model = build_model(recipe.model.name, **options)
    if recipe.quantize is None:
        assert "float" in path.stem or path.stem.endswith("-settle")  # whose arms the experiment adds
        return
    plan = plan_of(recipe.quantize, model)
    assert len(plan.layers) > 2
    widths = {(layer.method.w_bits, layer.method.a_bits) for layer in plan.layers[1:-1]}
    assert len(widths) == 1
    assert "compare" in path.stem or all(f"-w{w}a{a}-" in path.stem for w, a in widths)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_there_are_recipes():
    assert RECIPES


def test_every_key_arrives(tmp_path: Path):
    path = tmp_path / "full.toml"
    path.write_text(
        """
        [model]
        name = "resnet20"
        options = { num_classes = 7 }
        start = "start.safetensors"
        [data]
        name = "cifar10"
        val_share = 0.1
        limit = 100
        [train]
        lr = 1            # an integer is a number
        epochs = 3
        flip = true
        [quantize]
        method = "dorefa"
        options = { w_bits = 2 }
        keep_float = ["fc"]
        override = [{ pattern = "layer3.*", method = "lsq", options = { w_bits = 4 } }]
        """
    )
    recipe = load_recipe(path)
    assert recipe.train == TrainConfig(lr=1.0, epochs=3, flip=True) and isinstance(recipe.train.lr, float)
    assert recipe.model.options == {"num_classes": 7} and recipe.model.start == "start.safetensors"
    assert (recipe.data.name, recipe.data.val_share, recipe.data.limit) == ("cifar10", 0.1, 100)
    assert recipe.quantize is not None and recipe.quantize.keep_float == ("fc",)
    assert recipe.quantize.override == ({"pattern": "layer3.*", "method": "lsq", "options": {"w_bits": 4}},)
    plan = plan_of(recipe.quantize, build_model("resnet20", num_classes=7))
    assert plan["layer3.0.conv1"].name == "lsq" and plan["layer3.0.conv1"].w_bits == 4
    assert plan["layer2.0.conv1"].name == "dorefa" and plan["layer2.0.conv1"].w_bits == 2


@pytest.mark.parametrize("quantize", [None, {"method": "lsq", "keep_float": ["fc"], "override": [{"pattern": "*"}]}])
def test_recipe_survives_json(quantize: dict[str, Any] | None, tmp_path: Path):
    recipe = make_recipe(quantize)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe.to_json()))
    assert load_recipe(path) == recipe
    assert recipe_from(recipe.to_json()) == recipe


def test_override_inherits_the_options_of_its_method():
    recipe = make_recipe(
        {"method": "wnq", "options": {"w_bits": 2}, "override": [{"pattern": "3", "options": {"a_bits": 5}}]}
    )
    assert recipe.quantize is not None
    method = plan_of(recipe.quantize, build_model("digits_cnn"))["3"]
    assert (method.name, method.w_bits, method.a_bits) == ("wnq", 2, 5)


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[trian]\nepochs = 1", ["has no key 'trian'", "Did you mean 'train'?", "model, data, train, quantize"]),
        (
            "[train]\nepoch = 1",
            ["[train] has no key 'epoch'", "Did you mean 'epochs'?", "It takes: epochs, batch_size"],
        ),
        ("[train]\nepochs = 'ten'", ["[train] epochs must be an integer, got 'ten'"]),
        ("[train]\nepochs = 1.5", ["[train] epochs must be an integer, got 1.5"]),
        ("[train]\nepochs = true", ["[train] epochs must be an integer, got True"]),
        ("[train]\nlr = true", ["[train] lr must be a number, got True"]),
        ("[train]\nlr = nan", ["[train] lr must be greater than 0, got nan"]),
        ("[train]\nflip = 1", ["[train] flip must be true or false, got 1"]),
        ("[train]\noptimizer = 'sdg'", ["[train] optimizer must be one of 'sgd', 'adamw', got 'sdg'"]),
        ("[data]\nname = 3", ["[data] name must be a string, got 3"]),
        ("[data]\nsize = '32'", ["[data] size must be an integer or nothing, got '32'"]),
        ("[model]\noptions = 'num_classes'", ["[model] options must be a table, got 'num_classes'"]),
        ("train = 3", ["[train] must be a table, got 3"]),
        ("[quantize]\nkeep_float = 'fc'", ["[quantize] keep_float must be an array, got 'fc'"]),
        ("[quantize]\nkeep_float = ['fc', 1]", ["[quantize] keep_float[1] must be a string, got 1"]),
        ("[quantize]\noverride = ['layer3.*']", ["[quantize] override[0] must be a table, got 'layer3.*'"]),
        ("[train]\nepochs = 1\nepochs = 2", ["is malformed", "Cannot overwrite a value"]),
        ("[train\nepochs = 1", ["is malformed", "Expected ']'", "line 1"]),
    ],
)
def test_bad_recipe_is_explained(toml: str, words: list[str], tmp_path: Path):
    path = tmp_path / "bad.toml"
    path.write_text(toml)
    with pytest.raises(ValueError) as caught:
        load_recipe(path)
    message = str(caught.value)
    assert str(path) in message
    assert [word for word in words if word not in message] == [], message


def test_missing_or_unreadable_recipe_is_explained(tmp_path: Path):
    for path, words in ((tmp_path / "none.toml", "No such file"), (tmp_path, "directory")):
        with pytest.raises(ValueError) as caught:
            load_recipe(path)
        assert str(caught.value).startswith(f"cannot read the recipe {path}: ") and words in str(caught.value)
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot read the recipe"):
        load_recipe(binary)
    listed = tmp_path / "list.json"
    listed.write_text('["model"]')
    with pytest.raises(ValueError, match=r"list.json must be a table, got \['model'\]"):
        load_recipe(listed)


# Building what it says


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"model": {"name": "digits_cn"}}, ["unknown model 'digits_cn'", "Did you mean 'digits_cnn'"]),
        ({"model": {"options": {"num_clases": 3}}}, ["does not take num_clases", "Did you mean 'num_classes'"]),
        ({"quantize": {"method": "wqn"}}, ["unknown method 'wqn'", "Did you mean 'wnq'"]),
        ({"quantize": {"options": {"w_bit": 3}}}, ["has no option 'w_bit'", "Did you mean 'w_bits'"]),
        ({"quantize": {"options": {"w_bits": 11}}}, ["11"]),
        ({"quantize": {"keep_float": ["cnov"]}}, ["keep_float pattern 'cnov' matches no quantizable layer"]),
        ({"quantize": {"override": [{"patern": "3"}]}}, ["override[0] has no key 'patern'", "'pattern'"]),
        ({"quantize": {"override": [{"method": "lsq"}]}}, ["override[0] needs a pattern"]),
        ({"quantize": {"override": [{"pattern": 3}]}}, ["override[0] pattern must be a string, got 3"]),
        ({"quantize": {"override": [{"pattern": "3", "options": 2}]}}, ["override[0] options must be a table, got 2"]),
        ({"quantize": {"plan": "no-plan.json"}}, ["cannot read the plan no-plan.json"]),
        ({"train": {"distill_weight": 0.5}}, ["[train] distill_weight needs [model] start", "float twin"]),
    ],
)
def test_recipe_that_cannot_be_built_is_explained(tables: dict[str, Any], words: list[str], data: Dataset):
    with pytest.raises(ValueError) as caught:
        build(resolve(recipe_from(tables), data))
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_unknown_data_set_is_explained(tmp_path: Path):
    with pytest.raises(ValueError, match=r"unknown data set 'digit'. Did you mean 'digits'\?"):
        run_recipe(recipe_from({"data": {"name": "digit"}}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_start_weights_that_do_not_fit_are_explained(tmp_path: Path):
    other = tmp_path / "other.safetensors"
    save_file(build_model("digits_cnn", num_classes=7).state_dict(), other)
    text = tmp_path / "text.pt"
    text.write_text("no weights")
    numbers = tmp_path / "numbers.pt"
    torch.save([1, 2], numbers)
    code = tmp_path / "code.pt"
    torch.save(nn.Linear(1, 1), code)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    expected = {
        other: [
            "does not fit Sequential",
            "11.weight",
            "[7, 64]",
            "[10, 64]",
            "Build the model with the name and options",
        ],
        text: ["cannot read the weights", "text.pt", "Give a .safetensors file"],
        code: ["cannot read the weights", "code.pt", "a .pt state dict of tensors"],
        numbers: ["numbers.pt holds a list, expected a state dict"],
        unfinished: ["cannot read the weights", "model.safetensors", "No such file", "folder of a finished run"],
        tmp_path / "none.safetensors": ["cannot read the weights", "none.safetensors", "No such file"],
        tmp_path / "none.pt": ["cannot read the weights", "none.pt", "No such file"],
    }
    for path, words in expected.items():
        with pytest.raises(ValueError) as caught:
            load_weights_(build_model("digits_cnn"), path)
        assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
        assert "weights_only=False" not in str(caught.value)


def test_start_takes_float_weights_before_quantizing(tmp_path: Path, data: Dataset):
    trained, _ = run_recipe(make_recipe(), tmp_path / "float", data=data)
    wrapped = tmp_path / "wrapped.pt"
    torch.save({"state_dict": trained.state_dict(), "epoch": 3}, wrapped)
    for start in (tmp_path / "float", tmp_path / "float" / "model.safetensors", wrapped):
        recipe = make_recipe({"method": "lsq"}, {"start": str(start)}, distill_weight=0.5)
        model, twin = build(resolve(recipe, data))
        assert twin is not None and not any(p.requires_grad for p in twin.parameters())
        for name, value in trained.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value)
        for name, layer, quantizer in quantized_layers(model):
            weight = trained.get_submodule(name).weight
            assert torch.equal(layer.parametrizations.weight.original, weight)
            assert torch.equal(quantizer(weight), layer.weight)


# Runs and their folders


@pytest.mark.parametrize(
    ("quantize", "train"),
    [
        (None, {}),
        ({"method": "wnq", "options": {"w_bits": 3, "a_bits": 3}}, {}),
        ({"method": "lsq", "override": [{"pattern": "3", "method": "twn"}]}, {"ema_decay": 0.9, "bn_batches": 2}),
        ({"method": "dorefa"}, {"channels_last": True}),
    ],
)
def test_run_folder_gives_the_trained_model_back(quantize: dict | None, train: dict, tmp_path: Path, data: Dataset):
    recipe = make_recipe(quantize, **train)
    model, result = run_recipe(recipe, tmp_path / "run", data=data)
    state = torch.get_rng_state()
    again, loaded = load_run(tmp_path / "run")
    assert again == resolve(recipe, data) and not model.training and not loaded.training
    images = val_images(data)
    if recipe.train.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(loaded(images), model(images))
    assert (quantize is None) != (tmp_path / "run" / "plan.json").exists()
    if quantize is not None:
        assert get_plan(loaded) == get_plan(model)
    content = json.loads((tmp_path / "run" / "result.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == content["history"] == result.history and [row["epoch"] for row in rows] == [1, 2]
    assert content["val_accuracy"] == result.val.accuracy and content["val_images"] == len(data.val)
    assert recipe_from(content["recipe"]) == again
    assert content["environment"]["torch"] == torch.__version__
    assert not list((tmp_path / "run").glob(".*"))
    assert torch.get_rng_state().shape == state.shape


def test_run_with_tied_weights_loads_again(tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tied_nets.py").write_text(
        "from torch import nn\n"
        "def tied():\n"
        "    first, second = nn.Linear(64, 64), nn.Linear(64, 64)\n"
        "    second.weight = first.weight\n"
        "    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), nn.Linear(64, 10))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    recipe = make_recipe({"method": "lsq"}, {"name": "tied_nets:tied"})
    model, _ = run_recipe(recipe, tmp_path / "run", data=data)
    _, loaded = load_run(tmp_path / "run")
    assert torch.equal(loaded(val_images(data)), model(val_images(data)))


def test_finished_run_is_kept_and_loaded_on_resume(tmp_path: Path, data: Dataset):
    recipe = make_recipe({"method": "wnq"})
    model, result = run_recipe(recipe, tmp_path, data=data)
    with pytest.raises(ValueError) as caught:
        run_recipe(recipe, tmp_path, data=data)
    assert f"{tmp_path} holds a run already. Resume it (--resume) or choose another" in str(caught.value)
    again, same = run_recipe(recipe, tmp_path, data=data, resume=True)
    assert torch.equal(again(val_images(data)), model(val_images(data)))
    assert same.val == result.val and same.history == result.history


def test_resume_with_other_bits_is_refused_and_leaves_the_folder_alone(tmp_path: Path, data: Dataset):
    model, _ = run_recipe(make_recipe({"method": "wnq", "options": {"w_bits": 3}}), tmp_path, data=data)
    written = (tmp_path / "recipe.json").read_bytes()
    other = make_recipe({"method": "wnq", "options": {"w_bits": 2}}, epochs=3)
    with pytest.raises(ValueError) as caught:
        run_recipe(other, tmp_path, data=data, resume=True)
    message = str(caught.value)
    assert "[train] epochs: 2 then, 3 now" in message and "Use another output folder." in message
    assert "[quantize] options: {'w_bits': 3} then, {'w_bits': 2} now" in message
    assert (tmp_path / "recipe.json").read_bytes() == written
    with pytest.raises(ValueError, match=r"\[quantize\] method: 'wnq' then, None now"):
        run_recipe(make_recipe(), tmp_path, data=data, resume=True)
    _, loaded = load_run(tmp_path)
    assert torch.equal(loaded(val_images(data)), model(val_images(data)))


def test_resume_may_read_the_images_from_elsewhere(tmp_path: Path, data: Dataset):
    recipe = make_recipe()
    run_recipe(recipe, tmp_path, data=data)
    moved = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, folder="/moved"))
    run_recipe(moved, tmp_path, data=data, resume=True)


def test_interrupted_run_is_not_finished_and_resumes(tmp_path: Path, data: Dataset):
    def interrupt(progress: Progress) -> None:
        if progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    recipe = make_recipe({"method": "wnq"})
    with pytest.raises(Interrupted):
        run_recipe(recipe, tmp_path / "run", data=data, on_step=interrupt)
    with pytest.raises(ValueError) as caught:
        load_run(tmp_path / "run")
    assert "holds no finished run: model.safetensors is missing. Train one with wnq train" in str(caught.value)
    resumed, _ = run_recipe(recipe, tmp_path / "run", data=data, resume=True)
    whole, _ = run_recipe(recipe, tmp_path / "whole", data=data)
    assert torch.equal(resumed(val_images(data)), whole(val_images(data)))


def test_diverged_run_says_so(tmp_path: Path, data: Dataset):
    with pytest.raises(TrainingDivergedError, match=r"the loss is \S+ at epoch 1, step \d+\. Lower lr"):
        run_recipe(make_recipe(None, {"name": "digits_mlp"}, lr=1e12, warmup_epochs=0), tmp_path, data=data)


def test_float_run_removes_the_plan_of_an_earlier_run(tmp_path: Path, data: Dataset):
    run_recipe(make_recipe({"method": "wnq"}), tmp_path, data=data)
    (tmp_path / "checkpoint.pt").unlink()
    model, _ = run_recipe(make_recipe(), tmp_path, data=data)
    _, loaded = load_run(tmp_path)
    assert torch.equal(loaded(val_images(data)), model(val_images(data)))


def test_plan_file_is_used(tmp_path: Path, data: Dataset):
    recipe = make_recipe({"method": "dorefa", "options": {"w_bits": 2}})
    assert recipe.quantize is not None
    plan = plan_of(recipe.quantize, build_model("digits_cnn"))
    plan.save(tmp_path / "mine.json")
    model, _ = build(resolve(make_recipe({"plan": str(tmp_path / "mine.json")}), data))
    assert get_plan(model) == plan
    with pytest.raises(ValueError, match="parametrized already"):
        make_plan(model, plan["3"])


def test_tensorboard_tracker_receives_the_rows(tmp_path: Path, data: Dataset):
    pytest.importorskip("tensorboard")
    from accelerate import Accelerator
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accelerator = Accelerator(log_with="tensorboard", project_dir=tmp_path)
    accelerator.init_trackers("board")
    result = fit(build_model("digits_cnn"), data, TrainConfig(**TRAIN), accelerator=accelerator)
    accelerator.end_training()
    files = list((tmp_path / "board").rglob("events.out.tfevents.*"))
    assert files
    events = EventAccumulator(str(files[0].parent)).Reload()
    for key in ("loss", "val_accuracy", "lr"):
        logged = [(event.step, event.value) for event in events.Scalars(key)]
        # The board stores float32.
        assert logged == [(row["epoch"], pytest.approx(row[key], rel=1e-6)) for row in result.history]
