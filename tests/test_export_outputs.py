"""Networks trained with rounded outputs, in the engines: every product of integers, and the trained function."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from test_outputs import Net, images, trained
from wnq.integer import convert, round_biases_

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from wnq.export.engines import open_engine  # noqa: E402
from wnq.export.onnx import trace, write_onnx  # noqa: E402

try:
    import openvino  # noqa: F401

    ENGINES = ["onnxruntime", "openvino"]
except ModuleNotFoundError:
    ENGINES = ["onnxruntime"]

CASES = {
    "w2a2": (Net, wnq.get_method("wnq", w_bits=2, a_bits=2)),
    "w3a4": (Net, wnq.get_method("lsq", w_bits=3, a_bits=4)),
    "w8a8": (Net, wnq.get_method("wnq", w_bits=8, a_bits=8, grid="symmetric")),
}


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    torch.set_num_threads(1)
    model = trained(*CASES[request.param])
    conversion = convert(model, images(2))
    traced = trace(conversion.model, (images(2),))
    folder = tmp_path_factory.mktemp("onnx")
    files = {
        (engine, flavour): write_onnx(
            conversion, (images(2),), folder / f"{engine}-{flavour}.onnx",
            engine=engine, flavour=flavour, calibration=[(images(16),)], traced=traced,
        )
        for engine in ENGINES
        for flavour in ("fast", "small")
    }  # fmt: skip
    return model, conversion, files


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_computes_the_trained_function_in_integers(exported, engine):
    """On inputs beyond every clip, behind BatchNorms with factors of both signs and zero."""
    model, conversion, files = exported
    file = files[engine, "fast"]
    assert not any("calibrated" in note for note in file.notes)
    loaded = open_engine(engine, file.path)
    floats = {operator.layer for operator in loaded.operators() if not operator.integer}
    assert len(loaded.operators()) == 8
    # OpenVINO 2026.4 takes 1x1 convolutions with strides apart before it looks for integers.
    assert floats <= ({"first.down"} if engine == "openvino" else set())
    x = images(256, 9, scale=6.0)
    with torch.no_grad():
        theirs, reference = model(x).numpy(), conversion.model(x).numpy()
    ours = loaded.run([x.numpy()])
    assert np.array_equal(ours.argmax(1), theirs.argmax(1))
    if engine == "onnxruntime":
        assert any("Integer biases: 0 of " in note for note in file.notes)
        # Not one rounding is decided otherwise; what is left are float operations that both have.
        assert np.abs(ours - reference).max() <= 2e-7 * np.abs(reference).max()
        assert np.array_equal(ours, open_engine(engine, files[engine, "small"].path).run([x.numpy()]))
    else:
        # Float biases and scales in another order may move a value at one of 255 thresholds by one of 8 bits.
        assert (np.abs(ours - reference) > 1e-5).mean() < 0.02


def test_the_inputs_saturate(exported):
    """The test above does test both ends of every grid."""
    model, _, _ = exported
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, args, y, name=name: seen.update({name: m.quantize(args[0]).codes}))
        for name, module in model.named_modules()
        if name.endswith(("input_quantizer", "output_quantizer"))
    ]
    with torch.no_grad():
        model(images(256, 9, scale=6.0))
    for hook in hooks:
        hook.remove()
    assert len(seen) == 12
    for name, codes in seen.items():
        assert codes.max() == 2 ** model.get_submodule(name).bits - 1, name
        assert codes.min() == 0 or name == "fc.input_quantizer", name  # a mean


class Line(nn.Module):
    """What may stand between a convolution and the quantization behind it."""

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv2d(3, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))])
        self.fc = nn.Linear(8 * 4, 10)

    def forward(self, x):
        x = F.relu6(self.convs[0](x))
        x = F.max_pool2d(F.relu(self.convs[1](x)), 3, 1, 1)
        x = F.relu(F.max_pool2d(F.hardtanh(self.convs[2](x), -0.7, 0.9), 2))
        x = F.hardtanh(self.convs[3](x), -0.31, 0.29)
        x = F.max_pool2d(self.convs[4](x), 2)
        return self.fc(F.relu6(self.convs[5](x)).flatten(1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantization_goes_ahead_of_clips_and_pooling(bits, tmp_path):
    """Exactly, whatever the ends of clips fall on; without it each of these convolutions would get a quantization of its own."""
    torch.manual_seed(0)
    model = Line()
    method = wnq.get_method("wnq", w_bits=3, a_bits=bits)
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    round_biases_(wnq.calibrate_(model, images(8)).eval(), images(2))
    conversion = convert(model, images(2))
    file = write_onnx(conversion, (images(2),), tmp_path / "m.onnx", calibration=[(images(8),)])
    kinds = [node.op_type for node in onnx.load(file.path).graph.node]
    assert "Relu" in kinds and "MaxPool" in kinds and kinds.count("QLinearConv") == 0
    loaded, x = open_engine("onnxruntime", file.path), images(64, 3, scale=4.0)
    assert sum(operator.kind == "QLinearConv" for operator in loaded.operators()) == 6
    assert not any("calibrated" in note for note in file.notes)
    with torch.no_grad():
        reference = conversion.model(x).numpy()
    assert np.abs(loaded.run([x.numpy()]) - reference).max() <= 2e-7 * np.abs(reference).max()


@pytest.mark.parametrize(("name", "w_bits", "a_bits"), [("wnq", 8, 8), ("wnq", 32, 4), ("lqnets", 3, 4)])
def test_onnxruntime_does_not_round_weights_of_its_own(name, w_bits, a_bits, tmp_path):
    """Found by testing: it takes float weights between two quantizations, rounds them to 8 bits, and says nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    method = wnq.get_method(name, w_bits=w_bits, a_bits=a_bits, activation="lsq")
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    wnq.calibrate_(model, images(16)).eval()
    conversion = convert(model, images(2))
    assert {record.form for record in conversion.layers} <= {"float", "codebook"}
    file = write_onnx(conversion, (images(2),), tmp_path / "m.onnx", calibration=[(images(8),)])
    loaded, x = open_engine("onnxruntime", file.path), images(64, 3)
    assert not any(operator.integer for operator in loaded.operators())
    with torch.no_grad():
        reference = conversion.model(x).numpy()
    # Float sums in another order; no value happens to lie at a threshold.
    assert np.abs(loaded.run([x.numpy()]) - reference).max() < 1e-5 * np.abs(reference).max()
