"""The exact error theory against Monte Carlo, quadrature, brute force and published tables."""

import doctest
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, special, stats

import wnq.theory
import wnq.theory.empirical
import wnq.theory.optimum
from wnq.quantizer import Uniform
from wnq.tails import predicted_error
from wnq.theory import (
    Empirical,
    Gaussian,
    Laplace,
    StudentT,
    UniformDensity,
    error_bound,
    error_curve,
    error_parts,
    expected_crest,
    expected_error,
    law_error,
    optimal_clip,
)

GRIDS_AND_WIDTHS = [("full", bits) for bits in range(1, 9)] + [("symmetric", bits) for bits in range(2, 9)]
DENSITIES = [Gaussian(), Laplace(), StudentT(2.5), StudentT(5), StudentT(300), UniformDensity(), Laplace(rms=0.03)]


def pdf_of(density):
    """Textbook densities; frozen ones of SciPy take fifty times as long in a quadrature."""
    rms = density.rms
    if isinstance(density, StudentT):
        v, scale = density.df, rms * math.sqrt((density.df - 2) / density.df)
        top = math.exp(math.lgamma((v + 1) / 2) - math.lgamma(v / 2)) / math.sqrt(v * math.pi) / scale
        return lambda t: top * (1 + (t / scale) ** 2 / v) ** (-(v + 1) / 2)
    return {
        "Gaussian": lambda t: math.exp(-((t / rms) ** 2) / 2) / math.sqrt(2 * math.pi) / rms,
        "Laplace": lambda t: math.exp(-math.sqrt(2) * abs(t) / rms) / math.sqrt(2) / rms,
        "uniform": lambda t: (abs(t) <= math.sqrt(3) * rms) / math.sqrt(12) / rms,
    }[density.name]


def frozen(density):
    if isinstance(density, StudentT):
        return stats.t(density.df, scale=density.rms * math.sqrt((density.df - 2) / density.df))
    return {
        "Gaussian": stats.norm(scale=density.rms),
        "Laplace": stats.laplace(scale=density.rms / math.sqrt(2)),
        "uniform": stats.uniform(-math.sqrt(3) * density.rms, 2 * math.sqrt(3) * density.rms),
    }[density.name]


def quantized(t, bits, clip, grid):
    """The quantizer again, in NumPy: the nearest of evenly spaced levels, the outermost at the clip."""
    levels = np.linspace(-clip, clip, 2**bits if grid == "full" else 2**bits - 1)
    gap = levels[1] - levels[0]
    return levels[np.clip(np.floor((t + clip) / gap + 0.5), 0, levels.size - 1).astype(int)]


def measured(t, bits, clip, grid):
    t = np.asarray(t, dtype=np.float64)
    return ((t - quantized(t, bits, clip, grid)) ** 2).sum() / (t**2).sum()


def library(t, bits, clip, grid):
    """The library's own quantizer, in float64."""
    exact = torch.as_tensor(t).double()
    values = Uniform(bits, grid)(exact / clip) * clip
    return ((exact - values).square().sum() / exact.square().sum()).item()


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{d.name} {d.rms}")
def test_moments_equal_quadrature_of_the_density(density):
    pdf, unit = pdf_of(density), density.rms
    for x in np.array([-6.0, -1.7, -0.4, 0.0, 0.3, 1.1, 4.0]) * unit:
        for k, value in enumerate(density.moments(x)):
            edges = [-np.inf, *[e * unit for e in (-20, -math.sqrt(3), -1, 0, 1, math.sqrt(3)) if e * unit < x], x]
            pieces = [
                integrate.quad(lambda t, k=k: t**k * pdf(t), a, b, epsabs=0, limit=200)[0] for a, b in pairwise(edges)
            ]
            assert value == pytest.approx(math.fsum(pieces), rel=2e-8, abs=1e-13 * unit**k)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{d.name} {d.rms}")
