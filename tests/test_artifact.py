"""Artifacts: exact logits, small and reproducible files."""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import wnq
from helpers_artifact import CODERS, Net, content_of, images, net, trained
from wnq.artifact import load, save, unpack_file
from wnq.artifact.bundle import bundle, unbundle
from wnq.artifact.container import ArtifactError, read_artifact, write_artifact
from wnq.artifact.content import read_levels, store_levels
from wnq.artifact.manifest import Manifest
from wnq.attach import quantized_layers
from wnq.models import registered_model
from wnq.prepared import deployed, float_weight


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("method", "bits"),
    [(info.name, bits) for info in wnq.list_methods() for bits in info.widths if bits in (1, 2, 3, 5, 8)],
)
def test_logits_are_equal_bit_for_bit_for_every_method(method: str, bits: int, path: Path) -> None:
    torch.manual_seed(0)
    # Net has a transposed convolution, which XNOR-Net's scale map is not defined for; tests/test_xnor.py stores the map.
    options = {"scale_map": False} if method == "xnor" else {}
    model = trained(Net(), wnq.get_method(method, w_bits=bits, **options), images())
    codes = {name: deployed(quantizer, float_weight(layer)).codes for name, layer, quantizer in quantized_layers(model)}
    for coder in CODERS:
        assert save(model, path, coder=coder).coder == coder
        assert torch.equal(load(path, Net())(images(16)), model(images(16)))
        stored = content_of(path).quantized
        assert stored.keys() == codes.keys()
        assert all(torch.equal(stored[name].codes, codes[name]) for name in codes)


@pytest.mark.parametrize("options", [{"granularity": "channel"}, {"scale": "learned"}, {"a_bits": 32}, {"w_bits": 32}])
def test_logits_are_equal_for_other_options(options: dict[str, Any], path: Path) -> None:
    model = net(**options)
    save(model, path)
    loaded = load(path, Net())
    assert not loaded.training
    assert torch.equal(loaded(images(16)), model(images(16)))
    assert wnq.get_plan(loaded) == wnq.get_plan(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_floating_point_types_are_kept(dtype: torch.dtype, path: Path) -> None:
    torch.manual_seed(0)
    model = trained(Net().to(dtype), wnq.get_method("wnq"), images().to(dtype))
    save(model, path)
    assert torch.equal(load(path, Net().to(dtype))(images().to(dtype)), model(images().to(dtype)))
    with pytest.raises(ArtifactError, match=rf"has dtype {dtype} in the file but torch.float32 in the model"):
        load(path, Net())


@pytest.mark.parametrize("name", ["digits_cnn", "resnet20"])
def test_registered_models_rebuild_without_being_passed(name: str, path: Path) -> None:
    torch.manual_seed(0)
    model = registered_model(name, num_classes=7)
    x = torch.randn(2, 1, 8, 8) if name == "digits_cnn" else torch.randn(2, 3, 32, 32)
    trained(model, wnq.get_method("wnq", w_bits=3), x)
    save(model, path)
    state = torch.get_rng_state()
    loaded = load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loaded(x), model(x))


def test_building_a_registered_model_does_not_import_the_compiler(path: Path) -> None:
    """It took two seconds: random initialization on the meta device imports torch._dynamo."""
    torch.manual_seed(0)
    save(trained(registered_model("digits_cnn"), wnq.get_method("wnq", w_bits=3), torch.randn(2, 1, 8, 8)), path)
    code = "import sys, wnq; wnq.load(sys.argv[1]); sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(path)], check=True)


def test_a_loaded_or_frozen_model_saves_to_the_same_bytes(path: Path) -> None:
    for coder in CODERS:
        model = net(w_bits=4, granularity="channel")
        first = save(model, path, coder=coder)
        assert save(load(path, Net()), path, coder=coder).sha256 == first.sha256
        assert save(wnq.freeze_(model), path, coder=coder).sha256 == first.sha256


def test_the_same_model_gives_the_same_bytes_in_another_process(path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import torch; torch.set_num_threads(1)\n"
        "from helpers_artifact import CODERS, net; from wnq import save\n"
        "for coder in CODERS: save(net(), sys.argv[2] + coder, coder=coder)"
    )
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(path)]
    subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": "1"}, check=True)
    for coder in CODERS:
        save(net(), path, coder=coder)
        assert path.read_bytes() == Path(f"{path}{coder}").read_bytes()


def test_unpacked_weights_load_strictly_into_the_float_model(path: Path) -> None:
    model = net(w_bits=2, a_bits=32)
    save(model, path)
    state = unpack_file(path)
    plain = Net()
    plain.load_state_dict(state, strict=True)
    assert torch.equal(plain.eval()(images()), model(images()))
    assert torch.equal(state["up.weight"], model.up.weight)
    assert state["second.weight"] is state["first.weight"]
    save(net(w_bits=2, a_bits=2), path)
    assert unpack_file(path).keys() == Net().state_dict().keys()


def test_tied_weights_stay_tied_and_a_float_layer_keeps_its_own_copy(path: Path) -> None:
    save(net(), path)
    loaded = load(path, Net())
    assert loaded.first.weight is loaded.second.weight
    torch.manual_seed(0)
    half = trained(Net(), wnq.get_method("wnq", w_bits=2), images(), keep_float=["second"])
    save(half, path)
    loaded = load(path, Net())
    assert torch.equal(loaded(images()), half(images()))
    assert not torch.equal(loaded.first.weight, loaded.second.weight)


