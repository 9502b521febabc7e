"""Clip rules and their errors against the library's own quantizers applied to the weight."""

import math
import time

import numpy as np
import pytest
import torch

from wnq.clipping import CLIP_RULES, ClipError, clip_errors
from wnq.learned_step import LearnedStep
from wnq.methods.sawb import COEFFICIENTS, StatisticsAware
from wnq.quantizer import Uniform
from wnq.tails import error_stats, predicted_error, tensor_stats
from wnq.theory import Empirical

LONG = 270_000
"""More different numbers than are kept one by one."""


def weight_of(kind, n=LONG, seed=0):
    generator = np.random.default_rng(seed)
    values = {
        "gaussian": lambda: generator.standard_normal(n) * 0.05,
        "heavy": lambda: generator.standard_t(3, n) * 0.02,
        "flat": lambda: generator.uniform(-0.3, 0.3, n),
        "outlier": lambda: np.append(generator.standard_normal(n - 1), 300.0),
    }[kind]()
    return torch.from_numpy(values).float().reshape(-1, 50)


def direct(weight, row, grid):
    """|w - w_q|^2 / |w|^2 in float64 with the library's quantizer."""
    exact = weight.double()
    values = Uniform(row.bits, grid)(exact / row.clip) * row.clip
    return ((exact - values).square().sum() / exact.square().sum()).item()


def rows_of(rows, rule):
    return {row.bits: row for row in rows if row.rule == rule}


@pytest.mark.parametrize("grid", ["full", "symmetric"])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "flat", "outlier"])
def test_errors_of_a_long_weight_equal_the_direct_computation_to_1e_6(kind, grid):
    weight = weight_of(kind)
    rows = clip_errors(weight, bits=(2, 3, 4, 8), grid=grid)
    rms = weight.double().square().mean().sqrt().item()
    for row in rows:
        assert row.measured == pytest.approx(direct(weight, row, grid), rel=1e-6)
        assert row.clip_rms == pytest.approx(row.clip / rms, rel=1e-9)
        assert row.predicted == pytest.approx(predicted_error(row.bits, row.clip_rms, grid), rel=1e-9)


@pytest.mark.parametrize("grid", ["full", "symmetric"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1,), (7, 3), (5, 2, 3, 3), (300, 41)])
def test_errors_of_short_and_half_precision_weights_are_exact(shape, dtype, grid):
    generator = torch.Generator().manual_seed(sum(shape))
    weight = torch.randn(shape, generator=generator).mul(0.1).to(dtype)
    rows = clip_errors(weight, grid=grid)
    assert rows
    for row in rows:
        assert row.measured == pytest.approx(direct(weight, row, grid), rel=1e-6, abs=1e-14)


def test_long_half_precision_weights_are_exact():
    weight = weight_of("heavy").bfloat16()
    for row in clip_errors(weight, bits=(2, 5, 8)):
        assert row.measured == pytest.approx(direct(weight, row, "full"), rel=1e-9)


def test_max_and_the_law_are_those_of_tails():
    weight = weight_of("gaussian")
    stats = tensor_stats(weight)
    for bits, row in rows_of(clip_errors(weight, rules=["max"]), "max").items():
        assert row.clip == stats.peak
        assert row.clip_rms == pytest.approx(stats.crest, rel=1e-9)
        assert row.predicted == pytest.approx(predicted_error(bits, stats.crest), rel=1e-9)
        codes = StatisticsAwareLike(bits, row.clip).quantize(weight)
        assert row.measured == pytest.approx(error_stats(weight, codes).relative_error, rel=1e-6)


class StatisticsAwareLike(StatisticsAware):
    """The same grid with a given clip."""

    def __init__(self, bits, clip):
        super().__init__(2, "full", "tensor")
        self.grid, self.bits, self.value = Uniform(bits, "full"), bits, clip

    def clip(self, w):
        return w.new_tensor(self.value)


def test_percentile_is_numpys():
    for n, tolerance in ((1000, 1e-9), (LONG, 1e-3)):
        weight = weight_of("heavy", n)
        (row,) = clip_errors(weight, bits=[4], rules=["percentile"])
        assert row.clip == pytest.approx(np.percentile(weight.abs().double().numpy(), 99.9), rel=tolerance)


def test_percentile_of_nearly_only_zeros_is_the_largest():
    weight = torch.zeros(100, 100)
    weight[0, 0] = 2.0
    (row,) = clip_errors(weight, bits=[3], rules=["percentile"])
    assert row.clip == 2.0


@pytest.mark.parametrize("grid", ["full", "symmetric"])
@pytest.mark.parametrize("kind", ["gaussian", "heavy", "outlier"])
def test_mse_is_the_least_error_over_all_clips(kind, grid):
    weight = weight_of(kind, 4000)
    exact = weight.double()
    for bits, row in rows_of(clip_errors(weight, bits=(2, 4, 6), rules=["mse"], grid=grid), "mse").items():
        best = min(
            ((exact - Uniform(bits, grid)(exact / clip) * clip).square().sum() / exact.square().sum()).item()
            for clip in np.linspace(0.002, 1, 600) * exact.abs().max().item()
        )
        assert row.measured <= best * (1 + 1e-3)
    others = clip_errors(weight, grid=grid)
    for bits, row in rows_of(others, "mse").items():
        assert all(row.measured <= other.measured * (1 + 1e-9) for other in others if other.bits == bits)