def test_moments_end_at_zero_and_at_the_whole(density):
    zero, whole = density.moments(np.array([-np.inf, np.inf])).T
    np.testing.assert_array_equal(zero, 0)
    np.testing.assert_allclose(whole, [1, 0, density.second], atol=1e-15)
    assert density.moments(np.zeros((2, 3))).shape == (3, 2, 3)


def test_moments_equal_the_whole_table_of_scipy_far_into_the_tail():
    x = -np.geomspace(1e-3, 30, 40)
    np.testing.assert_allclose(Gaussian().moments(x)[0], special.ndtr(x), rtol=1e-12)
    for df in (2.0001, 2.05, 3, 7.5, 60, 99, 101, 1e4, 1e7):
        scale = math.sqrt((df - 2) / df)
        np.testing.assert_allclose(StudentT(df).moments(x * scale)[0], stats.t(df).cdf(x), rtol=1e-11)
    np.testing.assert_allclose(StudentT(1e9).moments(x[x > -5]), Gaussian().moments(x[x > -5]), rtol=1e-6)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{d.name} {d.rms}")
def test_samples_have_the_moments(density):
    drawn = density.sample(400_000, np.random.default_rng(3))
    for x in np.array([-1.0, 0.2, 1.5]) * density.rms:
        below = drawn <= x
        # The variance of a square is infinite up to four degrees of freedom.
        finite = 2 if isinstance(density, StudentT) and density.df <= 4 else 3
        for k, value in enumerate(density.moments(x)[:finite]):
            terms = below * drawn**k
            assert abs(terms.mean() - value) < 5 * terms.std() / math.sqrt(drawn.size)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{d.name} {d.rms}")
def test_expected_error_equals_monte_carlo_to_a_percent(density):
    # Importance sampling, or a heavy tail would swamp the rest: the share beyond t is v^6 / 2 for v from each of 100,000 strata.
    v = (np.arange(100_000) + np.random.default_rng(1).uniform(size=100_000)) / 100_000
    t, weight = frozen(density).isf(v**6 / 2), 6 * v**5
    assert (weight * t**2).mean() == pytest.approx(density.second, rel=0.01)
    for grid, bits in GRIDS_AND_WIDTHS:
        for factor in (0.8, 2.5, 6.0):
            clip = factor * density.rms
            error = (weight * (t - quantized(t, bits, clip, grid)) ** 2).mean() / density.second
            assert expected_error(density, bits, clip, grid=grid) == pytest.approx(error, rel=0.01)


@pytest.mark.parametrize("n", [5000, 400_000])
def test_expected_error_of_given_numbers_equals_monte_carlo_to_a_percent(n):
    values = np.random.default_rng(6).standard_t(4, n).astype(np.float32)
    density = Empirical.from_tensor(torch.from_numpy(values))
    # From each of as many strata, or the tail would swamp the rest.
    strata = max(n, 100_000)
    share = (np.arange(strata) + np.random.default_rng(7).uniform(size=strata)) / strata
    t = np.sort(values).astype(np.float64)[(share * n).astype(int)]
    for grid, bits in GRIDS_AND_WIDTHS:
        for clip in (2.0, 4.0, float(density.peak)):
            assert expected_error(density, bits, clip, grid=grid) == pytest.approx(
                measured(t, bits, clip, grid), rel=0.01
            )


@pytest.mark.parametrize("density", [Gaussian(), Laplace(), StudentT(6), UniformDensity()], ids=lambda d: d.name)
def test_expected_error_equals_random_samples_within_their_noise(density):
    t = density.sample(1_000_000, np.random.default_rng(11))
    for grid, bits in [("full", 1), ("full", 2), ("symmetric", 2), ("symmetric", 3), ("full", 4), ("full", 5)]:
        clip = 1.5 + 0.4 * bits
        square = (t - quantized(t, bits, clip, grid)) ** 2
        noise = square.std() / math.sqrt(t.size)
        assert abs(expected_error(density, bits, clip, grid=grid) - square.mean()) < 5 * noise + 1e-12
        assert noise < 0.05 * square.mean()


