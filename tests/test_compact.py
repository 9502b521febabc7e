"""Compact activations: the same losses and gradients, bit for bit, in less memory."""

import copy
import gc
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import wnq
from wnq import compact_activations_
from wnq.compact import rebuilding
from wnq.compact.codes import Codes, code_width, in_memory_order
from wnq.compact.saving import compact_saved

LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 3), (-2, 1), (0, 7), (-4, 3), (0, 15), (0, 255), (-128, 127), (-1, 0)]
)
def test_codes_give_the_values_back(low, high):
    for shape, dtype in itertools.product(
        [(), (1,), (7,), (0, 3), (3, 5), (2, 3, 4, 5), (1, 8, 1, 1), (2, 3, 2, 3, 2)],
        (torch.float32, torch.float64, torch.bfloat16),
    ):
        step = torch.tensor(0.0371, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        integers = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(1))
        values = (integers.to(step.dtype) * step).to(dtype)
        for layout in {torch.contiguous_format, LAYOUTS.get(len(shape), torch.contiguous_format)}:
            laid = values.contiguous(memory_format=layout)
            codes = Codes(laid, step, float(low), float(high))
            assert codes.packed.numel() == -(-values.numel() * code_width(high - low + 1) // 8)
            for last in (False, False, True, True):
                back = codes.restore(last=last)
                assert torch.equal(back, laid)
                assert back.dtype == dtype
                assert back.stride() == laid.stride()


def test_extreme_steps_come_back_too():
    for step in (1e-12, 3e-5, 0.3, 7e3, 1e30):
        step = torch.tensor(step)
        for dtype in (torch.float32, torch.bfloat16):
            values = (torch.arange(256.0) * step).to(dtype)
            assert torch.equal(Codes(values, step, 0.0, 255.0).restore(), values)


def test_a_tensor_with_gaps_is_not_read_as_a_row():
    x = torch.arange(12.0).reshape(3, 4)
    assert torch.equal(in_memory_order(x), torch.arange(12.0))
    assert in_memory_order(x.t()) is None
    assert in_memory_order(x[:, ::2]) is None


class Block(nn.Module):
    """A residual block whose shortcut is the input, or a convolution with BatchNorm where the width changes."""

    def __init__(self, narrow, wide, inplace):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(narrow, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.conv2, self.bn2 = nn.Conv2d(wide, wide, 3, padding=1), nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace)
        self.down = None if narrow == wide else nn.Sequential(nn.Conv2d(narrow, wide, 1), nn.BatchNorm2d(wide))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.down is None else self.down(x)))


