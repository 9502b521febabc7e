"""The procedures that add a loss: BNN-DL's distribution loss and guidance by a float twin."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq import get_method, make_plan, quantize_
from wnq.data import Batches, Dataset, load_data
from wnq.methods import lrnet
from wnq.models import build_model
from wnq.procedures import Procedure, get_procedure
from wnq.procedures.distribution import DistributionLoss, distribution_terms
from wnq.procedures.guided import Guided
from wnq.train import TrainConfig, fit


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=128)


def make_model(method: str | None = None, name: str = "digits_cnn", **options) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name)
    if method is not None:
        quantize_(model, make_plan(model, get_method(method, **options)))
    return model


# The distribution loss


def channel(mean: float, deviation: float) -> Tensor:
    """Two values, m - s and m + s: their mean is m and their biased deviation s."""
    return torch.tensor([[mean - deviation], [mean + deviation]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "deviation", "expected"),
    [
        (0.0, 2.0, (0, 0, 0)),  # the good region
        (1.5, 1.5, (0, 0, 0)),
        (-1.5, 1.5, (0, 0, 0)),
        (0.0, 3.9, (0, 0, 0)),
        (0.0, 0.5, (2.25, 0, 0)),  # narrow: (2 - 0.5)^2
        (0.5, 0.5, (1.0, 0, 0)),  # (2 - 0.5 - 0.5)^2
        (-0.5, 0.5, (1.0, 0, 0)),
        (0.0, 5.0, (0, 1.0, 0)),  # wide: (5 - 4)^2
        (3.0, 1.0, (0, 0, 8.0)),  # one sign: 9 - 1
        (-3.0, 1.0, (0, 0, 8.0)),
        (1.0, 0.5, (0.25, 0, 0.75)),  # narrow and of one sign
        (6.0, 5.0, (0, 1.0, 11.0)),  # wide and of one sign
    ],
)
def test_terms_by_hand_in_every_region(mean, deviation, expected):
    terms = [term.item() for term in distribution_terms(channel(mean, deviation))]
    # 1e-10 is added to the variance.
    assert terms == pytest.approx(expected, abs=1e-9)


def test_terms_equal_numpy_over_both_layouts():
    x = np.random.default_rng(0).normal(size=(8, 3, 4, 5)) * np.array([0.3, 2, 6])[:, None, None] + 1
    mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3))
    expected = [
        np.square(np.maximum(np.minimum(2 - mean - deviation, 2 + mean - deviation), 0)),
        np.square(np.maximum(deviation - 4, 0)),
        np.maximum(np.square(mean) - np.square(deviation), 0),
    ]
    for array, dim in ((x, 1), (np.moveaxis(x, 1, -1), 3)):
        terms = distribution_terms(torch.from_numpy(np.ascontiguousarray(array)), dim)
        for term, wanted in zip(terms, expected, strict=True):
            np.testing.assert_allclose(term.numpy(), wanted, atol=1e-9)


def test_constant_channel_has_finite_gradients():
    x = torch.full((4, 2), 3.0, requires_grad=True)
    torch.stack(distribution_terms(x)).sum().backward()
    assert torch.isfinite(x.grad).all()


def binary(width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Linear(width, 3))
    return quantize_(model, make_plan(model, get_method("wnq", w_bits=2, a_bits=2), first_last_bits=None))


def test_loss_is_the_mean_over_channels_and_layers_of_float_inputs():
    model = nn.Sequential(nn.Linear(5, 4), nn.Conv1d(4, 3, 1), nn.Linear(2, 2))
    quantize_(model, make_plan(model, get_method("wnq", w_bits=2, a_bits=2), first_last_bits=None))
    procedure = get_procedure("distribution_loss", weight=0.5)
    procedure.start_(model)
    inputs = []
    model[1].register_forward_pre_hook(lambda _, args: inputs.append(args[0]), prepend=True)
    model[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]), prepend=True)
    with procedure.watching(model):
        x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
        hidden = model[0](x)[..., :2]
        model[2](model[1](hidden))
    loss = procedure.loss(torch.tensor(1.0), model, x, x)
    # The images (input of layer 0, no gradient) do not count; a convolution has its channels second, a linear layer last.
    convolution, linear = (sum(distribution_terms(x, dim)).mean() for x, dim in zip(inputs, (1, 2), strict=True))
    assert len(convolution.shape) == 0 and len(inputs) == 2
    assert loss.item() == pytest.approx(1 + 0.5 * (convolution + linear).item() / 2, rel=1e-6)
    loss.backward()
    assert model[0].parametrizations.weight.original.grad.any()


def test_watching_ends_with_the_step():
    model, procedure = binary(), get_procedure("distribution_loss")
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with procedure.watching(model):
        model(x)
    assert procedure.loss(torch.zeros(()), model, x, x) > 0
    model(x)
    assert procedure.loss(torch.zeros(()), model, x, x) == 0
    hooks = [len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyError), procedure.watching(model):
        raise KeyError
    assert [len(m._forward_pre_hooks) for m in model.modules()] == hooks


@pytest.mark.parametrize(
    ("until", "epochs", "active"), [(60 / 65, 65, 60), (60 / 65, 6, 5), (0.5, 4, 2), (1.0, 3, 3), (0.0, 3, 1)]
)
def test_it_is_off_for_the_last_epochs(until, epochs, active):
    model, procedure = binary(), get_procedure("distribution_loss", until=until)
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    on = []
    for epoch in range(epochs):
        procedure.start_epoch_(model, epoch, epochs)
        with procedure.watching(model):
            model(x)
        on.append(bool(procedure.loss(torch.zeros(()), model, x, x) > 0))
    assert on == [True] * active + [False] * (epochs - active)


def test_it_pulls_degenerate_channels_back(data: Dataset):
    # BatchNorm shifts the four channels: of one sign, of the other, too narrow, too wide.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.Linear(4, 10))
    norm = model[2]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 1.0, 0.3, 5.0]))
        norm.bias.copy_(torch.tensor([3.0, -3.0, 0.0, 0.0]))
    quantize_(model, make_plan(model, get_method("wnq", w_bits=8, a_bits=1), first_last_bits=None))
    plain = copy.deepcopy(model)
    config = TrainConfig(epochs=8, batch_size=32, lr=0.05, weight_decay=0)
    fit(model, data, config, procedure=get_procedure("distribution_loss", until=1.0))
    fit(plain, data, config)
    for net, good in ((model, True), (plain, False)):
        mean, deviation = net[2].bias.abs(), net[2].weight.abs()
        inside = (mean <= deviation + 0.1) & (mean + deviation >= 1.9) & (deviation <= 4.1)
        assert inside.tolist() == [good] * 4


def test_distribution_loss_options_and_models_are_checked():
    with pytest.raises(ValueError, match="weight must be a finite number at least 0, got -1"):
        get_procedure("distribution_loss", weight=-1)
    with pytest.raises(ValueError, match="until must be a finite number from 0 to 1, got 60"):
        get_procedure("distribution_loss", until=60)
    with pytest.raises(ValueError, match="no input is quantized: set a_bits below 32"):
        get_procedure("distribution_loss").start_(make_model("wnq", a_bits=32))
    assert isinstance(get_procedure("distribution_loss"), DistributionLoss)


# Guidance


def test_guidance_by_hand():
    # One hidden unit: the model maps x to 2x, the twin to 5x; at x = 1 and 3 the maps differ by 3 and 9.
    model, twin = (nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)) for _ in range(2))
    model[0].weight.data.fill_(2.0)
    twin[0].weight.data.fill_(5.0)
    x, labels = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
    for joint in (False, True):
        procedure = get_procedure("guided", layers=["0"], weight=0.1, joint=joint)
        procedure.start_(model, twin)
        model.zero_grad()
        with procedure.watching(model):
            model(x)
        loss = procedure.loss(torch.tensor(1.0), model, x, labels)
        own = F.cross_entropy(twin(x), labels).item() if joint else 0.0
        assert loss.item() == pytest.approx(1 + 0.1 * (9 + 81) / 2 / 2 + own, rel=1e-6)
        loss.backward()
        # d/dw of 0.1 * mean((wx - 5x)^2) / 2 is 0.1 * mean((w - 5) x^2) = -0.1 * 3 * (1 + 9) / 2.
        assert model[0].weight.grad.item() == pytest.approx(-1.5, rel=1e-6)
        assert isinstance(procedure, Guided) and procedure.twin is not None
        guide = procedure.twin[0].weight
        if joint:
            alone = copy.deepcopy(twin)
            F.cross_entropy(alone(x), labels).backward()
            assert guide.grad.item() == pytest.approx(1.5 + alone[0].weight.grad.item(), rel=1e-5)
        else:
            assert guide.grad is None and not guide.requires_grad
        assert twin[0].weight.grad is None


def maps_apart(model: nn.Module, twin: nn.Module, data: Dataset, layer: str) -> float:
    images = next(Batches(data.val, 64, mean=data.mean, std=data.std).epoch(0))[0]
    maps: list[Tensor] = []
    for net in (model, twin):
        handle = net.get_submodule(layer).register_forward_hook(lambda _, __, output: maps.append(output.detach()))
        net.eval()(images)
        handle.remove()
    return F.mse_loss(*maps).item()


def guided_run(data: Dataset, twin: nn.Module, **options) -> tuple[nn.Module, Guided]:
    model = copy.deepcopy(twin)
    quantize_(model, make_plan(model, get_method("wnq", w_bits=2, a_bits=4)))
    procedure = get_procedure("guided", **options)
    assert isinstance(procedure, Guided)
    fit(model, data, TrainConfig(epochs=3, batch_size=32, lr=0.02), teacher=twin, procedure=procedure)
    return model, procedure


def test_guidance_draws_the_maps_together_and_trains_both_nets(data: Dataset):
    twin = make_model(name="digits_mlp")
    fit(twin, data, TrainConfig(epochs=5, batch_size=32))
    before = copy.deepcopy(twin.state_dict())
    (layer,) = guided_run(data, twin, joint=False)[1].layers
    free, fixed = guided_run(data, twin, weight=0.0, joint=False)
    drawn, still = guided_run(data, twin, weight=10.0, joint=False)
    assert maps_apart(drawn, twin, data, layer) < 0.7 * maps_apart(free, twin, data, layer)
    for name, value in before.items():
        assert torch.equal(fixed.twin.state_dict()[name], value) and torch.equal(still.twin.state_dict()[name], value)
    both, moving = guided_run(data, twin, weight=10.0, joint=True)
    assert maps_apart(both, moving.twin, data, layer) < maps_apart(free, twin, data, layer)
    assert any(not torch.equal(value, before[name]) for name, value in moving.twin.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in twin.state_dict().items())


def test_default_layer_is_the_last_hidden_one():
    procedure = get_procedure("guided")
    assert isinstance(procedure, Guided)
    procedure.start_(make_model("wnq"), make_model())
    assert procedure.layers == ("6",)


def test_guided_options_and_models_are_checked(data: Dataset):
    with pytest.raises(ValueError, match="layers must be an array of names, got 'layer3'"):
        get_procedure("guided", layers="layer3")
    with pytest.raises(ValueError, match="joint must be true or false, got 'yes'"):
        get_procedure("guided", joint="yes")
    with pytest.raises(ValueError, match="procedure 'guided' needs a teacher: pass the float twin"):
        fit(make_model("wnq"), data, TrainConfig(epochs=1), procedure=get_procedure("guided"))
    with pytest.raises(ValueError, match=r"the model has no layer 'layer3'\."):
        get_procedure("guided", layers=["layer3"]).start_(make_model("wnq"), make_model())
    with pytest.raises(ValueError, match="the float twin has no layer '6'"):
        get_procedure("guided").start_(make_model("wnq"), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with pytest.raises(ValueError, match="no hidden quantized layer; name some"):
        get_procedure("guided").start_(make_model(), make_model())
    assert isinstance(get_procedure("guided"), Procedure)


# LR-Net's regularizer


def test_probability_decay_adds_the_weighted_term_and_keeps_ternary_weights_random():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    quantize_(model, make_plan(model, get_method("lrnet", w_bits=2), first_last_bits=None))
    procedure = get_procedure("probability_decay", weight=0.5)
    procedure.start_(model)
    images, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    task = nn.functional.cross_entropy(model(images), labels)
    before = lrnet.probability_decay(model)
    assert procedure.loss(task, model, images, labels).item() == pytest.approx(task.item() + 0.5 * before.item())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(20):
        optimizer.zero_grad()
        procedure.loss(torch.zeros(()), model, images, labels).backward()
        optimizer.step()
    assert lrnet.probability_decay(model) < before, "the logits move toward even odds"


def test_probability_decay_needs_the_method():
    with pytest.raises(ValueError, match="no layer to train by method 'lrnet'"):
        get_procedure("probability_decay").start_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight"):
        get_procedure("probability_decay", weight=-1.0)