# J. Max, Quantizing for Minimum Distortion, IRE Transactions on Information Theory 6 (1960): the best uniform quantizers of
# a Gaussian of unit variance: number of levels, distance between them, mean squared error.
MAX_1960 = {
    ("full", 1): (2, 1.596, 0.3634),
    ("symmetric", 2): (3, 1.224, 0.1902),
    ("full", 2): (4, 0.9957, 0.1188),
    ("symmetric", 3): (7, 0.6508, 0.04686),
    ("full", 3): (8, 0.5860, 0.03744),
    ("symmetric", 4): (15, 0.3534, 0.01289),
    ("full", 4): (16, 0.3352, 0.01154),
}


@pytest.mark.parametrize(("grid", "bits"), MAX_1960)
def test_optimal_clips_of_a_gaussian_are_those_of_max_1960(grid, bits):
    levels, step, error = MAX_1960[grid, bits]
    clip, least = optimal_clip(Gaussian(), bits, grid=grid)
    # The outermost level lies half the number of gaps from zero; the quantizer's range ends half a step further out.
    assert clip == pytest.approx(step * (levels - 1) / 2, rel=3e-4)
    assert least == pytest.approx(error, rel=5e-4)


@pytest.mark.parametrize(("grid", "bits"), [("full", 5), ("symmetric", 6), ("full", 8)])
def test_optimal_clips_of_a_gaussian_with_more_levels_are_those_of_a_minimization(grid, bits):
    levels = np.linspace(-1, 1, 2**bits if grid == "full" else 2**bits - 1)
    borders = (levels[1:] + levels[:-1]) / 2

    def error(clip):
        x = clip * borders
        height = np.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
        mass = np.diff(special.ndtr(x), prepend=0, append=1)
        first = -np.diff(height, prepend=0, append=0)
        return 1 - 2 * clip * levels @ first + clip**2 * levels**2 @ mass

    best = optimize.minimize_scalar(error, bounds=(2, 6), method="bounded", options={"xatol": 1e-9})
    clip, least = optimal_clip(Gaussian(), bits, grid=grid)
    assert clip == pytest.approx(best.x, rel=1e-4)  # flat at the bottom: half the digits of the error
    assert least == pytest.approx(best.fun, rel=1e-8)


def test_optimal_clips_of_a_gaussian_are_near_the_usual_rules_of_thumb():
    assert optimal_clip(Gaussian(), 2, grid="symmetric")[0] == pytest.approx(1.24, abs=0.02)
    assert optimal_clip(Gaussian(), 2)[0] == pytest.approx(1.47, abs=0.03)
    assert optimal_clip(Gaussian(), 3)[0] == pytest.approx(2.0, abs=0.06)
    assert optimal_clip(Gaussian(), 4)[0] == pytest.approx(2.5, abs=0.03)


@pytest.mark.parametrize("density", DENSITIES, ids=lambda d: f"{d.name} {d.rms}")
@pytest.mark.parametrize(("grid", "bits"), [("full", 1), ("symmetric", 2), ("full", 3), ("symmetric", 5), ("full", 8)])
def test_optimal_clip_beats_a_dense_search(density, grid, bits):
    clip, error = optimal_clip(density, bits, grid=grid)
    tried = np.geomspace(0.2, min(300.0, density.peak / density.rms), 400) * density.rms
    curve = error_curve(density, bits, tried, grid=grid)
    assert error <= curve.min() * (1 + 1e-9)
    assert clip == pytest.approx(tried[curve.argmin()], rel=0.02)
    assert error == expected_error(density, bits, clip, grid=grid)


