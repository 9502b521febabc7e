"""The fused kernels against the plain operations: on a GPU as they are, without one by Triton's interpreter."""

import copy
import gc
import importlib.util
import itertools
import math

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import wnq
from wnq import compact_activations_, kernels
from wnq.activations import ClippedReLU
from wnq.learned_step import LearnedStep

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (GPU or kernels.INTERPRETED),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
HALVES = [torch.bfloat16, torch.float16]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def run(quantizer, x, grad):
    """Return the output, its node's kind, and the gradients of the input and the parameters."""
    leaf = x.detach().requires_grad_()
    quantizer.zero_grad()
    y = quantizer(leaf)
    y.backward(grad)
    return y.detach(), y.grad_fn.fused, leaf.grad, [p.grad.clone() for p in quantizer.parameters()]


def both(quantizer, x, grad):
    """Return outputs and gradients of the kernels, and of the plain operations."""
    fused = run(quantizer, x, grad)
    with kernels.disabled():
        plain = run(quantizer, x, grad)
    assert fused[1]
    assert not plain[1]
    return fused, plain


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def input_quantizer(bits, x):
    quantizer = LearnedStep(bits, is_weight=False).to(DEVICE)
    quantizer.observe_(x.float())
    return quantizer


def step_gradient_is_exact(quantizer, x, grad, found):
    """In float64 the sums of the plain operations are exact by comparison; n terms round to n ulp of their size at most."""
    exact = run(copy.deepcopy(quantizer).double(), x.double(), grad.double())
    peak = max(1, 2 ** (quantizer.bits - 1) - 1 if quantizer.signed else 2**quantizer.bits - 1)
    factor = (math.prod(x.shape[1:]) * peak) ** -0.5 / quantizer.step.detach().abs().clamp(min=1e-12).double()
    size = ((grad * exact[0]).abs().sum() + (exact[2] * x).abs().sum()) * factor
    assert (found - exact[3][0]).abs() <= x.numel() * torch.finfo(torch.float32).eps * size