def test_a_module_under_two_names_is_stored_once(path: Path) -> None:
    def build() -> nn.Module:
        shared = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))
        return nn.Sequential(shared, nn.ReLU(), shared, nn.Flatten(), nn.Linear(192, 5))

    torch.manual_seed(0)
    model = trained(build(), wnq.get_method("wnq"), images())
    assert [row.name for row in save(model, path).layers] == ["0.0", "4"]
    assert torch.equal(load(path, build())(images()), model(images()))
    build().load_state_dict(unpack_file(path), strict=True)


def test_a_bare_layer_is_a_model_too(path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6)
    model = trained(nn.Linear(6, 4), wnq.get_method("wnq", w_bits=3), x)
    save(model, path)
    assert torch.equal(load(path, nn.Linear(6, 4))(x), model(x))


def test_wrapped_models_are_saved_under_their_own_names(path: Path) -> None:
    model = net()
    assert save(nn.DataParallel(model), path) == save(model, path)


@pytest.mark.parametrize(
    ("levels", "name", "nbytes"),
    [
        (torch.arange(-255.0, 256.0, 2), "weight_grid", 6),
        (torch.arange(-7.0, 8.0).repeat(64, 1), "weight_grid", 384),
        (torch.tensor([0.0]), "weight_grid", 6),
        (torch.tensor([-3.0, -1.0, 2.0]), "weight_levels", 3),
        (torch.tensor([-300.0, -1.0, 2.0]), "weight_levels", 6),
        (torch.tensor([-0.5, 0.0, 0.5]), "weight_levels", 12),
        (torch.tensor([0.0, 40_000.0]), "weight_levels", 8),
    ],
)
def test_levels_take_the_smallest_exact_form(levels: Tensor, name: str, nbytes: int) -> None:
    ((stored_name, stored),) = store_levels(levels).items()
    assert (stored_name, stored.nbytes) == (name, nbytes)
    back = read_levels(stored, torch.float32) if name == "weight_grid" else stored.to(torch.float32)
    assert torch.equal(back, levels)


def test_bundles_round_trip_and_refuse_tables_that_do_not_add_up() -> None:
    tensors = {
        "a.step": torch.tensor(0.5),
        "b.step": torch.tensor(1.5),
        "n": torch.tensor(3),
        "b.on": torch.tensor(True),
        "a.w": torch.zeros(0, 2),
        "c.w": torch.arange(6.0).reshape(2, 3),
    }
    bundles, table = bundle(tensors)
    back = unbundle(bundles, json.loads(json.dumps(table)))
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], t) and back[k].dtype == t.dtype for k, t in tensors.items())
    for broken in (None, {}, {"kinds": [], "modules": [["a", 0]]}, {"kinds": [], "modules": []}, {**table, "x": 1}):
        with pytest.raises(ValueError, match="table of small tensors"):
            unbundle(bundles, broken)
    empty = {"kinds": [{str(i): ["bool", [0]] for i in range(1000)}], "modules": [[str(i), 0] for i in range(40)]}
    with pytest.raises(ValueError, match="the table of small tensors has 40,000 entries, more than 8,192"):
        unbundle(bundles, empty)
    huge = {"kinds": [{"w": ["float32", [2**40, 2]]}], "modules": [["a", 0]]}
    with pytest.raises(ValueError, match=r"tensor 'a.w' of float32 .* is not in the file"):
        unbundle(bundles, huge)


def test_a_model_without_a_plan_or_with_changed_layers_is_not_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="carries no plan"):
        save(Net(), path)
    model = net()
    model.up = nn.ConvTranspose2d(8, 8, 2, stride=2, bias=False)
    with pytest.raises(ValueError, match=r"are not those of its plan: \['up'\]"):
        save(model, path)
    assert not path.exists()


def test_a_model_from_elsewhere_must_be_passed(path: Path) -> None:
    save(net(), path)
    with pytest.raises(ArtifactError, match=r"names no registered model; pass the float model"):
        load(path)


def test_the_manifest_is_the_documented_json(path: Path) -> None:
    save(net(), path)
    _, document = read_artifact(path)
    assert (document["format"], document["format_version"], document["model"]) == ("wnq", 2, None)
    manifest = Manifest.from_json(document, where="x")
    assert manifest.plan.layers[0].shape == (8, 3, 3, 3)
    assert {"second.weight": "first.weight"}.items() <= manifest.aliases.items()
    assert manifest.to_json() == {k: document[k] for k in ("plan", "aliases", "coder", "dtype", "model")}


@pytest.mark.parametrize("coder", CODERS)
def test_a_plan_in_another_order_than_the_model(coder: str, path: Path) -> None:
    torch.manual_seed(0)
    model = Net()
    plan = wnq.make_plan(model, wnq.get_method("wnq", w_bits=3))
    stem, up, first, second, head = plan.layers
    wnq.quantize_(model, dataclasses.replace(plan, layers=(head, first, up, second, stem)))
    model(images())
    save(model.eval(), path, coder=coder)
    assert torch.equal(load(path, Net())(images()), model(images()))


def test_a_scale_that_is_not_finite_is_not_saved(path: Path) -> None:
    model = net(scale="learned")
    with torch.no_grad():
        model.up.parametrizations.weight[0].gain.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the scale of layer 'up' holds 1 NaN or infinite value of 1"):
        save(model, path)
    assert not path.exists()


def test_more_tensors_than_a_reader_takes_are_not_written(path: Path) -> None:
    with pytest.raises(ValueError, match="a packed file has at most 8,192 tensors"):
        write_artifact(path, {str(i): torch.empty(0) for i in range(8_193)}, {})
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(path: Path) -> None:
    save(net(), path)
    before = path.read_bytes()
    model = net(seed=5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"cannot write {path}: .*Free some space"):
            save(model, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