def test_optimal_clip_of_the_uniform_density_is_its_own_grid():
    for bits in range(1, 9):
        clip, error = optimal_clip(UniformDensity(), bits)
        assert clip == pytest.approx(math.sqrt(3) * (1 - 2.0**-bits), rel=1e-6)
        assert error == pytest.approx(4.0**-bits, rel=1e-9)


def test_error_is_the_law_in_the_limit_of_many_bits_and_one_of_no_range():
    for density in (Gaussian(), Laplace(), StudentT(30)):
        assert expected_error(density, 8, 12.0) == pytest.approx(law_error(density, 8, 12.0), rel=0.01)
        assert expected_error(density, 8, 12.0, grid="symmetric") == pytest.approx(
            law_error(density, 8, 12.0, grid="symmetric"), rel=0.01
        )
        assert expected_error(density, 4, 1e-9) == pytest.approx(1, rel=1e-8)
    # The law knows no clipping: a heavy tail beyond the clip is all the error there is.
    assert expected_error(StudentT(2.1), 8, 4.0) > 100 * law_error(StudentT(2.1), 8, 4.0)


@pytest.mark.parametrize(("grid", "bits"), GRIDS_AND_WIDTHS)
def test_law_is_the_one_of_tails_where_the_clip_is_the_peak(grid, bits):
    law = 4.5**2 / (12 * (2 ** (bits - 1) - 1) ** 2) if grid == "symmetric" else 4.5**2 / (3 * (2**bits - 1) ** 2)
    assert law_error(Gaussian(rms=0.2), bits, 0.9, grid=grid) == pytest.approx(law, rel=1e-14)
    assert predicted_error(bits, 4.5, grid) == pytest.approx(law, rel=1e-14)


def test_error_parts_are_rounding_within_and_clipping_beyond():
    t = Laplace().sample(1_000_000, np.random.default_rng(5))
    for grid, bits, clip in [("full", 2, 1.0), ("symmetric", 3, 2.2), ("full", 6, 3.0)]:
        square = (t - quantized(t, bits, clip, grid)) ** 2
        inside, beyond = error_parts(Laplace(), bits, clip, grid=grid)
        assert inside == pytest.approx((square * (np.abs(t) <= clip)).mean(), rel=0.01)
        assert beyond == pytest.approx((square * (np.abs(t) > clip)).mean(), rel=0.03)
        assert inside + beyond == pytest.approx(expected_error(Laplace(), bits, clip, grid=grid), rel=1e-12)
    assert error_parts(UniformDensity(), 4, 1.8)[1] == 0


def test_expected_crest_of_closed_forms():
    for n in (1, 2, 7, 1000, 10**8):
        assert expected_crest(UniformDensity(), n) == pytest.approx(math.sqrt(3) * n / (n + 1), rel=1e-9)
        # The maximum of n exponentials is the n-th harmonic number.
        harmonic = special.digamma(n + 1) + np.euler_gamma
        assert expected_crest(Laplace(), n) == pytest.approx(harmonic / math.sqrt(2), rel=1e-9)
    assert expected_crest(Gaussian(), 1) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-9)
    # Two Gaussians: E max(|a|, |b|) = 2 / sqrt(pi).
    assert expected_crest(Gaussian(), 2) == pytest.approx(2 / math.sqrt(math.pi), rel=1e-9)
    assert expected_crest(Gaussian(rms=7.0), 50) == pytest.approx(expected_crest(Gaussian(), 50), rel=1e-12)


def test_expected_crest_of_a_student_equals_quadrature_and_of_a_gaussian_the_rule_of_thumb():
    for df, n in [(2.2, 30), (3.0, 10_000), (5.0, 10**6)]:
        scale = math.sqrt((df - 2) / df)

        def beyond(s, df=df, n=n):
            x = math.exp(s)
            return -math.expm1(n * math.log1p(-2 * stats.t.sf(x, df))) * x

        reference = integrate.quad(beyond, -30, 5, limit=400)[0] + integrate.quad(beyond, 5, 80, limit=400)[0]
        assert expected_crest(StudentT(df), n) == pytest.approx(reference * scale, rel=1e-6)
    for n in (10**4, 10**6, 10**9):
        assert expected_crest(Gaussian(), n) == pytest.approx(math.sqrt(2 * math.log(n)), rel=0.07)
        assert expected_crest(Laplace(), n) == pytest.approx(math.log(n) / math.sqrt(2), rel=0.07)


