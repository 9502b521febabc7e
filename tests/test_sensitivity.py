"""Sensitivity against weights that NumPy quantized, put into a copy of the network, and statistics by hand."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.sensitivity import (
    Change,
    Prober,
    Row,
    Settings,
    load_sensitivity,
    measure_sensitivity,
    paired,
    quantizable_layers,
    quantized_weight,
    save_sensitivity,
)
from wnq.sensitivity.summary import sentences, together_rows, width_rows, with_error


def quantized_by_numpy(w, bits, clip, grid):
    """``clip * Q(clamp(w / clip))`` in float32, as the definition in the docs says it."""
    m = np.float32(clip)
    if not m > 0:
        return np.zeros_like(w)
    u = np.clip(w / m, np.float32(-1), np.float32(1))
    if bits == 1:
        return np.where(u >= 0, m, -m)
    if grid == "full":
        top = 2**bits - 1
        code = np.clip(np.floor(u * np.float32(top / 2) + np.float32(2 ** (bits - 1))), 0, top)
        return (2 * code - top) * (m / np.float32(top))
    top = 2 ** (bits - 1) - 1
    return np.round(u * np.float32(top)) * (m / np.float32(top))


def by_channel(w, axis, function):
    return np.stack([function(row) for row in np.moveaxis(w, axis, 0)], axis=axis)


def seeded_weight(shape, seed=0):
    # A tail: Student-t, so that the clip matters.
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator)
    return normal / torch.randn((4, *shape), generator=generator).square().mean(0).sqrt()


GRIDS = [(bits, grid) for grid in ("full", "symmetric") for bits in (1, 2, 3, 4, 8) if bits > 1 or grid == "full"]


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_max_scaling_is_numpys(bits, grid):
    weight = seeded_weight((6, 5, 3))
    w = weight.numpy()
    found = quantized_weight(weight, bits, "max", grid=grid, granularity="tensor", axis=0)
    assert np.array_equal(found.numpy(), quantized_by_numpy(w, bits, np.abs(w).max(), grid))
    for axis in (0, 1):
        found = quantized_weight(weight, bits, "max", grid=grid, granularity="channel", axis=axis)
        expected = by_channel(w, axis, lambda row: quantized_by_numpy(row, bits, np.abs(row).max(), grid))
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize(("bits", "grid"), GRIDS)
def test_the_clip_is_the_best_of_a_fine_scan(bits, grid):
    weight = seeded_weight((5, 24))
    w = weight.numpy()

    def least(row):
        clips = np.linspace(0.02, 1, 300) * np.abs(row).max()
        return min(np.square(row - quantized_by_numpy(row, bits, clip, grid), dtype=np.float64).sum() for clip in clips)

    def error(values):
        return np.square(w - values.numpy(), dtype=np.float64)

    found = quantized_weight(weight, bits, "clip", grid=grid, granularity="tensor", axis=0)
    # Ours is the best clip there is, but for the float32 rounding of the values.
    assert error(found).sum() <= least(w) * (1 + 1e-5)
    for axis in (0, 1):
        found = quantized_weight(weight, bits, "clip", grid=grid, granularity="channel", axis=axis)
        ours = np.moveaxis(error(found), axis, 0).reshape(w.shape[axis], -1).sum(1)
        for row, mine in zip(np.moveaxis(w, axis, 0), ours, strict=True):
            assert mine <= least(row) * (1 + 1e-5)


@pytest.mark.parametrize("variant", ["max", "clip"])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_zeros_stay_zeros_and_type_and_memory_are_kept(variant, granularity):
    weight = torch.zeros(3, 4, dtype=torch.float64)
    weight[1] = torch.tensor([1.0, -2.0, 3.0, 0.5])
    found = quantized_weight(weight, 3, variant, grid="symmetric", granularity=granularity, axis=0)
    assert found.dtype == torch.float64 and found.shape == weight.shape and torch.isfinite(found).all()
    assert not found[0].any() and not found[2].any() and found[1].any()


class Net(nn.Module):
    """Convolution, BatchNorm, transposed convolution, dropout, linear: channel axes 0, 1 and 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3 * 8 * 8, 5)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.head(self.drop(self.up(x).relu()).flatten(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        for layer in (net.first, net.up, net.head):
            layer.weight.copy_(seeded_weight(tuple(layer.weight.shape)) * layer.weight.std())
        net.train()(torch.randn(64, 1, 4, 4))
    return net


def batches(count=3, size=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 1, 4, 4, generator=generator), torch.randint(5, (size,), generator=generator))
        for _ in range(count)
    ]


