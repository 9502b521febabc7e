import json
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from wnq.models import build_model, list_models, networks, register_model, registered_model

PARAMETERS = {
    "digits_cnn": 24_058,
    "digits_mlp": 8_970,
    "preact_resnet18": 11_172_170,
    "resnet110": 1_727_962,
    "resnet20": 269_722,
    "resnet32": 464_154,
    "resnet44": 658_586,
    "resnet56": 853_018,
    "vgg_small": 4_660_106,
}
RESNET_DEPTHS = [20, 32, 44, 56, 110]


def test_every_model_is_listed_with_the_parameter_count_of_its_docstring():
    counts = {
        name: sum(p.numel() for p in build_model(name).parameters())
        for name in list_models()
        if hasattr(networks, name)
    }
    assert counts == PARAMETERS
    for name, count in counts.items():
        module = __import__("wnq.models.networks", fromlist=[name])
        assert f"{count:,} parameters" in getattr(module, name).__doc__


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_forward_gives_finite_logits_and_gradients_for_other_sizes(name: str):
    torch.manual_seed(0)
    channels, size = (2, 8) if name.startswith("digits") else (1, 32)
    model = build_model(name, num_classes=7, in_channels=channels)
    logits = model(torch.randn(2, channels, size, size))
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_activations_are_modules(name: str):
    model = build_model(name)
    relus = sum(isinstance(module, nn.ReLU) for module in model.modules())
    weights = sum(
        isinstance(module, nn.Linear | nn.Conv2d) and "shortcut" not in key for key, module in model.named_modules()
    )
    assert relus == weights - 1


@pytest.mark.parametrize("depth", RESNET_DEPTHS)
def test_resnet_depth_counts_its_weight_layers(depth: int):
    model = build_model(f"resnet{depth}")
    assert sum(isinstance(module, nn.Linear | nn.Conv2d) for module in model.modules()) == depth


