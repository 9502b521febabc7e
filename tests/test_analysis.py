import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wnq.analysis import (
    LayerStats,
    ModelEvidence,
    cause_of,
    checkpoint_evidence,
    checkpoint_stats,
    collect_evidence,
    layer_names,
    layer_stats,
    profile,
    stats_rows,
    weight_stats,
)
from wnq.analysis.causes import gaussian_crest, gaussian_error
from wnq.attach import freeze_, quantize_
from wnq.checkpoints import open_checkpoint
from wnq.clipping import clip_errors
from wnq.methods import get_method
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.plan import make_plan
from wnq.quantizer import Uniform
from wnq.tails import error_stats, predicted_error


def net() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 16),
        nn.Linear(16, 16),
    )
    model[5].weight = model[4].weight
    return model


def test_weight_stats_lists_what_a_plan_quantizes():
    rows = weight_stats(net())
    assert [(r.name, r.kind, r.shape) for r in rows] == [
        ("0", "Conv2d", (8, 3, 3, 3)),
        ("2", "ConvTranspose2d", (8, 4, 3, 3)),
        ("4", "Linear", (16, 16)),
    ]
    assert all(r.method is None and r.bits is None and r.relative_error is None for r in rows)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_layer_stats_measures_the_float_weight_and_what_the_layer_computes_with(granularity: str):
    model = net()
    floats = {r.name: r for r in weight_stats(model)}
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in floats}
    method = get_method("wnq", w_bits=3, granularity=granularity)
    quantize_(model, make_plan(model, method, first_last_bits=None))
    rows = layer_stats(model)
    assert [r.name for r in rows] == list(floats)
    for row in rows:
        assert (row.kind, row.method, row.bits) == (floats[row.name].kind, "wnq", 3)
        assert (row.crest, row.kurtosis) == (floats[row.name].crest, floats[row.name].kurtosis)
        w, q = weights[row.name].double(), model.get_submodule(row.name).weight.detach().double()
        assert row.relative_error == pytest.approx(((w - q).square().sum() / w.square().sum()).item(), rel=1e-9)
        if granularity == "tensor":
            assert row.law_error == pytest.approx(predicted_error(3, row.crest), rel=1e-5)


def test_layer_stats_of_a_frozen_model_finds_no_error():
    model = net()
    freeze_(quantize_(model, make_plan(model, get_method("wnq", w_bits=2))))
    assert [r.relative_error for r in layer_stats(model)] == pytest.approx([0, 0, 0], abs=1e-12)


def test_nan_weight_gives_a_row_without_error_and_json_without_nan():
    model = net()
    quantize_(model, make_plan(model, get_method("wnq", w_bits=3)))
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 0, 0, 0] = math.nan
        model[2].parametrizations.weight.original.zero_()
    evidence = collect_evidence(model, "spoilt", bins=11, summary={"accuracy": 0.1})
    rows = json.loads(json.dumps(stats_rows(evidence.stats), allow_nan=False))
    assert (rows[0]["nonfinite"], rows[0]["bits"], rows[0]["relative_error"]) == (1, 8, None)
    assert (rows[1]["crest"], rows[1]["kurtosis"], rows[1]["relative_error"], rows[1]["shape"]) == (
        None,
        None,
        None,
        [8, 4, 3, 3],
    )
    assert sum(evidence.histograms["0"].counts) == 8 * 27 - 1
    assert list(evidence.levels) == ["4"]


def test_collect_evidence_of_a_float_and_a_quantized_model():
    model = net()
    start = collect_evidence(model, "float", bins=31)
    quantize_(model, make_plan(model, get_method("wnq", w_bits=3), first_last_bits=None))
    after = collect_evidence(model, "wnq", bins=31, summary={"accuracy": 0.5})
    assert start.histograms == after.histograms
    assert (start.levels, after.summary) == ({}, {"accuracy": 0.5})
    factor = after.stats[0].rescale
    assert factor is not None
    assert after.levels["0"] == pytest.approx(
        [factor * after.stats[0].crest * c / 7 for c in range(-7, 8, 2)], rel=1e-5
    )


def rounded(values: np.ndarray, peak: np.ndarray | float, bits: int, grid: str) -> np.ndarray:
    """Round to the nearest level of a grid from -peak to peak, level by level, and clip."""
    count = 2**bits if grid == "full" else 2**bits - 1
    levels = np.linspace(-1, 1, count) * np.asarray(peak)[..., None]
    nearest = np.abs(values[..., None] - levels).argmin(-1)
    return np.take_along_axis(np.broadcast_to(levels, (*values.shape, count)), nearest[..., None], -1)[..., 0]


