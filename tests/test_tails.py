import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wnq.normalized import Normalized
from wnq.normalizers import max_abs
from wnq.quantizer import CodebookQuantizer, Quantized, Uniform
from wnq.tails import channel_stats, describe, error_stats, histogram, pieces, predicted_error, tensor_stats
from wnq.tails import channels as channels_module
from wnq.tails import errors as errors_module
from wnq.tails.bins import Bins
from wnq.tails.device import moments_on_device, spread_on_device
from wnq.tails.flat import Flat


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
    monkeypatch.setattr(pieces, "CHUNK", 50)
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
    assert (got.parameters, got.nonfinite, got.nan, got.infinite) == (103, 3, 1, 2)
    assert {**vars(got), "parameters": 100, "nonfinite": 0, "nan": 0, "infinite": 0} == vars(tensor_stats(weight))


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
    for chunk in (pieces.CHUNK, 40):
        monkeypatch.setattr(pieces, "CHUNK", chunk)
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


@pytest.mark.parametrize("number", [1, 2, 3, 61, 400, 65_536, 65_537])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("half", [1.0, 0.37, 1e-25, 3e25])
def test_what_lies_next_to_an_edge_is_counted_on_its_side(number: int, dtype: Any, half: float):
    bins = Bins(half, number)
    edges = bins.edges()
    chosen = edges[:: max(1, number // 500)]
    rng = np.random.default_rng(0)
    values = [chosen.astype(dtype), rng.uniform(-1.2 * half, 1.2 * half, 3000).astype(dtype), np.zeros(1, dtype)]
    for way in (-np.inf, np.inf):
        near = chosen.astype(dtype)
        for _ in range(3):
            near = np.nextafter(near, dtype(way))
            values.append(near)
    x = np.concatenate(values)
    expected = np.bincount(np.searchsorted(edges[1:-1], x.astype(np.float64), side="right"), minlength=number)
    assert bins.counter(np.dtype(dtype))(x, pieces.Room()).tolist() == expected.tolist()


@pytest.mark.parametrize("bins, limit", [(0, None), (5, 0.0), (5, math.inf), (5, 1e-320)])
def test_histogram_refuses(bins: int, limit: float | None):
    with pytest.raises(ValueError, match="bins >= 1"):
        histogram(torch.ones(3), bins, limit=limit)


# The same numbers by plain NumPy in float64, in units of the peak.
def array(weight: Tensor) -> np.ndarray[Any, Any]:
    # torch makes no float64 of exponents.
    return (weight.detach().float() if weight.element_size() == 1 else weight.detach()).double().resolve_neg().numpy()


def reference(weight: Tensor) -> dict[str, float]:
    w = array(weight).ravel()
    finite = w[np.isfinite(w)]
    peak = np.abs(finite).max()
    u = finite / peak
    rms = np.sqrt(np.mean(u**2))
    tail = np.abs(u) > 3 * rms
    return {
        "parameters": w.size,
        "nonfinite": w.size - finite.size,
        "nan": int(np.isnan(w).sum()),
        "infinite": int(np.isinf(w).sum()),
        "peak": peak,
        "rms": rms * peak,
        "crest": 1 / rms,
        "kurtosis": scipy.stats.kurtosis(u, fisher=False),
        "tail_mass": tail.mean(),
        "outlier_energy": (u[tail] ** 2).sum() / (u**2).sum(),
    }


def spoilt(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[::7], weight[3::50], weight[4::90] = math.nan, math.inf, -math.inf
    return weight


ODD: dict[str, Callable[[], Tensor]] = {
    "transposed": lambda: heavy(40, 30).t(),
    "every third": lambda: heavy(3000)[::3],
    "negative step by flip": lambda: heavy(20, 30).flip(1),
    "expanded": lambda: heavy(30, 1).expand(30, 9),
    "channels last": lambda: heavy(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "unaligned view": lambda: heavy(1001)[1:],
    "parameter": lambda: torch.nn.Parameter(heavy(50, 20)),
    "subnormal": lambda: heavy(500) * 1e-40,
    "huge": lambda: (heavy(500) / heavy(500).abs().max()) * 3e38,
    "huge beside subnormal": lambda: torch.cat([heavy(300) * 1e-41, heavy(300) * 1e36]),
    "large mean": lambda: heavy(2000) + 1e4,
    "mean that drifts": lambda: heavy(2000) + torch.linspace(-1e3, 1e3, 2000),
    "one outlier": lambda: torch.cat([heavy(999, df=30), torch.tensor([1e4])]),
    "spoilt": lambda: spoilt(heavy(2000)),
    "spoilt float64": lambda: spoilt(heavy(2000)).double() * 1e200,
    "spoilt half": lambda: spoilt(heavy(2000)).half(),
    "spoilt bfloat16": lambda: spoilt(heavy(2000)).bfloat16(),
    "float64 near the end": lambda: heavy(700).double() * 1e306,
    "float64 near zero": lambda: heavy(700).double() * 1e-300,
    "float8": lambda: (heavy(999) * 8).to(torch.float8_e4m3fn),
    "float8, spoilt": lambda: torch.cat([heavy(999), torch.tensor([math.nan, math.inf, -math.inf])]).to(
        torch.float8_e5m2
    ),
    "float8 of exponents only": lambda: heavy(999).abs().add(0.1).to(torch.float8_e8m0fnu),
    "negative view": lambda: torch.complex(heavy(99), heavy(99, seed=1)).conj().imag,
    "nearly constant": lambda: torch.cat([torch.ones(3000), torch.tensor([1 + 2.0**-23])]),
    "one that is not zero": lambda: torch.cat([torch.zeros(3000), torch.tensor([1e-45])]),
    "even": lambda: heavy(500, 4).round(),
    "integers": lambda: (heavy(999) * 10).int(),
    "half": lambda: heavy(999).half() / 100,
}


@pytest.mark.parametrize("chunk", [1 << 17, 64])
@pytest.mark.parametrize("name", ODD)
def test_statistics_equal_numpy_on_odd_tensors(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "CHUNK", chunk)
    weight = ODD[name]()
    before = weight.clone()
    got = tensor_stats(weight)
    # SciPy itself is off by 2e-9 where the numbers are nearly equal.
    assert asdict(got) == pytest.approx(reference(weight), rel=1e-8, abs=0)
    assert asdict(got)["tail_mass"] == reference(weight)["tail_mass"]
    stats, counted = describe(weight, 37)
    assert (stats, counted) == (got, histogram(weight, 37))
    assert sum(counted.counts) == got.parameters - got.nonfinite
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    after, before = (w.detach().resolve_neg().view(bits) for w in (weight, before))
    assert torch.equal(after, before), "the weight was changed"


@pytest.mark.parametrize("name", ODD)
def test_histogram_counts_as_a_search_of_the_edges_does(name: str):
    weight = ODD[name]()
    w = array(weight).ravel()
    w = w[np.isfinite(w)]
    w = w / np.abs(w).max()
    for bins, limit in [(None, None), (1, None), (8, None), (401, 3.0), (100, 0.5), (70_001, None)]:
        got = histogram(weight, bins, limit=limit)
        edges = np.array(got.edges) * np.sqrt(np.mean(w**2))
        # Values may lie on an edge up to rounding, so moving every edge by 1e-12 must enclose the counts.
        cumulated = np.cumsum(got.counts)[:-1]
        low = np.array([(w < edge - 1e-12).sum() for edge in edges[1:-1][:500]], dtype=int)
        high = np.array([(w < edge + 1e-12).sum() for edge in edges[1:-1][:500]], dtype=int)
        assert (low <= cumulated[:500]).all() and (cumulated[:500] <= high).all()
        assert sum(got.counts) == w.size


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(-9, 9), min_size=1, max_size=60).filter(any), st.sampled_from([1.0, 0.1, 1e-38, 3e30]))
def test_the_tail_is_counted_exactly(integers: list[int], unit: float):
    weight = torch.tensor(integers, dtype=torch.float32) * torch.tensor(2.0) ** round(math.log2(unit))
    square = sum(i * i for i in integers)
    beyond = [i for i in integers if i * i * len(integers) > 9 * square]
    got = tensor_stats(weight)
    assert got.tail_mass == len(beyond) / len(integers)
    assert got.outlier_energy == pytest.approx(sum(i * i for i in beyond) / square, rel=1e-12)


def test_a_magnitude_of_exactly_three_rms_is_not_beyond():
    for value in (0.1, 0.3, 0.7, 1e-3, 123.4):
        weight = torch.zeros(9)
        weight[4] = value
        assert tensor_stats(weight).tail_mass == 0
        assert tensor_stats(weight[:-1]).tail_mass == 0
        assert tensor_stats(torch.cat([weight, torch.zeros(1)])).tail_mass == 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_values_on_an_edge_count_to_its_right(dtype: torch.dtype):
    weight = torch.tensor([-1.0, 1.0] * 6, dtype=dtype)
    assert histogram(weight, 4, limit=2.0).counts == (0, 6, 0, 6)
    assert histogram(weight, 2, limit=1.0).counts == (6, 6)
    zeros = torch.cat([weight, torch.zeros(4, dtype=dtype)])
    assert histogram(zeros, 2).counts == (6, 10)
    assert histogram(torch.zeros(5, dtype=dtype), 3).counts == (0, 5, 0)


def test_edges_are_symmetric_to_the_last_bit():
    for bins in (1, 2, 7, 10, 61, 400):
        edges = histogram(heavy(500), bins).edges
        assert edges == tuple(-edge for edge in reversed(edges))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_only_nan_and_infinity(dtype: torch.dtype):
    stats, counted = describe(torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=dtype), 3)
    assert (stats.parameters, stats.nonfinite, stats.nan, stats.infinite) == (4, 4, 2, 2)
    assert (stats.peak, stats.rms, sum(counted.counts)) == (0, 0, 0)
    assert all(math.isnan(v) for v in (stats.crest, stats.kurtosis, stats.tail_mass, stats.outlier_energy))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_result_depends_on_the_number_of_threads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "CHUNK", 500)
    weight = heavy(60, 500).to(dtype)
    quantized = Normalized(max_abs, Uniform(4)).quantize(weight)
    results: list[Any] = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        spread = channel_stats(weight, 1)
        results.append((describe(weight), error_stats(weight, quantized), [t.tolist() for t in spread]))
        assert torch.get_num_threads() == threads
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", ODD)
def test_passes_on_a_device_equal_those_on_the_cpu(name: str):
    weight = pieces.readable(ODD[name](), where="the test")
    flat = Flat(weight)
    here = flat.moments()
    parts = weight.reshape(-1).split(max(1, weight.numel()))
    there = moments_on_device(parts, flat.scale)[0]
    assert there[:5] == here[:5]
    unit = here.rms
    exact = [here.mean / unit, *(s / unit**k for s, k in zip(here[6:], (2, 3, 4), strict=True))]
    assert [there.mean / unit, *(s / unit**k for s, k in zip(there[6:], (2, 3, 4), strict=True))] == pytest.approx(
        exact, rel=1e-9, abs=1e-9
    )
    for bins in (None, Bins(here.peak * 0.9, 37)):
        expected, got = flat.spread(2 * unit, bins), spread_on_device(parts, flat.scale, 2 * unit, bins)
        assert (got.beyond, got.counts) == (expected.beyond, expected.counts)
        assert got.energy == pytest.approx(expected.energy, rel=1e-12)
    assert moments_on_device((), 1.0) == []
    assert spread_on_device((), 1.0, 1.0, Bins(1.0, 3)).counts == [0, 0, 0]


