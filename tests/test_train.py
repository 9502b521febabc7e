import copy
import math
import signal
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from wnq import get_method, make_plan, quantize_, quantized_layers
from wnq.data import Augment, Batches, Dataset, load_data
from wnq.metrics import evaluate
from wnq.models import build_model
from wnq.train import Interrupted, TrainConfig, TrainingDivergedError, fit
from wnq.train.batchnorm import reestimate_batchnorm_
from wnq.train.config import schedule
from wnq.train.loss import training_loss
from wnq.train.progress import Progress


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load_data("digits")


@pytest.fixture(scope="module")
def few_digits() -> Dataset:
    return load_data("digits", limit=128)


def make_model(name: str = "digits_cnn", method: str | None = None, seed: int = 0, **options) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(name)
    if method is not None:
        quantize_(model, make_plan(model, get_method(method, **options)))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal_states(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def training_batches(data: Dataset, batch_size: int, seed: int = 0, **options) -> Batches:
    return Batches(
        data.train, batch_size, mean=data.mean, std=data.std, shuffle=True, seed=seed, drop_last=True, **options
    )


# What training reaches


@pytest.mark.parametrize("method", [None, "wnq"])
def test_digits_cnn_learns_in_four_epochs(digits: Dataset, method: str | None):
    model = make_model(method=method)
    result = fit(model, digits, TrainConfig(epochs=4, batch_size=64, lr=0.1))
    assert result.val.accuracy > 95 and result.val.images == len(digits.val)
    assert len(result.history) == 4 and result.history[-1]["val_accuracy"] == result.val.accuracy
    again = Batches(digits.val, 100, mean=digits.mean, std=digits.std)
    assert evaluate(model, again.epoch(0)).accuracy == result.val.accuracy
    if method is not None:
        levels = [len(layer.weight.unique()) for _, layer, _ in quantized_layers(model)]
        assert all(count <= 8 for count in levels[1:-1]) and max(levels) <= 255


def test_bfloat16_channels_last_crops_and_flips_train(digits: Dataset):
    settings = {"bf16": True, "channels_last": True, "crop_padding": 1, "flip": False}
    model = make_model(method="wnq")
    result = fit(model, digits, TrainConfig(epochs=4, batch_size=64, **settings))
    assert result.val.accuracy > 90
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_training_learns(few_digits: Dataset):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    quantize_(model, make_plan(model, get_method("wnq"), first_last_bits=None))
    result = fit(model, few_digits, TrainConfig(epochs=12, batch_size=32, compile=True))
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]


def test_same_seed_same_run_and_another_seed_another_run(few_digits: Dataset):
    states = []
    for seed in (0, 0, 1):
        model = make_model(method="lsq")
        fit(model, few_digits, TrainConfig(epochs=2, batch_size=32, seed=seed))
        states.append(state_of(model))
    assert_equal_states(states[0], states[1])
    assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])


# The arithmetic of a step


def plain_loop(model: nn.Module, data: Dataset, config: TrainConfig, loss_of, after_step=lambda: None) -> None:
    """The same training written out: own schedule, own parameter groups by name, torch's optimizers."""
    batches = training_batches(data, config.batch_size, config.seed)
    steps = [p for name, p in model.named_parameters() if name.endswith("step")]
    own = [p for name, p in model.named_parameters() if not name.endswith("step")]
    groups = [{"params": own, "weight_decay": config.weight_decay}]
    peaks = [config.lr]
    if steps:
        groups.append({"params": steps, "weight_decay": config.quantizer_weight_decay})
        peaks.append(config.lr * config.quantizer_lr)
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, lr=1.0, momentum=config.momentum, nesterov=True)
    else:
        optimizer = torch.optim.AdamW(groups)
    warmup, total = config.warmup_epochs * batches.steps_per_epoch, config.epochs * batches.steps_per_epoch
    done = 0
    model.train()
    for epoch in range(config.epochs):
        for images, labels in batches.epoch(epoch):
            share = (done + 1) / (warmup + 1)
            if done >= warmup:
                cosine = 0.5 * (1 + math.cos(math.pi * (done - warmup) / (total - warmup)))
                share = config.final_lr + (1 - config.final_lr) * cosine
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            optimizer.zero_grad()
            loss_of(model, images, labels).backward()
            optimizer.step()
            done += 1
            after_step()


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(model(images), labels)