def test_option_a_shortcut_strides_and_pads_with_zeros():
    block = build_model("resnet20").get_submodule("layer2.0.shortcut")
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    out = block(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()
    assert not list(block.parameters())


def test_resnet_takes_odd_image_sizes():
    assert build_model("resnet20")(torch.zeros(1, 3, 29, 31)).shape == (1, 10)


def test_digits_mlp_has_no_batch_normalization():
    assert not any(
        isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in build_model("digits_mlp").modules()
    )


def test_vgg_small_follows_the_image_size():
    assert build_model("vgg_small", image_size=16)(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    with pytest.raises(ValueError, match="image_size must be at least 8"):
        build_model("vgg_small", image_size=4)


def test_convolutions_start_with_kaimings_variance():
    torch.manual_seed(0)
    weight = build_model("vgg_small").get_parameter("3.weight")
    expected = (2 / (128 * 9)) ** 0.5
    # 147,456 samples: the standard error of the estimate is 0.2 %.
    assert weight.std().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("build", [build_model, registered_model])
def test_model_remembers_how_to_build_it_again(build):
    model = build("digits_cnn", num_classes=4)
    assert model.wnq_model == {"name": "digits_cnn", "options": {"num_classes": 4}}
    record = json.loads(json.dumps(deepcopy(model).wnq_model))
    again = registered_model(record["name"], **record["options"])
    again.load_state_dict(model.state_dict())
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.eval()(x), model.eval()(x))


def test_duplicate_name_is_refused():
    def resnet20() -> nn.Module:
        raise AssertionError("not to be called")

    with pytest.raises(ValueError, match=r"'resnet20' is registered already, by wnq\.models\.networks"):
        register_model(resnet20)


@pytest.mark.parametrize("build", [build_model, registered_model])
def test_unknown_name_gives_the_closest_and_all(build):
    with pytest.raises(
        ValueError,
        match=r"unknown model 'resnet2'\. Did you mean .*'resnet20'.*Known: alexnet_bn, digits_cnn, digits_mlp",
    ):
        build("resnet2")


@pytest.mark.parametrize("build", [build_model, registered_model])
def test_unknown_option_names_the_accepted_ones(build):
    with pytest.raises(
        ValueError, match=r"does not take num_clases\. Did you mean 'num_classes'\? Options: num_classes, in_channels"
    ):
        build("resnet20", num_clases=3)
    with pytest.raises(ValueError, match="does not take name"):
        build("resnet20", **{"name": "x"})


@pytest.mark.parametrize("value", [0, -1, 10**9, 2.0, True, "10", None])
@pytest.mark.parametrize("option", ["num_classes", "in_channels"])
def test_sizes_from_a_file_are_checked(option: str, value: object):
    with pytest.raises(ValueError, match=f"{option} must be an integer from 1 to 65536"):
        registered_model("resnet20", **{option: value})


NETS = """
from torch import nn
executed = open(__file__ + ".ran", "w")
def net(width: int = 3, depth: int = 1):
    return nn.Linear(width, depth)
def no_module():
    return 3
number = 5
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "user_nets_for_test.py"
    path.write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return path


def test_users_factory_is_called_with_its_options(user_module: Path):
    model = build_model("user_nets_for_test:net", width=5)
    assert isinstance(model, nn.Linear) and model.in_features == 5
    assert not hasattr(model, "wnq_model")


def test_users_factory_errors_say_what_is_wrong(user_module: Path):
    with pytest.raises(ValueError, match=r"does not take widht\. Did you mean 'width'\? Options: width, depth"):
        build_model("user_nets_for_test:net", widht=5)
    with pytest.raises(ValueError, match=r"has no function 'nett'\. Did you mean 'net'"):
        build_model("user_nets_for_test:nett")
    with pytest.raises(ValueError, match="has no function 'number'"):
        build_model("user_nets_for_test:number")
    with pytest.raises(TypeError, match=r"must return a torch\.nn\.Module, got int"):
        build_model("user_nets_for_test:no_module")
    with pytest.raises(ModuleNotFoundError, match=r"no module 'no_such_module_here'.*PYTHONPATH"):
        build_model("no_such_module_here:net")
    with pytest.raises(ValueError, match="not of the form"):
        build_model("user_nets_for_test:net()")


@pytest.mark.parametrize(
    "name", ["user_nets_for_test:net", "timm:resnet18", "torchvision:resnet18", "hf:a/b", "os:system"]
)
def test_registered_model_never_imports(name: str, user_module: Path):
    user_module.write_text("raise AssertionError('imported')")
    with pytest.raises(ValueError, match="unknown model"):
        registered_model(name)


@pytest.mark.parametrize(
    ("prefix", "package"), [("timm", "timm"), ("torchvision", "torchvision"), ("hf", "transformers")]
)
def test_missing_package_is_named(prefix: str, package: str):
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(ModuleNotFoundError, match=f"needs {package}: pip install {package}"):
        build_model(f"{prefix}:anything")


@pytest.mark.parametrize("prefix", ["timm", "torchvision"])
def test_outside_networks(prefix: str):
    pytest.importorskip(prefix)
    model = build_model(f"{prefix}:resnet18", num_classes=4, in_channels=3)
    assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(ValueError, match=r"has no model 'resnet1z8'\. Did you mean 'resnet18'"):
        build_model(f"{prefix}:resnet1z8")
    with pytest.raises(ValueError, match=r"cannot be built: .*'fo'"):
        build_model(f"{prefix}:resnet18", fo=1)


def test_transformers_network_returns_logits(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    config = transformers.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[8, 8, 8, 8], embedding_size=8)
    config.save_pretrained(tmp_path)
    model = build_model(f"hf:{tmp_path}", num_classes=4, in_channels=1)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 4)
    with pytest.raises(ValueError, match="has no fo"):
        build_model(f"hf:{tmp_path}", fo=1)
