"""Training procedures: the moments of a run, the registry, extragradient, and ADMM."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wnq import get_method, make_plan, quantize_, quantized_layers
from wnq.data import Batches, Dataset, load_data
from wnq.models import build_model
from wnq.prepared import float_weight
from wnq.procedures import Procedure, get_procedure, list_procedures, looked_ahead, register_procedure
from wnq.procedures.admm import ADMM
from wnq.train import TrainConfig, fit


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load_data("digits", limit=128)


def make_model(
    method: str | None = None, name: str = "digits_cnn", first_last_bits: int | None = 8, **options
) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(name)
    if method is not None:
        quantize_(model, make_plan(model, get_method(method, **options), first_last_bits=first_last_bits))
    return model


def assert_equal_states(one: nn.Module, other: nn.Module) -> None:
    states = one.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [name for name, value in states[0].items() if not torch.equal(value, states[1][name])] == []


# The registry


def test_registered_procedures_are_found_with_their_options():
    infos = {info.name: info for info in list_procedures()}
    assert set(infos) >= {"admm", "distribution_loss", "guided"}
    assert infos["admm"].paper == "arXiv:1707.09870" and infos["admm"].options["extragradient"] is True
    for name, info in infos.items():
        procedure = get_procedure(name)
        assert procedure.name == name and dict(procedure.options) == info.options and info.summary.endswith(".")
        assert procedure.settings["name"] == name and get_procedure(name) is not procedure
        frame = ["Args:", "Returns:", "Raises:", "References:", "Differences from the paper:"]
        places = [(info.function.__doc__ or "").index(word) for word in frame]
        assert places == sorted(places)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("adnm", {}, r"unknown procedure 'adnm'. Did you mean 'admm'\? Available: admm, distribution_loss, guided"),
        (
            "admm",
            {"roh": 1},
            r"procedure 'admm' has no option 'roh'. Did you mean 'rho'\? It takes: rho, every, extrag",
        ),
        ("admm", {"rho": 0}, "rho must be greater than 0"),
        ("admm", {"rho": "1"}, "admm: rho must be a finite number at least 0, got '1'"),
        ("admm", {"rho": float("nan")}, "got nan"),
        ("admm", {"rho": float("inf")}, "got inf"),
        ("admm", {"every": -1}, "every must be a number of steps, or 0 for an epoch, got -1"),
        ("admm", {"every": True}, "got True"),
        ("admm", {"extragradient": 1}, "extragradient must be true or false, got 1"),
    ],
)
def test_bad_names_and_options(name, options, words):
    with pytest.raises(ValueError, match=words):
        get_procedure(name, **options)


def test_registering_checks_name_and_defaults():
    with pytest.raises(ValueError, match="'admm' is registered already"):

        @register_procedure(paper="")
        def admm() -> Procedure: ...

    with pytest.raises(ValueError, match=r"parameters \['rate'\] need defaults"):

        @register_procedure(paper="")
        def other(rate) -> Procedure: ...


# The moments of a run


class Recorder(Procedure):
    """Writes down what it is told; adds nothing."""

    def __init__(self, looks_ahead: bool = False) -> None:
        super().__init__()
        self.calls, self.looks_ahead = [], looks_ahead
        self.register_buffer("count", torch.zeros(()))

    def start_(self, model, teacher=None):
        self.calls.append(("start", teacher is not None))

    def start_epoch_(self, model, epoch, epochs):
        self.calls.append(("epoch", epoch, epochs))

    def watching(self, model):
        self.calls.append("watching")
        return super().watching(model)

    def loss(self, loss, model, images, labels):
        assert len(images) == len(labels) == 32 and loss.requires_grad
        self.calls.append("loss")
        return loss

    def after_step_(self, model, step):
        self.calls.append(("step", step))

    def after_epoch_(self, model, epoch, epochs):
        self.calls.append(("end", epoch, epochs))

    def finish_(self, model):
        self.calls.append("finish")


def test_every_moment_comes_once_and_in_order(data: Dataset):
    procedure = Recorder()
    fit(make_model(), data, TrainConfig(epochs=2, batch_size=32), procedure=procedure)
    expected = [("start", False)]
    for epoch in range(2):
        expected.append(("epoch", epoch, 2))
        for step in range(4):
            expected += ["watching", "loss", ("step", 4 * epoch + step + 1)]
        expected.append(("end", epoch, 2))
    assert procedure.calls == [*expected, "finish"]


def test_a_procedure_that_does_nothing_changes_nothing(data: Dataset):
    plain, watched = make_model("lsq"), make_model("lsq")
    config = TrainConfig(epochs=2, batch_size=32, ema_decay=0.9, clip_grad_norm=1.0, bn_batches=2)
    results = fit(plain, data, config), fit(watched, data, config, procedure=Recorder())
    assert_equal_states(plain, watched)
    assert results[0].val == results[1].val


def test_what_finish_changes_is_what_is_measured(data: Dataset):
    class Zeroing(Procedure):
        def finish_(self, model):
            for p in model.parameters():
                p.data.zero_()

    result = fit(make_model(), data, TrainConfig(epochs=1, batch_size=32), procedure=Zeroing())
    assert result.val.loss == pytest.approx(np.log(10), rel=1e-6)


def test_own_parameters_are_trained(data: Dataset):
    class Learning(Procedure):
        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.tensor(3.0))

        def loss(self, loss, model, images, labels):
            return loss + self.shift.square()

    procedure = Learning()
    fit(make_model(), data, TrainConfig(epochs=3, batch_size=32, lr=0.1, weight_decay=0), procedure=procedure)
    assert abs(procedure.shift.item()) < 1


def test_compiled_models_cannot_be_watched(data: Dataset):
    for name in ("guided", "distribution_loss"):
        with pytest.raises(ValueError, match=f"procedure '{name}' cannot watch a compiled model: set compile = false"):
            fit(make_model("lsq"), data, TrainConfig(compile=True), procedure=get_procedure(name))


# Extragradient


def test_looking_ahead_by_hand():
    # f(w) = w^2 at w = 1: gradient 2, with decay 0.5 it is 2.5; rate 0.1: w^p = 0.75, gradient 1.5.
    w = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    idle = nn.Parameter(torch.tensor(7.0))
    optimizer = torch.optim.SGD([w, idle], lr=0.1, weight_decay=0.5)
    w.square().backward()
    with looked_ahead(optimizer):
        assert w.item() == 0.75 and idle.item() == 7
        optimizer.zero_grad()
        w.square().backward()
    assert w.item() == 1 and w.grad.item() == 1.5
    optimizer.step()
    assert w.item() == pytest.approx(1 - 0.1 * (1.5 + 0.5), rel=1e-12)


def test_looking_ahead_gives_the_weights_back_after_an_error():
    w = nn.Parameter(torch.tensor(1.0))
    optimizer = torch.optim.SGD([w], lr=0.1)
    w.square().backward()
    with pytest.raises(KeyError), looked_ahead(optimizer):
        raise KeyError
    assert w.item() == 1


def test_extragradient_turns_a_rotation_into_a_contraction():
    # min over x, max over y of x*y: gradient descent spirals outwards, extragradient inwards, as Korpelevich shows.
    sizes = []
    for ahead in (False, True):
        x, y = (nn.Parameter(torch.tensor(1.0)) for _ in range(2))
        optimizer = torch.optim.SGD([x, y], lr=0.3)

        def gradients(x: Tensor = x, y: Tensor = y, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.zero_grad()
            (x * y).backward()
            y.grad.neg_()

        for _ in range(50):
            gradients()
            if ahead:
                with looked_ahead(optimizer):
                    gradients()
            optimizer.step()
        sizes.append((x.square() + y.square()).item())
    assert sizes[0] > 10 and sizes[1] < 0.1


def test_fit_looks_ahead_as_a_plain_loop_does(data: Dataset):
    config = TrainConfig(epochs=2, batch_size=32, lr=0.05, warmup_epochs=0, final_lr=1.0)
    fitted, plain = make_model(name="digits_mlp"), make_model(name="digits_mlp")
    fit(fitted, data, config, procedure=Recorder(looks_ahead=True))
    batches = Batches(data.train, 32, mean=data.mean, std=data.std, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch in range(2):
        for images, labels in batches.epoch(epoch):
            ahead = copy.deepcopy(plain)
            optimizer.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            with torch.no_grad():
                for p, q in zip(plain.parameters(), ahead.parameters(), strict=True):
                    q -= 0.05 * (p.grad + 5e-4 * p)
            F.cross_entropy(ahead(images), labels).backward()
            for p, q in zip(plain.parameters(), ahead.parameters(), strict=True):
                p.grad = q.grad
            optimizer.step()
    assert_equal_states(fitted, plain)


# ADMM


def one_layer(weight: list[list[float]]) -> tuple[nn.Module, ADMM]:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))
    model = nn.Sequential(layer)
    quantize_(model, make_plan(model, get_method("elbnn", w_bits=2), first_last_bits=None))
    procedure = get_procedure("admm", rho=0.5)
    assert isinstance(procedure, ADMM)
    procedure.start_(model)
    return model, procedure


def test_admm_steps_by_hand():
    # mean|W| = 0.9, above half of it 2.0 and 0.8: alpha = 1.4, and above 0.7 the same two.
    model, procedure = one_layer([[2.0, 0.8, 0.4, -0.4]])
    apart = torch.tensor([[0.6, -0.6, 0.4, -0.4]], dtype=torch.float64)
    torch.testing.assert_close(procedure.projected_0, torch.tensor([[1.4, 1.4, 0, 0]], dtype=torch.float64))
    assert not procedure.multiplier_0.any()
    # 0.36 + 0.36 + 0.16 + 0.16 = 1.04, times 0.5 / 2.
    loss = procedure.loss(torch.tensor(1.0, dtype=torch.float64), model, None, None)
    assert loss.item() == pytest.approx(1.26, rel=1e-12)
    loss.backward()
    weight = float_weight(model[0])
    torch.testing.assert_close(weight.grad, 0.5 * apart)
    assert procedure.distance(model) == pytest.approx(np.sqrt(1.04 / 4.96), rel=1e-12)
    # W moves; W + 0 = (2.0, 0.6, 0.5, -0.1), mean 0.8: above 0.4 three of them, alpha = 3.1 / 3, above 0.5167 two, alpha 1.3,
    # above 0.65 one, alpha 2, above 1 the same. The multiplier is W - G.
    weight.data.copy_(torch.tensor([[2.0, 0.6, 0.5, -0.1]]))
    procedure.project_(model)
    torch.testing.assert_close(procedure.projected_0, torch.tensor([[2.0, 0, 0, 0]], dtype=torch.float64))
    first = torch.tensor([[0.0, 0.6, 0.5, -0.1]], dtype=torch.float64)
    torch.testing.assert_close(procedure.multiplier_0, first, check_dtype=True, rtol=1e-6, atol=1e-7)
    # Again at the same W: V = (2.0, 1.2, 1.0, -0.2), mean 1.1, above 0.55 three, alpha 1.4, above 0.7 the same.
    procedure.project_(model)
    g = torch.tensor([[1.4, 1.4, 1.4, 0]], dtype=torch.float64)
    torch.testing.assert_close(procedure.projected_0, g, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(procedure.multiplier_0, first + weight.data - g, rtol=1e-6, atol=1e-7)


def test_admm_trains_float_weights_and_evaluates_projected_ones():
    model, procedure = one_layer([[2.0, 0.8, 0.4, -0.4]])
    x = torch.eye(4, dtype=torch.float64)
    weight = float_weight(model[0])
    with procedure.watching(model):
        assert torch.equal(model.train()(x), weight.T)
        assert torch.equal(model.eval()(x), model[0].weight.T) and not torch.equal(model[0].weight, weight)
        assert torch.equal(quantize_codes(model), quantize_codes(copy.deepcopy(model)))
    assert torch.equal(model.train()(x), model[0].weight.T) and not torch.equal(model[0].weight, weight)


def quantize_codes(model: nn.Module) -> Tensor:
    (_, layer, quantizer), *_ = quantized_layers(model)
    return quantizer.quantize(float_weight(layer)).codes


def test_admm_with_a_quadratic_loss_finds_the_constrained_minimum():
    # f(W) = |W - T|^2 / 2 is convex, so ADMM must end at the projection of T, where W = G.
    target = torch.tensor([[1.2, -0.9, 0.1, 0.0, 1.0, -0.05]], dtype=torch.float64)
    model, procedure = one_layer([[0.3, 0.2, -0.1, 0.4, 0.5, -0.6]])
    weight = float_weight(model[0])
    optimizer = torch.optim.SGD([weight], lr=0.2)
    for _ in range(60):
        for _ in range(20):
            optimizer.zero_grad()
            procedure.loss((weight - target).square().sum() / 2, model, None, None).backward()
            optimizer.step()
        procedure.after_epoch_(model, 0, 1)
    (_, layer, quantizer), *_ = quantized_layers(model)
    expected = quantizer.quantize(target).dequantize()
    assert procedure.distance(model) < 1e-6
    torch.testing.assert_close(layer.weight, expected, rtol=1e-6, atol=1e-6)


def test_admm_pulls_the_weights_onto_the_grid_and_learns():
    digits = load_data("digits", limit=512)
    model = make_model(name="digits_mlp")
    fit(model, digits, TrainConfig(epochs=3, batch_size=32, lr=0.1))
    quantize_(model, make_plan(model, get_method("elbnn", w_bits=2)))
    distances = []

    class Measured(ADMM):
        def start_(self, model, teacher=None):
            super().start_(model)
            distances.append(self.distance(model))

        def after_epoch_(self, model, epoch, epochs):
            super().after_epoch_(model, epoch, epochs)
            distances.append(self.distance(model))

    procedure = Measured(0.4, 0, extragradient=True)
    result = fit(model, digits, TrainConfig(epochs=6, batch_size=32, lr=0.05), procedure=procedure)
    assert max(distances[-2:]) < 0.1 < 0.25 < distances[0], distances
    assert result.val.accuracy > 85
    assert all(len(layer.weight.unique()) == 3 for _, layer, _ in list(quantized_layers(model))[1:-1])


def test_admm_projects_every_so_many_steps(data: Dataset):
    counted = []

    class Counting(ADMM):
        def project_(self, model):
            counted.append(1)
            super().project_(model)

    for every, expected in ((0, 2), (3, 2), (1, 8)):
        counted.clear()
        model = make_model("elbnn")
        fit(model, data, TrainConfig(epochs=2, batch_size=32), procedure=Counting(0.1, every, extragradient=False))
        assert len(counted) == expected


def test_admm_refuses_models_it_cannot_train():
    procedure = get_procedure("admm")
    with pytest.raises(ValueError, match="no weight is quantized: use a method such as 'elbnn'"):
        procedure.start_(make_model())
    with pytest.raises(ValueError, match="cannot train the quantizer of layer '3', whose parameters need a gradient"):
        procedure.start_(make_model("lsq"))


def test_admm_shows_a_diverged_weight():
    model, procedure = one_layer([[2.0, 0.8, 0.4, -0.4]])
    float_weight(model[0]).data[0, 0] = float("nan")
    procedure.project_(model)
    assert procedure.loss(torch.zeros(()), model, None, None).isnan()


@pytest.mark.slow
def test_admm_trains_a_compiled_model(data: Dataset):
    def trained(compiled: bool) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        quantize_(model, make_plan(model, get_method("elbnn"), first_last_bits=None))
        config = TrainConfig(epochs=2, batch_size=32, lr=0.05, compile=compiled)
        fit(model, data, config, procedure=get_procedure("admm", every=3))
        return model

    for one, other in zip(trained(True).parameters(), trained(False).parameters(), strict=True):
        # Two orders of the same float32 sums, over 8 steps.
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