@pytest.mark.parametrize("method", [None, "lsq"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_fit_equals_a_plain_loop_bit_for_bit(few_digits: Dataset, optimizer: str, method: str | None):
    config = TrainConfig(
        epochs=3, batch_size=32, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3, weight_decay=1e-3,
        warmup_epochs=0.5, final_lr=0.1, quantizer_lr=0.1, quantizer_weight_decay=1e-2, seed=5,
    )  # fmt: skip
    fitted, plain = make_model(method=method), make_model(method=method)
    fit(fitted, few_digits, config)
    plain_loop(plain, few_digits, config, cross_entropy)
    assert_equal_states(state_of(fitted), state_of(plain))


def test_quantizers_get_their_own_rate(few_digits: Dataset):
    frozen, moving = make_model(method="lsq"), make_model(method="lsq")
    start = {name: p.clone() for name, p in frozen.named_parameters() if "weight.0.step" in name}
    assert start
    for model, rate in ((frozen, 0.0), (moving, 1.0)):
        fit(model, few_digits, TrainConfig(epochs=1, batch_size=32, quantizer_lr=rate, weight_decay=0.1))
    assert all(torch.equal(dict(frozen.named_parameters())[name], p) for name, p in start.items())
    assert all(not torch.equal(dict(moving.named_parameters())[name], p) for name, p in start.items())


def test_schedule_values():
    config = TrainConfig(epochs=10, warmup_epochs=2, final_lr=0.2)
    values = [schedule(step, 5, config) for step in range(51)]
    assert values[:10] == pytest.approx([k / 11 for k in range(1, 11)])
    assert values[10] == 1.0
    assert values[30] == pytest.approx(0.2 + 0.8 / 2)  # half way down
    assert values[20] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[50] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(values[10:]))
    assert schedule(0, 5, TrainConfig(warmup_epochs=0)) == 1.0
    assert schedule(2, 5, TrainConfig(epochs=1, warmup_epochs=0.5)) == pytest.approx(3 / 3.5)


def test_loss_equals_a_numpy_computation():
    generator = np.random.default_rng(0)
    logits, twin = generator.normal(size=(2, 6, 5))
    labels = generator.integers(0, 5, 6)
    smoothing, weight, temperature = 0.1, 0.3, 4.0

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(1, keepdims=True))

    target = np.full((6, 5), smoothing / 5)
    target[np.arange(6), labels] += 1 - smoothing
    hard = -(target * log_softmax(logits)).sum(1).mean()
    p = np.exp(log_softmax(twin / temperature))
    soft = (p * (np.log(p) - log_softmax(logits / temperature))).sum(1).mean() * temperature**2
    config = TrainConfig(label_smoothing=smoothing, distill_weight=weight, distill_temperature=temperature)
    arguments = torch.from_numpy(logits), torch.from_numpy(labels)
    # Both are float64 sums of 30 terms.
    assert training_loss(*arguments, TrainConfig(label_smoothing=smoothing)).item() == pytest.approx(hard, rel=1e-12)
    both = training_loss(*arguments, config, torch.from_numpy(twin)).item()
    assert both == pytest.approx((1 - weight) * hard + weight * soft, rel=1e-12)