def test_expected_crest_equals_samples_also_of_an_empirical_density():
    generator = np.random.default_rng(8)
    peaks = np.abs(generator.standard_normal((20_000, 64))).max(1)
    assert expected_crest(Gaussian(), 64) == pytest.approx(peaks.mean(), rel=0.005)
    values = generator.laplace(size=50)
    density = Empirical.from_values(values)
    peaks = np.abs(density.sample(20_000 * 16, generator).reshape(-1, 16)).max(1)
    assert expected_crest(density, 16) == pytest.approx(peaks.mean() / np.sqrt((values**2).mean()), rel=0.01)
    assert expected_crest(density, 10**9) == pytest.approx(np.abs(values).max() / np.sqrt((values**2).mean()))


def weights(kind, n, seed=0):
    generator = np.random.default_rng(seed)
    return {
        "gaussian": lambda: generator.standard_normal(n) * 0.05,
        "heavy": lambda: generator.standard_t(2.5, n),
        "flat": lambda: generator.uniform(-0.3, 0.3, n),
        "shifted": lambda: generator.exponential(size=n) - 0.2,
        "lattice": lambda: np.rint(generator.standard_normal(n) * 20) / 1000 + 0.0003,
        "outlier": lambda: np.append(generator.standard_normal(n - 1), 1e4),
    }[kind]().astype(np.float32)


KINDS = ["gaussian", "heavy", "flat", "shifted", "lattice", "outlier"]


@pytest.mark.parametrize("kind", KINDS)
def test_exact_empirical_error_equals_the_quantizer_to_1e_6(kind):
    values = weights(kind, 5000)
    density = Empirical.from_tensor(torch.from_numpy(values).reshape(50, 100))
    assert density.exact
    assert density.second == pytest.approx((values.astype(np.float64) ** 2).mean(), rel=1e-12)
    assert density.mean == pytest.approx(values.astype(np.float64).mean(), rel=1e-9)
    assert density.peak == np.abs(values).max()
    rms = math.sqrt(density.second)
    for grid, bits in GRIDS_AND_WIDTHS:
        for clip in (0.4 * rms, 1.9 * rms, float(density.peak)):
            direct = library(values, bits, clip, grid)
            assert expected_error(density, bits, clip, grid=grid) == pytest.approx(direct, rel=1e-6)
            assert measured(values, bits, clip, grid) == pytest.approx(direct, rel=1e-6)
            assert error_bound(density, bits, clip, grid=grid) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_binned_empirical_error_is_within_its_bound_and_within_1e_6(kind):
    values = weights(kind, 400_000)
    density = Empirical.from_tensor(torch.from_numpy(values))
    assert density.count == values.size
    assert density.peak == np.abs(values).max()
    assert density.second == pytest.approx((values.astype(np.float64) ** 2).mean(), rel=1e-12)
    # One bin may hold both signs.
    assert density.mean_magnitude == pytest.approx(np.abs(values.astype(np.float64)).mean(), rel=1e-9)
    rms = math.sqrt(density.second)
    strict = []
    for grid, bits in [("full", 1), ("symmetric", 2), ("full", 4), ("symmetric", 7), ("full", 8)]:
        for clip in (0.4 * rms, 1.9 * rms, 4 * rms, float(density.peak)):
            direct = library(values, bits, clip, grid)
            error = expected_error(density, bits, clip, grid=grid)
            bound = error_bound(density, bits, clip, grid=grid)
            assert abs(error - direct) <= bound + 1e-11 * max(1, direct)
            assert bound < 0.02 * direct
            assert error == pytest.approx(direct, rel=1e-6)
            strict.append(bound > 0)
    assert any(strict) == (kind != "lattice")


