"""A plan under a budget: which layer gets how many bits, and where normalization pays, chosen by what was measured.

The cost of a layer at a width is the size of the change of the loss with that layer alone quantized, of the variant that it will
be trained towards: the best clip where the tail is to go, max scaling where it is to stay. A loss that falls counts as much as one
that rises: rounding knows nothing new, and larger logits, which please the images that the network was trained on, are no gain.
:mod:`wnq.budget` makes the sum of costs least.

Where removing the tail pays, or the data cannot tell, a layer gets ``wnq`` as it is; where it costs, ``wnq`` with ``max_gain=0``:
the same grid, rounding and start, but no gradient that shrinks the largest weight. Both start training at max scaling as measured,
bit for bit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from wnq.budget import SOLVERS, Allocation, Budget, Option, uniform_allocations
from wnq.methods import Method, MethodInfo, get_method
from wnq.names import check_choice, did_you_mean
from wnq.plan import LayerPlan, Plan, make_plan
from wnq.quantizer import FLOAT_BITS
from wnq.sensitivity import Row, Sensitivity

DETACHED = {"max_gain": 0.0}
"""What ``wnq`` gets where normalization costs."""


@dataclass(frozen=True)
class LayerChoice:
    """What one layer got, and why."""

    layer: str
    parameters: int
    bits: int
    change: float
    """Of the loss, with this layer alone quantized: by the best clip where its tail is to go, else by max scaling."""
    row: Row
    """All that was measured at this width."""
    normalized: bool
    """Whether the method keeps the gradient through the maximum here."""

    @property
    def cost(self) -> float:
        """What the solver counts: the size of the change."""
        return abs(self.change)


@dataclass(frozen=True)
class BudgetedPlan:
    """A plan, and how it compares.

    Attributes:
        plan: for :func:`wnq.quantize_`, or a recipe's ``plan``.
        choices: the layers that were chosen, in order.
        found: the choice as the solver returned it; costs and sizes are sums over the layers chosen.
        uniform: width -> the same layers all at that width, with the better variant of each, whatever its size.
        capacity: bits that the budget leaves for these layers.
        outside: bits of everything else: first and last layer, exceptions, float layers.
    """

    plan: Plan
    choices: tuple[LayerChoice, ...]
    found: Allocation
    uniform: Mapping[int, Allocation]
    capacity: int
    outside: int

    @property
    def parameters(self) -> int:
        """Number of weights in the layers chosen."""
        return sum(choice.parameters for choice in self.choices)

    @property
    def mean_bits(self) -> float:
        """Bits a weight in the layers chosen."""
        return self.found.size / self.parameters

    @property
    def size_kib(self) -> float:
        """Size of all weights and float parameters, in KiB, as a plan's table adds it up."""
        return (self.found.size + self.outside) / 8 / 1024

    @property
    def uniform_bits(self) -> int | None:
        """The largest width at which all layers chosen fit the budget; None if none does."""
        return max((bits for bits, plain in self.uniform.items() if plain.size <= self.capacity), default=None)