def test_distillation_trains_towards_the_twin(few_digits: Dataset):
    twin = make_model("digits_mlp", seed=9)
    before = state_of(twin)
    config = TrainConfig(epochs=2, batch_size=32, lr=0.02, distill_weight=0.7, distill_temperature=2.0)
    config_smooth = TrainConfig(**{**vars(config), "label_smoothing": 0.2})

    def independent(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            target = torch.softmax(twin(images) / 2, 1)
        logits = model(images)
        soft = (target * (target.log() - torch.log_softmax(logits / 2, 1))).sum(1).mean() * 4
        smooth = 0.8 * F.one_hot(labels, 10) + 0.2 / 10
        hard = -(smooth * torch.log_softmax(logits, 1)).sum(1).mean()
        return 0.3 * hard + 0.7 * soft

    fitted, plain = make_model("digits_mlp"), make_model("digits_mlp")
    fit(fitted, few_digits, config_smooth, teacher=twin)
    plain_loop(plain, few_digits, config_smooth, independent)
    for one, other in zip(fitted.parameters(), plain.parameters(), strict=True):
        # Two float32 formulas for one loss: rounding errors of 1e-7 a step, over 8 steps.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert_equal_states(state_of(twin), before)


def test_gradient_is_clipped_to_the_norm(few_digits: Dataset):
    # One step of plain gradient descent: the update is lr times the (clipped) gradient.
    def update(clip: float) -> float:
        model = make_model("digits_mlp")
        before = [p.detach().clone() for p in model.parameters()]
        fit(
            model, few_digits,
            TrainConfig(epochs=1, batch_size=128, lr=0.5, momentum=0, weight_decay=0, warmup_epochs=0, clip_grad_norm=clip),
        )  # fmt: skip
        moved = [(a - b).detach().double().square().sum() for a, b in zip(model.parameters(), before, strict=True)]
        return math.sqrt(sum(moved)) / 0.5

    free = update(0)
    assert free > 0.2
    # torch divides by the norm plus 1e-6; the rest is float32 rounding of weights around 0.1.
    assert update(0.1) == pytest.approx(0.1, rel=1e-4)
    assert update(2 * free) == pytest.approx(free, rel=1e-6)


@pytest.mark.parametrize("method", [None, "lsq"])
def test_average_equals_one_computed_by_hand(few_digits: Dataset, method: str | None):
    decay = 0.8
    model = make_model(method=method)
    averages: dict[str, Tensor] = {}
    seen: set[tuple[int, int]] = set()

    def average(progress: Progress) -> None:
        if (progress.epoch, progress.step) in seen:  # the end of an epoch reports its last step again
            return
        seen.add((progress.epoch, progress.step))
        for name, p in model.named_parameters():
            now = p.detach().double()
            averages[name] = decay * averages[name] + (1 - decay) * now if name in averages else now

    result = fit(model, few_digits, TrainConfig(epochs=2, batch_size=32, ema_decay=decay), on_step=average)
    assert len(seen) == 8
    for name, p in model.named_parameters():
        # torch keeps the average in float32.
        torch.testing.assert_close(p.detach().double(), averages[name], rtol=1e-5, atol=1e-7)
    val = Batches(few_digits.val, 128, mean=few_digits.mean, std=few_digits.std)
    assert evaluate(model, val.epoch(0)).loss == result.val.loss == result.history[-1]["val_loss"]


# BatchNorm


@pytest.mark.parametrize("method", [None, "wnq"])
def test_batchnorm_statistics_are_the_plain_average_over_batches(few_digits: Dataset, method: str | None):
    model = make_model(method=method)
    fit(model, few_digits, TrainConfig(epochs=1, batch_size=32))
    batches = training_batches(few_digits, 32, augment=Augment(1))
    norms = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    reference = copy.deepcopy(model).eval()
    inputs: dict[str, list[Tensor]] = {name: [] for name, _ in norms}
    for name, _ in norms:
        module = reference.get_submodule(name).train()
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].double()))
    with torch.no_grad():
        for step, (images, _) in enumerate(batches.epoch(0)):
            if step < 3:
                reference(images)
    others = {name: t for name, t in state_of(model).items() if "running" not in name and "tracked" not in name}
    momentum = norms[0][1].momentum
    model.train()
    reestimate_batchnorm_(model, batches, 3)
    for name, module in norms:
        mean = torch.stack([x.mean((0, 2, 3)) for x in inputs[name]]).mean(0)
        var = torch.stack([x.var((0, 2, 3), unbiased=True) for x in inputs[name]]).mean(0)
        # Float32 sums over 32 images against float64 ones.
        torch.testing.assert_close(module.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module.running_var.double(), var, rtol=1e-5, atol=1e-6)
        assert module.momentum == momentum and module.training and len(inputs[name]) == 3
    assert_equal_states({name: t for name, t in state_of(model).items() if name in others}, others)


