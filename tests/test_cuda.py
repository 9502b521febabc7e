"""On a GPU: the law, the numbers of the CPU, whole runs, files, and a host that never waits."""

import contextlib
import copy
import itertools

import pytest
import torch
from torch import nn

import wnq
from wnq.activations import list_inputs
from wnq.attach import freeze_, quantized_layers
from wnq.data import Dataset, ImageData
from wnq.methods import get_method, list_methods
from wnq.train import TrainConfig, fit, plain_accelerator
from wnq.train.account import Account
from wnq.train.average import Average
from wnq.train.optimizer import make_optimizer
from wnq.train.step import TrainStep

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

FLIPPED = 1 / 500
"""Share of the values that may take the neighbouring level on the other device: sums, means and norms add up in another order
there, dividing by a plain number multiplies by its reciprocal, and tanh and exp differ in the last bit."""


@pytest.fixture(autouse=True, scope="module")
def exact_arithmetic():
    """Float32 as on the CPU, and the same algorithm at every call."""
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    yield
    cudnn.allow_tf32, cudnn.deterministic = before


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def few(widths):
    return sorted({widths[0], widths[-1], *({3} & set(widths))})


METHODS = [(info.name, {"w_bits": bits}) for info in list_methods() for bits in few(info.widths)]
METHODS += [
    ("wnq", {"w_bits": bits, "grid": grid, "scale": scale, "granularity": granularity})
    for bits, grid, scale, granularity in itertools.product(
        (2, 8), ("full", "symmetric"), ("max", "one", "learned", "optimal"), ("tensor", "channel")
    )
]
INPUTS = [(info, bits) for info in list_inputs() for bits in few(info.widths)]


SEARCHED = {"lqnets": 0.02, "lsqplus": 0.1}
"""How far the start of an input quantizer may be off, as a share: the end of an alternation in which a value changed sides, and the
next of sixteen ranges, in place of a sum."""


def identity(value):
    return "-".join(map(str, value.values())) if isinstance(value, dict) else getattr(value, "name", str(value))


def values_and_gradients(quantizer, x, grad):
    x = x.clone().requires_grad_()
    y = quantizer(x)
    y.backward(grad)
    return y.detach(), x.grad, {name: p.grad for name, p in quantizer.named_parameters()}


def assert_few_differ(actual, expected, allowed, *, rtol=1e-4):
    """Compare against the largest value, because a small one may be the difference of two large ones."""
    off = (actual.cpu() - expected).abs() > rtol * expected.abs() + 0.1 * rtol * expected.abs().max()
    assert int(off.sum()) <= allowed, f"{int(off.sum())} of {off.numel()} differ"


def assert_rounds_alike(host, device, x, *, exact=False):
    """The law on the device, bit for bit; the CPU's codes, values and gradients but for the few that may flip."""
    there = x.to(DEVICE)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        quantized, values = device.quantize(there.to(dtype)), device(there.to(dtype))
        assert values.device.type == quantized.codes.device.type == DEVICE
        assert torch.equal(values, quantized.dequantize().to(dtype))
    codes, expected = device.quantize(there).codes.cpu(), host.quantize(x).codes
    flipped = int((codes != expected).sum())
    assert flipped <= (0 if exact else max(1, FLIPPED * x.numel()))
    grad = randn(*x.shape, seed=9)
    on_host = values_and_gradients(host, x, grad)
    on_device = values_and_gradients(device, there, grad.to(DEVICE))
    allowed = flipped if flipped == 0 else max(1, FLIPPED * x.numel())
    assert_few_differ(on_device[0], on_host[0], allowed, rtol=1e-5)
    # A mask that compares with a bound, or a share of ties, may decide otherwise in an element or two.
    assert_few_differ(on_device[1], on_host[1], max(1, FLIPPED * x.numel()))
    if not flipped:
        for name, expected in on_host[2].items():
            if expected is not None:
                assert_few_differ(on_device[2][name], expected, 0, rtol=1e-2)  # sums over all elements, which cancel


@pytest.mark.parametrize(("name", "options"), METHODS, ids=identity)
def test_weights_round_as_on_the_cpu(name, options):
    method = get_method(name, **options)
    for w in (randn(16, 8, 3, 3), randn(16, 8, 3, 3, seed=1) ** 3, 0.01 * randn(40, 30, seed=2)):
        host = method.weight(w, 0)
        host.observe_(w)
        device = method.weight(w.to(DEVICE), 0).to(DEVICE)
        device.load_state_dict(host.state_dict(), strict=True)
        training, there = device.train(), w.to(DEVICE)
        assert torch.equal(training(there), training.quantize(there).dequantize())
        # By the largest weight nothing is added up, and no code depends on a division by a plain number.
        assert_rounds_alike(host.eval(), device.eval(), w, exact=name == "wnq")