def relative(values: np.ndarray, quantized: np.ndarray) -> float:
    return float(((values - quantized) ** 2).sum() / (values**2).sum())


def heavy(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    return torch.from_numpy(0.05 * generator.standard_t(4, shape)).to(dtype)


@pytest.mark.parametrize("grid", ["full", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_errors_of_a_profile_equal_numpy(dtype: torch.dtype, grid: str):
    weight = heavy(6, 5, 3, 3, dtype=dtype)
    weight[2] *= 5
    values = weight.double().numpy()
    _, _, found = profile(weight, bits=(2, 3, 5), grid=grid)
    assert [(e.bits, e.rule) for e in found.errors if e.rule in ("max", "channel")] == [
        (bits, rule) for bits in (2, 3, 5) for rule in ("max", "channel")
    ]
    own = np.abs(values).reshape(6, -1).max(1)[:, None, None, None]
    for bits in (2, 3, 5):
        expected = relative(values, rounded(values, np.abs(values).max(), bits, grid))
        # Rounding to float64 in another order.
        assert found.measured(bits, "max") == pytest.approx(expected, rel=1e-9)
        expected = relative(values, rounded(values, np.broadcast_to(own, values.shape), bits, grid))
        assert found.measured(bits, "channel") == pytest.approx(expected, rel=1e-9)


def test_a_profile_agrees_with_the_clip_rules_and_the_laws():
    weight = heavy(16, 40)
    stats, _, found = profile(weight, bits=(2, 4))
    for row in clip_errors(weight, bits=(2, 4)):
        entry = found.error(row.bits, row.rule)
        assert entry is not None
        assert (entry.measured, entry.predicted) == pytest.approx((row.measured, row.predicted), rel=1e-9)
        assert entry.clip == pytest.approx(row.clip_rms, rel=1e-9)
    law = found.error(4, "max")
    assert law is not None and law.predicted == pytest.approx(predicted_error(4, stats.crest), rel=1e-9)
    peaks = weight.double().abs().amax(1)
    mean_step = (2 * peaks / 15).square().mean() / 12 / weight.double().square().mean()
    law = found.error(4, "channel")
    assert law is not None and law.predicted == pytest.approx(mean_step.item(), rel=1e-9)
    assert found.error(3, "max") is None and found.measured(3, "max") is None


@pytest.mark.parametrize("rule", ["max", "mse", "percentile", "sawb", "lsq"])
@pytest.mark.parametrize("grid", ["full", "symmetric"])
def test_entropy_is_that_of_the_codes(grid: str, rule: str):
    values = heavy(30, 30).double().numpy()
    _, _, found = profile(torch.from_numpy(values), bits=(2, 3, 8), grid=grid)
    rms = np.sqrt((values**2).mean())
    for bits in (2, 3, 8):
        entry = found.error(bits, rule)
        if entry is None:  # SAWB was published for few widths
            assert rule == "sawb"
            continue
        assert entry.clip is not None
        _, counts = np.unique(rounded(values, entry.clip * rms, bits, grid), return_counts=True)
        share = counts / counts.sum()
        assert entry.entropy == pytest.approx(-(share * np.log2(share)).sum(), rel=1e-9)


def test_entropy_counts_exact_zeros_where_the_quantizer_puts_them():
    weight = heavy(20, 20)
    weight[weight.abs() < 0.03] = 0
    weight[weight < 0] *= 0.4
    quantizer = Normalized(max_abs, Uniform(3))
    _, _, found = profile(weight, bits=(3,))
    entry = found.error(3, "max")
    assert entry is not None
    assert entry.entropy == pytest.approx(error_stats(weight, quantizer.quantize(weight)).entropy, rel=1e-12)


@pytest.mark.parametrize("shape", [(40, 30), (300, 400)])
def test_the_tail_counts_what_lies_beyond(shape: tuple[int, int]):
    weight = heavy(*shape).bfloat16()  # of which all counts are exact
    stats, _, found = profile(weight)
    sizes = np.abs(weight.double().numpy())
    assert found.tail.reach[-1] == pytest.approx(stats.crest, rel=1e-9)
    assert found.tail.share[-1] == 0
    rms = np.sqrt((sizes**2).mean())
    for reach, share in zip(found.tail.reach[:-1], found.tail.share[:-1], strict=True):
        # A reach may lie on a number, to rounding.
        low, high = ((sizes > reach * rms * (1 + slack)).mean() for slack in (1e-9, -1e-9))
        assert low - 1e-12 <= share <= high + 1e-12
    assert list(found.tail.share) == sorted(found.tail.share, reverse=True)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("chunk", [7, 64, 1 << 17])
def test_channel_errors_run_along_an_axis_and_skip_nan(axis: int, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("wnq.tails.pieces.CHUNK", chunk)
    weight = heavy(6, 9, 3)
    weight[1, 2, 0], weight[5, 0, 1] = math.nan, math.inf
    (weight[3] if axis == 0 else weight[:, 3]).zero_()
    values = weight.double().numpy()
    values = np.where(np.isfinite(values), values, 0.0)
    peak = np.abs(values).max(axis=(1, 2) if axis == 0 else (0, 2), keepdims=True)
    # A channel of zeros has no error; every other grid is scaled by its own peak.
    errors = profile(weight, axis=axis, bits=(2, 3))[2]
    for bits in (2, 3):
        quantized = rounded(values, np.broadcast_to(peak, values.shape), bits, "full")
        expected = np.where(np.isfinite(weight.numpy()), (values - quantized) ** 2, 0).sum() / (values**2).sum()
        assert errors.measured(bits, "channel") == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-290, 1e-30, 1e30, 1e290])
def test_channel_errors_survive_extreme_magnitudes(scale: float):
    weight = heavy(5, 40, dtype=torch.float64)
    expected = profile(weight, bits=(3,))[2].measured(3, "channel")
    assert profile(weight * scale, bits=(3,))[2].measured(3, "channel") == pytest.approx(expected, rel=1e-9)


def test_channels_that_stand_out_are_named_with_how_far():
    weight = torch.ones(20, 4) * torch.tensor([0.5, -0.1, 0.2, 1.0])
    weight[4] *= 8
    weight[17] *= -3.5
    weight[9] *= 3  # not beyond
    weight[11] = 0
    found = profile(weight)[2].channels
    assert (found.number, found.outlying) == (20, 2)
    assert found.listed == ((4, pytest.approx(8)), (17, pytest.approx(3.5)))
    rms = weight.square().mean().sqrt().item()
    assert found.median_peak == pytest.approx(1 / rms, rel=1e-6)


def test_a_weight_of_zeros_and_one_of_nan_have_a_profile_without_numbers():
    for weight in (torch.zeros(3, 4), torch.full((3, 4), math.nan)):
        stats, counted, found = profile(weight, bits=(2,))
        assert all(math.isnan(entry.measured) and entry.predicted is None for entry in found.errors)
        assert (found.tail.reach, found.channels.outlying) == ((), 0)
        assert found.measured(2, "max") is None
        row = LayerStats("zero", "Linear", (3, 4), 12, 0, *(math.nan,) * 5)
        cause = cause_of(row, found, 2)
        assert (cause.cause, cause.error, cause.remedy) == ("none", None, None)
        json.dumps(stats_rows([row]), allow_nan=False)
        assert sum(counted.counts) == 12 - stats.nonfinite


def flat(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).uniform(-1, 1, shape)).float()


def with_outlier() -> torch.Tensor:
    weight = flat(8, 100)
    weight[:, 0] = 8.0  # in every channel, so that no channel escapes
    return weight


@pytest.mark.parametrize(
    "weight, bits, expected",
    [
        (flat(8, 100), 4, "width"),
        (with_outlier(), 3, "tail"),
        (torch.cat([0.2 * flat(7, 100), flat(1, 100)]), 8, "channels"),
        (torch.randn(512, 512, generator=torch.Generator().manual_seed(0)), 4, "tail and channels"),
        (torch.cat([0.1 * flat(400, 10), 2 * flat(2, 10)]), 3, "channels"),
    ],
)
def test_a_cause_is_named_after_what_halves_the_error(weight: torch.Tensor, bits: int, expected: str):
    stats, _, found = profile(weight, bits=(bits,))
    row = LayerStats("layer", "Linear", tuple(weight.shape), weight.numel(), 0, stats.rms, stats.crest, 3, 0, 0)
    cause = cause_of(row, found, bits)
    plain, clip, channel = (found.measured(bits, rule) for rule in ("max", "mse", "channel"))
    assert plain is not None and clip is not None and channel is not None
    helps = {"tail": clip <= plain / 2 and 2 * channel > clip, "channels": channel <= plain / 2 and 2 * clip > channel}
    name = " and ".join(name for name, holds in helps.items() if holds) or "width"
    assert cause.cause == name == expected
    assert cause.remedied == min(plain, clip, channel)
    assert cause.remedy == ("mse" if clip < channel else "channel")
    # Law and needed crest factor are inverses.
    assert cause.needed_crest is not None
    assert predicted_error(bits, cause.needed_crest) == pytest.approx(clip, rel=1e-12)


def test_the_gaussian_crest_is_what_gaussian_weights_have():
    generator = np.random.default_rng(0)
    samples = np.abs(generator.standard_normal((400, 1000))).max(1)
    # Five standard errors of the mean of the samples.
    assert gaussian_crest(1000) == pytest.approx(samples.mean(), abs=5 * samples.std() / 20)
    assert gaussian_error(4) == pytest.approx(0.01154, rel=1e-3)  # the textbook's 20.22 dB


def saved(model: nn.Module, folder: Path, kind: str) -> Path:
    path = folder / f"model{kind}"
    state = model.state_dict()
    if kind == ".safetensors":
        save_file({name: tensor.clone() for name, tensor in state.items()}, path)
    else:
        torch.save({"epoch": 3, "models": {"model": state}}, path)
    return path


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_a_checkpoint_gives_the_evidence_of_its_model(kind: str, tmp_path: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(16, 16), nn.LayerNorm(16))
    checkpoint = open_checkpoint(saved(model, tmp_path, kind))
    steps: list[tuple[int, int]] = []
    found = checkpoint_evidence(checkpoint, "file", bits=(3,), on_step=lambda *step: steps.append(step))
    expected = collect_evidence(model, "model", bits=(3,))
    assert [(row.name, row.shape, row.crest, row.kurtosis) for row in found.stats] == [
        (row.name, row.shape, row.crest, row.kurtosis) for row in expected.stats
    ]
    assert found.profiles == expected.profiles
    assert found.histograms == expected.histograms
    assert steps == [(4 * 216, 4 * 472), (4 * 472, 4 * 472)]
    assert found.summary == {"layers": 2, "weights": 472, "bytes": 1888}
    assert [row.kind for row in found.stats] == ["float32", "float32"]
    assert layer_names(checkpoint) == layer_names(model) == ["0", "3"]
    assert checkpoint_stats(checkpoint) == found.stats


def test_names_of_tensors_stay_apart_where_the_ending_is_all_that_differs(tmp_path: Path):
    save_file({name: torch.ones(2, 2) for name in ("a", "a.weight", "b.weight", "b.bias")}, tmp_path / "m.safetensors")
    assert layer_names(open_checkpoint(tmp_path / "m.safetensors")) == ["a", "a.weight", "b"]


def test_a_checkpoint_without_weights_says_so(tmp_path: Path):
    save_file({"bias": torch.ones(3), "steps": torch.ones(2, 2, dtype=torch.int64)}, tmp_path / "m.safetensors")
    for read in (checkpoint_stats, layer_names):
        with pytest.raises(ValueError, match=r"m\.safetensors holds no weights to round: none of its 2 tensors"):
            read(open_checkpoint(tmp_path / "m.safetensors"))


def test_a_frozen_model_has_values_only_and_a_trained_one_an_error_of_its_own():
    model = net()
    quantize_(model, make_plan(model, get_method("wnq", w_bits=3)))
    trained = collect_evidence(model, "trained", bits=(3,))
    assert not trained.values_only
    assert [trained.own_error(row) for row in trained.stats] == [row.relative_error for row in trained.stats]
    assert trained.row("2") is trained.stats[1] and trained.row("no") is None
    frozen = collect_evidence(freeze_(model), "frozen", bits=(3,))
    assert frozen.values_only
    assert all(found.errors == () and found.tail.reach for found in frozen.profiles.values())
    assert [frozen.own_error(row) for row in frozen.stats] == [None] * 3


def test_an_error_beyond_one_counts_after_the_best_rescale():
    row = LayerStats("a", "Linear", (1, 1), 1, 0, 1.0, 1.0, 3.0, 0.0, 0.0, "bwn", 1, 5.0, 0.1, 0.25)
    assert ModelEvidence("m", [row]).own_error(row) == 0.25