def test_fit_reestimates_batchnorm_at_the_end(few_digits: Dataset):
    plain, reestimated = make_model(), make_model()
    fit(plain, few_digits, TrainConfig(epochs=1, batch_size=32))
    result = fit(reestimated, few_digits, TrainConfig(epochs=1, batch_size=32, bn_batches=2))
    reestimate_batchnorm_(plain, training_batches(few_digits, 32), 2)
    assert_equal_states(state_of(reestimated), state_of(plain))
    val = Batches(few_digits.val, 256, mean=few_digits.mean, std=few_digits.std)
    assert result.val == evaluate(plain, val.epoch(0))
    assert result.val.loss != result.history[-1]["val_loss"]


def test_reestimation_leaves_a_model_without_batchnorm_alone(few_digits: Dataset):
    model = make_model("digits_mlp")
    before = state_of(model)
    reestimate_batchnorm_(model, training_batches(few_digits, 32), 2)
    assert_equal_states(state_of(model), before)


# Reports


def test_history_holds_what_was_seen(few_digits: Dataset):
    reports: list[Progress] = []
    config = TrainConfig(epochs=5, batch_size=32, eval_every=2, lr=0.05)
    result = fit(make_model(), few_digits, config, on_step=reports.append)
    rates = [0.05 * schedule(4 * epoch + 3, 4, config) for epoch in range(5)]
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4, 5]
    assert [row["lr"] for row in result.history] == rates
    assert [row["val_loss"] is None for row in result.history] == [True, False, True, False, False]
    assert result.val.accuracy == result.history[-1]["val_accuracy"]
    assert len(reports) == 5 * (4 + 1)  # every step, and the end of every epoch
    assert reports[-1].val == result.val and reports[-1].seconds_left == 0
    assert [report.step for report in reports[:5]] == [1, 2, 3, 4, 4]
    assert reports[4].loss == result.history[0]["loss"]


def test_first_loss_and_accuracy_are_those_of_the_untrained_model(few_digits: Dataset):
    model = make_model("digits_mlp")
    images, labels = next(training_batches(few_digits, 128).epoch(0))
    with torch.no_grad():
        logits = model(images)
    result = fit(model, few_digits, TrainConfig(epochs=1, batch_size=128))
    assert result.history[0]["loss"] == F.cross_entropy(logits, labels).item()
    assert result.history[0]["accuracy"] == 100 * (logits.argmax(1) == labels).sum().item() / 128


def test_batch_larger_than_the_data_is_one_step(few_digits: Dataset):
    result = fit(make_model("digits_mlp"), few_digits, TrainConfig(epochs=3, batch_size=1000))
    assert result.val.images == 128
    assert result.images_per_second == pytest.approx(3 * 128 / result.seconds)