CHANNELS: dict[str, Callable[[], Tensor]] = {
    "linear": lambda: heavy(30, 70),
    "convolution": lambda: heavy(8, 6, 3, 3).bfloat16(),
    "vector": lambda: heavy(50),
    "half, transposed": lambda: heavy(20, 30).t().half(),
    "long rows": lambda: heavy(2, 1500),
    "subnormal": lambda: heavy(9, 9) * 1e-41,
    "float64 near the end": lambda: heavy(9, 8).double() * 1e305,
    "spoilt": lambda: torch.cat([spoilt(heavy(300)).reshape(3, 100), torch.full((1, 100), math.nan)]),
    "float64 of two magnitudes": lambda: torch.cat([heavy(3, 9).double() * 1e-200, heavy(2, 9).double() * 1e200]),
    "float64 near zero": lambda: heavy(9, 8).double() * 1e-300,
    "float8": lambda: heavy(9, 8).to(torch.float8_e4m3fn),
    "integers": lambda: (heavy(9, 8) * 10).int(),
    "one": lambda: torch.tensor([[-3.0]]),
    "zeros": lambda: torch.zeros(3, 4),
}


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("name", CHANNELS)
def test_channel_stats_equal_numpy(name: str, axis: int, where: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "CHUNK", 256)
    monkeypatch.setattr(pieces, "DEVICE_CHUNK", 100)
    if where == "device":
        monkeypatch.setattr(channels_module, "_gather", channels_module._gather_on_device)
    weight = CHANNELS[name]()
    got = channel_stats(weight, axis)
    w = np.moveaxis(array(weight), axis, 0).reshape(weight.shape[axis], -1)
    for row, peak, rms, nonfinite in zip(w, *got, strict=True):
        finite = row[np.isfinite(row)]
        unit = (np.abs(finite).max() if finite.size else 1.0) or 1.0
        assert nonfinite == row.size - finite.size
        assert peak == (np.abs(finite).max() if finite.size else 0)
        expected = math.sqrt(np.mean((finite / unit) ** 2)) * unit if finite.size else 0
        assert rms.item() == pytest.approx(expected, rel=1e-12, abs=0)
    assert [t.dtype for t in got] == [torch.float64, torch.float64, torch.int64]