def plan_for_budget(
    model: nn.Module,
    sensitivity: Sensitivity,
    budget: Budget,
    *,
    method: Method | None = None,
    first_last_bits: int | None = 8,
    keep_float: Sequence[str] = (),
    override: Mapping[str, Method] | None = None,
    residual_bits: int = FLOAT_BITS,
    solver: str = "exact",
) -> BudgetedPlan:
    """Choose a width for every layer that no other rule decides, so that the sum of their costs is least.

    Never worse than a uniform width that fits, on that sum. A sum of single changes is not the change of the whole plan.

    Args:
        model: the network that was measured; only its layers' names and shapes count.
        sensitivity: from :func:`wnq.sensitivity.measure_sensitivity`.
        budget: from :func:`wnq.budget.parse_budget`. Mean bits hold for the layers that are chosen; a size holds for all
            parameters, as a plan's table adds them up: weights at their widths, float layers as float32.
        method: whose options the chosen layers get, beside their widths; by default ``wnq`` with the measured grid and granularity,
            and float inputs. Inputs that were measured get their layer's width, others that of this method. A method other
            than ``wnq`` gets widths only.
        first_last_bits: as :func:`wnq.make_plan`.
        keep_float: likewise.
        override: likewise; such layers are not chosen.
        residual_bits: as :func:`wnq.make_plan`.
        solver: one of :data:`wnq.budget.SOLVERS`.

    Raises:
        ValueError: nothing fits the budget, a layer was not measured or has a finite loss at no width, the measurements are of
            another network, or an option is wrong.
    """
    check_choice(solver, SOLVERS, where="solver")
    method = _base(method, sensitivity)
    plan = make_plan(
        model,
        method,
        first_last_bits=first_last_bits,
        keep_float=keep_float,
        override=override,
        residual_bits=residual_bits,
    )
    free = [entry for entry in plan.layers if entry.method is method and entry.tied_to is None]
    if not free:
        raise ValueError(
            "no layer is left to choose a width for: the first, the last and the exceptions have theirs. "
            "Set first_last_bits to none."
        )
    offers = [_offers(entry, sensitivity, method) for entry in free]
    outside = 8 * 1024 * (sum(e.size_kib for e in plan.layers) + sum(e.size_kib for e in plan.floats))
    outside = round(outside - sum(8 * 1024 * entry.size_kib for entry in free))
    capacity = budget.capacity(sum(entry.parameters for entry in free), outside)
    options = [[Option(c.bits, c.bits * c.parameters, c.cost) for c in offer] for offer in offers]
    if capacity < 0:
        raise ValueError(
            f"budget {budget.text}: the layers that are not chosen alone take {outside / 8 / 1024:.2f} KiB. Allow more, or fewer "
            "exceptions."
        )
    try:
        found = SOLVERS[solver](options, capacity)
    except ValueError as error:
        raise ValueError(f"budget {budget.text}: {error} Allow more, or measure smaller widths.") from None
    choices = tuple(offer[index] for offer, index in zip(offers, found.choice, strict=True))
    methods = {choice.layer: _method(method, choice, sensitivity) for choice in choices}
    layers = tuple(
        replace(entry, method=methods[entry.tied_to or entry.name]) if entry.method is method else entry
        for entry in plan.layers
    )
    return BudgetedPlan(replace(plan, layers=layers), choices, found, uniform_allocations(options), capacity, outside)


def _base(method: Method | None, sensitivity: Sensitivity) -> Method:
    settings = sensitivity.settings
    measured = {"grid": settings.grid, "granularity": settings.granularity}
    if method is None:
        return get_method("wnq", w_bits=settings.bits[-1], a_bits=8 if settings.inputs else FLOAT_BITS, **measured)
    for name, value in measured.items():
        if method.name == "wnq" and method.options[name] != value:
            raise ValueError(
                f"{name} {value!r} was measured, but the method has {method.options[name]!r}; use the same."
            )
    return method


def _offers(entry: LayerPlan, sensitivity: Sensitivity, method: Method) -> list[LayerChoice]:
    """Return a choice for each width that the layer was measured at and the method defines."""
    known = {layer.name: layer for layer in sensitivity.layers}
    if entry.name not in known:
        hint = did_you_mean(entry.name, known)
        raise ValueError(
            f"layer {entry.name!r} was not measured.{hint} Measure it too, give it a method by override, or keep it float."
        )
    if known[entry.name].shape != entry.shape:
        raise ValueError(
            f"layer {entry.name!r} has shape {entry.shape} but was measured with {known[entry.name].shape}: "
            "the measurements are of another network."
        )
    widths = MethodInfo.of(method.name).widths
    rows = [sensitivity.row("alone", entry.name, bits) for bits in sensitivity.settings.bits if bits in widths]
    if not rows or None in rows:
        reason = (
            f"method {method.name!r} defines none of the measured widths"
            if not rows
            else "its measurements are unfinished; finish them by the command that began them"
        )
        raise ValueError(f"layer {entry.name!r}: {reason}.")
    choices = [_choice(entry, row, method) for row in rows if row is not None]
    finite = [choice for choice in choices if math.isfinite(choice.cost)]
    if not finite:
        raise ValueError(
            f"layer {entry.name!r}: the loss is NaN or infinite at every measured width; keep it float, or measure more bits."
        )
    return finite


def _choice(entry: LayerPlan, row: Row, method: Method) -> LayerChoice:
    normalized = method.name == "wnq" and method.options["max_gain"] > 0 and row.tail != "costs"
    variant = row.clip if normalized or method.name != "wnq" else row.max
    return LayerChoice(entry.name, entry.parameters, row.bits, variant.loss_change, row, normalized)


def _method(method: Method, choice: LayerChoice, sensitivity: Sensitivity) -> Method:
    inputs = {"a_bits": choice.bits} if sensitivity.settings.inputs else {}
    detached = DETACHED if method.name == "wnq" and not choice.normalized else {}
    return method.with_options(w_bits=choice.bits, **inputs, **detached)