def test_evaluate_computes_averages_and_keeps_the_mode():
    logits = torch.tensor([[2.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    labels = torch.tensor([0, 1, 1])
    model = nn.Identity().train()
    metrics = evaluate(model, [(logits[:2], labels[:2]), (logits[2:], labels[2:])])
    expected = np.mean([math.log1p(math.exp(-1)), math.log1p(math.exp(-3)), math.log1p(math.exp(1))])
    assert metrics.accuracy == pytest.approx(200 / 3) and metrics.images == 3 and model.training
    assert metrics.loss == pytest.approx(expected, rel=1e-6)  # float32 cross-entropy


@pytest.mark.parametrize("batches", [[], [(torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))]])
def test_evaluating_nothing_is_an_error(batches: list[tuple[Tensor, Tensor]]):
    with pytest.raises(ValueError, match=r"no images to evaluate on\..*used up"):
        evaluate(nn.Identity(), batches)


# Errors and Ctrl-C


def test_divergence_says_where_and_what_to_do(few_digits: Dataset):
    with pytest.raises(TrainingDivergedError) as caught:
        fit(make_model("digits_mlp"), few_digits, TrainConfig(epochs=3, batch_size=32, lr=1e12, warmup_epochs=0))
    message = str(caught.value)
    assert message.startswith("the loss is ") and "epoch 1, step" in message
    assert "Lower lr or quantizer_lr" in message and "warmup_epochs" in message


def test_distillation_needs_a_teacher(few_digits: Dataset):
    with pytest.raises(ValueError, match="distill_weight is above 0 but there is no teacher: pass the float twin"):
        fit(make_model(), few_digits, TrainConfig(distill_weight=0.5))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"epochs": 0}, "epochs must be greater than 0, got 0"),
        ({"lr": float("nan")}, "lr must be greater than 0, got nan"),
        ({"label_smoothing": 1.5}, "label_smoothing must be from 0 to 1, got 1.5"),
        ({"weight_decay": -1e-4}, "weight_decay must not be negative, got -0.0001"),
        ({"bn_batches": -1}, "bn_batches must not be negative, got -1"),
        ({"optimizer": "adam"}, "optimizer must be one of 'sgd', 'adamw', got 'adam'"),
    ],
)
def test_settings_are_checked(setting: dict, words: str):
    with pytest.raises(ValueError) as caught:
        TrainConfig(**setting)
    assert words in str(caught.value)


def test_first_interrupt_ends_the_step_and_the_second_stops_at_once(few_digits: Dataset, ctrl_c_raises: None):
    steps: list[int] = []

    def interrupt(times: int):
        def on_step(progress: Progress) -> None:
            steps.append(progress.step)
            for _ in range(times if progress.step == 2 else 0):
                signal.raise_signal(signal.SIGINT)

        return on_step

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        fit(make_model("digits_mlp"), few_digits, TrainConfig(batch_size=32), on_step=interrupt(1))
    assert steps == [1, 2, 3] and signal.getsignal(signal.SIGINT) is handler
    steps.clear()
    with pytest.raises(KeyboardInterrupt):
        fit(make_model("digits_mlp"), few_digits, TrainConfig(batch_size=32), on_step=interrupt(2))
    assert steps == [1, 2] and signal.getsignal(signal.SIGINT) is handler


def test_training_works_outside_the_main_thread(few_digits: Dataset):
    results = []
    config = TrainConfig(epochs=1, batch_size=32)
    thread = threading.Thread(target=lambda: results.append(fit(make_model(), few_digits, config)))
    thread.start()
    thread.join()
    assert len(results) == 1 and len(results[0].history) == 1


# The user's own loop


@pytest.mark.parametrize("method", ["wnq", "lsq"])
def test_own_loop_with_an_averaged_model(few_digits: Dataset, method: str):
    model = make_model(method=method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    batches = training_batches(few_digits, 32)
    average = None
    losses = []
    for epoch in range(12):
        for images, labels in batches.epoch(epoch):
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if epoch >= 8:
                average = average or AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
                average.update_parameters(model)
    assert sum(losses[-4:]) < 0.3 * sum(losses[:4])
    assert average is not None
    val = Batches(few_digits.val, 128, mean=few_digits.mean, std=few_digits.std)
    torch.optim.swa_utils.update_bn((images for images, _ in batches.epoch(0)), average)
    assert evaluate(average, val.epoch(0)).accuracy > 70
    for (_, layer, _), (_, averaged, _) in zip(quantized_layers(model), quantized_layers(average), strict=True):
        assert layer is not averaged
        assert len(averaged.weight.unique()) <= 255
