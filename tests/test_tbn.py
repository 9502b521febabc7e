"""TBN against its equations: the ternary inputs and their running threshold."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.activations import input_builder
from wnq.methods.tbn import TernaryInput
from wnq.testing import LAWS, METHOD_LAWS

QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def ternary(_=None):
    return input_builder("tbn", 2)()


def test_by_hand():
    # mean |x| = 1, threshold 0.4, which itself counts as above.
    x = torch.tensor([[0.5, -0.25], [0.25, 3.0]], requires_grad=True)
    quantizer = TernaryInput(0.25)
    quantizer.observe_(x)
    assert quantizer.mean.item() == 1
    y = quantizer(x)
    assert y.tolist() == [[1.0, -1.0], [1.0, 1.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    wider = TernaryInput(0.4)
    wider.observe_(x)
    assert wider(x).tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert wider.quantize(x).codes.tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_random_tensors_equal_numpy(dtype, tolerance):
    generator = np.random.default_rng(0)
    v, g = generator.normal(size=(8, 5, 4)), generator.normal(size=(8, 5, 4))
    x = torch.tensor(v, dtype=dtype, requires_grad=True)
    quantizer = ternary()
    quantizer.observe_(x)
    y = quantizer(x)
    y.backward(torch.tensor(g, dtype=dtype))
    # The average is a float32 buffer; no element of this tensor lies within its rounding of the threshold.
    delta = 0.4 * np.abs(v).mean()
    assert np.abs(np.abs(v) - delta).min() > 1e-4
    assert (y.detach().numpy() == np.sign(v) * (np.abs(v) >= delta)).all()
    assert np.abs(x.grad.double().numpy() - g * (np.abs(v) <= 1)).max() < tolerance


def test_the_average_runs_over_training_batches():
    quantizer = TernaryInput(momentum=0.25)
    with pytest.raises(RuntimeError, match="calibrate_"):
        quantizer(torch.ones(3))
    for value, expected in ((2.0, 2.0), (4.0, 2.5), (-8.0, 3.875)):
        quantizer.observe_(torch.full((3, 2), value))
        assert quantizer.mean.item() == expected
    assert quantizer(torch.tensor([1.5, 1.6, -1.5, -1.6, 0.0])).tolist() == [0.0, 1.0, 0.0, -1.0, 0.0]


def test_a_batch_that_is_not_finite_leaves_the_average_alone():
    quantizer = TernaryInput()
    quantizer.observe_(torch.tensor([1.0, float("nan")]))
    assert not quantizer.initialized
    quantizer.observe_(torch.tensor([1.0, 3.0]))
    quantizer.observe_(torch.tensor([1.0, float("inf")]))
    assert quantizer.mean.item() == 2
    assert quantizer(torch.tensor([1.0, float("nan")]))[1].isnan()


def test_evaluation_keeps_the_average_and_a_file_stores_it(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    x = torch.randn(32, 6)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("tbn"), first_last_bits=None))
    for scale in (1, 2, 3):
        model(scale * x)
    means = [model[i].input_quantizer.mean.item() for i in (0, 2)]
    assert means[0] == pytest.approx((0.9 * (0.9 + 0.1 * 2) + 0.1 * 3) * x.abs().mean().item(), rel=1e-6)
    expected = model.eval()(x)
    model(100 * x)
    assert [model[i].input_quantizer.mean.item() for i in (0, 2)] == means
    wnq.save(model, tmp_path / "model.safetensors")
    fresh = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    loaded = wnq.load(tmp_path / "model.safetensors", fresh)
    assert torch.equal(loaded(x), expected)
    assert [loaded[i].input_quantizer.mean.item() for i in (0, 2)] == means


def test_processes_average_together(tmp_path):
    code = (
        "import sys, torch, torch.distributed as dist; from wnq.methods.tbn import TernaryInput\n"
        "rank = int(sys.argv[1]); dist.init_process_group('gloo', init_method=sys.argv[2], rank=rank, world_size=2)\n"
        "quantizer = TernaryInput(); quantizer.observe_(torch.full((3,), 1.0 + 4 * rank))\n"
        "print(quantizer.mean.item()); dist.destroy_process_group()"
    )
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), f"file://{tmp_path}/store"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert [run.communicate(timeout=120)[0].strip() for run in runs] == ["3.0", "3.0"]
    finally:
        for run in runs:
            run.kill()
            run.wait()


def test_weights_are_those_of_bwn():
    w = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(wnq.get_method("tbn").weight(w, 0)(w), wnq.get_method("bwn").weight(w, 0)(w))


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
def test_laws_of_the_input(law):
    law(ternary)


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
def test_laws_of_the_weight(law):
    law(lambda x: wnq.get_method("tbn").weight(x, 0))


def test_compiles():
    COMPILES(ternary)


def test_the_running_average_compiles():
    quantizer = ternary()
    observe = torch.compile(quantizer.observe_, fullgraph=True)
    for value in (2.0, 4.0):
        observe(torch.full((3,), value))
    assert quantizer.mean.item() == pytest.approx(2.2)


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("a_bits", [2, 32])
def test_method_laws(law, a_bits):
    law(wnq.get_method("tbn", a_bits=a_bits))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 2"):
        wnq.get_method("tbn", w_bits=2)
    with pytest.raises(ValueError, match=r"activation 'tbn' defines a_bits 2, or 32 for float; got 1"):
        wnq.get_method("tbn", a_bits=1)
    for delta in (0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="delta must be positive and finite"):
            TernaryInput(delta)
    for momentum in (0, 1.1):
        with pytest.raises(ValueError, match="momentum must lie above 0 and at most 1"):
            TernaryInput(momentum=momentum)