def test_channel_stats_find_the_channel_that_stands_out():
    weight = heavy(16, 9, 3, 3, df=30)
    weight[11] *= 20
    assert int(channel_stats(weight).rms.argmax()) == 11
    assert int(channel_stats(weight.transpose(0, 1), 1).peak.argmax()) == 11


def test_channel_stats_of_nothing_and_of_no_such_dimension():
    empty = channel_stats(torch.empty(3, 0))
    assert [t.tolist() for t in empty] == [[0.0] * 3, [0.0] * 3, [0] * 3]
    assert [t.shape for t in channel_stats(torch.empty(0, 3))] == [(0,)] * 3
    for weight, axis in [(torch.tensor(1.0), 0), (heavy(3, 4), 2)]:
        with pytest.raises(ValueError, match=f"dimension {axis}"):
            channel_stats(weight, axis)


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("scale", [1e-300, 1e-38, 1.0, 1e38, 1e300])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_errors_do_not_depend_on_magnitude_device_or_chunk(
    axis: int | None, scale: float, where: str, monkeypatch: pytest.MonkeyPatch
):
    if where == "device":
        monkeypatch.setattr(errors_module, "_gather", errors_module._gather_on_device)
    dtype = torch.float64 if not 1e-40 < scale < 1e39 else torch.float32
    unit = heavy(40, 30) / 100
    rng = np.random.default_rng(3)
    codes = torch.from_numpy(rng.integers(0, 5, (40, 30))).to(torch.uint8)
    count = () if axis is None else (unit.shape[axis],)
    steps = torch.from_numpy(rng.uniform(0.01, 0.02, count)).to(dtype) * scale
    levels = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=dtype)
    quantized = Quantized(codes, levels, steps, axis or 0)
    weight = unit.to(dtype) * scale
    w, q = (t.double().numpy() / scale for t in (weight, quantized.dequantize()))
    for chunk in (1 << 17, 77):
        monkeypatch.setattr(pieces, "CHUNK", chunk)
        monkeypatch.setattr(pieces, "DEVICE_CHUNK", chunk)
        got = error_stats(weight, quantized)
        assert got.relative_error == pytest.approx(((w - q) ** 2).sum() / (w**2).sum(), rel=1e-10)
        assert got.rescale == pytest.approx((w * q).sum() / (q**2).sum(), rel=1e-9)
        assert got.zeros == (q == 0).mean()
        law = np.mean((steps.double().numpy() / scale) ** 2) / 12 / np.mean(w**2)
        assert got.law_error == pytest.approx(law, rel=1e-10)


