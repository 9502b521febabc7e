import json
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import wnq.tails
from wnq.analysis import collect_evidence, layer_stats, stats_rows, weight_stats
from wnq.attach import freeze_, quantize_
from wnq.methods import get_method
from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.plan import make_plan
from wnq.quantizer import CodebookQuantizer, Quantized, Uniform
from wnq.tails import error_stats, histogram, predicted_error, tensor_stats


def heavy(*shape: int, seed: int = 0, df: float = 4.0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(df, size=shape)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7, 3, 5, 1), (1, 1, 3), (1013,), (2, 1), (64, 33)])
def test_tensor_stats_equal_scipy(shape: tuple[int, ...], dtype: torch.dtype):
    weight = (0.02 * heavy(*shape) + 0.003).to(dtype)
    w = weight.double().numpy().ravel()
    rms = math.sqrt(np.mean(w**2))
    tail = np.abs(w) > 3 * rms
    got = tensor_stats(weight)
    assert got.parameters == w.size and got.nonfinite == 0
    assert got.peak == np.abs(w).max()
    assert got.rms == pytest.approx(rms, rel=1e-12)
    assert got.crest == pytest.approx(np.abs(w).max() / rms, rel=1e-12)
    assert got.kurtosis == pytest.approx(scipy.stats.kurtosis(w, fisher=False), rel=1e-10)
    assert got.tail_mass == tail.mean()
    assert got.outlier_energy == pytest.approx((w[tail] ** 2).sum() / (w**2).sum(), rel=1e-12)


def test_tensor_stats_do_not_depend_on_memory_order_or_chunks(monkeypatch: pytest.MonkeyPatch):
    weight = heavy(8, 6, 3, 3)
    whole = tensor_stats(weight)
    strided = tensor_stats(weight.to(memory_format=torch.channels_last))
    monkeypatch.setattr(wnq.tails, "CHUNK", 50)
    for other in (strided, tensor_stats(weight)):
        assert vars(other) == pytest.approx(vars(whole), rel=1e-12)


def test_zero_weight_has_no_crest():
    got = tensor_stats(torch.zeros(4, 3))
    assert (got.peak, got.rms, got.nonfinite) == (0, 0, 0)
    assert all(math.isnan(v) for v in (got.crest, got.kurtosis, got.tail_mass, got.outlier_energy))


@pytest.mark.parametrize("weight", [torch.full((5, 7), -0.1), torch.tensor([3.0]), torch.tensor(0.7)])
def test_constant_weight_has_crest_one_and_no_kurtosis(weight: Tensor):
    got = tensor_stats(weight)
    assert got.crest == pytest.approx(1, rel=1e-12)
    assert math.isnan(got.kurtosis)
    assert (got.tail_mass, got.outlier_energy) == (0, 0)


def test_empty_weight():
    got = tensor_stats(torch.empty(0, 3))
    assert (got.parameters, got.nonfinite, got.peak) == (0, 0, 0)
    assert math.isnan(got.crest)
    assert sum(histogram(torch.empty(0)).counts) == 0


def test_nonfinite_elements_are_counted_and_left_out():
    weight = heavy(100)
    spoilt = torch.cat([weight, torch.tensor([math.nan, math.inf, -math.inf])])
    got = tensor_stats(spoilt)
    assert (got.parameters, got.nonfinite) == (103, 3)
    assert {**vars(got), "parameters": 100, "nonfinite": 0} == vars(tensor_stats(weight))


@pytest.mark.parametrize("scale", [1e-160, 1e160])
def test_float64_statistics_survive_extreme_magnitudes(scale: float):
    weight = heavy(300).double()
    base, got = tensor_stats(weight), tensor_stats(weight * scale)
    assert (got.crest, got.kurtosis, got.tail_mass) == pytest.approx((base.crest, base.kurtosis, base.tail_mass))


def test_known_densities():
    rng = np.random.default_rng(1)
    uniform = tensor_stats(torch.from_numpy(rng.uniform(-1, 1, 400_000)))
    assert (uniform.crest, uniform.kurtosis) == pytest.approx((math.sqrt(3), 1.8), rel=0.01)
    laplace = tensor_stats(torch.from_numpy(rng.laplace(size=400_000)))
    assert laplace.tail_mass == pytest.approx(math.exp(-3 * math.sqrt(2)), rel=0.05)


