"""BNN against its equations: signs of weights and inputs, both with Hardtanh's gradient."""

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.activations import input_builder
from wnq.testing import LAWS, METHOD_LAWS

QUICK = [law for law in LAWS if law.__name__ != "compiles"]
(COMPILES,) = [law for law in LAWS if law.__name__ == "compiles"]


def weight(x):
    return wnq.get_method("bnn").weight(x, 0)


def sign(_=None):
    return input_builder("sign", 1)()


@pytest.mark.parametrize(("make", "zero"), [(weight, 1.0), (sign, -1.0)], ids=["weight", "input"])
def test_sign_with_hardtanhs_gradient(make, zero):
    x = torch.tensor([[0.0, -0.2, 1.0], [-1.0, 1.001, -3.0]], requires_grad=True)
    g = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    y = make(x.detach())(x)
    y.backward(g)
    assert y.tolist() == [[zero, -1.0, 1.0], [-1.0, 1.0, -1.0]]
    assert x.grad.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("make", [weight, sign], ids=["weight", "input"])
def test_random_tensors_equal_numpy(make, dtype):
    generator = np.random.default_rng(0)
    v, g = generator.normal(size=(7, 9)), generator.normal(size=(7, 9))
    x = torch.tensor(v, dtype=dtype, requires_grad=True)
    y = make(x.detach())(x)
    y.backward(torch.tensor(g, dtype=dtype))
    assert (y.detach().numpy() == np.where(v >= 0, 1, -1)).all()
    assert np.abs(x.grad.double().numpy() - g * (np.abs(v) <= 1)).max() < (1e-12 if dtype == torch.float64 else 1e-6)


def test_ewgs_scales_inside_the_window_only():
    x = torch.tensor([0.4, -0.4, 2.0], requires_grad=True)
    quantizer = wnq.get_method("bnn", ewgs=0.5).input()
    quantizer(x).sum().backward()
    # g (1 + delta sign(g) (x - Q(x)) / span), span 2; nothing outside [-1, 1].
    assert torch.allclose(x.grad, torch.tensor([1 - 0.5 * 0.6 / 2, 1 + 0.5 * 0.6 / 2, 0.0]))


def test_the_input_is_signed_and_one_bit_wide():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4, bias=False))
    plan = wnq.make_plan(model, wnq.get_method("bnn"), first_last_bits=None)
    wnq.quantize_(model, plan)
    assert wnq.get_plan(model)["0"].a_bits == 1
    assert model[0].input_quantizer.signed is True
    y = model(torch.tensor([[0.5, -0.1, -7.0]]))
    assert torch.equal(y, torch.tensor([[1.0, -1.0, -1.0]]) @ model[0].weight.T)


def test_the_float_weight_is_clipped_before_a_training_step():
    w = torch.tensor([[0.5, -4.0], [1.5, -1.0]])
    weight(w).observe_(w)
    assert w.tolist() == [[0.5, -1.0], [1.0, -1.0]]


def test_it_learns_with_signs_as_inputs():
    """Which of four directions a point lies in; blocks of linear, BatchNorm, sign."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 32), nn.BatchNorm1d(32), nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 4))
    x = torch.randn(512, 2)
    y = (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0).long()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("bnn")))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    original = model[2].parametrizations.weight.original
    assert model[2].input_quantizer(x).unique().tolist() == [-1.0, 1.0]
    assert original.abs().max() <= 1.1  # the last update may stand a little outside
    assert (model.eval()(x).argmax(1) == y).float().mean() > 0.8


@pytest.mark.parametrize("law", QUICK, ids=lambda law: law.__name__)
@pytest.mark.parametrize("make", [weight, sign], ids=["weight", "input"])
def test_laws(law, make):
    law(make)


@pytest.mark.parametrize("make", [weight, sign], ids=["weight", "input"])
def test_compiles(make):
    COMPILES(make)


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_laws_with_float_inputs(law):
    law(wnq.get_method("bnn", a_bits=32))


@pytest.mark.parametrize("law", METHOD_LAWS[:2], ids=lambda law: law.__name__)
def test_method_laws_with_signs_as_inputs(law):
    """Not the third: the task of that law has a ReLU in front of the layer, whose signs are all +1."""
    law(wnq.get_method("bnn"))


def test_bad_options_are_explained():
    with pytest.raises(ValueError, match=r"w_bits must be 1 \(or 32 for float weights\), got 3"):
        wnq.get_method("bnn", w_bits=3)
    with pytest.raises(ValueError, match=r"activation 'sign' defines a_bits 1, or 32 for float; got 2"):
        wnq.get_method("bnn", a_bits=2)
    with pytest.raises(ValueError, match="takes no normalizer in front: its values have no scale"):
        wnq.get_method("bnn", normalize="tanh")


def test_behind_a_relu_the_sign_tells_active_from_inactive():
    x = torch.tensor([-2.0, 0.5, 0.0, 3.0]).relu()
    assert sign()(x).tolist() == [-1.0, 1.0, -1.0, 1.0]
