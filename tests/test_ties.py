"""Values of the network's input that lie on a threshold: the integers stay, the threshold moves, nothing else does."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.export import export_model
from wnq.integer import DeployedLayer, convert
from wnq.integer.ties import CLEARANCE, clear_ties_


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.beside, self.last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.last(torch.relu(self.first(x))) + self.last(torch.relu(self.beside(x * 0.5)))


def images(count=8):
    """Pixels of 256 levels, normalized."""
    pixels = torch.randint(0, 256, (count, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    pixels[0, 0, 0, 0], pixels[0, 0, 0, 1] = 0, 255
    return (pixels / 255 - 0.5) / 0.25


def converted(step):
    torch.manual_seed(0)
    model = Net()
    method = wnq.get_method("wnq", w_bits=3, a_bits=8)
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    wnq.calibrate_(model, images()).eval()
    model.first.input_quantizer.step.data.fill_(step)
    return model, convert(model, images(2))


def on_a_threshold(nudge=0.0):
    """A step that puts one pixel value on the threshold at 20.5, or by ``nudge`` steps off it."""
    return float(images().unique()[200] / (20.5 + nudge))


@pytest.mark.parametrize("nudge", [0.0, 5e-7, -5e-7, 3e-5, -9e-5])
def test_no_value_is_near_a_threshold_and_every_integer_stays(nudge):
    step = on_a_threshold(nudge)
    model, conversion = converted(step)
    first, x = conversion.model.first, images()
    before, product, others = (
        first.grid.integers(x),
        first.grid.step * first.scale.double(),
        copy.deepcopy(conversion.model),
    )
    moved = clear_ties_(conversion.model, [(x,)])
    assert set(moved) == {"first"} and 0 < abs(moved["first"]) < 1e-3
    assert first.grid.step != step and torch.equal(first.grid.integers(x), before)
    assert (first.grid.step * first.scale.double() / product - 1).abs().max() < 1.3e-7
    ratio = x.double().numpy() / np.float32(first.grid.step)
    inside = (ratio > first.grid.low) & (ratio < first.grid.high)
    assert np.abs(ratio - np.floor(ratio) - 0.5)[inside].min() >= CLEARANCE
    # As engines compute it: times the inverse, plus the zero point, in float32.
    codes = np.rint(x.numpy() * np.float32(1 / first.grid.step) + np.float32(first.grid.zero_point))
    assert np.array_equal(codes.clip(0, 255) - first.grid.zero_point, before.numpy())
    for name, layer in others.named_modules():
        if isinstance(layer, DeployedLayer) and name != "first":
            assert conversion.model.get_submodule(name).grid == layer.grid
    with torch.no_grad():
        assert (conversion.model(x) - model(x)).abs().max() < 1e-5


def test_what_is_clear_or_continuous_stays():
    _, conversion = converted(on_a_threshold(0.2))
    assert clear_ties_(conversion.model, [(images(),)]) == {}
    _, conversion = converted(on_a_threshold())
    assert (
        clear_ties_(conversion.model, [(torch.randn(700, 3, 6, 6),)]) == {} and clear_ties_(conversion.model, []) == {}
    )


def test_an_export_says_so(tmp_path):
    pytest.importorskip("onnxruntime")
    torch.set_num_threads(1)
    model, _ = converted(on_a_threshold(1e-7))
    proof = export_model(model, (images(),), tmp_path / "m.onnx", to="onnx", residual_bits=32, seconds=0.01)
    assert [note.partition(":")[0] for note in proof["notes"] if "parts per million" in note] == ["first"]
    assert proof["engine_vs_trained"]["max"] < 1e-4