@pytest.mark.parametrize("grid, bits", [("full", 1), ("full", 2), ("full", 4), ("symmetric", 3), ("symmetric", 8)])
def test_law_equals_monte_carlo_on_a_uniform_density(grid: str, bits: int):
    uniform = torch.rand(1_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1
    error = error_stats(uniform, Normalized(max_abs, Uniform(bits, grid)).quantize(uniform))
    law = predicted_error(bits, tensor_stats(uniform).crest, grid)
    assert error.relative_error == pytest.approx(law, rel=0.01)
    assert error.law_error == pytest.approx(law, rel=1e-6)


def test_law_of_a_long_tail_holds_once_steps_are_fine():
    weight = heavy(200_000)
    error = error_stats(weight, Normalized(max_abs, Uniform(8)).quantize(weight))
    assert error.relative_error == pytest.approx(error.law_error, rel=0.1)


@pytest.mark.parametrize("bits, grid, match", [(1, "symmetric", "2 to 8"), (9, "full", "1 to 8"), (3, "ful", "grid")])
def test_predicted_error_refuses(bits: int, grid: str, match: str):
    with pytest.raises(ValueError, match=match):
        predicted_error(bits, 3.0, grid)


@pytest.mark.parametrize("granularity, axis", [("tensor", 0), ("channel", 0), ("channel", 1)])
def test_error_stats_equal_numpy(granularity: str, axis: int, monkeypatch: pytest.MonkeyPatch):
    weight = heavy(6, 5, 3, 3) * torch.linspace(0.1, 2, 6)[:, None, None, None]
    dims = [d for d in range(4) if d != axis]
    peak = weight.abs().amax(dims) if granularity == "channel" else weight.abs().max()
    shaped = peak.reshape([-1 if d == axis else 1 for d in range(4)]) if granularity == "channel" else peak
    codes = (weight / shaped * 3).round() + 3
    quantized = Quantized(codes.to(torch.uint8), torch.arange(-3.0, 4.0), peak / 3, axis)
    w = weight.double().numpy()
    step = (peak / 3).double().numpy()
    q = (codes.double().numpy() - 3) * (shaped / 3).double().numpy()
    counts = np.unique(codes.numpy(), return_counts=True)[1]
    for chunk in (wnq.tails.CHUNK, 40):
        monkeypatch.setattr(wnq.tails, "CHUNK", chunk)
        got = error_stats(weight, quantized)
        assert got.relative_error == pytest.approx(((w - q) ** 2).sum() / (w**2).sum(), rel=1e-6)
        assert got.rescale == pytest.approx((w * q).sum() / (q**2).sum(), rel=1e-6)
        fitted = ((w - got.rescale * q) ** 2).sum() / (w**2).sum()
        assert got.rescaled_error == pytest.approx(fitted, rel=1e-6)
        assert got.law_error == pytest.approx(np.mean(step**2) / 12 / np.mean(w**2), rel=1e-6)
        assert got.zeros == (q == 0).mean()
        assert got.entropy == pytest.approx(scipy.stats.entropy(counts, base=2), rel=1e-12)
        assert got.levels_used == len(counts)


def test_uneven_codebook_has_no_law_but_an_error():
    weight = heavy(50, 4)
    got = error_stats(
        weight, CodebookQuantizer(torch.tensor([-4.0, -1.0, 0.0, 1.0]), torch.tensor(0.7), 2).quantize(weight)
    )
    assert got.law_error is None
    assert 0 < got.relative_error < 1


def test_rescaled_error_ignores_the_scale():
    weight = heavy(1000)
    kept = error_stats(weight, Normalized(max_abs, Uniform(3)).quantize(weight))
    one = error_stats(weight, Normalized(max_abs, Uniform(3), scale="one").quantize(weight))
    assert one.rescaled_error == pytest.approx(kept.rescaled_error, rel=1e-5)
    assert kept.rescaled_error <= kept.relative_error


def test_zero_weight_has_no_relative_error():
    weight = torch.zeros(3, 3)
    got = error_stats(weight, Normalized(max_abs, Uniform(3, "symmetric")).quantize(weight))
    assert (got.zeros, got.entropy, got.levels_used) == (1, 0, 1)
    assert all(math.isnan(v) for v in (got.relative_error, got.rescale, got.rescaled_error, got.law_error or 0.0))


def test_error_stats_refuses_another_shape():
    quantized = Normalized(max_abs, Uniform(3)).quantize(heavy(4, 3))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(4, 3\)"):
        error_stats(heavy(3, 4), quantized)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_subnormal=False), max_size=60),
    st.integers(1, 50),
    st.none() | st.floats(0.1, 10),
)
def test_histogram_counts_every_finite_element(values: list[float], bins: int, limit: float | None):
    got = histogram(torch.tensor(values), bins, limit=limit)
    assert sum(got.counts) == sum(map(math.isfinite, values))
    assert len(got.edges) == bins + 1 == len(got.counts) + 1
    assert list(got.edges) == sorted(got.edges)


def test_histogram_equals_numpy():
    weight = heavy(5000)
    got = histogram(weight, 61)
    w = weight.double().numpy()
    expected, _ = np.histogram(w / math.sqrt(np.mean(w**2)), np.array(got.edges))
    assert list(got.counts) == expected.tolist()
    width = got.edges[1] - got.edges[0]
    assert sum(got.density()) * width == pytest.approx(1)


@pytest.mark.parametrize("bins, limit", [(0, None), (5, 0.0), (5, math.inf)])
def test_histogram_refuses(bins: int, limit: float | None):
    with pytest.raises(ValueError, match="bins >= 1"):
        histogram(torch.ones(3), bins, limit=limit)


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
