r"""Widths under a size: one choice a layer, the smallest sum of costs, no more bits in all than the budget.

This is the multiple-choice knapsack problem. Nothing here knows of models: layers are lists of :class:`Option`.

:func:`solve_exact` keeps, layer after layer, the (size, cost) pairs that no other pair beats in both, and drops those that a
Lagrangian bound proves to end above a solution that is known already. Sizes are divided by their greatest common divisor g,
so at most ``capacity / g + 1`` pairs remain: time and memory O(layers * widths * pairs * log pairs) at worst, and in practice
a few thousand pairs. The result is exact up to the rounding of float64 sums; should more than ``max_states`` pairs remain,
the least promising are dropped and the result carries a proven lower bound instead of a proof (:attr:`Allocation.gap`).

:func:`solve_greedy` starts with the smallest option everywhere and buys, as long as something fits, the step with the largest
decrease of cost a bit.

Both are never worse than any uniform width that fits the same budget, and the exact one is never worse than the greedy one:
each is compared with those before it is returned. Negative costs are taken as they are.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from wnq.names import did_you_mean

UNITS = {"B": 8, "KiB": 8 * 1024, "MiB": 8 * 1024**2, "GiB": 8 * 1024**3}
"""Bits in a unit of size."""

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Option:
    """What a layer may get: a width, the bits that all its weights take then, and what that costs."""

    bits: int
    size: int
    cost: float


@dataclass(frozen=True)
class Allocation:
    """One option for each layer.

    Attributes:
        choice: position of the option in each layer's list.
        size: bits in all.
        cost: sum of the costs.
        solver: ``exact``, ``greedy``, or ``uniform``.
        lower: what no choice within the capacity can cost less than; ``cost`` itself where the optimum is proven.
    """

    choice: tuple[int, ...]
    size: int
    cost: float
    solver: str
    lower: float

    @property
    def gap(self) -> float:
        """How far above the optimum the cost can be at most; 0: it is the optimum."""
        return max(0.0, self.cost - self.lower)


@dataclass(frozen=True)
class Budget:
    """A limit: mean bits a weight over the layers that may be chosen, or the size of all weights in bits."""

    text: str
    mean_bits: Fraction | None = None
    total_bits: Fraction | None = None

    def capacity(self, weights: int, outside: int) -> int:
        """Return the bits left for the layers that may be chosen.

        Args:
            weights: number of weights in those layers.
            outside: bits that everything else takes; counts for a total size only.
        """
        if self.mean_bits is not None:
            return math.floor(self.mean_bits * weights)
        assert self.total_bits is not None
        return math.floor(self.total_bits) - outside


def parse_budget(text: str) -> Budget:
    """Return the meaning of ``2.5bits`` (mean bits a weight), ``900B``, ``120KiB``, ``1.5MiB`` or ``1GiB`` (total size).

    Raises:
        ValueError: it has another form, or is not positive.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    unit = match.group(2) if match else ""
    amount = Fraction(match.group(1)) if match else Fraction(0)
    if amount > 0 and unit in ("bit", "bits"):
        return Budget(text.strip(), mean_bits=amount)
    if amount > 0 and unit in UNITS:
        return Budget(text.strip(), total_bits=amount * UNITS[unit])
    hint = did_you_mean(unit, UNITS) if unit and unit not in UNITS else ""
    raise ValueError(
        f"a budget must be a positive number with bits (mean bits a weight), {', '.join(UNITS)} (size of all weights), "
        f"such as 2.5bits or 120KiB, got {text!r}.{hint}"
    )


def pareto(options: Sequence[Option]) -> list[int]:
    """Return the positions of the options that no other beats in size and cost, by size; of equals the first stays."""
    kept: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].cost, i)):
        if not kept or options[index].cost < options[kept[-1]].cost:
            kept.append(index)
    return kept


def uniform_allocations(layers: Sequence[Sequence[Option]]) -> dict[int, Allocation]:
    """Return, for each width that every layer offers, all layers at that width."""
    _check(layers)
    found: dict[int, Allocation] = {}
    for bits in sorted({option.bits for option in layers[0]}):
        places = [next((i for i, option in enumerate(options) if option.bits == bits), None) for options in layers]
        if None not in places:
            found[bits] = _allocation(layers, [place for place in places if place is not None], "uniform", -math.inf)
    return found


def solve_greedy(layers: Sequence[Sequence[Option]], capacity: int) -> Allocation:
    """Return the greedy choice, or the best uniform width that fits if that costs less.

    Raises:
        ValueError: even the smallest options exceed the capacity.
    """
    fronts = _fronts(layers, capacity)
    return _greedy(layers, fronts, capacity, _best_multiplier(layers, fronts, capacity))


