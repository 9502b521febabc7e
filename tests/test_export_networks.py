"""Networks and methods, exported and proven as a user would: whole, in a fresh process."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.integer import convert

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from wnq.export import export_model
from wnq.export.engines import open_engine
from wnq.export.onnx import trace, write_onnx

try:
    import openvino  # noqa: F401

    TARGETS = ["onnx", "openvino"]
except ModuleNotFoundError:
    TARGETS = ["onnx"]

ENGINE = {"onnx": "onnxruntime", "openvino": "openvino"}


class Inverted(nn.Module):
    """MobileNetV2's block: expansion, depthwise convolution, linear projection, a shortcut where shapes allow."""

    def __init__(self, inputs, outputs, stride, expand):
        super().__init__()
        hidden = inputs * expand
        self.shortcut = stride == 1 and inputs == outputs
        parts = [] if expand == 1 else [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        parts += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        ]  # fmt: skip
        self.body = nn.Sequential(*parts)

    def forward(self, x):
        return x + self.body(x) if self.shortcut else self.body(x)


class MobileNetV2(nn.Module):
    """All 17 blocks of the table of arXiv:1801.04381, an eighth as wide, on 32x32 pixels."""

    def __init__(self):
        super().__init__()
        table = (
            (1, 16, 1, 1),
            (6, 24, 2, 1),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        layers, width = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()], 8
        for expand, outputs, count, stride in table:
            for i in range(count):
                layers.append(Inverted(width, outputs // 8, stride if i == 0 else 1, expand))
                width = outputs // 8
        self.features = nn.Sequential(*layers, nn.Conv2d(width, 160, 1, bias=False), nn.BatchNorm2d(160), nn.ReLU6())
        self.fc = nn.Linear(160, 10)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class Plain(nn.Module):
    """No BatchNorm: grouped, transposed and 1-D convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.grouped = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.up, self.line, self.fc = (
            nn.ConvTranspose2d(8, 4, 2, stride=2),
            nn.Conv1d(4, 6, 16, stride=16),
            nn.Linear(96, 10),
        )

    def forward(self, x):
        x = F.relu(self.grouped(F.relu(self.first(x))))
        return self.fc(F.relu(self.line(F.relu(self.up(x)).flatten(2))).flatten(1))


def trained(model, x, *, bits, a_bits, **options):
    """Quantize, with BatchNorm statistics and step sizes of small inputs, so that larger ones saturate."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            g = torch.Generator().manual_seed(module.num_features)
            module.weight.data.copy_(torch.rand(module.num_features, generator=g) + 0.5)
            module.weight.data[::3] *= -1  # negative factors, and one of zero
            module.weight.data[1] = 0
    with torch.no_grad():
        model(x)
    model.eval()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=bits, a_bits=a_bits, **options)))
    return wnq.calibrate_(model, 0.5 * x).eval()


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize(
    ("network", "shape", "bits"), [(MobileNetV2, (3, 32, 32), 4), (Plain, (3, 8, 8), 2)], ids=["mobilenetv2", "plain"]
)
def test_a_network_is_written_and_proven(network, shape, bits, to, tmp_path):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    x = torch.randn(48, *shape, generator=torch.Generator().manual_seed(1))
    model = trained(network(), x, bits=bits, a_bits=bits)
    proof = export_model(model, (x,), tmp_path / "m.onnx", to=to, seconds=0.0, residual_bits=32)
    assert proof == json.loads((tmp_path / "m.onnx.proof.json").read_text())
    if to == "openvino":  # float biases: the trained function
        assert proof["engine_vs_reference"]["agreement"] == 100
    else:  # integer biases; a network of random weights has close logits and carries a moved rounding through 52 layers
        assert proof["engine_vs_reference"]["agreement"] >= 85
    assert proof["reference_vs_trained"]["agreement"] == 100
    records = {record["name"]: record for record in proof["layers"]}
    assert all(record["sums"] == "integer" for record in records.values())
    if to == "openvino":
        assert proof["operators"]["integer"] == proof["operators"]["products"] == len(records)
    # A second engine's process, other batch sizes: the file holds no batch.
    engine = open_engine(ENGINE[to], tmp_path / "m.onnx")
    whole = engine.run([x.numpy()])
    np.testing.assert_allclose(
        np.concatenate([engine.run([x[:1].numpy()]), engine.run([x[1:].numpy()])]), whole, rtol=1e-5, atol=1e-5
    )


class Branches(nn.Module):
    """One branch a method, side by side, so that a wrong one shows by itself."""

    def __init__(self, names):
        super().__init__()
        self.names = list(names)
        self.blocks = nn.ModuleDict(
            {
                name: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
                for name in self.names
            }
        )

    def forward(self, x):
        return torch.stack([self.blocks[name](x).mean((2, 3)) for name in self.names], 1)


NO_INTEGERS = {"lqnets", "ttq", "abcnet", "sketching", "hbb"}
"""Methods whose levels are no multiples of one step at 2 bits, or whose values are sums of several steps."""


def test_every_method_runs_in_an_engine_and_says_how(tmp_path):
    """All methods in one file: uniform ones as integers, the others as floats or tables, and the record says which."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    found = {info.name: min(info.widths, key=lambda bits: abs(bits - 2)) for info in wnq.list_methods()}
    model = Branches(found).train()
    x = torch.randn(24, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model(x)
    model.eval()
    methods = {f"blocks.{name}.*": wnq.get_method(name, w_bits=bits) for name, bits in found.items()}
    plan = wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=2), first_last_bits=None, override=methods)
    wnq.quantize_(model, plan)
    wnq.calibrate_(model, 0.5 * x).eval()
    with torch.no_grad():
        before = model(x).numpy()
    conversion = convert(model, x)
    with torch.no_grad():
        reference = conversion.model(x).numpy()
    forms = {
        name: {r.form for r in conversion.layers if r.kind == "Conv2d" and r.name.startswith(f"blocks.{name}.")}
        for name in found
    }
    assert {name for name, form in forms.items() if form != {"integer"}} == NO_INTEGERS
    assert all(record.why for record in conversion.layers if record.sums != "integer")
    traced = trace(conversion.model, (x[:2],))
    for to in TARGETS:
        write_onnx(conversion, (x[:2],), tmp_path / f"{to}.onnx", engine=ENGINE[to], traced=traced)
        got = open_engine(ENGINE[to], tmp_path / f"{to}.onnx").run([x.numpy()])
        for i, name in enumerate(found):
            size = np.abs(before[:, i]).max()
            # A mean of 16 sums whose inputs are rounded alike; one input at a threshold may differ by the order of a float sum.
            assert np.abs(got[:, i] - reference[:, i]).mean() <= 1e-4 * size, (to, name)
            assert np.abs(reference[:, i] - before[:, i]).mean() <= 1e-4 * size, name