def residual(inplace=False, blocks=3):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace), nn.MaxPool2d(2),
        *[Block(8, 8, inplace) for _ in range(blocks)], Block(8, 16, inplace), Block(16, 16, inplace),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def assorted():
    """Kernels, strides, groups, transposed order of layers, no BatchNorm, no ReLU (signed inputs), padding by reflection."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.Conv2d(6, 6, 2, bias=False),
        nn.BatchNorm2d(6, affine=False), nn.ReLU(), nn.Flatten(2), nn.Conv1d(6, 5, 2), nn.BatchNorm1d(5), nn.ReLU(),
        nn.Flatten(), nn.LazyLinear(7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 4),
    )  # fmt: skip


def tokens():
    """Linear layers on sequences: three dimensions, which torch flattens to two."""
    return nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.LayerNorm(12), nn.Linear(12, 4),
        nn.Flatten(), nn.Linear(12, 4),
    )  # fmt: skip


NETWORKS = {"residual": residual, "in place": lambda: residual(True), "assorted": assorted, "tokens": tokens}


def prepared(build, options, *, dtype=torch.float32, batch=4, layout=torch.contiguous_format):
    torch.manual_seed(0)
    model = build().to(dtype)
    x = randn(batch, 3, 8, 8, seed=2, dtype=dtype).contiguous(memory_format=layout)
    model(randn(4, 3, 8, 8, dtype=dtype))
    model = wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(**options)))
    return model.to(memory_format=layout), x


def step(model, x):
    """Return loss, gradients and buffers after one forward and backward pass."""
    model.zero_grad()
    y = model(x)
    loss = nn.functional.cross_entropy(y, torch.arange(len(y)) % 4)
    loss.backward()
    return [y.detach(), loss.detach(), *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())]


def assert_same(plain, compact, x):
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(step(plain, x), step(compact, x), strict=True))
        for model in (plain, compact):
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.05 * p.grad


METHODS = [
    {"name": "wnq", "w_bits": 3, "a_bits": 3},
    {"name": "wnq", "w_bits": 1, "a_bits": 1, "granularity": "channel"},
    {"name": "wnq", "w_bits": 2, "a_bits": 2, "ewgs": 1e-2},
    {"name": "lsq", "w_bits": 2, "a_bits": 2},
    {"name": "dorefa", "w_bits": 4, "a_bits": 8},
    {"name": "wnq", "w_bits": 3, "a_bits": 4, "activation": "clip", "scale": "learned"},
    {"name": "pact", "w_bits": 3, "a_bits": 3},
    {"name": "wnq", "w_bits": 3, "a_bits": 32},
]


@pytest.mark.parametrize("options", METHODS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_are_the_same_bit_for_bit(network, options):
    for layout in (torch.contiguous_format, torch.channels_last):
        plain, x = prepared(NETWORKS[network], options, layout=layout)
        plain(x)
        compact = copy.deepcopy(plain)
        compact_activations_(compact)
        assert_same(plain, compact, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_types_give_the_same(dtype):
    plain, x = prepared(residual, METHODS[0], dtype=dtype)
    plain(x)
    compact = copy.deepcopy(plain)
    compact_activations_(compact)
    assert_same(plain, compact, x)


def test_a_batch_of_one_autocast_and_the_first_batch_give_the_same():
    plain, x = prepared(residual, METHODS[0], batch=1)
    compact = copy.deepcopy(plain)
    compact_activations_(compact)  # before the quantizers have met any data
    assert_same(plain, compact, x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(plain, compact, x)


def test_dead_channels_and_frozen_parameters_give_the_same():
    plain, x = prepared(residual, METHODS[0])
    with torch.no_grad():
        plain[1].weight[2:5] = 0
        plain[1].bias[2:5] = -1
        plain[4].conv1.parametrizations.weight.original[1] = 0
    plain(x)
    for frozen in ("4.conv1", "1."):
        for name, p in plain.named_parameters():
            if name.startswith(frozen):
                p.requires_grad_(False)
        compact = copy.deepcopy(plain)
        compact_activations_(compact)
        for _ in range(2):
            for a, b in zip(step(plain, x), step(compact, x), strict=True):
                assert (a is None and b is None) or torch.equal(a, b)


def test_a_second_backward_pass_through_the_same_graph_gives_the_same():
    plain, x = prepared(residual, METHODS[0])
    plain(x)
    compact = copy.deepcopy(plain)
    compact_activations_(compact)
    for model in (plain, compact):
        model.zero_grad()
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), compact.parameters(), strict=True))


def left_allocated(run):
    """Bytes that a call leaves allocated."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        kept = run()
    total = sum(event.nbytes() for event in found.profiler.kineto_results.events() if event.name() == "[memory]")
    del kept
    return total


@pytest.mark.parametrize(("bits", "share"), [(2, 0.75), (3, 0.8)])
def test_the_graph_holds_less_than_that_of_the_float_network(bits, share):
    # Of four tensors that a float block keeps, two inputs of BatchNorm and two outputs of ReLU, the latter give way to codes of
    # 2 or 4 bits, but for the last output and every fifth one in a row; beside it stand small tensors, which count here.
    torch.manual_seed(0)
    x = randn(4, 3, 32, 32)
    net = residual(blocks=3)
    net(x)
    quantized = wnq.quantize_(copy.deepcopy(net), wnq.make_plan(net, wnq.get_method("wnq", w_bits=bits, a_bits=bits)))
    quantized(x)
    plain = left_allocated(lambda: quantized(x))
    compact_activations_(quantized)
    quantized(x)
    compact, base = left_allocated(lambda: quantized(x)), left_allocated(lambda: net(x))
    assert plain > 1.3 * base
    assert compact < share * base


