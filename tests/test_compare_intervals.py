"""The statistics of a comparison against scipy, and what the ranks make of them."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from wnq.compare import (
    Cell,
    Comparison,
    Contender,
    Outcome,
    cells_of,
    paired_interval,
    t_quantile,
    table_rows,
    welch_interval,
)
from wnq.compare.outcome import accuracy_text, interval_text, rank_text
from wnq.recipe import Recipe


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 2.7, 3, 4.5, 9, 30, 250.25, 1e4])
@pytest.mark.parametrize("probability", [0.5, 0.6, 0.95, 0.975, 0.999, 0.025])
def test_t_quantile_is_scipys(probability: float, freedom: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-8, abs=1e-12)


@pytest.mark.parametrize(("probability", "freedom"), [(0, 3), (1, 3), (0.5, 0.9), (0.5, math.inf), (math.nan, 3)])
def test_t_quantile_out_of_range(probability: float, freedom: float) -> None:
    with pytest.raises(ValueError, match="t_quantile needs"):
        t_quantile(probability, freedom)


@pytest.mark.parametrize("count", [2, 3, 5, 20])
def test_paired_interval_is_scipys(count: int) -> None:
    generator = np.random.default_rng(count)
    first, second = generator.normal(90, 1, count), generator.normal(89, 2, count)
    expected = stats.ttest_rel(first, second).confidence_interval(0.95)
    interval = paired_interval(first.tolist(), second.tolist())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)
    assert interval.difference == pytest.approx((first - second).mean())
    assert interval.kind == f"paired t, {count} seeds"


@pytest.mark.parametrize(("n", "m"), [(2, 2), (3, 5), (10, 2), (7, 30)])
def test_welch_interval_is_scipys(n: int, m: int) -> None:
    generator = np.random.default_rng(n * m)
    first, second = generator.normal(90, 1, n), generator.normal(89, 3, m)
    expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    interval = welch_interval(first.tolist(), second.tolist())
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_intervals_of_constants_have_no_width() -> None:
    for interval in (paired_interval([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]), welch_interval([2.0, 2.0], [1.0, 1.0, 1.0])):
        assert (interval.low, interval.difference, interval.high) == (1, 1, 1)
        assert not interval.holds_zero
    assert paired_interval([2.0, 3.0], [2.0, 3.0]).holds_zero
    with pytest.raises(ValueError, match="two pairs"):
        paired_interval([1.0], [2.0])
    with pytest.raises(ValueError, match="two pairs"):
        paired_interval([1.0, 2.0], [2.0, 1.0, 3.0])
    with pytest.raises(ValueError, match="two values of each"):
        welch_interval([1.0], [2.0, 3.0])


def test_the_interval_covers_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    trials = 2000
    covered = 0
    for _ in range(trials):
        interval = paired_interval(generator.normal(0.3, 1, 4).tolist(), generator.normal(0, 2, 4).tolist())
        covered += interval.low <= 0.3 <= interval.high
    # Three standard errors of a binomial share around 95 %.
    assert covered / trials == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / trials))


# Ranks


def rows_of(seeds: int, found: dict[str, dict[int, Any]], floats: float = 95.0) -> dict[str, dict[str, Any]]:
    """Return the table's rows by method for made-up accuracies: label -> seed -> accuracy, or a state."""
    comparison = Comparison(Recipe(), tuple(Contender(label, "wnq") for label in found), ((2, 2),), tuple(range(seeds)))

    def outcome(cell: Cell) -> Outcome:
        value = floats if cell.label == "float" else found[cell.label].get(cell.seed, "not run")
        return Outcome(value) if isinstance(value, str) else Outcome("done", accuracy=value, best_accuracy=value + 1)

    rows = table_rows(comparison, {cell.name: (cell, outcome(cell)) for cell in cells_of(comparison)})
    return {row["label"]: row for row in rows}


def seeded(*values: Any) -> dict[int, Any]:
    return dict(enumerate(values))