def test_the_bound_is_reached_by_the_worst_bin():
    # Two numbers at the ends of a bin that a threshold halves: no estimate from count, sum and squares can see them.
    low, high = 0.9, 1.1
    density = Empirical.from_bins([0.8, 1.2], [2], [low + high], [low**2 + high**2])
    exact = Empirical.from_values([low, high])
    clip = 2.0  # levels -2, 0, 2: thresholds at 1 and -1
    gap = abs(expected_error(density, 2, clip, grid="symmetric") - expected_error(exact, 2, clip, grid="symmetric"))
    bound = error_bound(density, 2, clip, grid="symmetric")
    assert 0.1 * bound < gap <= bound


def test_from_bins_agrees_with_the_numbers_in_them():
    t = np.random.default_rng(2).standard_normal(100_000)
    edges = np.linspace(-6, 6, 4001)
    sums = [np.histogram(t, edges, weights=w)[0] for w in (np.ones_like(t), t, t**2)]
    density = Empirical.from_bins(edges, *sums)
    assert density.count == t.size
    assert not density.exact
    for bits in (1, 3, 5):
        clip = 1 + bits / 3
        error = expected_error(density, bits, clip)
        assert error == pytest.approx(measured(t, bits, clip, "full"), rel=1e-4)
        assert abs(error - measured(t, bits, clip, "full")) <= error_bound(density, bits, clip)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sixteen_bit_numbers_are_exact_however_they_are_stored(dtype, stored):
    tensor = torch.from_numpy(weights("heavy", 400_000)).to(dtype).to(stored)
    density = Empirical.from_tensor(tensor)
    assert density.exact
    clip = 0.11 * density.peak
    assert expected_error(density, 6, clip) == pytest.approx(library(tensor, 6, clip, "full"), rel=1e-7)
    assert density.peak == tensor.double().abs().max().item()


@pytest.mark.parametrize("precision", [10, 18])
def test_float64_numbers_keep_all_their_digits(precision):
    ticks = np.random.default_rng(3).integers(-50_000, 50_000, 30_000)
    tensor = 1 + torch.from_numpy(ticks * 2.0**-50)
    density = Empirical.from_tensor(tensor, precision=precision)
    assert density.exact == (precision == 18)
    assert density.points()[0].size < 1.1 * 2**precision
    assert density.peak == tensor.max().item()
    # A threshold at 1 parts them into two levels.
    assert density.moments(1.0)[0] == pytest.approx((ticks <= 0).mean(), abs=1e-4 if precision == 10 else 0)


@pytest.mark.parametrize("n", [1, 2, 1023, 1024, 1025, 1026, 1500, 2049, 5000, 70_001])
def test_every_number_is_in_one_bin_and_bins_do_not_overlap(n):
    values = weights("heavy", n)
    density = Empirical.from_tensor(torch.from_numpy(values), precision=10)
    bins = density._bins
    assert (bins.count.sum(), bins.low[0], bins.high[-1]) == (n, values.min(), values.max())
    assert (bins.low <= bins.mean).all() and (bins.mean <= bins.high).all()
    assert (bins.high[:-1] <= bins.low[1:]).all()
    held = np.searchsorted(np.sort(values).astype(np.float64), bins.high, side="right")
    np.testing.assert_array_equal(held, bins.count.cumsum())
    assert density.exact == (n <= 1024)
    assert density.mean_magnitude == pytest.approx(np.abs(values.astype(np.float64)).mean(), rel=1e-4)
    assert density.second == pytest.approx((values.astype(np.float64) ** 2).mean(), rel=1e-12)