@pytest.mark.parametrize("sign", ["signed", "unsigned"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_inputs_equal_the_plain_operations_bit_for_bit(bits, sign):
    x, grad = randn(3, 5, 7, 11) * 2, randn(3, 5, 7, 11, seed=1)
    x = x.relu() if sign == "unsigned" else x
    quantizer = input_quantizer(bits, x)
    for step in (1.0, -0.7, 0.2):
        quantizer.step.data.mul_(step)
        fused, plain = both(quantizer, x, grad)
        same(fused[0], plain[0])
        same(fused[2], plain[2])
        same(fused[0], quantizer.quantize(x).dequantize())
        step_gradient_is_exact(quantizer, x, grad, fused[3][0])
        assert fused[0].any()


def cut(y):
    """Float32 to bfloat16 as Triton's interpreter does it: cut off, not rounded."""
    return y.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32).bfloat16()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_computes_in_float32(dtype):
    x, grad = (randn(4, 3, 9, 9) * 2).to(dtype), randn(4, 3, 9, 9, seed=1).to(dtype)
    for bits in (1, 3, 8):
        quantizer = input_quantizer(bits, x)
        fused, plain = both(quantizer, x, grad)
        with kernels.disabled():
            exact = run(quantizer, x.float(), grad.float())
        same(fused[0], cut(exact[0]) if not GPU and dtype == torch.bfloat16 else plain[0])
        same(fused[2], exact[2].to(dtype))
        step_gradient_is_exact(quantizer, x, grad, fused[3][0])


@pytest.mark.parametrize("shape", [(1,), (5, 1), (4, 6, 1, 1), (3, 6, 5, 5), (1, 2, 3, 4, 5), (2, 3, 41, 43)])
def test_every_layout_of_input_and_gradient(shape):
    layouts = LAYOUTS if len(shape) == 4 else LAYOUTS[:1]
    for x_layout, grad_layout in itertools.product(layouts, layouts):
        x = randn(*shape).contiguous(memory_format=x_layout)
        grad = randn(*shape, seed=1).contiguous(memory_format=grad_layout)
        quantizer = input_quantizer(3, x)
        for g in (grad, grad.flatten()[:1].reshape([1] * len(shape)).expand(shape)):
            fused, plain = both(quantizer, x, g)
            for i in (0, 2):
                same(fused[i], plain[i])
                assert fused[i].stride() == x.stride()
            step_gradient_is_exact(quantizer, x, g, fused[3][0])


def test_a_program_takes_more_than_one_block(monkeypatch):
    from wnq.kernels import rounding

    monkeypatch.setattr(rounding, "PROGRAMS", 2)
    for n in (2047, 2048, 2049, 5001):
        x, grad = randn(n), randn(n, seed=1)
        quantizer = input_quantizer(3, x)
        fused, plain = both(quantizer, x, grad)
        same(fused[2], plain[2])
        step_gradient_is_exact(quantizer, x, grad, fused[3][0])


def test_extreme_inputs():
    step = 0.3
    grid = torch.arange(-5.0, 5.0, 0.5)
    edges = torch.cat([grid * step, torch.nextafter(grid * step, torch.tensor(9.0)), torch.tensor([-0.0, 1e-42, 3e38])])
    wild = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = torch.cat([edges, wild]).to(DEVICE)
    for shape in (randn(9), randn(9).relu()):
        quantizer = input_quantizer(3, shape)
        quantizer.step.data.fill_(step)
        fused, plain = both(quantizer, x, torch.ones_like(x))
        same(fused[0], plain[0])
        assert fused[0][-3].isnan()
        # The gradient at a NaN depends on the processor's vectors; the others do not.
        numbers = ~x.isnan()
        same(fused[2][numbers], plain[2][numbers])
        assert both(quantizer, x[numbers], torch.ones_like(x[numbers]))[0][3][0].isfinite()


@pytest.mark.parametrize("step", [0.0, -0.0, 1e-20, -1e-20, -0.4, 1e12, float("nan")])
def test_a_step_of_any_value(step):
    x, grad = randn(50), randn(50, seed=1)
    quantizer = input_quantizer(4, x)
    quantizer.step.data.fill_(step)
    fused, plain = both(quantizer, x, grad)
    same(fused[0], plain[0])
    if step == step:
        same(fused[2], plain[2])
        step_gradient_is_exact(quantizer, x, grad, fused[3][0])
        assert (fused[3][0] == 0) == (step == 0)


def test_a_fixed_step_and_one_with_an_offset():
    x, grad = randn(3, 50), randn(3, 50, seed=1)
    fused, plain = both(ClippedReLU(3, clip=1.5).to(DEVICE), x, grad)
    same(fused[0], plain[0])
    same(fused[2], plain[2])
    quantizer = wnq.get_method("lsqplus").input().to(DEVICE)
    quantizer.observe_(x)
    results = []
    for on in (True, False):
        leaf = x.clone().requires_grad_()
        quantizer.zero_grad()
        if on:
            y = quantizer(leaf)
        else:
            with kernels.disabled():
                y = quantizer(leaf)
        y.backward(grad)
        results.append([y.detach(), leaf.grad, *(p.grad.clone() for p in quantizer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)  # sums in another order


def test_where_the_kernels_stand_back():
    x = randn(4, 6)
    quantizer = input_quantizer(3, x)
    with kernels.disabled():
        assert not kernels.usable(x)
        with kernels.disabled():
            pass
        assert not kernels.usable(x)
    assert kernels.usable(x)
    for other in (x.double(), x[:, ::2], x[:0]):
        assert not run(copy.deepcopy(quantizer).to(other.dtype), other, torch.ones_like(other))[1]
    quantizer.ewgs = 0.1
    assert not run(quantizer, x, x)[1]


def test_compiled_code_traces_the_plain_operations():
    x, grad = randn(4, 6), randn(4, 6, seed=1)
    says = torch.compile(lambda t: t * 0 + (1 if kernels.usable(t) else 2), backend="eager", fullgraph=True)
    assert (says(x) == 2).all()
    weight = wnq.get_method("wnq").weight(x, 0)
    for quantizer in (input_quantizer(3, x), weight):
        leaf = x.clone().requires_grad_()
        y = torch.compile(quantizer, backend="aot_eager", fullgraph=True)(leaf)
        y.backward(grad)
        fused = run(quantizer, x, grad)
        same(y.detach(), fused[0])
        torch.testing.assert_close(leaf.grad, fused[2], rtol=1e-5, atol=1e-6)  # at the maximum: a sum in another order


def test_second_derivatives():
    x, grad = randn(4, 6), randn(4, 6, seed=1)
    leaf = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(input_quantizer(3, x)(leaf).sum(), leaf, create_graph=True)

    def of_the_weight():
        leaf, outer = x.clone().requires_grad_(), grad.clone().requires_grad_()
        y = wnq.get_method("wnq").weight(x, 0)(leaf)
        (first,) = torch.autograd.grad(y, leaf, outer, create_graph=True)
        return torch.autograd.grad((first**2).sum(), outer)[0]

    found = of_the_weight()
    with kernels.disabled():
        same(found, of_the_weight())


GRIDS = [(bits, "full") for bits in range(1, 9)] + [(bits, "symmetric") for bits in range(2, 9)]


def weights(kind, *shape):
    w = randn(*shape)
    flat = w.view(-1)
    if kind == "tied":
        flat[3], flat[-1], flat[7] = 9.0, -9.0, 9.0
    if kind == "close":  # the neighbours of the maximum are no maxima
        flat[0] = 9.0
        flat[1:3] = torch.nextafter(flat[0], flat[0] * 0)
    if kind == "halves":  # u on the thresholds of every grid
        flat.mul_(8).round_().clamp_(-16, 16)
    return {"zeros": w * 0, "tiny": w * 1e-41, "huge": w * 1e38}.get(kind, w)


def check_weight(w, bits, grid, gain, grad):
    quantizer = wnq.get_method("wnq", w_bits=bits, grid=grid, max_gain=gain).weight(w, 0)
    fused, plain = both(quantizer, w, grad)
    same(fused[0], plain[0])
    same(fused[0], quantizer.quantize(w).dequantize())
    largest = w.abs().max()
    if 0 < largest < 1e-36:  # its inverse is infinite
        return
    attained = (w.abs() == largest) & (largest > 0)
    same(fused[2][~attained], plain[2][~attained])
    assert fused[2].stride() == w.stride()
    if largest > 0:
        terms = grad.double() * (fused[0].double() - w.double())
        through = gain * terms.sum() / largest.double() / attained.sum()
        exact = (grad.double() + w.double().sign() * through)[attained]
        # A sum of n terms: n ulp of their size at most, and the addition's own rounding.
        allowed = torch.finfo(torch.float32).eps * (w.numel() * terms.abs().sum() / largest.double() + grad.abs().max())
        assert ((fused[2][attained] - exact).abs() <= allowed).all()


@pytest.mark.parametrize("kind", ["gaussian", "tied", "close", "halves", "zeros", "tiny"])
@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_weights_equal_the_plain_operations_bit_for_bit(bits, grid, kind):
    for gain in (1.0, 0.5, 0.0):
        check_weight(weights(kind, 5, 3, 3, 3), bits, grid, gain, randn(5, 3, 3, 3, seed=1))


def test_many_weights_take_two_launches(monkeypatch):
    from wnq.kernels import maximum

    for programs, (bits, grid), shape in itertools.product(
        (1024, 2), [(1, "full"), (3, "full"), (4, "symmetric")], [(70, 40, 5, 5), (16, 4097)]
    ):
        monkeypatch.setattr(maximum, "PROGRAMS", programs)
        check_weight(weights("tied", *shape), bits, grid, 1.0, randn(*shape, seed=1))
    monkeypatch.setattr(maximum, "PROGRAMS", 4)
    check_weight(weights("zeros", 33, 2000), 3, "full", 1.0, randn(33, 2000, seed=1))
    check_weight(weights("gaussian", 150, 100), 3, "full", 1.0, randn(150, 100, seed=1))


def test_weights_in_every_layout_and_type():
    for w_layout, grad_layout, shape in itertools.product(LAYOUTS, LAYOUTS, [(6, 4, 3, 3), (6, 4, 1, 1)]):
        w = randn(*shape).contiguous(memory_format=w_layout)
        check_weight(w, 3, "full", 1.0, randn(*shape, seed=1).contiguous(memory_format=grad_layout))
    for dtype in HALVES:
        w = randn(6, 40).to(dtype)
        quantizer = wnq.get_method("wnq").weight(w, 0)
        with kernels.disabled():
            plain = quantizer(w)
        same(quantizer(w), plain)
        assert plain.dtype == dtype


def test_a_nan_or_an_infinity_among_the_weights_stays_visible():
    for value, (bits, grid), shape in itertools.product(
        ("nan", "-nan", "inf", "-inf"), [(1, "full"), (3, "full"), (3, "symmetric")], [(7, 9)]
    ):
        w = randn(*shape)
        w[2, 1] = float(value.strip("-")) * (-1 if value[0] == "-" else 1)
        fused, plain = both(wnq.get_method("wnq", w_bits=bits, grid=grid).weight(randn(7, 9), 0), w, torch.ones_like(w))
        same(fused[0], plain[0])
        assert "nan" not in value or fused[0].isnan().all()
    large = randn(70, 1000)
    large[69, 999] = float("nan")
    assert wnq.get_method("wnq").weight(randn(7, 9), 0)(large).isnan().all()


def test_one_scale_a_channel_is_plain():
    w = randn(5, 9)
    quantizer = wnq.get_method("wnq", granularity="channel").weight(w, 0)
    assert not run(quantizer, w, w)[1]


def network():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 2, 3),
    )  # fmt: skip
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=3, a_bits=2), first_last_bits=None))
    return model.to(DEVICE)