def test_error_of_a_scalar_and_of_nothing():
    scalar = torch.tensor(0.7)
    got = error_stats(scalar, Normalized(max_abs, Uniform(3)).quantize(scalar))
    assert (got.levels_used, got.entropy) == (1, 0)
    assert got.relative_error == pytest.approx(0, abs=1e-12)
    nothing = Quantized(torch.empty(0, 3, dtype=torch.uint8), torch.tensor([-1.0, 1.0]), torch.tensor(1.0))
    got = error_stats(torch.empty(0, 3), nothing)
    assert math.isnan(got.relative_error) and got.levels_used == 0


ERRORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: heavy(1)[0],
    "one": lambda: heavy(1),
    "prime": lambda: heavy(1009),
    "odd": lambda: heavy(7, 3, 5, 1),
    "transposed": lambda: heavy(30, 40).t(),
    "channels last": lambda: heavy(8, 6, 3, 3).to(memory_format=torch.channels_last),
    "expanded": lambda: heavy(30, 1).expand(30, 9),
    "float64": lambda: heavy(300).double(),
    "half": lambda: heavy(300).half(),
    "bfloat16": lambda: heavy(300).bfloat16(),
    "float8": lambda: heavy(300).to(torch.float8_e4m3fn),
    "constant": lambda: torch.full((5, 5), 0.1),
    "negative view": lambda: torch.complex(heavy(99), heavy(99, seed=1)).conj().imag,
}