def test_one_number_many_times_is_one_bin_however_many_others_there_are():
    generator = np.random.default_rng(5)
    values = np.concatenate([generator.standard_normal(20_000), np.full(30_000, 0.1), np.zeros(30_000), [-0.0] * 500])
    values = values.astype(np.float32)
    density = Empirical.from_tensor(torch.from_numpy(generator.permutation(values)), precision=12)
    at = np.float32(0.1)
    around = np.float64([np.nextafter(at, np.float32(0)), at, np.nextafter(at, np.float32(1))])
    gap = density.moments(around)[0] - [(values <= x).mean() for x in around]
    assert np.abs(gap).max() < 1e-3
    for bits, clip in ((3, 1.0), (8, 2.0)):
        assert expected_error(density, bits, clip) == pytest.approx(library(values, bits, clip, "full"), rel=1e-4)


@pytest.mark.parametrize("precision", [10, 18])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.bfloat16, torch.float32, torch.float64])
def test_a_long_tensor_leaves_out_what_is_not_finite_and_counts_it(dtype, precision):
    tensor = torch.from_numpy(weights("gaussian", 100_000)).to(dtype)
    spoilt = torch.tensor([math.nan, math.inf, -math.inf, math.nan])
    spoilt = torch.cat([spoilt[:2].to(dtype).view(-1), tensor, spoilt[2:].to(dtype)])
    clean, density = (Empirical.from_tensor(t, precision=precision) for t in (tensor, spoilt))
    assert (density.nonfinite, density.count, clean.nonfinite) == (4, 100_000, 0)
    assert (density.second, density.peak, density.mean) == (clean.second, clean.peak, clean.mean)
    assert expected_error(density, 3, 0.1) == expected_error(clean, 3, 0.1)


def test_a_tensor_of_no_finite_element_has_no_error():
    for tensor in (torch.full((100_000,), math.nan), torch.empty(0), torch.tensor([math.inf])):
        density = Empirical.from_tensor(tensor)
        assert density.count == 0 and density.nonfinite == tensor.numel() and density.peak == 0
        assert math.isnan(density.second) and math.isnan(expected_error(density, 2, 1.0))
        assert all(math.isnan(x) for x in optimal_clip(density, 2))
    zeros = Empirical.from_tensor(torch.zeros(100_000))
    assert zeros.second == 0 and zeros.peak == 0 and math.isnan(expected_error(zeros, 2, 1.0))
    assert math.isnan(law_error(zeros, 2, 1.0)) and math.isnan(expected_crest(zeros, 5))


def test_extreme_numbers_keep_their_errors():
    base = weights("gaussian", 80_000).astype(np.float64)
    reference = expected_error(Empirical.from_values(base), 5, 0.15)
    for factor in (1e-36, 1e36):
        density = Empirical.from_tensor(torch.from_numpy((base * factor).astype(np.float32)))
        assert expected_error(density, 5, 0.15 * factor) == pytest.approx(reference, rel=1e-4)
    # Subnormal float32 numbers have few bits left.
    tiny = torch.from_numpy((base * 1e-42).astype(np.float32))
    density = Empirical.from_tensor(tiny)
    assert expected_error(density, 3, density.peak) == pytest.approx(library(tiny, 3, density.peak, "full"), rel=1e-6)
    huge = Empirical.from_tensor(torch.full((70_000,), torch.finfo(torch.float32).max))
    assert expected_error(huge, 1, huge.peak) == 0


def test_units_divide_exactly():
    tensor = torch.from_numpy(weights("heavy", 90_000))
    plain, scaled = Empirical.from_tensor(tensor), Empirical.from_tensor(tensor, unit=3.7)
    assert scaled.peak == pytest.approx(plain.peak / 3.7, rel=1e-15)
    assert expected_error(scaled, 4, 1.0) == pytest.approx(expected_error(plain, 4, 3.7), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("grid", "bits"), [("full", 1), ("symmetric", 2), ("full", 2), ("full", 4), ("symmetric", 6)])