@torch.backends.cudnn.flags(enabled=True, deterministic=True)
def test_compact_activations_keep_codes_here_too():
    x, gradients = randn(4, 3, 9, 9), []
    plain, compact = network(), network()
    assert compact_activations_(compact) == {}
    for model in (plain, compact):
        kept = []
        model[3].register_forward_hook(
            lambda m, args, y, kept=kept: kept.append(StorageWeakRef(args[0].untyped_storage()))
        )
        wnq.calibrate_(model, x).train()
        for _ in range(2):  # what is computed anew is compared on the first batch only
            kept.clear()
            model.zero_grad()
            loss = (model(x) ** 2).mean()
            gc.collect()  # the interpreter refers to what it ran on in circles
            assert kept[0].expired() == (model is compact)
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        same(a, b)


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_a_graph_captures_a_step():
    x, grad = randn(8, 16), randn(8, 16, seed=1)
    quantizer, weight = input_quantizer(3, x), wnq.get_method("wnq").weight(x, 0)
    leaf = x.clone().requires_grad_()

    def step():
        y = weight(quantizer(leaf))
        return y, *torch.autograd.grad(y, (leaf, quantizer.step), grad)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # where gradients are accumulated first, they are always
        expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = step()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        same(a, b)


@pytest.mark.slow
@pytest.mark.skipif(not GPU or torch.cuda.get_device_properties(0).total_memory < 40e9, reason="needs a GPU of 40 GB")
def test_more_elements_than_an_int32_counts():
    n = 2**31 + 4099
    x = torch.full((n,), 0.3, dtype=torch.bfloat16, device=DEVICE)
    x[-7:] = torch.tensor([-9.0, -0.4, 0.0, 0.4, 0.8, 5.0, 9.0])
    quantizer = input_quantizer(3, randn(100))
    y, fused, grad_x, _ = run(quantizer, x, torch.ones((), dtype=x.dtype, device=DEVICE).expand(n))
    assert fused
    with kernels.disabled():
        tail, _, tail_grad, _ = run(quantizer, x[-7:].clone(), torch.ones_like(x[-7:]))
    same(y[-7:], tail)
    same(grad_x[-7:], tail_grad)
    assert (y[: 2**20] == y[0]).all()
    w = torch.zeros(n, device=DEVICE)
    w[-3:] = torch.tensor([0.4, -1.0, 1.0])
    same(
        wnq.get_method("wnq", grid="symmetric").weight(randn(4, 5), 0)(w)[-4:], torch.tensor([0.0, 1 / 3, -1, 1]).to(w)
    )