@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("name", ERRORS)
def test_errors_of_odd_tensors_equal_numpy(name: str, channel: bool):
    weight = ERRORS[name]()
    if channel and weight.ndim < 2:
        weight = weight.reshape(1, -1)
    exact = weight.to(torch.float64) if weight.dtype == torch.float64 else weight.float()
    peak = exact.flatten(1).abs().amax(1) if channel else exact.abs().max()
    axes = (slice(None), *[None] * (weight.ndim - 1)) if channel else ()
    codes = (exact / peak[axes] * 3).round() + 3
    quantized = Quantized(codes.to(torch.uint8), torch.arange(-3.0, 4.0).to(exact.dtype), peak / 3)
    w, q, c = exact.double().numpy(), quantized.dequantize().double().numpy(), codes.numpy().astype(int).ravel()
    got = error_stats(weight, quantized)
    energy = (w**2).sum()
    assert got.relative_error == pytest.approx(((w - q) ** 2).sum() / energy, rel=1e-9, abs=1e-15)
    assert got.rescale == pytest.approx((w * q).sum() / (q**2).sum(), rel=1e-9)
    assert got.rescaled_error == pytest.approx(1 - (w * q).sum() ** 2 / (q**2).sum() / energy, rel=1e-6, abs=1e-12)
    assert got.law_error == pytest.approx(np.mean(peak.double().numpy() ** 2) / 9 / 12 / np.mean(w**2), rel=1e-6)
    assert got.zeros == (q == 0).mean()
    assert got.entropy == pytest.approx(scipy.stats.entropy(np.bincount(c), base=2), rel=1e-12, abs=1e-15)
    assert got.levels_used == np.unique(c).size