def test_ranks_share_the_first_place_where_the_interval_holds_zero() -> None:
    rows = rows_of(
        3,
        {
            "worst": seeded(80.0, 80.1, 80.2),
            "best": seeded(90.0, 91.0, 92.0),
            "close": seeded(90.4, 90.6, 91.3),
            "behind": seeded(89.0, 90.01, 91.0),  # a smaller spread of the differences: told apart
            "wide": seeded(95.0, 80.0, 84.0),
        },
    )
    assert list(rows) == ["best", "close", "behind", "wide", "worst"]
    assert {label: rank_text(row) for label, row in rows.items()} == {
        "best": "1=", "close": "1=", "behind": "3", "wide": "1=", "worst": "5",
    }  # fmt: skip
    expected = stats.ttest_rel([90, 91, 92], [90.4, 90.6, 91.3]).confidence_interval(0.95)
    assert (rows["close"]["low"], rows["close"]["high"]) == pytest.approx((expected.low, expected.high))
    assert interval_text(rows["close"]) == f"{rows['close']['behind']:.2f} [{expected.low:.2f}, {expected.high:.2f}]"
    assert interval_text(rows["best"]) == "–"
    assert rows["best"]["drop"] == pytest.approx(4)
    assert rows["best"]["best_epoch_mean"] == pytest.approx(92)


def test_the_best_alone_has_no_equals() -> None:
    rows = rows_of(3, {"a": seeded(90.0, 91.0, 92.0), "b": seeded(80.0, 81.1, 82.0)})
    assert (rank_text(rows["a"]), rank_text(rows["b"])) == ("1", "2")


def test_one_seed_has_no_ranks() -> None:
    rows = rows_of(1, {"a": seeded(90.0), "b": seeded(80.0)})
    assert list(rows) == ["a", "b"]
    assert all(row["rank"] is None and row["std"] is None for row in rows.values())
    assert accuracy_text(rows["a"]) == "90.00"


def test_seeds_that_are_not_common_take_welchs_interval() -> None:
    rows = rows_of(4, {"a": seeded(90.0, 91.0, 92.0, 90.5), "b": seeded(80.0, 81.0), "c": {3: 85.0}})
    assert rows["b"]["interval"] == "Welch, 4 and 2 seeds"
    assert (rows["c"]["rank"], rows["c"]["low"]) == (None, None)
    assert interval_text(rows["c"]).endswith("[no interval]")
    assert accuracy_text(rows["b"]).endswith("(2 of 4; 2 not run)")


def test_a_method_that_diverged_stands_behind_whatever_its_other_seeds_say() -> None:
    rows = rows_of(
        3, {"lucky": seeded(99.0, 99.0, "diverged"), "steady": seeded(80.0, 81.0, 80.5), "none": seeded("failed")}
    )
    assert list(rows) == ["steady", "lucky", "none"]
    assert [rank_text(row) for row in rows.values()] == ["1", "–", "–"]
    assert accuracy_text(rows["lucky"]) == "99.00 ± 0.00 (2 of 3; 1 diverged)"
    assert accuracy_text(rows["none"]) == "1 failed, 2 not run"
    assert rows["lucky"]["drop"] == pytest.approx(-4)


def test_seeds_that_happen_to_agree_leave_the_resolution() -> None:
    # One image of 359 apart, on every seed: without the floor the interval would have no width at all.
    image = 100 / 359
    first, second = [image, 2 * image, 3 * image], [0.0, image, 2 * image]
    assert not paired_interval(first, second).holds_zero
    interval = paired_interval(first, second, resolution=image)
    assert interval.holds_zero
    assert interval.high - interval.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * image / math.sqrt(18))
    # Where the seeds spread, the floor changes nothing.
    wide = [0.0, 5.0, -3.0]
    assert paired_interval(wide, second, resolution=image) == paired_interval(wide, second)
    constant = welch_interval([image, image], [0.0, 0.0], resolution=image)
    assert constant.high - constant.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * image / math.sqrt(12))