def test_optimal_clip_of_few_numbers_is_the_best_there_is(kind, grid, bits):
    values = weights(kind, 300, seed=bits)
    density = Empirical.from_values(values)
    clip, error = optimal_clip(density, bits, grid=grid)
    tried = np.linspace(1e-3, 1, 5001) * density.peak
    curve = error_curve(density, bits, tried, grid=grid)
    assert 0 < clip <= density.peak
    assert error <= curve.min() * (1 + 1e-9) + 1e-14
    assert error == pytest.approx(library(values, bits, clip, grid), rel=1e-6)


@pytest.mark.parametrize(("grid", "bits"), [("full", 1), ("symmetric", 2), ("full", 4), ("full", 6), ("full", 8)])
def test_optimal_clip_by_scanning_is_within_a_thousandth_of_the_best(grid, bits, monkeypatch):
    values = weights("heavy", 2000, seed=bits)
    density = Empirical.from_values(values)
    monkeypatch.setattr(wnq.theory.optimum, "COUNTABLE", 1 << 30)
    best = optimal_clip(density, bits, grid=grid)[1]
    monkeypatch.setattr(wnq.theory.optimum, "COUNTABLE", 0)
    scanned = optimal_clip(density, bits, grid=grid)[1]
    assert best * (1 - 1e-9) <= scanned <= best * 1.001


def test_optimal_clip_of_a_large_sample_is_near_its_densitys():
    for density in (Gaussian(), Laplace()):
        tensor = torch.from_numpy(density.sample(1_000_000, np.random.default_rng(4))).float()
        for bits in (2, 4, 6):
            clip, error = optimal_clip(Empirical.from_tensor(tensor), bits)
            exact_clip, exact_error = optimal_clip(density, bits)
            assert error == pytest.approx(exact_error, rel=0.02)
            assert clip == pytest.approx(exact_clip, rel=0.03)


def test_quantiles_are_numpys():
    for n, tolerance in ((1001, 1e-12), (100_000, 1e-3)):
        values = weights("heavy", n)
        density = Empirical.from_tensor(torch.from_numpy(values))
        for share in (0, 0.1, 0.5, 0.999, 0.99999, 1):
            expected = np.quantile(np.abs(values).astype(np.float64), share)
            assert density.quantile(share) == pytest.approx(expected, rel=tolerance, abs=1e-7)


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="df of StudentT must be above 2"):
        StudentT(2)
    with pytest.raises(ValueError, match="rms of a density"):
        Gaussian(rms=0)
    with pytest.raises(ValueError, match="clip must be positive"):
        expected_error(Gaussian(), 2, 0.0)
    with pytest.raises(ValueError, match="bits of the symmetric grid"):
        optimal_clip(Gaussian(), 1, grid="symmetric")
    with pytest.raises(ValueError, match="grid must be one of"):
        optimal_clip(Gaussian(), 3, grid="half")
    with pytest.raises(ValueError, match="count of expected_crest"):
        expected_crest(Gaussian(), 0)
    for tensor in (torch.zeros(3, dtype=torch.int64), torch.eye(2).to_sparse(), torch.empty(3, device="meta")):
        with pytest.raises(ValueError, match="dense floating-point tensor"):
            Empirical.from_tensor(tensor)
    with pytest.raises(ValueError, match="precision"):
        Empirical.from_tensor(torch.zeros(3), precision=30)
    with pytest.raises(ValueError, match="one more edge"):
        Empirical.from_bins([0, 1], [1, 1], [1, 1], [1, 1])
    with pytest.raises(ValueError, match="ascending edges"):
        Empirical.from_bins([1, 0], [1], [1], [1])
    with pytest.raises(ValueError, match="mean"):
        Empirical.from_bins([0, 1], [1], [2], [4])
    with pytest.raises(ValueError, match="share must be"):
        Empirical.from_values([1.0]).quantile(2)


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(wnq.theory).attempted == 3
    assert doctest.testmod(wnq.theory).failed == 0