@pytest.mark.parametrize("where", ["cpu", "device"])
@pytest.mark.parametrize("channel", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_errors_leave_out_what_is_not_finite(
    dtype: torch.dtype, channel: bool, where: str, monkeypatch: pytest.MonkeyPatch
):
    if where == "device":
        monkeypatch.setattr(errors_module, "_gather", errors_module._gather_on_device)
    monkeypatch.setattr(pieces, "CHUNK", 60)
    clean = heavy(20, 30).to(dtype)
    steps = torch.linspace(0.5, 1, 20) if channel else torch.tensor(0.7)
    codes = torch.from_numpy(np.random.default_rng(4).integers(0, 7, (20, 33))).to(torch.uint8)
    levels = torch.arange(-3.0, 4.0)
    bad = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype).expand(20, 3)
    got = error_stats(torch.cat([clean, bad], 1), Quantized(codes, levels, steps))
    expected = error_stats(clean, Quantized(codes[:, :30], levels, steps))
    assert asdict(got) == pytest.approx(asdict(expected), rel=1e-12)
    nothing = error_stats(bad, Quantized(codes[:, 30:], levels, steps))
    assert (nothing.levels_used, nothing.entropy) == (0, 0) and math.isnan(nothing.relative_error)


def test_float64_weights_far_beyond_their_levels_leave_their_whole_energy_as_error():
    weight = torch.tensor([1e200, 2.0, -1.0, 0.5], dtype=torch.float64)
    quantized = Uniform(2).quantize(weight)
    assert error_stats(weight, quantized).relative_error == pytest.approx(1)


def test_what_cannot_be_read_is_named():
    codes = torch.zeros(3, 3, dtype=torch.uint8)
    quantized = Quantized(codes, torch.tensor([-1.0, 1.0]), torch.tensor(1.0))
    for weight, match in [
        (torch.ones(3, 3, dtype=torch.complex64), "complex64"),
        (torch.eye(3).to_sparse(), "sparse_coo"),
        (torch.empty(3, 3, device="meta"), "meta"),
    ]:
        for call in (tensor_stats, histogram, describe, channel_stats, lambda w: error_stats(w, quantized)):
            with pytest.raises(ValueError, match=f"dense tensor of real numbers.*{match}"):
                call(weight)


def test_one_outlier_among_millions():
    weight = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0)) * 0.01
    weight[1_234_567] = -500.0
    got, counted = describe(weight)
    assert asdict(got) == pytest.approx(reference(weight), rel=1e-9)
    assert got.outlier_energy == pytest.approx(500**2 / (500**2 + 300), rel=0.01)
    assert got.tail_mass == 1 / 3_000_001
    assert (sum(counted.counts), counted.counts[0]) == (3_000_001, 1)


@pytest.mark.parametrize("work", [describe, channel_stats], ids=lambda work: work.__name__)
def test_statistics_cost_a_few_passes_and_no_more(work: Callable[[Tensor], object]):
    weight = torch.randn(1000, 2000, generator=torch.Generator().manual_seed(0))
    exact = weight.double().numpy()
    room = np.empty_like(exact)

    def passes() -> None:
        for _ in range(30):
            np.multiply(exact, exact, out=room)

    best: dict[str, float] = {}
    for _ in range(3):
        for name, call in (("work", lambda: work(weight)), ("passes", passes)):
            start = time.process_time()
            call()
            best[name] = min(best.get(name, math.inf), time.process_time() - start)
    # Of processor time, which a loaded machine stretches alike; typical is 0.3. `benchmarks/tails.py` measures speed.
    assert best["work"] < best["passes"]
