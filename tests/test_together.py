"""The weights of all layers rounded in one pass, against each by itself."""

import contextlib
import copy
import itertools
import pickle
import threading

import pytest
import torch
from torch import nn

import wnq
from wnq import kernels, together
from wnq.together import layers_together, rounded_together

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
GRIDS = [(bits, "full") for bits in range(1, 9)] + [(bits, "symmetric") for bits in range(2, 9)]
WAYS = ["plain"] + ["kernels"] * (GPU or kernels.INTERPRETED)


@pytest.fixture(params=WAYS)
def way(request):
    if request.param == "plain":
        with kernels.disabled():
            yield "plain"
    else:
        yield "kernels"


class Weights(nn.Module):
    """Layers of any shape; calling it returns their weights."""

    def __init__(self, weights, options, method="wnq"):
        super().__init__()
        self.layers = nn.ModuleList()
        for weight, option in zip(weights, options, strict=True):
            layer = nn.Module()
            layer.weight = nn.Parameter(weight.clone(memory_format=torch.preserve_format))
            wnq.attach.attach_weight_(layer, wnq.get_method(method, **option).weight(weight, 0))
            self.layers.append(layer)
        self.to(DEVICE)

    def forward(self):
        return [layer.weight for layer in self.layers]

    @property
    def originals(self):
        return [layer.parametrizations.weight.original for layer in self.layers]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def values_and_gradients(model, grads, *, jointly):
    originals = model.originals
    if jointly:
        with rounded_together(model):
            values = model()
            assert all(v.grad_fn.name() == "RoundedTogetherBackward" for v in values)
    else:
        values = model()
    return [v.detach() for v in values], torch.autograd.grad(values, originals, grads)


def compare(model, seed=1):
    """Values bit for bit, gradients but for the order of the sums."""
    grads = [randn(*w.shape, seed=seed + i).to(DEVICE) for i, w in enumerate(model.originals)]
    ours = values_and_gradients(model, grads, jointly=True)
    each = values_and_gradients(model, grads, jointly=False)
    rows = zip(model.originals, grads, ours[0], each[0], ours[1], each[1], strict=True)
    for original, g, y, y_each, dw, dw_each in rows:
        w = original.detach()
        same(y, y_each)
        assert y.stride() == w.stride() == dw.stride()
        largest = w.abs().max()
        attained = (w.abs() == largest) & (largest > 0)
        same(dw[~attained], dw_each[~attained])
        if not 1e-36 < largest < float("inf"):  # no maximum, or its inverse is infinite
            continue
        # Two sums of n terms: each n ulp of their size at most, and the addition's own rounding.
        terms = (g * (y - w)).abs().sum() / largest
        allowed = 2 * torch.finfo(torch.float32).eps * (w.numel() * terms + g.abs().max())
        assert ((dw - dw_each)[attained].abs() <= allowed).all()


SHAPES = [(5, 3, 3, 3), (1,), (512,), (513,), (7, 11), (2, 3, 5, 1, 2), (16, 8, 3, 3), (1, 1, 1, 1), (40, 33)]


def test_every_width_grid_and_gain_at_once(way):
    options = [
        {"w_bits": bits, "grid": grid, "max_gain": gain}
        for (bits, grid), gain in itertools.product(GRIDS, (1.0, 0.5, 0.0))
    ]
    weights = [randn(*SHAPES[i % len(SHAPES)], seed=i) * (i + 1) for i in range(len(options))]
    model = Weights(weights, options)
    assert [len(group) for group in layers_together(model)] == [len(options)]
    compare(model)


def test_layouts_and_odd_weights(way):
    cases = [
        randn(6, 4, 3, 3).contiguous(memory_format=torch.channels_last),
        randn(6, 4, 1, 1).contiguous(memory_format=torch.channels_last),
        torch.zeros(30, 30),
        randn(9, 200) * 1e-41,
        randn(9, 200) * 1e38,
        randn(3, 700).mul(8).round().clamp(-16, 16),
    ]
    tied = randn(4, 400)
    tied[0, 0], tied[1, 3], tied[3, 399] = 9.0, -9.0, 9.0
    close = randn(20)
    close[3] = 9.0
    close[4] = torch.nextafter(close[3], torch.tensor(0.0))
    cases += [tied, close]
    for bits, grid in [(1, "full"), (3, "full"), (2, "symmetric")]:
        compare(Weights(cases, [{"w_bits": bits, "grid": grid}] * len(cases)))


