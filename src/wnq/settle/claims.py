"""The paper's claims, each held against numbers with an interval. Any of them can come out either way."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from wnq.compare import Interval, paired_interval
from wnq.settle.experiment import ATTACHED, DETACHED, NONE
from wnq.settle.measures import RunMeasure

SUPPORTED, CONTRADICTED, UNDECIDED, MISSING = "supported", "contradicted", "undecided", "not measured"

Runs = Mapping[str, Mapping[int, RunMeasure]]
"""Arm -> seed -> run, of one width."""


@dataclass(frozen=True)
class Test:
    """One number held against a claim.

    Attributes:
        name: what is measured.
        unit: ``points``, ``share`` or ``factor``; a factor is the exponential of a mean of logarithms.
        expected: ``above`` or ``below``: where the claim puts it.
        chance: the value that would say nothing.
        estimate: mean over seeds.
        low: lower end of the 95 % interval over seeds.
        high: upper end.
        values: one a seed.
        verdict: ``supported`` if the interval lies on the claimed side of ``chance``, ``contradicted`` if on the other,
            ``undecided`` if it holds ``chance``, ``not measured`` without two seeds.
    """

    name: str
    unit: str
    expected: str
    chance: float
    estimate: float | None
    low: float | None
    high: float | None
    values: tuple[float, ...]
    verdict: str


@dataclass(frozen=True)
class Claim:
    """One claim at one width.

    Attributes:
        letter: a to e.
        text: the claim.
        tests: what it is held against.
        verdict: ``supported`` if all tests support it, ``contradicted`` if one contradicts it, ``undecided`` otherwise.
    """

    letter: str
    text: str
    tests: tuple[Test, ...]
    verdict: str


CLAIMS = {
    "a": "the largest weight moves toward zero",
    "b": "the tail goes",
    "c": "the quantization error falls",
    "d": "accuracy rises",
    "e": "it is the gradient through the maximum that does it",
}


def hold(runs: Runs, resolution: float) -> list[Claim]:
    """Hold every claim against the runs of one width.

    Args:
        runs: of all arms.
        resolution: one evaluation image, in percent: what an accuracy cannot tell apart.
    """
    attached, detached, none = (runs.get(arm, {}) for arm in (ATTACHED, DETACHED, NONE))
    peak, crest, error = (_change(column) for column in ("peak", "crest", "error"))
    tests: dict[str, list[Test]] = {
        "a": [
            _share("attached: records in which descent moves it toward zero", attached, None),
            _factor("attached: largest weight, end over start", attached, None, peak),
        ],
        "b": [_factor("attached: crest factor, end over start", attached, None, crest)],
        "c": [
            _factor("attached: relative error, end over start", attached, None, error),
            _factor("relative error at the end, attached over no normalization", attached, none, _end("error")),
        ],
        "d": [_points("accuracy, attached minus no normalization", attached, none, resolution)],
        "e": [
            _share(
                "records in which descent moves the largest weight toward zero, attached minus detached",
                attached,
                detached,
            ),
            _factor("largest weight at the end, attached over detached", attached, detached, _end("peak")),
            _factor("crest factor at the end, attached over detached", attached, detached, _end("crest")),
            _factor("relative error at the end, attached over detached", attached, detached, _end("error")),
            _points("accuracy, attached minus detached", attached, detached, resolution),
        ],
    }
    return [
        Claim(letter, text, tuple(tests[letter]), combined(test.verdict for test in tests[letter]))
        for letter, text in CLAIMS.items()
    ]


def combined(verdicts: Iterable[str]) -> str:
    """Return the verdict of several: one that contradicts decides, and all must support."""
    found = list(verdicts)
    if CONTRADICTED in found:
        return CONTRADICTED
    if not found or MISSING in found:
        return MISSING
    return SUPPORTED if all(verdict == SUPPORTED for verdict in found) else UNDECIDED


def _change(column: str) -> Callable[[RunMeasure], float]:
    return lambda run: run.log_ratio(f"{column}_end", f"{column}_start")


def _end(column: str) -> Callable[[RunMeasure], float]:
    return lambda run: run.mean(
        lambda layer: math.log(value) if (value := getattr(layer, f"{column}_end")) > 0 else math.nan
    )


def _share(name: str, arm: Mapping[int, RunMeasure], other: Mapping[int, RunMeasure] | None) -> Test:
    def values(runs: Mapping[int, RunMeasure]) -> dict[int, float]:
        return {seed: run.mean(lambda layer: layer.toward) for seed, run in runs.items()}

    # Shares are counts of records: seeds that agree do so to one record at best.
    counts = [sum(layer.records for layer in run.layers) for runs in (arm, other or {}) for run in runs.values()]
    resolution = 1 / max(1, min(counts, default=1))
    first = values(arm)
    if other is None:
        return _test(name, "share", "above", 0.5, first, dict.fromkeys(first, 0.0), resolution, lambda value: value)
    return _test(name, "share", "above", 0.0, first, values(other), resolution, lambda value: value)


def _factor(
    name: str,
    arm: Mapping[int, RunMeasure],
    other: Mapping[int, RunMeasure] | None,
    value: Callable[[RunMeasure], float],
) -> Test:
    first = {seed: value(run) for seed, run in arm.items()}
    second = dict.fromkeys(first, 0.0) if other is None else {seed: value(run) for seed, run in other.items()}
    return _test(name, "factor", "below", 0.0, first, second, 0.0, math.exp)


def _points(name: str, arm: Mapping[int, RunMeasure], other: Mapping[int, RunMeasure], resolution: float) -> Test:
    first, second = ({seed: run.accuracy for seed, run in runs.items()} for runs in (arm, other))
    return _test(name, "points", "above", 0.0, first, second, resolution, lambda value: value)


def _test(
    name: str,
    unit: str,
    expected: str,
    chance: float,
    first: Mapping[int, float],
    second: Mapping[int, float],
    resolution: float,
    shown: Callable[[float], float],
) -> Test:
    seeds = [s for s in sorted(first.keys() & second.keys()) if math.isfinite(first[s]) and math.isfinite(second[s])]
    values = tuple(shown(first[seed] - second[seed]) for seed in seeds)
    if len(seeds) < 2:
        return Test(name, unit, expected, shown(chance), None, None, None, values, MISSING)
    interval = paired_interval([first[s] for s in seeds], [second[s] for s in seeds], resolution=resolution)
    return Test(
        name, unit, expected, shown(chance),
        shown(interval.difference), shown(interval.low), shown(interval.high),
        values, _verdict(interval, chance, expected),
    )  # fmt: skip


def _verdict(interval: Interval, chance: float, expected: str) -> str:
    if interval.low <= chance <= interval.high:
        return UNDECIDED
    above = interval.low > chance
    return SUPPORTED if above == (expected == "above") else CONTRADICTED