def solve_exact(layers: Sequence[Sequence[Option]], capacity: int, *, max_states: int = 1_000_000) -> Allocation:
    """Return the choice of least cost (of equally cheap ones the smallest).

    Args:
        layers: the options of each layer.
        capacity: the most bits in all.
        max_states: how many (size, cost) pairs are kept at most; beyond, the result may have a :attr:`Allocation.gap`.

    Raises:
        ValueError: even the smallest options exceed the capacity.
    """
    fronts = _fronts(layers, capacity)
    multiplier = _best_multiplier(layers, fronts, capacity)
    known = _greedy(layers, fronts, capacity, multiplier)
    # Sizes above each layer's smallest, in units of their greatest common divisor.
    extra = [np.array([layers[n][i].size - layers[n][f[0]].size for i in f], np.int64) for n, f in enumerate(fronts)]
    unit = math.gcd(*(int(size) for sizes in extra for size in sizes)) or 1
    sizes = [size // unit for size in extra]
    costs = [np.array([layers[n][i].cost for i in f]) for n, f in enumerate(fronts)]
    room = (capacity - sum(layers[n][f[0]].size for n, f in enumerate(fronts))) // unit
    # What the layers still to come cost at least, a bit of size being worth the multiplier.
    rate = multiplier * unit
    ahead = np.cumsum([0.0, *(float((c + rate * s).min()) for s, c in zip(sizes[::-1], costs[::-1], strict=True))])
    slack = 1e-9 * max(1e-300, sum(float(np.abs(c).max()) for c in costs))
    size, cost = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[Integers, Integers]] = []
    lower = math.inf
    for place, (s, c) in enumerate(zip(sizes, costs, strict=True)):
        total, price = (size[:, None] + s).ravel(), (cost[:, None] + c).ravel()
        bound = price + ahead[len(sizes) - place - 1] - rate * (room - total)
        keep = np.flatnonzero((total <= room) & (bound <= known.cost + slack))
        keep = keep[np.lexsort((price[keep], total[keep]))]
        if len(keep):
            least = np.minimum.accumulate(price[keep])
            keep = keep[np.concatenate([[True], price[keep][1:] < least[:-1]])]
        if len(keep) > max_states:
            order = np.argsort(bound[keep], kind="stable")
            lower = min(lower, float(bound[keep][order[max_states]]))
            keep = np.sort(keep[order[:max_states]])
            keep = keep[np.argsort(total[keep], kind="stable")]
        trail.append((keep // len(s), keep % len(s)))
        size, cost = total[keep], price[keep]
    best = known.choice
    if len(cost):
        at, picked = int(np.argmin(cost)), [0] * len(fronts)
        for place in range(len(fronts) - 1, -1, -1):
            parents, chosen = trail[place]
            picked[place] = fronts[place][int(chosen[at])]
            at = int(parents[at])
        found = _allocation(layers, picked, "exact", lower)
        if (found.cost, found.size) <= (known.cost, known.size):
            best = found.choice
    return _allocation(layers, best, "exact", lower)


SOLVERS: dict[str, Callable[[Sequence[Sequence[Option]], int], Allocation]] = {
    "exact": solve_exact,
    "greedy": solve_greedy,
}
"""Solvers by name."""


def _check(layers: Sequence[Sequence[Option]]) -> None:
    if not layers or not all(layers):
        raise ValueError("there is nothing to choose: no layers, or a layer without any option.")
    for options in layers:
        for option in options:
            if not math.isfinite(option.cost) or option.size < 0:
                raise ValueError(f"an option needs a finite cost and a size of 0 or more, got {option}.")


def _fronts(layers: Sequence[Sequence[Option]], capacity: int) -> list[list[int]]:
    _check(layers)
    fronts = [pareto(options) for options in layers]
    least = sum(options[front[0]].size for options, front in zip(layers, fronts, strict=True))
    if least > capacity:
        raise ValueError(
            f"the budget leaves {capacity:,} bits for these layers, but at their smallest widths they take {least:,}."
        )
    return fronts


def _allocation(layers: Sequence[Sequence[Option]], choice: Sequence[int], solver: str, lower: float) -> Allocation:
    chosen = [options[index] for options, index in zip(layers, choice, strict=True)]
    cost = math.fsum(option.cost for option in chosen)
    return Allocation(tuple(choice), sum(option.size for option in chosen), cost, solver, min(lower, cost))


def _best_multiplier(layers: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], capacity: int) -> float:
    """Return the price of a bit at which choosing each layer by itself just fits: the maximum of the Lagrangian bound."""

    def taken(price: float) -> int:
        return sum(
            layers[n][min(front, key=lambda i: (layers[n][i].cost + price * layers[n][i].size, layers[n][i].size))].size
            for n, front in enumerate(fronts)
        )

    slopes = sorted(
        {
            (layers[n][a].cost - layers[n][b].cost) / (layers[n][b].size - layers[n][a].size)
            for n, front in enumerate(fronts)
            for place, a in enumerate(front)
            for b in front[place + 1 :]
        }
        | {0.0}
    )
    low, high = 0, len(slopes) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if taken(slopes[middle]) <= capacity else (middle + 1, high)
    return slopes[low]


def _greedy(
    layers: Sequence[Sequence[Option]], fronts: Sequence[Sequence[int]], capacity: int, multiplier: float
) -> Allocation:
    choice = [front[0] for front in fronts]
    room = capacity - sum(options[index].size for options, index in zip(layers, choice, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for n, front in enumerate(fronts):
            now = layers[n][choice[n]]
            for index in front[front.index(choice[n]) + 1 :]:
                step = layers[n][index].size - now.size
                gain = (now.cost - layers[n][index].cost) / step
                if step <= room and (best is None or gain > best[0]):
                    best = (gain, n, index)
        if best is None:
            break
        _, n, index = best
        room -= layers[n][index].size - layers[n][choice[n]].size
        choice[n] = index
    cheapest = [
        min(layers[n][i].cost + multiplier * layers[n][i].size for i in front) for n, front in enumerate(fronts)
    ]
    lower = math.fsum([*cheapest, -multiplier * capacity])
    fitting = [plain for plain in uniform_allocations(layers).values() if plain.size <= capacity]
    best_choice = min(
        [_allocation(layers, choice, "greedy", lower), *fitting], key=lambda found: (found.cost, found.size)
    ).choice
    return _allocation(layers, best_choice, "greedy", lower)