@pytest.mark.skipif("kernels" not in WAYS, reason="needs a GPU, or TRITON_INTERPRET=1")
def test_a_program_reads_many_rows(monkeypatch):
    from wnq.kernels import together as kernel

    monkeypatch.setattr(kernel, "PARTS", 2)
    compare(Weights([randn(9, 400), randn(5, 700), randn(3, 3), randn(2, 512)], [{}, {"w_bits": 1}, {}, {}]))


def test_gradients_of_another_layout(way):
    model = Weights([randn(6, 4, 3, 3), randn(5, 7), randn(5, 7)], [{}] * 3)
    grads = [randn(6, 4, 3, 3, seed=1).contiguous(memory_format=torch.channels_last), torch.ones(1, 1).expand(5, 7)]
    grads.append(randn(7, 5, seed=2).t())
    grads = [g.to(DEVICE) for g in grads]
    ours, each = (values_and_gradients(model, grads, jointly=jointly) for jointly in (True, False))
    for a, b in zip(ours[1], each[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # a sum in another order


def test_what_is_not_finite_stays_where_it_is(way):
    for value in ("nan", "inf", "-inf"):
        model = Weights([randn(40, 40), randn(40, 40, seed=1), randn(40, 40, seed=2)], [{}, {"w_bits": 1}, {}])
        for layer in model.layers[:2]:
            with torch.no_grad():
                layer.parametrizations.weight.original[39, 39] = float(value)
        with rounded_together(model):
            values = model()
        for a, b in zip(values, model(), strict=True):
            same(a, b)
        assert [bool(v.isfinite().all()) for v in values] == [False, False, True]
        sum(v.sum() for v in values).backward()
        assert model.originals[2].grad.isfinite().all()


def test_a_layer_without_a_gradient_gets_zeros(way):
    model = Weights([randn(5, 6), randn(700), randn(3, 4)], [{}] * 3)
    with rounded_together(model):
        values = model()
    (values[0].sum() + (values[2] ** 2).sum()).backward()
    assert not model.originals[1].grad.any()
    found = [model.originals[i].grad.clone() for i in (0, 2)]
    model.zero_grad()
    (model.layers[0].weight.sum() + (model.layers[2].weight ** 2).sum()).backward()
    for i, a in zip((0, 2), found, strict=True):
        torch.testing.assert_close(a, model.originals[i].grad, rtol=1e-5, atol=1e-6)  # a sum in another order


def small(method="wnq", **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 25, 10),
    )  # fmt: skip
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(method, **options)))
    return wnq.calibrate_(model.to(DEVICE), images()).train()


def images(n=4):
    return randn(n, 3, 9, 9).to(DEVICE)


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_a_network_computes_the_same(way):
    a, b = small(w_bits=2, a_bits=3), small(w_bits=2, a_bits=3)
    for _ in range(2):
        with rounded_together(a):
            ours = a(images())
        each = b(images())
        same(ours, each)
    ours.square().mean().backward()
    each.square().mean().backward()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(
            p.grad, q.grad, rtol=1e-4, atol=1e-6
        )  # at the largest weight: a sum in another order


def test_a_tied_weight_is_rounded_once_and_gets_both_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    model[2].weight = model[0].weight
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq"), first_last_bits=None))
    x = randn(3, 6)
    twin = copy.deepcopy(model)
    assert [len(g) for g in layers_together(model)] == [3]
    with rounded_together(model):
        assert model[0].weight is model[2].weight
        model(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)  # a sum in another order


def free(model):
    return all(module.taken is None for module in model.modules() if isinstance(module, wnq.normalized.Normalized))


def test_nothing_is_left_behind():
    model = small()
    with pytest.raises(ZeroDivisionError), rounded_together(model):
        assert model[0].weight is model[0].weight
        raise ZeroDivisionError
    assert free(model)
    assert model[0].weight is not model[0].weight
    assert model[0].weight.grad_fn.name() == "MaxRoundingBackward"
    with rounded_together(model):
        with rounded_together(model):
            inner = model[0].weight
        outer = model[0].weight
    assert free(model)
    same(inner, outer)
    (inner.sum() + outer.sum()).backward()


def test_copies_and_files_know_nothing_of_it():
    model = small()
    before = model.state_dict()
    with rounded_together(model):
        assert model.state_dict().keys() == before.keys()
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        same(copies[0][0].weight, model[0].weight)
        assert all(free(twin) for twin in copies)
        assert not free(model)


