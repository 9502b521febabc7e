"""Widths under a size: against brute force, against uniform widths, and the words for a budget."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from wnq.budget import Option, pareto, parse_budget, solve_exact, solve_greedy, uniform_allocations

COSTS = st.one_of(
    st.integers(-3, 12).map(float), st.floats(-1, 5, allow_nan=False), st.floats(0, 1e-3), st.sampled_from([0.0, 1e6])
)


@st.composite
def problems(draw, most_layers=5):
    """Layers of several sizes with several widths each, and a capacity that something fits."""
    widths = sorted(draw(st.sets(st.integers(1, 8), min_size=1, max_size=4)))
    layers = []
    for _ in range(draw(st.integers(1, most_layers))):
        weights = draw(st.sampled_from([1, 3, 7, 64, 100, 144, 4608]))
        own = draw(st.permutations(widths))[: draw(st.integers(1, len(widths)))] if draw(st.booleans()) else widths
        layers.append([Option(bits, bits * weights, draw(COSTS)) for bits in own])
    least, most = (sum(pick(o.size for o in options) for options in layers) for pick in (min, max))
    return layers, draw(st.integers(least, most + 5))


def brute_force(layers, capacity):
    best = math.inf
    for choice in itertools.product(*layers):
        if sum(option.size for option in choice) <= capacity:
            best = min(best, math.fsum(option.cost for option in choice))
    return best


def check(layers, capacity, found):
    chosen = [options[index] for options, index in zip(layers, found.choice, strict=True)]
    assert found.size == sum(option.size for option in chosen) <= capacity
    assert found.cost == math.fsum(option.cost for option in chosen)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_exact_is_what_brute_force_finds(problem):
    layers, capacity = problem
    found, best = solve_exact(layers, capacity), brute_force(layers, capacity)
    check(layers, capacity, found)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert found.gap == 0 and found.lower == found.cost


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problems())
def test_greedy_fits_is_bounded_and_never_beats_exact(problem):
    layers, capacity = problem
    greedy, exact = solve_greedy(layers, capacity), solve_exact(layers, capacity)
    check(layers, capacity, greedy)
    assert exact.cost <= greedy.cost
    # The bound that greedy reports is a bound.
    assert greedy.lower <= brute_force(layers, capacity) + 1e-9 * max(1, abs(greedy.lower))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(problems())
def test_neither_is_worse_than_a_uniform_width_that_fits(problem):
    layers, capacity = problem
    fitting = [u for u in uniform_allocations(layers).values() if u.size <= capacity]
    for solve in (solve_exact, solve_greedy):
        found = solve(layers, capacity)
        assert all(found.cost <= uniform.cost for uniform in fitting)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 6))
def test_with_few_states_the_bound_still_holds(problem, most):
    layers, capacity = problem
    found, best = solve_exact(layers, capacity, max_states=most), brute_force(layers, capacity)
    check(layers, capacity, found)
    tolerance = 1e-9 * max(1, abs(best), *(abs(o.cost) for options in layers for o in options))
    assert found.lower <= best + tolerance and found.cost - found.gap <= best + tolerance
    assert found.cost <= solve_greedy(layers, capacity).cost


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problems(), st.integers(1, 500))
def test_more_room_never_costs_more(problem, more):
    layers, capacity = problem
    assert solve_exact(layers, capacity + more).cost <= solve_exact(layers, capacity).cost + 1e-9


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 9)), min_size=1, max_size=8))
def test_pareto_keeps_what_nothing_beats(pairs):
    options = [Option(1, size, float(cost)) for size, cost in pairs]
    kept = [options[i] for i in pareto(options)]
    for option in options:
        assert any(k.size <= option.size and k.cost <= option.cost for k in kept)
    assert all(a.size < b.size and a.cost > b.cost for a, b in itertools.pairwise(kept))


def test_greedy_can_miss_what_exact_finds():
    """The step that gains most a bit blocks the two that gain more together."""
    layers = [[Option(1, 1, 10.0), Option(2, 4, 0.0)], *[[Option(1, 1, 6.0), Option(2, 3, 0.0)]] * 2]
    assert (solve_greedy(layers, 7).cost, solve_exact(layers, 7).cost) == (12.0, 10.0)


def test_of_equal_costs_the_smaller_size_wins():
    layers = [[Option(2, 20, 0.0), Option(4, 40, 0.0)], [Option(2, 6, 1.0), Option(4, 12, 1.0)]]
    for solve in (solve_exact, solve_greedy):
        assert solve(layers, 100).size == 26


def test_negative_costs_are_taken_as_they_are():
    layers = [[Option(2, 20, -0.5), Option(3, 30, -0.1)], [Option(2, 20, 0.3), Option(3, 30, -0.2)]]
    assert solve_exact(layers, 50).cost == pytest.approx(-0.7)


def test_two_hundred_layers_of_odd_sizes_are_solved_exactly_and_fast():
    generator = np.random.default_rng(0)
    layers = []
    for weights in generator.integers(1_000, 5_000_000, 200):
        scale = generator.lognormal(0, 2)
        layers.append([Option(b, b * int(weights), scale * 4.0**-b * generator.uniform(0.7, 1.4)) for b in range(1, 9)])
    capacity = int(2.5 * sum(options[0].size for options in layers))
    exact, greedy = solve_exact(layers, capacity), solve_greedy(layers, capacity)
    check(layers, capacity, exact)
    assert exact.gap == 0
    assert greedy.lower <= exact.cost <= greedy.cost


@pytest.mark.parametrize(
    ("text", "mean", "total"),
    [
        ("2.5bits", Fraction(5, 2), None),
        (" 3 bit ", Fraction(3), None),
        ("120KiB", None, 120 * 1024 * 8),
        ("1.5MiB", None, 1.5 * 1024**2 * 8),
        (".5 GiB", None, 2**32),
        ("900B", None, 7200),
    ],
)
def test_a_budget_in_words(text, mean, total):
    budget = parse_budget(text)
    assert (budget.mean_bits, budget.total_bits) == (mean, total)


@pytest.mark.parametrize("text", ["2.5", "bits", "-2bits", "0bits", "120KB", "1e3KiB", "nanbits", "", "2.5.1bits"])
def test_a_bad_budget_is_a_mistake_in_words(text):
    with pytest.raises(ValueError, match=r"a budget must be a positive number .* got"):
        parse_budget(text)
    if text == "120KB":
        with pytest.raises(ValueError, match="Did you mean 'KiB'"):
            parse_budget(text)


def test_capacity_counts_what_it_says():
    assert parse_budget("2.5bits").capacity(7, outside=1000) == 17  # rounded down; what stands outside does not count
    assert parse_budget("1KiB").capacity(7, outside=192) == 8000


def test_bad_problems_are_mistakes():
    with pytest.raises(ValueError, match=r"the budget leaves 5 bits for these layers, but .* take 6"):
        solve_exact([[Option(2, 6, 0.0)]], 5)
    with pytest.raises(ValueError, match="finite cost"):
        solve_greedy([[Option(2, 6, math.nan)]], 10)
    for layers in ([], [[]]):
        with pytest.raises(ValueError, match="nothing to choose"):
            solve_exact(layers, 5)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(problems())
def test_uniform_widths_are_those_that_all_layers_offer(problem):
    layers, _ = problem
    common = set.intersection(*({o.bits for o in options} for options in layers))
    assume(common)
    for bits, found in uniform_allocations(layers).items():
        assert {options[i].bits for options, i in zip(layers, found.choice, strict=True)} == {bits}
    assert set(uniform_allocations(layers)) == common