AXIS = {"first": 0, "up": 1, "head": 0}


def with_numpy_weights(net, names, bits, settings, variant="max"):
    """Return a copy of the network whose weights NumPy quantized; the clips, which a test above checks, are read off ours."""
    net = copy.deepcopy(net)
    for name in names:
        weight = net.get_submodule(name).weight.data
        if variant == "clip":
            values = quantized_weight(
                weight, bits, "clip", grid=settings.grid, granularity=settings.granularity, axis=AXIS[name]
            )
            weight.copy_(values)
            continue
        w = weight.numpy().copy()
        values = (
            quantized_by_numpy(w, bits, np.abs(w).max(), settings.grid)
            if settings.granularity == "tensor"
            else by_channel(w, AXIS[name], lambda row: quantized_by_numpy(row, bits, np.abs(row).max(), settings.grid))
        )
        weight.copy_(torch.from_numpy(values))
    return net


@torch.no_grad()
def losses_of(net, data):
    net.eval()
    losses = [F.cross_entropy(net(x), y, reduction="none").numpy().astype(np.float64) for x, y in data]
    right = [(net(x).argmax(1) == y).numpy() for x, y in data]
    return np.concatenate(losses), np.concatenate(right)


def check(change, ours, reference):
    (losses, right), (base, base_right) = ours, reference
    difference, points = losses - base, 100.0 * right - 100.0 * base_right
    count = len(losses)
    # Means and deviations of the same numbers, summed in another order.
    assert change.loss == pytest.approx(losses.mean(), rel=1e-12)
    assert change.loss_change == pytest.approx(difference.mean(), rel=1e-9, abs=1e-15)
    assert change.loss_error == pytest.approx(difference.std(ddof=1) / math.sqrt(count), rel=1e-9)
    assert change.accuracy == pytest.approx(100 * right.mean(), rel=1e-12)
    assert change.accuracy_change == pytest.approx(points.mean(), rel=1e-12)
    assert change.accuracy_error == pytest.approx(points.std(ddof=1) / math.sqrt(count), rel=1e-9)
    assert change.nonfinite == 0


@pytest.mark.parametrize(("grid", "granularity"), [("full", "tensor"), ("symmetric", "channel")])
def test_every_row_is_what_a_copy_with_numpys_weights_gives(net, grid, granularity):
    data, names = batches(), ["first", "up", "head"]
    settings = Settings(bits=(2, 4), grid=grid, granularity=granularity, leave_out=True)
    found = measure_sensitivity(Prober(net, data, settings))
    assert [layer.name for layer in found.layers] == names and found.samples == 21 and found.complete
    base = losses_of(net, data)
    assert found.loss == pytest.approx(base[0].mean(), rel=1e-12) and found.accuracy == 100 * base[1].mean()
    assert len(found.rows) == 2 * (3 + 1 + 3)
    for row in found.rows:
        quantized = {"alone": [row.layer], "all": names, "others": [name for name in names if name != row.layer]}
        outcomes = {}
        for variant in ("max", "clip"):
            outcomes[variant] = losses_of(
                with_numpy_weights(net, quantized[row.scope], row.bits, settings, variant), data
            )
            reference = base
            if row.scope == "others":
                reference = losses_of(with_numpy_weights(net, names, row.bits, settings, variant), data)
            check(getattr(row, variant), outcomes[variant], reference)
        gap = outcomes["max"][0] - outcomes["clip"][0]
        assert row.gap == pytest.approx(gap.mean(), rel=1e-9)
        assert row.gap_error == pytest.approx(gap.std(ddof=1) / math.sqrt(21), rel=1e-9)
        if row.scope == "alone":
            w = net.get_submodule(row.layer).weight.detach().numpy().astype(np.float64)
            q = (
                with_numpy_weights(net, [row.layer], row.bits, settings)
                .get_submodule(row.layer)
                .weight.detach()
                .numpy()
            )
            assert row.weight_error == pytest.approx(np.square(w - q).sum() / np.square(w).sum(), rel=1e-9)
            assert row.clip_weight_error <= row.weight_error
        else:
            assert row.weight_error is None and row.clip_weight_error is None


