"""``wnq plan --budget``: from a file of measurements to a plan, and what is said of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from wnq.cli.screen import Screen

if TYPE_CHECKING:
    from torch import nn

    from wnq.allocation import BudgetedPlan, LayerChoice
    from wnq.recipe import QuantizeSection


def within_budget(
    network: "nn.Module", section: "QuantizeSection", budget: str, sensitivity: Path, solver: str
) -> "BudgetedPlan":
    """Return the plan of least measured cost within a budget, with the other options as they were typed."""
    from wnq.allocation import plan_for_budget
    from wnq.budget import parse_budget
    from wnq.methods import get_method
    from wnq.quantizer import FLOAT_BITS
    from wnq.recipe import overrides_of
    from wnq.sensitivity import load_sensitivity

    limit = parse_budget(budget)
    found = load_sensitivity(sensitivity)
    settings, options = found.settings, dict(section.options)
    if settings.inputs and "a_bits" in options:
        raise ValueError(
            f"{sensitivity} measured the inputs at their layer's width, which they get; leave a_bits out, or measure without "
            "--inputs."
        )
    options.setdefault("a_bits", settings.bits[-1] if settings.inputs else FLOAT_BITS)
    if section.method == "wnq":
        options = {"grid": settings.grid, "granularity": settings.granularity, **options}
    return plan_for_budget(
        network,
        found,
        limit,
        method=get_method(section.method, **options),
        first_last_bits=section.first_last_bits,
        keep_float=section.keep_float,
        override=overrides_of(section),
        residual_bits=section.residual_bits,
        solver=solver,
    )


def show_choice(screen: Screen, made: "BudgetedPlan", budget: str) -> dict[str, Any]:
    """Say what was chosen and how it compares, and return that as JSON types."""
    from wnq.sensitivity.summary import with_error

    rows = [
        {
            "layer": choice.layer,
            "weights": choice.parameters,
            "w_bits": choice.bits,
            "loss change": f"{choice.change:+.4f}",
            "removing the tail saves": with_error(choice.row.gap, choice.row.gap_error),
            "normalization": _verdict(choice),
        }
        for choice in made.choices
    ]
    screen.say("")
    screen.table(rows, title="Chosen by what was measured with each layer alone:")
    count = len(made.choices)
    screen.say(
        f"\n{budget}: {made.mean_bits:.3f} bits a weight in the {count} layer{'s' if count > 1 else ''} chosen "
        f"({made.parameters:,} weights), {made.size_kib:,.2f} KiB in all."
    )
    screen.say(f"The sizes of the changes add up to {made.found.cost:.4f}; {_uniform(made)}.")
    screen.say(_proof(made))
    if not any(layer.method.a_bits <= 8 for layer in made.plan.layers):
        screen.say("The inputs stay float: they were not measured, and --a-bits was not given.")
    return {
        "budget": budget,
        "solver": made.found.solver,
        "cost": made.found.cost,
        "proven_gap": made.found.gap,
        "mean_bits": made.mean_bits,
        "kib": round(made.size_kib, 3),
        "capacity_bits": made.capacity,
        "outside_bits": made.outside,
        "uniform": [
            {"bits": bits, "cost": plain.cost, "size_bits": plain.size, "fits": plain.size <= made.capacity}
            for bits, plain in made.uniform.items()
        ],
        "choices": [
            {
                "layer": choice.layer,
                "parameters": choice.parameters,
                "w_bits": choice.bits,
                "loss_change": choice.change,
                "gap": choice.row.gap,
                "gap_error": choice.row.gap_error,
                "tail": choice.row.tail,
                "normalized": choice.normalized,
            }
            for choice in made.choices
        ],
    }


def _verdict(choice: "LayerChoice") -> str:
    reason = {"pays": "pays", "costs": "costs", "unclear": "cannot be told"}[choice.row.tail]
    return f"{'on' if choice.normalized else 'off'}: {reason}"


def _uniform(made: "BudgetedPlan") -> str:
    """Return how uniform widths compare: the largest that fits and the next one."""
    fits, parts = made.uniform_bits, list[str]()
    if fits is not None:
        parts.append(f"{fits} bits everywhere, the largest uniform width that fits, to {made.uniform[fits].cost:.4f}")
    beyond = min((bits for bits, plain in made.uniform.items() if plain.size > made.capacity), default=None)
    if beyond is not None:
        more = (made.uniform[beyond].size - made.found.size) / 8 / 1024
        parts.append(f"{beyond} bits, which take {more:,.2f} KiB more, to {made.uniform[beyond].cost:.4f}")
    return ", ".join(parts) or "no width was measured in all of these layers"


def _proof(made: "BudgetedPlan") -> str:
    if made.found.gap == 0:
        return "Proven: no other choice of the measured widths within the budget has a smaller sum."
    return f"The least possible sum is at most {made.found.gap:.2g} lower ({made.found.solver})."