@pytest.mark.parametrize("kind", ["gaussian", "heavy", "flat"])
@pytest.mark.parametrize("grid", ["full", "symmetric"])
def test_sawb_is_the_method_where_it_has_coefficients(grid, kind):
    weight = weight_of(kind)
    rows = rows_of(clip_errors(weight, grid=grid), "sawb")
    assert set(rows) == {bits for name, bits in COEFFICIENTS if name == grid}
    for bits, row in rows.items():
        method = StatisticsAware(bits, grid, "tensor")
        assert row.clip == pytest.approx(method.clip(weight.double()).item(), rel=1e-9)
        error = error_stats(weight.double(), method.quantize(weight.double())).relative_error
        assert row.measured == pytest.approx(error, rel=1e-6)


def test_sawb_of_one_magnitude_is_the_largest():
    rows = rows_of(clip_errors(torch.full((4, 4), -0.3), rules=["sawb"]), "sawb")
    assert rows[4].clip == pytest.approx(0.3, rel=1e-6)


@pytest.mark.parametrize("grid", ["full", "symmetric"])
def test_lsq_has_the_step_that_lsq_starts_from(grid):
    weight = weight_of("heavy")
    rows = rows_of(clip_errors(weight, grid=grid), "lsq")
    assert set(rows) == set(range(2, 9))
    for bits, row in rows.items():
        start = LearnedStep(bits, is_weight=True)
        start.reset_(weight)
        levels = 2**bits - 1 if grid == "full" else 2**bits - 2
        assert 2 * row.clip / levels == pytest.approx(start.step.item(), rel=1e-5)
        assert start.step.item() == pytest.approx(
            2 * weight.abs().mean().item() / math.sqrt(2 ** (bits - 1) - 1), rel=1e-5
        )


def test_order_and_selection():
    weight = weight_of("gaussian", 1000)
    rows = clip_errors(weight)
    assert [(row.bits, row.rule) for row in rows if row.bits in (1, 2, 6)] == [
        *[(1, rule) for rule in ("max", "percentile", "mse")],
        *[(2, rule) for rule in CLIP_RULES],
        *[(6, rule) for rule in ("max", "percentile", "mse", "lsq")],
    ]
    assert {row.bits for row in clip_errors(weight, grid="symmetric")} == set(range(2, 9))
    assert [(r.bits, r.rule) for r in clip_errors(weight, bits=[5, 3], rules=["mse", "max"])] == [
        (5, "mse"),
        (5, "max"),
        (3, "mse"),
        (3, "max"),
    ]


@pytest.mark.parametrize("n", [50, 100_000])
def test_what_is_not_finite_is_left_out(n):
    weight = weight_of("heavy", n).reshape(-1)
    spoilt = torch.cat([weight, torch.tensor([math.nan, math.inf, -math.inf])])
    assert clip_errors(spoilt) == clip_errors(weight)


@pytest.mark.parametrize("n", [1, 100_000])
def test_zeros_have_no_error(n):
    for row in clip_errors(torch.zeros(n)):
        assert row.clip == 0
        assert math.isnan(row.clip_rms) and math.isnan(row.measured) and row.predicted is None
    assert len(clip_errors(torch.zeros(n))) == len(clip_errors(torch.ones(n)))


@pytest.mark.parametrize("weight", [torch.empty(0), torch.full((3, 2), math.nan), torch.full((100_000,), math.inf)])
def test_nothing_finite_has_neither_clip_nor_error(weight):
    for row in clip_errors(weight):
        assert math.isnan(row.clip) and math.isnan(row.measured) and row.predicted is None


@pytest.mark.parametrize("n", [1, 3, 100_000])
def test_a_constant_is_a_level_of_its_own(n):
    for row in clip_errors(torch.full((n,), -0.7), rules=["max", "percentile", "mse"]):
        assert row.clip == pytest.approx(0.7, rel=1e-6)
        assert row.clip_rms == pytest.approx(1, rel=1e-9)
        assert row.measured == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("factor", [2.0**-700, 2.0**700])
@pytest.mark.parametrize("n", [1000, 100_000])
def test_float64_beyond_the_range_of_squares(factor, n):
    weight = weight_of("gaussian", n).double()
    for plain, scaled in zip(clip_errors(weight), clip_errors(weight * factor), strict=True):
        assert scaled.clip == pytest.approx(plain.clip * factor, rel=1e-9)
        assert scaled.measured == pytest.approx(plain.measured, rel=1e-9)


def test_a_long_weight_costs_little_more_than_its_sorting():
    weight = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    best = {}
    for _ in range(2):
        for name, work in (
            ("density", lambda: Empirical.from_tensor(weight)),
            ("all", lambda: clip_errors(weight)),
            ("one by one", lambda: [Uniform(bits)(weight / 0.5) for bits in range(1, 9)]),
        ):
            start = time.process_time()
            work()
            best[name] = min(best.get(name, math.inf), time.process_time() - start)
    # Of processor time, which a loaded machine stretches alike. 40 clips one by one would be five times the last.
    assert best["all"] < 20 * best["density"]
    assert best["all"] < 5 * best["one by one"]


def test_wrong_settings_are_named():
    weight = torch.ones(3)
    with pytest.raises(ValueError, match=r"clip rule 'mes' is unknown.*'mse'"):
        clip_errors(weight, rules=["mes"])
    with pytest.raises(ValueError, match="bits of the symmetric grid"):
        clip_errors(weight, bits=[1], grid="symmetric")
    with pytest.raises(ValueError, match="bits must be"):
        clip_errors(weight, bits=[9])
    with pytest.raises(ValueError, match="grid must be one of"):
        clip_errors(weight, grid="half")


def test_rows_are_plain_data():
    (row,) = clip_errors(torch.tensor([1.0, -1.0, 0.5]), bits=[2], rules=["max"])
    assert row == ClipError(2, "max", 1.0, row.clip_rms, row.measured, row.predicted)
    assert all(isinstance(x, float) for x in (row.clip, row.clip_rms, row.measured, row.predicted))