def test_the_model_is_only_read(net):
    net.head.eval()
    before, modes = copy.deepcopy(net.state_dict()), [module.training for module in net.modules()]
    measure_sensitivity(Prober(net, batches(), Settings(bits=(2,), inputs=True, leave_out=True)))

    def broken(*_):
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        Prober(net, batches(), Settings(inputs=True), loss=broken)
    assert [module.training for module in net.modules()] == modes
    assert net.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(module._forward_pre_hooks for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_inputs_are_quantized_as_training_starts_them(net):
    data = batches()
    for bits in (2, 4):
        prober = Prober(net, data, Settings(bits=(bits,), inputs=True))
        found = prober.run(dict.fromkeys(AXIS, (bits, "max")))
        method = wnq.get_method("wnq", w_bits=bits, a_bits=bits)
        model = copy.deepcopy(net).eval()
        wnq.quantize_(model, wnq.make_plan(model, method, first_last_bits=None))
        wnq.calibrate_(model, data[0][0])
        assert np.array_equal(found.losses.numpy(), losses_of(model, data)[0])


class Tied(nn.Module):
    """Token embedding shared with the head, and once more a whole layer used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.again = self.mix
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        return self.head(self.again(self.mix(self.embed(tokens)).relu()))


def sequence_loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)


def test_tied_weights_are_quantized_together():
    torch.manual_seed(3)
    net = Tied()
    tokens = torch.randint(11, (9, 5))
    prober = Prober(net, [(tokens, tokens.roll(-1, 1))], Settings(bits=(2,)), loss=sequence_loss)
    assert [(layer.name, layer.tied) for layer in prober.layers] == [("embed", ("head",)), ("mix", ())]
    for name in ("embed", "mix"):
        expected = copy.deepcopy(net)
        weight = expected.get_submodule(name).weight
        w = weight.detach().numpy()
        weight.data.copy_(torch.from_numpy(quantized_by_numpy(w, 2, np.abs(w).max(), "full")))
        with torch.no_grad():
            losses = sequence_loss(expected(tokens), tokens.roll(-1, 1)).double()
        assert torch.equal(prober.run({name: (2, "max")}).losses, losses)
    assert net.head.weight is net.embed.weight


def test_inputs_that_are_indices_stay():
    torch.manual_seed(3)
    net, tokens = Tied(), torch.randint(11, (9, 5))
    prober = Prober(net, [(tokens, tokens)], Settings(bits=(2,), inputs=True), loss=sequence_loss)
    found = measure_sensitivity(prober)
    assert all(math.isfinite(row.max.loss_change) and row.max.accuracy is None for row in found.rows)


def test_inputs_come_as_tensor_tuple_or_mapping(net):
    given = batches()
    plain = Prober(net, given).run({"up": (2, "max")}).losses
    positional = Prober(net, [((x,), y) for x, y in given]).run({"up": (2, "max")}).losses
    named = Prober(net, [({"x": x}, y) for x, y in given]).run({"up": (2, "max")}).losses
    assert torch.equal(plain, positional) and torch.equal(plain, named)


def test_one_loss_a_batch_makes_the_batch_the_unit(net):
    found = measure_sensitivity(Prober(net, batches(count=4), Settings(bits=(2,)), loss=F.cross_entropy))
    assert found.samples == 4 and found.accuracy is None
    ours = [F.cross_entropy(with_numpy_weights(net, ["up"], 2, Settings()).eval()(x), y) for x, y in batches(count=4)]
    base = [F.cross_entropy(net.eval()(x), y) for x, y in batches(count=4)]
    difference = np.array([a.item() - b.item() for a, b in zip(ours, base, strict=True)])
    change = found.row("alone", "up", 2).max
    assert change.loss_change == pytest.approx(difference.mean(), rel=1e-6)  # float32 losses
    assert change.loss_error == pytest.approx(difference.std(ddof=1) / 2, rel=1e-6)
    single = measure_sensitivity(Prober(net, batches(count=1), Settings(bits=(2,)), loss=F.cross_entropy))
    row = single.row("alone", "up", 2)
    assert math.isnan(row.max.loss_error) and row.tail == "unclear" and not row.hurts


def test_a_loss_that_breaks_is_counted_and_never_averaged(net, tmp_path, caplog):
    data = batches()
    with torch.no_grad():
        highest = max(net.eval()(x).max().item() for x, _ in data)

    def fragile(outputs, labels):
        losses = F.cross_entropy(outputs, labels, reduction="none")
        return torch.where(outputs.amax(1) > highest, math.nan, losses)

    found = measure_sensitivity(Prober(net, data, Settings(bits=(1,)), loss=fragile), tmp_path / "s.json")
    row = found.row("alone", "head", 1)
    values = with_numpy_weights(net, ["head"], 1, Settings()).eval()
    with torch.no_grad():
        bad = sum(int((values(x).amax(1) > highest).sum()) for x, _ in data)
    assert row.max.nonfinite == bad > 0
    assert math.isnan(row.max.loss_change) and math.isnan(row.max.loss) and math.isnan(row.gap) and row.hurts
    assert f"is NaN or infinite on {bad} samples" in caplog.text
    assert json.loads((tmp_path / "s.json").read_text())["rows"][2]["max"]["loss"] is None
    again = load_sensitivity(tmp_path / "s.json")
    assert [repr(row) for row in again.rows] == [repr(row) for row in found.rows]  # NaN differs from itself


def row_of(gap, error, loss=1.0, maximum=0.0, clip=0.0):
    return Row(
        "alone", "a", 2, Change(loss + maximum, maximum, 0.01, 0), Change(loss + clip, clip, 0.01, 0), gap, error
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (row_of(0.21, 0.1), "pays"),
        (row_of(0.2, 0.1), "unclear"),
        (row_of(-0.21, 0.1), "costs"),
        (row_of(0.0009, 1e-6), "unclear"),  # certain, but less than a thousandth of the loss
        (row_of(0.0011, 1e-6), "pays"),
        (row_of(0.00009, 1e-6, loss=0.001), "unclear"),  # a loss below 0.1 counts as 0.1
        (row_of(0.00011, 1e-6, loss=0.001), "pays"),
        (row_of(0.1, math.nan), "unclear"),
        (row_of(math.nan, math.nan, maximum=math.nan), "pays"),
        (row_of(math.nan, math.nan, clip=math.nan), "costs"),
        (row_of(math.nan, math.nan, maximum=math.nan, clip=math.nan), "unclear"),
    ],
)
def test_where_removing_the_tail_pays(row, expected):
    assert row.tail == expected


def test_paired_errors_by_hand():
    assert paired(torch.tensor([3.0, 5.0, 7.0]), torch.tensor([1.0, 1.0, 1.0])) == (4.0, 2 / math.sqrt(3))
    mean, error = paired(torch.tensor([3.0]), torch.tensor([1.0]))
    assert mean == 2 and math.isnan(error)
    assert all(math.isnan(x) for x in paired(torch.tensor([1.0, math.inf]), torch.tensor([1.0, 1.0])))


def test_a_nan_logit_is_never_right():
    labels = torch.tensor([0, 1])
    outputs = torch.tensor([[math.nan, 1.0], [0.0, 1.0]])
    assert wnq.sensitivity.largest_is_label(outputs, labels).tolist() == [False, True]


def test_mistakes_are_said(net, tmp_path):
    with pytest.raises(ValueError, match="there are no batches"):
        Prober(net, [])
    with pytest.raises(ValueError, match=r"'hed' matches no layer .* Did you mean 'head'\? 3 layers: first, up, head"):
        Prober(net, batches(), Settings(layers=("hed",)))
    with pytest.raises(ValueError, match="one loss a sample"):
        Prober(net, batches(), loss=lambda outputs, _: outputs)
    with pytest.raises(ValueError, match="own loss is NaN or infinite on 21 of 21 samples"):
        Prober(net, batches(), loss=lambda outputs, _: outputs.sum(1) * math.nan)
    quantized = wnq.quantize_(copy.deepcopy(net), wnq.make_plan(net, wnq.get_method("wnq")))
    with pytest.raises(ValueError, match="parametrized already"):
        Prober(quantized, batches())
    for options, words in (
        ({"bits": ()}, "different widths, got none"),
        ({"bits": (2, 2)}, "different widths"),
        ({"bits": (9,)}, "from 1 to 8"),
        ({"bits": (1,), "grid": "symmetric"}, "from 2 to 8"),
        ({"granularity": "layer"}, "granularity must be"),
    ):
        with pytest.raises(ValueError, match=words):
            Settings(**options)
    with torch.no_grad():
        net.up.weight[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 'up' holds 1 NaN"):
        Prober(net, batches())


def test_layers_are_chosen_by_pattern(net):
    assert [layer.name for layer in quantizable_layers(net, ("h*", "up"))] == ["up", "head"]
    found = measure_sensitivity(Prober(net, batches(), Settings(bits=(3,), layers=("up",), leave_out=True)))
    assert [row.key for row in found.rows] == [("alone", "up", 3), ("all", "", 3), ("others", "up", 3)]
    assert found.row("others", "up", 3).max.loss == pytest.approx(found.loss, rel=1e-12)


def test_a_model_that_is_one_layer():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    data = [(torch.randn(8, 6), torch.arange(8) % 5)]
    found = measure_sensitivity(Prober(layer, data, Settings(bits=(2,))))
    assert [row.key for row in found.rows] == [("alone", "", 2)] and found.rows[0].max.loss_change != 0


class StopError(Exception):
    """Pulled the plug."""


def test_a_stopped_measurement_goes_on_row_by_row(net, tmp_path):
    settings, out = Settings(bits=(4, 2), leave_out=True), tmp_path / "s.json"
    whole = measure_sensitivity(Prober(net, batches(), settings), about={"data": "random"})

    def stop_at(count):
        def on_row(_, done, total):
            assert total == 14
            if done == count:
                raise StopError

        return on_row

    for count in (2, 9):  # in the middle of single layers, and of a width's others
        with pytest.raises(StopError):
            measure_sensitivity(Prober(net, batches(), settings), out, about={"data": "random"}, on_row=stop_at(count))
        part = load_sensitivity(out)
        assert part.rows == whole.rows[:count] and not part.complete
    measured = []
    found = measure_sensitivity(
        Prober(net, batches(), settings), out, about={"data": "random"}, on_row=lambda row, *_: measured.append(row)
    )
    assert tuple(measured) == whole.rows[9:]
    assert found == whole == load_sensitivity(out)
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_more_widths_are_added_to_a_file(net, tmp_path):
    out = tmp_path / "s.json"
    measure_sensitivity(Prober(net, batches(), Settings(bits=(4,))), out)
    measured = []
    found = measure_sensitivity(
        Prober(net, batches(), Settings(bits=(2,), leave_out=True)),
        out,
        on_row=lambda row, *_: measured.append(row.key),
    )
    assert found.settings.bits == (2, 4) and found.complete and len(found.rows) == 14
    assert ("alone", "up", 4) not in measured and len(measured) == 11


def test_a_file_of_other_measurements_is_refused(net, tmp_path):
    out = tmp_path / "s.json"
    settings = Settings(bits=(2,))
    measure_sensitivity(Prober(net, batches(), settings), out)
    text = out.read_bytes()
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.norm.running_mean[0] += 1
    for prober, word in (
        (Prober(other, batches(), settings), "weights"),
        (Prober(net, batches(seed=2), settings), "data"),
        (Prober(net, batches(size=8), settings), "data"),
        (Prober(net, batches(), settings, loss=F.cross_entropy), "loss"),
        (Prober(net, batches(), dataclasses.replace(settings, granularity="channel")), "granularity"),
        (Prober(net, batches(), dataclasses.replace(settings, grid="symmetric", inputs=True)), "grid, inputs"),
        (Prober(net, batches(), dataclasses.replace(settings, layers=("up",))), "layers"),
    ):
        with pytest.raises(ValueError, match=rf"s.json holds measurements with other {word}\. Choose another file"):
            measure_sensitivity(prober, out)
    assert out.read_bytes() == text


def test_damaged_files_are_refused(net, tmp_path):
    found = measure_sensitivity(Prober(net, batches(), Settings(bits=(2,))))
    path = tmp_path / "s.json"
    save_sensitivity(found, path)
    good = json.loads(path.read_text())
    for content, words in (
        ("", "cannot read the measurements"),
        ("[]", "not measurements"),
        (json.dumps({**good, "format": "plan"}), "not measurements"),
        (json.dumps({**good, "version": 2}), "version 2; this wnq reads version 1"),
        (json.dumps({key: value for key, value in good.items() if key != "layers"}), "damaged: KeyError 'layers'"),
        (json.dumps({**good, "rows": [{**good["rows"][0], "scope": "alike"}]}), "damaged"),
        (json.dumps({**good, "rows": [good["rows"][0]] * 2}), "a row is there twice"),
        (json.dumps({**good, "rows": [{**good["rows"][0], "layer": "tail"}]}), "belongs to no layer"),
        (json.dumps({**good, "settings": {**good["settings"], "bits": [9]}}), "from 1 to 8"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words) as error:
            load_sensitivity(path)
        assert str(path) in str(error.value)
    with pytest.raises(ValueError, match="No such file"):
        load_sensitivity(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.18712, 0.01263, "+0.187 ± 0.013"),
        (-443.82, 11.8, "-444 ± 12"),
        (0.0000087, 0.000002, "+0.0000 ± 0.0000"),
        (1.5, 0.0, "+1.5000 ± 0.0000"),
        (1.5, math.nan, "+1.5000"),
        (math.nan, math.nan, "–"),
        (None, None, "–"),
    ],
)
def test_numbers_with_their_error(value, error, text):
    assert with_error(value, error) == text


def test_tables_are_sorted_by_harm_and_sentences_say_it(net):
    found = measure_sensitivity(Prober(net, batches(size=200), Settings(bits=(1, 8), leave_out=True)))
    order = sorted(AXIS, key=lambda name: -found.row("alone", name, 1).max.loss_change)
    rows = width_rows(found, 1)
    assert [row["layer"] for row in rows] == order
    assert [row["weights"] for row in rows] == [net.get_submodule(name).weight.numel() for name in order]
    for row in rows:
        tail, cell = found.row("alone", row["layer"], 1).tail, row["removing the tail saves"]
        assert cell.endswith(" *") == (tail != "unclear") and cell.startswith("-") <= (tail != "pays")
    gains = sorted(AXIS, key=lambda name: found.row("others", name, 1).max.loss_change)
    assert [row["layer left float"] for row in together_rows(found, 1)] == ["none", *gains]
    assert together_rows(dataclasses.replace(found, rows=found.rows[:6]), 1) == []
    worst = found.row("alone", order[0], 1).max
    first, last = sentences(found)
    assert first.startswith(f"1 bit: {order[0]!r} hurts most ({with_error(worst.loss_change, worst.loss_error)})")
    assert last.startswith("8 bits: 600 samples show no harm in any layer. Removing the tail would pay nowhere")
