"""Integer-arithmetic-only training: running ranges and BatchNorm folded before rounding."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import wnq
from wnq.folding import batchnorm_pairs, fold_batchnorm_, merge_batchnorm_
from wnq.methods.jacob import RunningRange
from wnq.prepared import weight_quantizer
from wnq.quantizer import Quantizer
from wnq.testing import LAWS, METHOD_LAWS


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("law", [law for law in LAWS if law.__name__ != "compiles"], ids=lambda law: law.__name__)
def test_running_range_keeps_the_laws(law, bits):
    law(lambda _: RunningRange(bits))


def test_running_range_compiles():
    LAWS[-1](lambda _: RunningRange(4))


@pytest.mark.parametrize("law", METHOD_LAWS, ids=lambda law: law.__name__)
def test_method_keeps_the_laws(law):
    law(wnq.get_method("jacob", w_bits=4, a_bits=4))


def test_running_range_equals_numpy():
    generator = np.random.default_rng(0)
    quantizer, low, high = RunningRange(3, momentum=0.25), 0.0, 0.0
    for step in range(5):
        x = generator.normal(size=(4, 6)) * (step + 1)
        quantizer.observe_(torch.tensor(x))
        share = 1 if step == 0 else 0.25
        low += share * (min(x.min(), 0) - low)
        high += share * (max(x.max(), 0) - high)
    S = (high - low) / 7
    Z = np.rint(-low / S)
    x = generator.normal(size=(5, 5)) * 8
    expected = S * (np.clip(np.rint(x / S) + Z, 0, 7) - Z)
    t = torch.tensor(x, requires_grad=True)
    y = quantizer(t)
    y.backward(torch.ones_like(y))
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-5)
    np.testing.assert_array_equal(t.grad.numpy(), (x > -Z * S) & (x < (7 - Z) * S))
    assert 0.0 in quantizer.quantize(torch.tensor(x)).codebook


def test_a_constant_input_is_kept_and_a_fresh_range_is_refused():
    quantizer = RunningRange(8)
    with pytest.raises(RuntimeError, match="not met any data"):
        quantizer(torch.ones(2, 2))
    quantizer.observe_(torch.full((2, 2), 3.0))
    assert torch.allclose(quantizer(torch.full((2, 2), 3.0)), torch.tensor(3.0))


def test_delay_passes_inputs_while_training_only():
    quantizer = RunningRange(2, delay=2)
    x = torch.tensor([[0.1, 0.35, 1.0]])
    for step in range(3):
        quantizer.observe_(x)
        assert torch.equal(quantizer(x), x) is (step < 2)
        assert not torch.equal(quantizer.eval()(x), x)
        quantizer.train()


def test_bad_settings_are_explained():
    with pytest.raises(ValueError, match="momentum must be above 0"):
        RunningRange(8, momentum=0.0)
    with pytest.raises(ValueError, match="w_bits must be an integer from 2 to 8"):
        wnq.get_method("jacob", w_bits=1)


# BatchNorm folded before rounding


class Exact(Quantizer):
    """Rounds nothing, so that folding alone is seen."""

    bits = 8

    def forward(self, x):
        return x


class Net(nn.Module):
    def __init__(self, kind=nn.Conv2d, bias=False):
        super().__init__()
        torch.manual_seed(0)
        norm = {
            nn.Conv1d: nn.BatchNorm1d,
            nn.Conv2d: nn.BatchNorm2d,
            nn.Conv3d: nn.BatchNorm3d,
            nn.Linear: nn.BatchNorm1d,
        }
        self.first = kind(3, 4, bias=bias) if kind is nn.Linear else kind(3, 4, 3, padding=1, bias=bias)
        self.norm = norm[kind](4)
        self.second = kind(4, 5) if kind is nn.Linear else kind(4, 5, 1)
        with torch.no_grad():
            self.norm.weight.uniform_(0.5, 2)
            self.norm.bias.normal_()
            self.norm.running_mean.normal_()
            self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


SHAPES = {nn.Linear: (6, 3), nn.Conv1d: (6, 3, 7), nn.Conv2d: (6, 3, 5, 5), nn.Conv3d: (2, 3, 3, 3, 3)}


def folded_pair(kind, bias):
    """The same net twice: as it is, and with BatchNorm folded in front of a quantizer that rounds nothing."""
    plain = Net(kind, bias).double()
    model = copy.deepcopy(plain)
    pairs = batchnorm_pairs(plain, torch.randn(SHAPES[kind], dtype=torch.float64))
    assert pairs == [("first", "norm")]
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("minmax", a_bits=32), first_last_bits=None))
    for layer in (model.first, model.second):
        layer.parametrizations.weight[0] = Exact()
    return plain, fold_batchnorm_(model, pairs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_without_rounding_folding_changes_nothing(kind, bias):
    plain, model = folded_pair(kind, bias)
    x = torch.randn(SHAPES[kind], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(model.eval()(x), plain.eval()(x), rtol=1e-12, atol=1e-12)
    for net in (plain.train(), model.train()):
        net(x).square().sum().backward()
    assert torch.allclose(model(x), plain(x), rtol=1e-10, atol=1e-10)
    norm = model.first.folded_batchnorm
    assert torch.allclose(norm.running_mean, plain.norm.running_mean)
    assert torch.allclose(norm.running_var, plain.norm.running_var)
    pairs = [
        (model.first.parametrizations.weight.original, plain.first.weight),
        (norm.weight, plain.norm.weight),
        (norm.bias, plain.norm.bias),
    ]
    for ours, theirs in pairs:
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-8, atol=1e-8)
    merged = merge_batchnorm_(copy.deepcopy(model)).eval()
    assert torch.allclose(merged(x), plain.eval()(x), rtol=1e-10, atol=1e-10)
    assert not any("norm" in name for name, _ in merged.named_parameters())


def test_weights_are_rounded_after_folding():
    model = Net()
    pairs = batchnorm_pairs(model, torch.randn(2, 3, 5, 5))
    factor = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    expected = (model.first.weight * factor.view(-1, 1, 1, 1)).detach()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("minmax", w_bits=3, a_bits=32), first_last_bits=None))
    fold_batchnorm_(model, pairs)
    rounded = wnq.get_method("minmax", w_bits=3).weight(expected, 0)(expected)
    assert torch.equal(model.first.weight, rounded)
    assert len(model.first.weight.unique()) <= 8


def test_trained_merged_packed_and_loaded(tmp_path):
    model = Net()
    x = torch.randn(64, 3, 5, 5) + torch.randn(64, 3, 1, 1)
    y = x.mean((2, 3)).argmax(1)
    pairs = batchnorm_pairs(model, x[:1])
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("jacob", w_bits=4, a_bits=4), first_last_bits=None))
    fold_batchnorm_(model, pairs)
    optimizer = torch.optim.SGD(wnq.param_groups(model, lr=0.05, weight_decay=0.0))
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x).mean((2, 3)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    twin = copy.deepcopy(model).eval()
    expected = model.eval()(x)
    assert torch.equal(twin(x), expected)
    merge_batchnorm_(model)
    # The same codes; the shift is added by the convolution instead of after it.
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)
    wnq.save(model, tmp_path / "m.safetensors")
    # A file of a merged model loads into a float model that was folded the same way.
    loaded = wnq.load(tmp_path / "m.safetensors", fold_batchnorm_(Net(), pairs))
    assert torch.equal(loaded(x), model(x))


def test_folded_parameters_keep_their_learning_rate():
    model = Net()
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("lsq", a_bits=32), first_last_bits=None))
    fold_batchnorm_(model, [("first", "norm")])
    ours, quantizers = wnq.param_groups(model, lr=1.0, weight_decay=0.0, quantizer_lr=0.1)
    assert any(p is model.first.folded_batchnorm.weight for p in ours["params"])
    assert {id(p) for p in quantizers["params"]} == {
        id(p) for layer in (model.first, model.second) for p in weight_quantizer(layer).parameters()
    }


@pytest.mark.parametrize(("pair", "message"), [
    (("first", "nothing"), "cannot fold 'nothing'"),
    (("norm", "norm"), "expected a BatchNorm with running statistics"),
    (("second", "norm"), "cannot fold 'norm' of 4 channels into 'second' of 5"),
])  # fmt: skip
def test_pairs_that_do_not_fit_are_explained(pair, message):
    with pytest.raises(ValueError, match=message):
        fold_batchnorm_(Net(), [pair])
