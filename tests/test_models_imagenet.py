"""The ImageNet networks: published parameter counts and names, plans; and that the recipes for them can be built."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from wnq import get_method, make_plan, quantize_
from wnq.models import build_model, registered_model
from wnq.models.mobile import InvertedResidual
from wnq.recipe import load_recipe, plan_of, recipe_from

# As published with torchvision's weights; AlexNet's from its paper's layers, MobileNet's from its table 1, typed below.
PARAMETERS = {
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "alexnet_bn": 60_974_792,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v2": 3_504_872,
}
LAYERS = {"resnet18": 21, "resnet34": 37, "resnet50": 54, "alexnet_bn": 8, "mobilenet_v1": 28, "mobilenet_v2": 53}
RECIPES = sorted((Path(__file__).parent.parent / "recipes" / "imagenet").glob("*.toml"))


def on_meta(name: str, **options: int) -> nn.Module:
    with torch.device("meta"):
        return build_model(name, **options)


def counted(layers: list[tuple[int, int, int, bool]]) -> int:
    """Parameters of (inputs of a group, outputs, kernel, batch normalization or bias) layers."""
    return sum(
        narrow * wide * kernel**2 + wide * (2 if normalized else 1) for narrow, wide, kernel, normalized in layers
    )


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_parameters_shapes_and_plan(name: str):
    model = on_meta(name).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    module = __import__("wnq.models.mobile" if "mobile" in name else "wnq.models.imagenet", fromlist=[name])
    assert f"{PARAMETERS[name]:,} parameters" in getattr(module, name).__doc__
    assert model(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)
    weights = {key: m for key, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    plan = make_plan(model, get_method("wnq", w_bits=2, a_bits=2))
    assert len(plan.layers) == len(weights) == LAYERS[name]
    *_, last = weights
    assert [layer.name for layer in plan.layers if layer.method.w_bits == 8] == [next(iter(weights)), last]
    again = {"num_classes": 7, "in_channels": 1}
    assert on_meta(name, **again)(torch.empty(2, 1, 224, 224, device="meta")).shape == (2, 7)


def test_counts_follow_from_the_papers_tables():
    alexnet = [(3, 96, 11, True), (48, 256, 5, True), (256, 384, 3, True), (192, 384, 3, True), (192, 256, 3, True)]
    linear = [(256 * 36, 4096, 1, True), (4096, 4096, 1, True), (4096, 1000, 1, False)]
    assert counted(alexnet + linear) == PARAMETERS["alexnet_bn"]
    widths = [32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024]
    blocks = [layer for narrow, wide in pairwise(widths) for layer in ((1, narrow, 3, True), (narrow, wide, 1, True))]
    assert counted([(3, 32, 3, True), *blocks, (1024, 1000, 1, False)]) == PARAMETERS["mobilenet_v1"]


def test_state_names_are_those_of_the_published_weights():
    names = set(on_meta("resnet50").state_dict())
    for name in ("conv1.weight", "bn1.running_mean", "layer1.0.downsample.0.weight", "layer1.0.downsample.1.bias"):
        assert name in names
    assert {"layer4.2.conv3.weight", "layer3.5.bn2.weight", "fc.bias"} < names
    assert (
        "layer1.1.downsample.0.weight" not in names
        and "layer1.0.downsample.0.weight" not in on_meta("resnet18").state_dict()
    )
    names = set(on_meta("mobilenet_v2").state_dict())
    for name in (
        "features.0.0.weight",
        "features.1.conv.0.0.weight",
        "features.1.conv.1.weight",
        "features.1.conv.2.bias",
    ):
        assert name in names
    assert {
        "features.2.conv.1.0.weight",
        "features.17.conv.3.running_var",
        "features.18.1.bias",
        "classifier.1.bias",
    } < names


def test_the_3x3_convolution_strides_in_resnet50():
    model = on_meta("resnet50")
    strides = {key: m.stride for key, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.stride == (2, 2)}
    expected = {"conv1", *(f"layer{i}.0.{part}" for i in (2, 3, 4) for part in ("conv2", "downsample.0"))}
    assert set(strides) == expected


def test_blocks_add_their_shortcut():
    torch.manual_seed(0)
    x = torch.randn(2, 8, 5, 5)
    block = InvertedResidual(8, 8, 1, 6).eval()
    assert torch.equal(block(x), x + block.conv(x))
    assert not InvertedResidual(8, 16, 1, 6).adds and not InvertedResidual(8, 8, 2, 6).adds
    residual = build_model("resnet18").get_submodule("layer2.0").eval()
    x = torch.randn(1, 64, 6, 6)
    y = residual.bn2(residual.conv2(residual.bn1(residual.conv1(x)).relu()))
    assert torch.equal(residual(x), (y + residual.downsample[1](residual.downsample[0](x))).relu())


@pytest.mark.parametrize("name", list(PARAMETERS))
def test_every_activation_is_a_module_of_its_own(name: str):
    model = on_meta(name)
    activations = [m for m in model.modules() if isinstance(m, nn.ReLU | nn.ReLU6)]
    # Behind every layer with a weight but the last, the shortcuts, and the narrow ends of MobileNetV2's blocks.
    silent = {"resnet50": 4, "mobilenet_v2": 17, "resnet18": 3, "resnet34": 3}.get(name, 0)
    assert len(set(activations)) == LAYERS[name] - 1 - silent


def test_a_quantized_mobilenet_trains_and_is_remembered():
    torch.manual_seed(0)
    model = registered_model("mobilenet_v2", num_classes=3)
    quantize_(model, make_plan(model, get_method("wnq", w_bits=4, a_bits=4)))
    nn.functional.cross_entropy(model(torch.randn(2, 3, 32, 32)), torch.tensor([0, 2])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.wnq_model == {"name": "mobilenet_v2", "options": {"num_classes": 3}}


def test_alexnet_follows_the_image_size():
    assert on_meta("alexnet_bn", image_size=96)(torch.empty(2, 3, 96, 96, device="meta")).shape == (2, 1000)
    assert on_meta("alexnet_bn", image_size=63)(torch.empty(2, 3, 63, 63, device="meta")).shape == (2, 1000)
    with pytest.raises(ValueError, match="image_size must be at least 63 pixels"):
        build_model("alexnet_bn", image_size=62)
    with pytest.raises(ValueError, match="num_classes must be an integer"):
        build_model("mobilenet_v1", num_classes=0)


def test_every_network_has_its_two_recipes():
    stems = {name.replace("_", "-") for name in PARAMETERS}
    assert {path.stem for path in RECIPES} == {f"{stem}-{kind}" for stem in stems for kind in ("float", "wnq")}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_can_be_built(path: Path):
    recipe = load_recipe(path)
    name = path.stem.rsplit("-", 1)[0]
    assert recipe.model.name.replace("_", "-") == name and recipe.data.stream and recipe.data.name == "imagenet"
    assert (recipe.quantize is None) == path.stem.endswith("-float")
    model = on_meta(recipe.model.name)
    if recipe.quantize is None:
        return
    assert recipe.model.start == f"runs/imagenet/{name}-float" and recipe.train.distill_weight == 0.5
    for bits in (2, 3, 4):
        tables = recipe.to_json()
        tables["quantize"]["options"] = {"w_bits": bits, "a_bits": bits}
        plan = plan_of(recipe_from(tables).quantize, model)
        assert {layer.method.w_bits for layer in plan.layers} == {8, bits}