@pytest.mark.parametrize(("info", "bits"), INPUTS, ids=identity)
def test_inputs_start_and_round_as_on_the_cpu(info, bits):
    for x in (randn(8, 12, 6, 6).relu(), randn(8, 12, 6, 6, seed=1), randn(64, 40, seed=2)):
        for layout in (torch.contiguous_format, torch.channels_last) if x.ndim == 4 else (torch.contiguous_format,):
            laid = x.contiguous(memory_format=layout)
            host, device = info.build(bits), info.build(bits).to(DEVICE)
            host.observe_(laid)
            device.observe_(laid.to(DEVICE))
            for key, value in host.state_dict().items():
                value = value.double()
                off = (device.state_dict()[key].cpu().double() - value).abs().max()
                assert float(off) <= SEARCHED.get(info.name, 1e-4) * float(value.abs().max()), key
            device.load_state_dict(host.state_dict(), strict=True)
            assert_rounds_alike(host.eval(), device.eval(), laid)


def network(method, kind="resnet20", *, channels_last=True, **options):
    """A quantized network whose quantizers have met data and whose channels are all alive."""
    torch.manual_seed(0)
    model = wnq.build_model(kind, num_classes=10, in_channels=3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(
                module.bias, 0.1, 0.2
            )  # at zero a channel without any input sits right at the ReLU's corner
    wnq.quantize_(model, wnq.make_plan(model, get_method(method, w_bits=3, a_bits=3, **options)))
    model(randn(8, 3, 32, 32))
    return model.to(memory_format=torch.channels_last) if channels_last else model


def loss_and_gradient(model, device, dtype, batch=8):
    model = copy.deepcopy(model).to(device, dtype)
    x = randn(batch, 3, 32, 32, seed=3).to(device, dtype).contiguous(memory_format=torch.channels_last)
    loss = nn.functional.cross_entropy(model(x), (torch.arange(batch) % 10).to(device))
    loss.backward()
    return loss.item(), torch.cat([p.grad.cpu().double().flatten() for p in model.parameters()])


# In float32 a sum may fall to the other side of a threshold, and in twenty layers each level that flips brings others behind it:
# the CPU's own algorithms differ by 1.5 % in the loss and 0.6 in the gradient. So few layers are held to a close bound, many in
# float64, where no sum is that near to a threshold.
CLOSE = {("digits_cnn", torch.float32): (1e-4, 1e-3), ("resnet20", torch.float64): (1e-9, 1e-6)}


@pytest.mark.parametrize("method", ["wnq", "lsq"])
@pytest.mark.parametrize(("kind", "dtype"), [*CLOSE, ("resnet20", torch.float32)], ids=str)
def test_a_step_is_that_of_the_cpu(kind, dtype, method):
    model = network(method, kind)
    (host, expected), (device, actual) = (loss_and_gradient(model, d, dtype) for d in ("cpu", DEVICE))
    if (kind, dtype) in CLOSE:
        of_loss, of_gradient = CLOSE[kind, dtype]
        assert abs(device - host) <= of_loss * host
        assert (actual - expected).norm() <= of_gradient * expected.norm()
    else:
        assert abs(device - host) <= 0.1 * host
        assert nn.functional.cosine_similarity(actual, expected, dim=0) > 0.5


def random_data(count=256):
    def split(n, seed):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randint(0, 256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
        return ImageData(images, torch.randint(0, 10, (n,), generator=generator), tuple("0123456789"))

    return Dataset(split(count, 0), split(64, 1), (0.5,) * 3, (0.25,) * 3)


COMMON = {"epochs": 1, "batch_size": 64, "lr": 0.01, "channels_last": True, "crop_padding": 4, "flip": True}
SETTINGS = [
    {},
    {"bf16": True},
    {"compact_activations": True},
    {"ema_decay": 0.9, "bn_batches": 2},
    {"bf16": True, "compact_activations": True, "ema_decay": 0.9, "clip_grad_norm": 1.0},
    {"compile": True},
    {"cuda_graph": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(s) or "plain")
def test_a_run_ends_with_finite_numbers(settings):
    model = network("wnq", "digits_cnn" if "compile" in settings else "resnet20")
    result = fit(model, random_data(), TrainConfig(**COMMON, **settings))
    assert all(p.device.type == DEVICE and bool(p.isfinite().all()) for p in model.parameters())
    assert torch.tensor([result.history[0]["loss"], result.val.loss]).isfinite().all()
    assert 1 < result.history[0]["loss"] < 10  # nats; guessing among ten classes costs 2.3


class Stopped(Exception):
    pass


def test_a_run_resumes_on_the_device(tmp_path):
    config, data = TrainConfig(**(COMMON | {"epochs": 2}), checkpoint_steps=1, ema_decay=0.9), random_data()

    def stop(progress):
        if (progress.epoch, progress.step) >= (2, 2):
            raise Stopped

    with pytest.raises(Stopped):
        fit(network("lsq"), data, config, out=tmp_path, on_step=stop)
    kept = torch.load(tmp_path / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = network("lsq")
    result = fit(model, data, config, out=tmp_path, resume=True)
    assert len(result.history) == 2
    assert all(p.device.type == DEVICE for p in model.parameters())
    moved = [not torch.equal(kept["models"]["model"][key], value.cpu()) for key, value in model.state_dict().items()]
    assert any(moved)
    # A finished run has nothing left to do but to load what was kept: the same numbers, bit for bit.
    again = network("lsq")
    assert fit(again, data, config, out=tmp_path, resume=True).val == result.val
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", ["wnq", "lsq"])
def test_a_file_of_a_model_trained_on_the_device_is_exact_on_the_cpu(method, tmp_path):
    model = network(method, channels_last=False)
    fit(model, random_data(), TrainConfig(**(COMMON | {"channels_last": False})))
    model.eval()
    wnq.save(model, tmp_path / "model.safetensors", coder="none")
    loaded = wnq.load(tmp_path / "model.safetensors", wnq.build_model("resnet20", num_classes=10, in_channels=3))
    weights = {name: layer.weight.detach().cpu() for name, layer, _ in quantized_layers(model)}
    stored = dict(loaded.named_modules())
    assert weights
    assert all(torch.equal(stored[name].weight, weight) for name, weight in weights.items())
    x = randn(16, 3, 32, 32, seed=5)
    with torch.no_grad():
        # Frozen on the device: its scales stay the device's, as in the file.
        assert torch.equal(loaded(x), freeze_(copy.deepcopy(model)).cpu()(x))
        there, expected = loaded.to(DEVICE)(x.to(DEVICE)), model(x.to(DEVICE))
    assert torch.equal(there, expected)


@contextlib.contextmanager
def no_waiting():
    """Raise where the host waits for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_is_noticed():
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting():
        x.sum().item()


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "ema_decay": 0.9}, {"compact_activations": True}], ids=str)
@pytest.mark.parametrize("method", [None, "wnq", "lsq"])
def test_the_host_never_waits_for_the_device_within_a_step(method, settings):
    config = TrainConfig(**COMMON, **settings)
    model = wnq.build_model("resnet20") if method is None else network(method)
    model = model.to(DEVICE, memory_format=torch.channels_last).train()
    if config.compact_activations:
        wnq.compact_activations_(model)
    step = TrainStep(
        model, make_optimizer(model, wnq.procedures.Procedure(), config), config, steps_per_epoch=9,
        accelerator=plain_accelerator(), average=Average(model, 0.9) if config.ema_decay else None,
    )  # fmt: skip
    account = Account(torch.device(DEVICE))
    x = randn(64, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    y = (torch.arange(64) % 10).to(DEVICE)
    for done in range(7):
        with no_waiting() if done > 3 else contextlib.nullcontext():
            account.add(*step.take(x, y, done), y)
    losses = account.read().losses
    assert len(losses) == 7
    assert torch.tensor(losses).isfinite().all()


def losses_and_peak(model):
    """Losses of three steps, and the bytes that one more adds to what is allocated, at its peak."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = randn(64, 3, 32, 32).to(DEVICE, memory_format=torch.channels_last)
    y = (torch.arange(64) % 10).to(DEVICE)

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.item()

    losses = [step() for _ in range(3)]
    optimizer.zero_grad()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return losses, torch.cuda.max_memory_allocated() - before


def test_compact_activations_take_less_memory_and_change_nothing():
    plain = network("wnq").to(DEVICE)
    compact = copy.deepcopy(plain)
    wnq.compact_activations_(compact)
    (expected, most), (losses, less) = losses_and_peak(plain), losses_and_peak(compact)
    assert losses == expected
    assert (
        less < 0.9 * most
    )  # on the CPU it is 0.46; on an H100 0.82: the workspaces of convolutions are the same in both