def test_a_weight_that_changed_is_rounded_again():
    model = small()
    with rounded_together(model):
        old = model[0].weight
        with torch.no_grad():
            model[0].parametrizations.weight.original.mul_(2)
        same(model[0].weight, 2 * old)
        other = {"0.parametrizations.weight.original": torch.ones_like(old)}
        out = torch.func.functional_call(model, other, (images(),))
    assert out.isfinite().all()
    model[0].parametrizations.weight.original.data = (
        randn(8, 3, 3, 3, seed=5).to(DEVICE).to(memory_format=torch.channels_last)
    )
    with rounded_together(model):
        found = model[0].weight
    same(found, model[0].weight)


def test_without_gradients():
    model = small().eval()
    expected = model(images()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), rounded_together(model):
            same(model(images()), expected)
            assert not model[0].weight.requires_grad
            assert model[0].weight is model[0].weight
            if mode is torch.no_grad:
                with torch.enable_grad():
                    assert model[0].weight.requires_grad
    with rounded_together(model):
        model(images()).sum().backward()
    assert model[0].parametrizations.weight.original.grad.any()


def test_threads_with_models_of_their_own_do_not_meet():
    models = [small(w_bits=bits) for bits in (1, 2, 3, 4)]
    for model in models:
        model.eval()
    expected = [model(images()).detach() for model in models]
    barrier, wrong = threading.Barrier(len(models), timeout=60), []

    def work(i):
        for _ in range(10):
            barrier.wait()
            with rounded_together(models[i]):
                barrier.wait()
                if not torch.equal(models[i](images()), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(models))]
    # Triton's interpreter is not made for threads.
    with kernels.disabled() if kernels.INTERPRETED else contextlib.nullcontext():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_which_layers_are_taken(monkeypatch):
    assert not layers_together(small("lsq"))
    assert not layers_together(small("dorefa"))
    assert not layers_together(small(granularity="channel"))
    assert not layers_together(small(scale="learned"))
    assert not layers_together(small().double())
    assert not layers_together(nn.Linear(3, 4))
    model = small()
    assert [len(g) for g in layers_together(model)] == [3]
    model[0].parametrizations.weight.original.requires_grad_(False)
    assert not layers_together(model)  # two are left
    model = small()
    monkeypatch.setitem(together.LARGEST, DEVICE, 600)
    assert not layers_together(model)
    for method in ("lsq", "dorefa"):
        model = small(method)
        with rounded_together(model):
            a = model(images())
        same(a, model(images()))


def test_a_compiled_model_traces_its_own_rounding():
    model = small().eval()
    model(images())
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = images()
    with rounded_together(model):
        y = compiled(x)
    names = set()

    def walk(node):
        if node is not None and node not in names:
            names.add(node)
            for after, _ in node.next_functions:
                walk(after)

    walk(y.grad_fn)
    assert not any("RoundedTogether" in node.name() for node in names)
    same(y, model(x))


def one_step(model, monkeypatch, *, jointly):
    config = wnq.TrainConfig(epochs=1, batch_size=8, lr=0.1)
    if not jointly:
        monkeypatch.setitem(together.LARGEST, DEVICE, 0)
    from accelerate import Accelerator

    from wnq.train.step import TrainStep

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    step = TrainStep(model, optimizer, config, steps_per_epoch=10, accelerator=Accelerator(cpu=not GPU))
    loss, _ = step.take(randn(8, 3, 32, 32).to(DEVICE), torch.arange(8, device=DEVICE), 0)
    return loss


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_a_training_step_of_resnet20(monkeypatch):
    results = []
    for jointly in (True, False):
        torch.manual_seed(0)
        model = wnq.build_model("resnet20", num_classes=10)
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=3)))
        results.append((one_step(model.to(DEVICE), monkeypatch, jointly=jointly), model))
    same(results[0][0], results[1][0])
    for p, q in zip(results[0][1].parameters(), results[1][1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # at the largest weights: a sum in another order


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_graph_captures_it_and_nothing_waits(way):
    model = Weights([randn(30, 50), randn(700), randn(8, 4, 3, 3)], [{}, {"w_bits": 8}, {"grid": "symmetric"}])
    grads = [randn(*w.shape, seed=3).to(DEVICE) for w in model.originals]

    def both():
        values, gradients = values_and_gradients(model, grads, jointly=True)
        return *values, *gradients

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(side):
            both()
            both()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    with torch.no_grad():
        for w in model.originals:
            w.mul_(-3)
    graph.replay()
    for a, b in zip(captured, both(), strict=True):
        same(a, b)