def test_a_graph_that_is_dropped_is_freed_at_once():
    model, x = prepared(residual, METHODS[0])
    compact_activations_(model)
    step(model, x)
    gc.collect()
    gc.disable()
    try:
        held, dropped = left_allocated(lambda: model(x)), left_allocated(lambda: model(x) is None)
    finally:
        gc.enable()
    assert held > 10_000
    assert dropped < 100


def test_what_differs_when_computed_anew_is_kept(monkeypatch):
    plain, x = prepared(residual, METHODS[0])
    plain(x)
    compact = copy.deepcopy(plain)
    compact_activations_(compact)
    exact, asked = rebuilding._normalized, []

    def inexact(node):
        asked.append(node.name())
        return exact(node) * (1 + 1e-6)

    monkeypatch.setattr(rebuilding, "_normalized", inexact)
    assert all(torch.equal(a, b) for a, b in zip(step(plain, x), step(compact, x), strict=True))
    assert asked


def test_layers_that_keep_their_inputs_are_named():
    model, _ = prepared(residual, {"name": "pact", "w_bits": 3, "a_bits": 3})
    left = compact_activations_(model)
    assert left["4.conv1"] == "its input is rounded by PACT, not to multiples of one step"
    model, _ = prepared(residual, METHODS[0])
    assert compact_activations_(model) == {}
    deconvolution = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3))
    wnq.quantize_(deconvolution, wnq.make_plan(deconvolution, wnq.get_method("wnq"), first_last_bits=None))
    assert compact_activations_(deconvolution) == {"1": "it is neither a convolution nor a linear layer"}
    assert compact_activations_(nn.Linear(2, 2)) == {}


def test_within_other_hooks_and_checkpoints_it_stands_back():
    plain, x = prepared(residual, METHODS[0])
    plain(x)
    compact = copy.deepcopy(plain)
    compact_activations_(compact)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert all(torch.equal(a, b) for a, b in zip(step(plain, x), step(compact, x), strict=True))


def test_copies_pickles_evaluation_and_a_second_call_work():
    model, x = prepared(residual, METHODS[0])
    model(x)
    compact_activations_(model)
    compact_activations_(model)
    assert len(model[4].conv1._forward_hooks) == 1
    twin, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    step(model, x)
    for other in (twin, loaded):
        step(other, x)
        assert compact_saved in other[4].conv1._forward_hooks.values()
        gradients = {name: p.grad for name, p in other.named_parameters()}
        assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), twin.eval()(x))
    assert torch.equal(
        model(x), twin(x)
    )  # a graph in evaluation mode, whose BatchNorm keeps no statistics of the batch


def test_a_compiled_step_is_left_alone():
    model, x = prepared(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), METHODS[0]
    )
    model(x)
    twin = copy.deepcopy(model)
    compact_activations_(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert all(torch.allclose(a, b) for a, b in zip(step(twin, x), step(compiled, x), strict=True))


def test_the_trainer_gives_the_same_and_refuses_to_compile():
    data = wnq.load_data("digits", limit=64)
    results = []
    for option in (False, True):
        torch.manual_seed(0)
        model = wnq.build_model("digits_cnn")
        wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq")))
        config = wnq.TrainConfig(epochs=2, batch_size=16, lr=0.01, compact_activations=option)
        result = wnq.fit(model, data, config)
        hooks = [hook for layer in model.modules() for hook in layer._forward_hooks.values()]
        assert (compact_saved in hooks) == option
        results.append((result.val, [row["loss"] for row in result.history], list(model.state_dict().values())))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(a, b) for a, b in zip(results[0][2], results[1][2], strict=True))
    with pytest.raises(ValueError, match=r"compact_activations works in eager mode.*set compile = false"):
        wnq.TrainConfig(compile=True, compact_activations=True)
