"""Attaching a plan: any layer, tied weights, checkpoints, copies, pickles, averages, compilers."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import wnq
from wnq.learned_step import LearnedStep
from wnq.prepared import ORIGINAL, float_weight, weight_quantizer


def small(norm=True):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8) if norm else nn.Identity(),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def prepared(method="wnq", norm=True, **options):
    model = small(norm)
    return wnq.quantize_(model, wnq.make_plan(model, wnq.get_method(method, **options)))


def batch(seed=0):
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


LAYERS = {
    "Conv1d": (lambda: nn.Conv1d(3, 6, 3, padding=1), (2, 3, 9)),
    "Conv1d grouped": (lambda: nn.Conv1d(4, 6, 3, groups=2), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(3, 6, 3, bias=False), (2, 3, 9, 8)),
    "Conv2d circular": (lambda: nn.Conv2d(3, 6, 3, padding=1, padding_mode="circular"), (2, 3, 9, 8)),
    "Conv2d depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), (2, 6, 9, 8)),
    "Conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "Linear": (lambda: nn.Linear(7, 5), (3, 2, 7)),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize(("build", "shape"), LAYERS.values(), ids=LAYERS.keys())
def test_every_layer_kind(build, shape, granularity):
    torch.manual_seed(0)
    layer = build()
    reference = copy.deepcopy(layer)
    model = nn.Sequential(layer)
    method = wnq.get_method("wnq", w_bits=2, a_bits=3, granularity=granularity)
    wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
    x = torch.randn(shape)
    y = model(x)
    y.square().sum().backward()
    assert float_weight(layer).grad.abs().sum() > 0
    # The same layer, fed by hand with the quantized weight and input.
    quantizer = weight_quantizer(layer)
    reference.weight.data.copy_(quantizer.quantize(float_weight(layer)).dequantize())
    assert torch.equal(reference(layer.input_quantizer(x)), y)
    channels = float_weight(layer).shape[quantizer.axis]
    expected = channels if granularity == "channel" else 1
    assert quantizer.quantize(float_weight(layer)).scale.numel() == expected
    assert quantizer.axis == (1 if "Transpose" in type(reference).__name__ else 0)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_quantize_the_weight_and_leave_indices_alone(kind):
    torch.manual_seed(0)
    model = nn.Sequential(kind(20, 6), nn.Linear(6, 4), nn.Linear(4, 3))
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", w_bits=2), first_last_bits=None))
    assert not hasattr(model[0], "input_quantizer")
    model(torch.tensor([[1, 2, 3], [4, 5, 6]]))
    assert model[0].weight.unique().numel() <= 4


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.hidden = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.hidden(self.embedding(x)).relu())


def test_tied_weights_are_quantized_once():
    torch.manual_seed(0)
    model = Tied()
    plan = wnq.make_plan(model, wnq.get_method("wnq", w_bits=2, a_bits=32), first_last_bits=None)
    assert [(layer.name, layer.tied_to, layer.parameters) for layer in plan.layers] == [
        ("embedding", None, 128), ("hidden", None, 64), ("head", "embedding", 0),
    ]  # fmt: skip
    wnq.quantize_(model, plan)
    assert model.embedding.parametrizations.weight.original is model.head.parametrizations.weight.original
    assert weight_quantizer(model.embedding) is weight_quantizer(model.head)
    assert [name for name, _, _ in wnq.quantized_layers(model)] == ["embedding", "hidden"]
    assert sum(p.numel() for p in model.parameters()) == 128 + 64 + 8
    x = torch.arange(16).reshape(2, 8)
    expected = model(x)
    for other in (copy.deepcopy(model), pickled(model)):
        assert torch.equal(other(x), expected)
        assert other.embedding.parametrizations.weight.original is other.head.parametrizations.weight.original
    frozen = wnq.freeze_(model)
    assert torch.equal(frozen(x), expected)
    assert frozen.embedding.weight is frozen.head.weight


def test_freezing_leaves_a_float_layer_that_shares_its_weight_alone():
    torch.manual_seed(0)
    model = Tied()
    plan = wnq.make_plan(
        model, wnq.get_method("wnq", w_bits=2, a_bits=32), keep_float=["embedding"], first_last_bits=None
    )
    wnq.quantize_(model, plan)
    x = torch.arange(16).reshape(2, 8)
    expected = model(x)
    assert torch.equal(wnq.freeze_(model)(x), expected)
    assert model.embedding.weight.unique().numel() > 4


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["wnq", "lsq", "minmax"])
def test_torch_save_of_the_whole_model(method):
    model = prepared(method)
    model(batch())
    model.eval()
    loaded = pickled(pickled(model))
    assert torch.equal(loaded(batch(1)), model(batch(1)))
    assert wnq.get_plan(loaded) == wnq.get_plan(model)
    loaded.train()
    loaded(batch(1)).sum().backward()
    assert loaded[3].parametrizations.weight.original.grad is not None
    loaded.load_state_dict(small().state_dict())  # hooks survive too


def test_deepcopy_is_independent_and_outlives_freezing_the_original():
    model = prepared()
    model(batch())
    model.eval()
    twin = copy.deepcopy(model)
    expected = twin(batch(1))
    wnq.freeze_(model)
    assert torch.equal(twin(batch(1)), expected)
    with torch.no_grad():
        twin[3].parametrizations.weight.original.mul_(-1)
    assert not torch.equal(twin(batch(1)), expected)
    assert torch.equal(model(batch(1)), expected)


@pytest.mark.parametrize("method", ["wnq", "lsq", "twn"])
def test_strict_state_dict_round_trip(method):
    model = prepared(method, a_bits=3)
    model(batch())
    model.eval()
    other = prepared(method, a_bits=3)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(other.eval()(batch(1)), model(batch(1)))


def test_float_checkpoint_with_plain_keys_loads_and_restarts_learned_parameters():
    checkpoint = small().state_dict()
    checkpoint = {key: 3 * value if value.is_floating_point() else value for key, value in checkpoint.items()}
    model = prepared("lsq")
    model.load_state_dict(checkpoint, strict=True)
    assert torch.equal(model[3].parametrizations.weight.original, checkpoint["3.weight"])
    fresh = wnq.get_method("lsq").weight(checkpoint["3.weight"], 0)
    assert torch.equal(weight_quantizer(model[3]).step, fresh.step)
    del checkpoint["4.running_mean"]
    with pytest.raises(RuntimeError, match=r"4\.running_mean"):
        model.load_state_dict(checkpoint, strict=True)


def test_reading_the_weight_changes_no_state():
    model = prepared("lsq").train()
    model(batch())
    before = copy.deepcopy(model.state_dict())
    for _ in range(3):
        _ = model[3].weight.shape
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_first_batch_decides_signs_and_the_plan_shows_them():
    model = prepared()
    plan = wnq.get_plan(model)
    assert wnq.input_signs(model) == dict.fromkeys(["0", "3", "8"], "first batch decides")
    assert "first batch decides" in wnq.format_plan(plan, wnq.input_signs(model))
    model(batch())
    assert wnq.input_signs(model) == {"0": "signed", "3": "unsigned", "8": "unsigned"}
    assert "unsigned" in wnq.format_plan(plan, wnq.input_signs(model))


def test_evaluating_before_any_batch_says_what_to_do():
    model = prepared().eval()
    with pytest.raises(RuntimeError, match=r"run one batch in training mode first, or call wnq.calibrate_"):
        model(batch())


def test_calibrate_starts_the_steps_and_touches_nothing_else():
    model = prepared().eval()
    statistics = copy.deepcopy(model[1].state_dict())
    assert wnq.calibrate_(model, batch()) is model
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(statistics[key], value) for key, value in model[1].state_dict().items())
    assert torch.isfinite(model(batch())).all()
    trained = prepared()
    trained(batch())
    assert trained[0].input_quantizer.step == model[0].input_quantizer.step


def test_calibrating_on_a_diverging_net_is_reported():
    model = prepared()
    model[1].running_var.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"calibration gave NaN.*Train the float model first"):
        wnq.calibrate_(model, batch())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["wnq", "lsq"])
def test_compiles_whole_in_training_from_the_very_first_batch(method):
    model = prepared(method, norm=False)
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for step in range(2):
        y, expected = compiled(batch(step)), eager(batch(step))
        y.square().mean().backward()
        expected.square().mean().backward()
        # Fused kernels round differently; a value at a threshold may move one level of 3 bits in a sum of 72 products.
        assert torch.allclose(y, expected, rtol=0.05, atol=0.02)
    assert wnq.input_signs(model) == wnq.input_signs(eager)
    gradient, reference = (m[3].parametrizations.weight.original.grad for m in (model, eager))
    assert torch.nn.functional.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) > 0.98


def test_exports():
    model = prepared()
    model(batch())
    model.eval()
    with torch.no_grad():  # torch 2.9 needs it for a dynamic batch; later ones do not
        exported = torch.export.export(model, (batch(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    x = torch.cat([batch(1), batch(2)])
    assert torch.equal(exported.module()(x), model(x))


def test_bfloat16_autocast_trains():
    model = prepared()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(batch())
    assert y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    assert torch.isfinite(model[3].parametrizations.weight.original.grad).all()


def test_channels_last_gives_the_same_gradient_as_contiguous():
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        model = prepared().double()
        model = model.to(memory_format=layout)
        model(batch().double().contiguous(memory_format=layout)).square().mean().backward()
        gradients.append(model[3].input_quantizer.step.grad)
    # Same sums in another order; the step is a float32 parameter turned float64.
    assert torch.allclose(*gradients, rtol=1e-6)


def test_averaged_model():
    model = prepared()
    average = AveragedModel(model)  # before any batch: the average learns of the first batch by its update
    model(batch())
    average.update_parameters(model)
    assert torch.equal(average.eval()(batch(1)), model.eval()(batch(1)))


def test_keyword_input_is_quantized_too():
    layer = nn.Linear(6, 4)
    model = nn.Sequential(layer)
    wnq.quantize_(model, wnq.make_plan(model, wnq.get_method("wnq", a_bits=2), first_last_bits=None))
    x = torch.randn(3, 6)
    assert torch.equal(layer(input=x), layer(x))


def test_a_users_own_loop_learns():
    model = prepared(w_bits=2, a_bits=2)
    y = torch.arange(64) % 10
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.2 * y.view(-1, 1, 1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(120):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_param_groups_separate_the_quantizers():
    model = prepared("lsq")
    groups = wnq.param_groups(model, lr=0.1, weight_decay=1e-4, quantizer_lr=0.01)
    special = [m.step for m in model.modules() if isinstance(m, LearnedStep)]
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in special}
    assert (groups[1]["lr"], groups[1]["weight_decay"]) == (0.01, 0.0)
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(model.parameters()))
    assert len(wnq.param_groups(small(), lr=0.1, weight_decay=0)) == 1


def test_freeze_keeps_the_outputs_and_the_codes():
    for method in ("wnq", "lsq", "twn", "bwn", "minmax", "dorefa"):
        model = prepared(method, a_bits=3)
        model(batch())
        model.eval()
        expected = model(batch(1))
        stored = {name: q.quantize(float_weight(layer)) for name, layer, q in wnq.quantized_layers(model)}
        wnq.freeze_(model)
        assert torch.equal(model(batch(1)), expected)
        assert type(model[3]) is nn.Conv2d
        assert not any(ORIGINAL in key for key in model.state_dict())
        for name, layer, quantizer in wnq.quantized_layers(model):
            again = quantizer.quantize(float_weight(layer))
            assert torch.equal(again.codes, stored[name].codes)
            assert torch.equal(again.codebook, stored[name].codebook)


# Bad input: nothing is changed, one sentence says what to do.


def untouched(model):
    return not any(hasattr(m, "parametrizations") or hasattr(m, "input_quantizer") for m in model.modules())


def test_nan_weights_name_the_layer():
    model = small()
    model[3].weight.data[0, 0, 0, 0] = float("nan")
    plan = wnq.make_plan(model, wnq.get_method("wnq"))
    with pytest.raises(ValueError, match=r"the weight of layer '3' holds 1 NaN or infinite value of 576"):
        wnq.quantize_(model, plan)
    assert untouched(model)


def test_a_plan_of_another_model_is_refused():
    plan = wnq.make_plan(small(), wnq.get_method("wnq"))
    other = small()
    other[3] = nn.Conv2d(8, 8, 5)
    with pytest.raises(
        ValueError, match=r"layer '3' has shape \(8, 8, 3, 3\) in the plan but \(8, 8, 5, 5\) in the model"
    ):
        wnq.quantize_(other, plan)
    assert untouched(other)
    with pytest.raises(ValueError, match="the plan names layer '0', which Linear does not have"):
        wnq.quantize_(nn.Linear(3, 3), plan)
    other[3] = nn.Tanh()
    with pytest.raises(ValueError, match="layer '3' is a Tanh, whose weight cannot be quantized"):
        wnq.quantize_(other, plan)


def test_quantizing_twice_is_refused():
    model = prepared()
    with pytest.raises(ValueError, match="layer '0' is quantized already"):
        wnq.quantize_(model, wnq.get_plan(model))
    with pytest.raises(ValueError, match="layer '0' is parametrized already"):
        wnq.make_plan(model, wnq.get_method("wnq"))


def test_a_float_model_has_no_plan():
    with pytest.raises(ValueError, match=r"Sequential carries no plan: it is a float model\. Quantize it first"):
        wnq.get_plan(small())
