"""PACT: the input quantizer against its equations, and the method."""

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.activations import PACT
from wnq.methods import MethodInfo
from wnq.testing import LAWS


@pytest.mark.parametrize("bits", range(1, 9))
def test_input_equals_equations_1_to_3(bits):
    generator = np.random.default_rng(bits)
    v, g = generator.normal(size=(40,)) * 2, generator.normal(size=(40,))
    x = torch.tensor(v, requires_grad=True)
    quantizer = PACT(bits, start=1.5).double()
    y = quantizer(x)
    y.backward(torch.tensor(g))
    clipped = 0.5 * (np.abs(v) - np.abs(v - 1.5) + 1.5)  # the paper's form of clip(x, 0, alpha)
    step = 1.5 / (2**bits - 1)
    assert np.abs(y.detach().numpy() - np.rint(clipped / step) * step).max() < 1e-12
    assert (x.grad.numpy() == g * ((v >= 0) & (v < 1.5))).all()
    assert quantizer.alpha.grad.item() == pytest.approx((g * (v >= 1.5)).sum(), rel=1e-12)


def test_input_in_single_precision_and_by_hand():
    x = torch.tensor([-1.0, 0.0, 0.4, 0.6, 2.9, 3.0, 7.0], requires_grad=True)
    quantizer = PACT(2, start=3.0)
    y = quantizer(x)
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]))
    assert y.tolist() == [0.0, 0.0, 0.0, 1.0, 3.0, 3.0, 3.0]
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 5.0, 0.0, 0.0]
    assert quantizer.alpha.grad.item() == 13.0


def test_the_method_is_dorefas_weights_behind_the_learned_clip():
    w = torch.randn(6, 7, generator=torch.Generator().manual_seed(0))
    for bits in range(1, 9):
        results = []
        for name in ("pact", "dorefa"):
            x = w.clone().requires_grad_()
            y = wnq.get_method(name, w_bits=bits).weight(w, 0)(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert isinstance(wnq.get_method("pact").input(), PACT)
    assert wnq.get_method("pact", a_bits=32).input is None


def test_the_clip_is_decayed_like_the_weights_and_shrinks_without_inputs_above_it():
    assert MethodInfo.of("pact").recommended.quantizer_weight_decay == 1.0
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("pact"), first_last_bits=None))
    groups = wnq.param_groups(model, lr=0.1, weight_decay=0.01, quantizer_weight_decay=0.01)
    model(torch.randn(8, 3)).sum().backward()
    torch.optim.SGD(groups).step()
    assert model[2].input_quantizer.alpha.item() == pytest.approx(8 * (1 - 0.1 * 0.01), rel=1e-6)


@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_laws(law):
    for bits in (1, 3, 8):
        law(lambda _, bits=bits: PACT(bits, start=0.5))


def test_compiles():
    LAWS[-1](lambda _: PACT(3, start=0.5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PACT(3, start=0), "start must be positive"),
        (lambda: PACT(9), "bits must be an integer from 1 to 8, got 9"),
        (lambda: wnq.get_method("pact", w_bits=9), "w_bits must be an integer from 1 to 8 \\(or 32"),
        (lambda: wnq.get_method("pact", a_bits=0), "a_bits \\(or 32 for float inputs\\) must be"),
    ],
)
def test_bad_options_are_explained(build, message):
    with pytest.raises(ValueError, match=message):
        build()
