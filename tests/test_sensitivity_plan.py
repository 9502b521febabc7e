"""From measurements to a plan: against all choices there are, the sizes of a plan's table, and a language model."""

import copy
import itertools
import json
import math
import re
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wnq
from wnq.allocation import plan_for_budget
from wnq.budget import parse_budget
from wnq.plan_table import plan_rows
from wnq.sensitivity import (
    Change,
    Prober,
    Row,
    Sensitivity,
    Settings,
    load_sensitivity,
    measure_sensitivity,
    quantizable_layers,
)

ROOT = Path(__file__).resolve().parent.parent
BITS = (1, 2, 3, 4, 8)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16),
        nn.ReLU(),
        nn.Linear(16, 24),
        nn.LayerNorm(24),
        nn.ReLU(),
        nn.Linear(24, 12),
        nn.Linear(12, 5),
    )


def measured_by_chance(model, seed, settings=None):
    """Return made-up measurements: harm that falls with the width, some of it negative, gaps of both signs, one NaN."""
    settings = settings or Settings(bits=BITS)
    generator = torch.Generator().manual_seed(seed)

    def draw():
        return torch.randn((), generator=generator).item()

    rows = []
    layers = quantizable_layers(model)
    for layer in layers:
        for bits in settings.bits:
            maximum, clip = (draw() * 4.0**-bits for _ in range(2))
            gap = maximum - clip
            error = abs(0.4 * draw() * gap)
            rows.append(
                Row(
                    "alone",
                    layer.name,
                    bits,
                    Change(1 + maximum, maximum, error, 0),
                    Change(1 + clip, clip, error, 0),
                    gap,
                    error,
                )
            )
    broken = Change(math.nan, math.nan, math.nan, 3)
    rows[0] = replace(rows[0], max=broken, clip=broken, gap=math.nan, gap_error=math.nan)
    return Sensitivity(settings, layers, 100, 1.0, None, tuple(rows), {})


def cost_of(sensitivity, name, bits):
    row = sensitivity.row("alone", name, bits)
    cost = abs((row.max if row.tail == "costs" else row.clip).loss_change)
    return cost if math.isfinite(cost) else math.inf


def kib(plan):
    return sum(row["parameters"] * row["w_bits"] for row in plan_rows(plan)) / 8 / 1024


@pytest.mark.parametrize("solver", ["exact", "greedy"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("first_last", [8, None])
def test_a_plan_fits_and_nothing_that_fits_is_better(seed, first_last, solver):
    model = network()
    sensitivity = measured_by_chance(model, seed)
    free = ["0", "2", "5", "6"] if first_last is None else ["2", "5"]
    weights = {layer.name: layer.parameters for layer in sensitivity.layers}
    for budget in ("2bits", "2.5bits", "3bits", "7.9bits", "0.7KiB", "0.9KiB"):
        limit = parse_budget(budget)
        if first_last is None and budget == "0.7KiB":
            continue  # what the table below says is then too little for the widths that do not break
        made = plan_for_budget(model, sensitivity, limit, first_last_bits=first_last, solver=solver)
        planned = {entry.name: entry.method.w_bits for entry in made.plan.layers}
        assert [choice.layer for choice in made.choices] == free
        assert all(planned[name] == 8 for name in weights if name not in free)

        def fits(widths, limit=limit):
            if limit.mean_bits is not None:
                return sum(weights[n] * b for n, b in widths.items()) <= limit.mean_bits * sum(
                    weights[n] for n in widths
                )
            others = sum(weights[n] * 8 for n in weights if n not in widths) + 48 * 32  # and the LayerNorm's parameters
            return sum(weights[n] * b for n, b in widths.items()) + others <= limit.total_bits

        chosen = {name: planned[name] for name in free}
        assert fits(chosen)
        cost = math.fsum(cost_of(sensitivity, name, bits) for name, bits in chosen.items())
        assert made.found.cost == cost
        best = min(
            math.fsum(cost_of(sensitivity, name, bits) for name, bits in zip(free, widths, strict=True))
            for widths in itertools.product(BITS, repeat=len(free))
            if fits(dict(zip(free, widths, strict=True)))
        )
        assert made.found.cost - made.found.gap <= best * (1 + 1e-9)
        assert made.found.gap > 0 or cost == pytest.approx(best, rel=1e-9)
        uniform = {
            bits: math.fsum(cost_of(sensitivity, name, bits) for name in free)
            for bits in BITS
            if fits(dict.fromkeys(free, bits))
        }
        assert all(cost <= other for other in uniform.values())
        finite = [bits for bits, other in uniform.items() if math.isfinite(other)]
        assert made.uniform_bits == (max(finite) if finite else None)
        assert made.mean_bits == sum(weights[n] * b for n, b in chosen.items()) / sum(weights[n] for n in free)
        assert made.size_kib == pytest.approx(kib(made.plan), rel=1e-12)


def test_normalization_stays_where_it_pays_or_nobody_can_tell():
    model, tails = network(), set()
    for seed in range(4):
        sensitivity = measured_by_chance(model, seed)
        made = plan_for_budget(model, sensitivity, parse_budget("3bits"), first_last_bits=None)
        for choice in made.choices:
            tails.add(choice.row.tail)
            method, stays = made.plan[choice.layer], choice.row.tail != "costs"
            assert (method.name, method.a_bits, method.options["max_gain"]) == ("wnq", 32, float(stays))
            assert choice.normalized == stays
            assert choice.change == (choice.row.clip if stays else choice.row.max).loss_change
    assert tails == {"pays", "costs", "unclear"}
    # Asked for without normalization, no layer gets it, and all costs are those of max scaling.
    detached = wnq.get_method("wnq", a_bits=4, max_gain=0.0)
    made = plan_for_budget(model, sensitivity, parse_budget("3bits"), method=detached)
    assert all(choice.change == choice.row.max.loss_change for choice in made.choices)
    assert all(entry.method.options["max_gain"] == 0 for entry in made.plan.layers)


def test_rules_decide_first():
    model, sensitivity = network(), measured_by_chance(network(), 2)
    lsq = wnq.get_method("lsq", w_bits=5, a_bits=5)
    made = plan_for_budget(
        model, sensitivity, parse_budget("2.1KiB"), first_last_bits=6, keep_float=["2"], override={"0": lsq}
    )
    assert [choice.layer for choice in made.choices] == ["5"]
    assert made.plan["0"] is lsq and made.plan["6"].w_bits == 6
    assert {left.name for left in made.plan.floats} == {"2", "3"}
    assert made.outside == 160 * 5 + (384 + 24) * 32 + 48 * 32 + 60 * 6  # a float layer with its bias
    assert made.size_kib == pytest.approx(kib(made.plan), rel=1e-12)


def test_another_method_gets_widths_only():
    model, sensitivity = network(), measured_by_chance(network(), 2)
    lsq = wnq.get_method("lsq", a_bits=4)  # defines 2 to 8 bits
    made = plan_for_budget(model, sensitivity, parse_budget("2.5bits"), method=lsq)
    for choice in made.choices:
        assert made.plan[choice.layer].name == "lsq" and made.plan[choice.layer].a_bits == 4
        assert choice.bits in (2, 3, 4, 8) and choice.change == choice.row.clip.loss_change


def test_measured_inputs_get_their_layers_width():
    model = network()
    sensitivity = measured_by_chance(
        model, 3, Settings(bits=(2, 4), inputs=True, grid="symmetric", granularity="channel")
    )
    made = plan_for_budget(model, sensitivity, parse_budget("3bits"))
    for choice in made.choices:
        method = made.plan[choice.layer]
        assert (method.a_bits, method.options["grid"], method.options["granularity"]) == (
            choice.bits,
            "symmetric",
            "channel",
        )
    assert made.plan["0"].a_bits == 8


def test_mistakes_are_said():
    model, sensitivity = network(), measured_by_chance(network(), 0)

    def refused(words, *, model=model, sensitivity=sensitivity, budget="3bits", **options):
        with pytest.raises(ValueError, match=words):
            plan_for_budget(model, sensitivity, parse_budget(budget), **options)

    refused("budget 0.5bits: the budget leaves 336 bits .* Allow more", budget="0.5bits")
    refused(r"the layers that are not chosen alone take 0.40 KiB\. Allow more", budget="100B")
    refused("solver must be one of 'exact', 'greedy', got 'best'", solver="best")
    refused("no layer is left to choose", keep_float=["2", "5"])
    refused("grid 'full' was measured, but the method has 'symmetric'", method=wnq.get_method("wnq", grid="symmetric"))
    refused(
        "defines none of the measured widths",
        method=wnq.get_method("twn"),
        sensitivity=measured_by_chance(model, 0, Settings(bits=(3, 4))),
    )
    other = nn.Sequential(
        nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 25), nn.LayerNorm(25), nn.ReLU(), nn.Linear(25, 5)
    )
    refused(r"layer '2' has shape \(25, 16\) but was measured with \(24, 16\)", model=other)
    refused("layer '2' was not measured", sensitivity=replace(sensitivity, layers=sensitivity.layers[2:]))
    refused("layer '5'.* unfinished", sensitivity=replace(sensitivity, rows=sensitivity.rows[:13]))
    broken = Change(math.nan, math.nan, math.nan, 3)
    rows = tuple(replace(row, max=broken, clip=broken) if row.layer == "5" else row for row in sensitivity.rows)
    refused(
        "layer '5': the loss is NaN or infinite at every measured width", sensitivity=replace(sensitivity, rows=rows)
    )


class Attention(nn.Module):
    """One head, causal, of linear layers."""

    def __init__(self, width):
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class Language(nn.Module):
    """A transformer of one block whose head shares the embedding."""

    def __init__(self, tokens=12, width=16):
        super().__init__()
        self.embed = nn.Embedding(tokens, width)
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, *, tokens):
        x = self.embed(tokens)
        x = x + self.attention(self.norm1(x))
        return {"logits": self.head(x + self.down(self.up(self.norm2(x)).relu()))}


def text_loss(outputs, labels):
    return F.cross_entropy(outputs["logits"].transpose(1, 2), labels, reduction="none").mean(1)


def next_is_right(outputs, labels):
    return (outputs["logits"].argmax(2) == labels).double().mean(1)


def test_a_language_model_with_its_own_batches_and_loss():
    torch.manual_seed(0)
    model = Language()
    generator = torch.Generator().manual_seed(1)
    # Counting up by one or two, told by the first token: the second neighbour is needed.
    start, stride = (torch.randint(1, high, (256, 1), generator=generator) for high in (13, 3))
    text = (start + stride * torch.arange(9)) % 12
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        text_loss(model(tokens=text[:, :-1]), text[:, 1:]).mean().backward()
        optimizer.step()
    batches = [({"tokens": part[:, :-1]}, part[:, 1:]) for part in text.split(64)]
    prober = Prober(model, batches, Settings(bits=(2, 3, 4, 8)), loss=text_loss, correct=next_is_right)
    sensitivity = measure_sensitivity(prober)
    names = ["embed", "attention.qkv", "attention.out", "up", "down"]
    assert [layer.name for layer in sensitivity.layers] == names and sensitivity.samples == 256
    assert sensitivity.accuracy is not None and sensitivity.accuracy > 80  # it learned
    # Eight bits do next to nothing, two bits do harm, in every layer.
    for name in names:
        small, large = (sensitivity.row("alone", name, bits).clip for bits in (2, 8))
        assert abs(large.loss_change) < 0.01 < small.loss_change and small.accuracy_change < 0
    made = plan_for_budget(model, sensitivity, parse_budget("3bits"))
    # The embedding stands first and, tied, last: eight bits.
    assert made.plan["embed"].w_bits == made.plan["head"].w_bits == 8
    assert [choice.layer for choice in made.choices] == names[1:]
    quantized = wnq.quantize_(copy.deepcopy(model), made.plan)
    with torch.no_grad():
        losses = torch.cat([text_loss(quantized(**given), labels) for given, labels in batches]).double()
    whole = {entry.name: (entry.method.w_bits, "max") for entry in made.plan.layers if entry.tied_to is None}
    # The embedding's grid is symmetric there; without it, the plan is what the prober ran.
    rest = {name: choice for name, choice in whole.items() if name != "embed"}
    loose = wnq.quantize_(
        copy.deepcopy(model), replace(made.plan, layers=tuple(e for e in made.plan.layers if e.name in rest))
    )
    with torch.no_grad():
        expected = torch.cat([text_loss(loose(**given), labels) for given, labels in batches]).double()
    assert torch.equal(prober.run(rest).losses, expected)
    assert torch.isfinite(losses).all()
    free = plan_for_budget(model, sensitivity, parse_budget("3bits"), first_last_bits=None)
    assert free.plan["head"] is free.plan["embed"] and free.choices[0].layer == "embed"
    assert free.size_kib == pytest.approx(kib(free.plan), rel=1e-12)
    assert re.fullmatch(r"[0-9a-f]{64}", sensitivity.fingerprint["weights"])


def test_the_docs_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "sensitivity.md").read_text(encoding="utf-8")
    names = {}
    exec(compile(re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)[0], "sensitivity", "exec"), names)
    assert {name for name, *_ in wnq.quantized_layers(names["model"])} == {"0", "1", "3"}
    assert names["chosen"].mean_bits <= 3 and names["sensitivity"].complete
    assert load_sensitivity("sensitivity.json") == names["sensitivity"]


def test_the_docs_table_is_the_committed_one():
    page = (ROOT / "docs" / "sensitivity.md").read_text(encoding="utf-8")
    [results] = sorted((ROOT / "benchmarks" / "results").glob("sensitivity_*.json"))
    rows = json.loads(results.read_text(encoding="utf-8"))["rows"]
    shown = re.findall(r"^\| (\d\.\dbits) \| (planned|uniform) \| (.*) \|$", page, re.M)
    assert len(shown) == 8
    for budget, arm, cells in shown:
        own = [row for row in rows if (row["budget"], row["arm"]) == (budget, arm)]
        assert len(own) == 5
        for cell, (key, places) in zip(
            cells.split(" | "), (("start_loss", 3), ("start_accuracy", 2), ("loss", 4), ("accuracy", 2)), strict=True
        ):
            values = [row[key] for row in own]
            assert cell == f"{statistics.mean(values):.{places}f} ± {statistics.stdev(values):.{places}f}"
    # On the metric itself no plan is worse than the uniform width of its budget.
    sums = {(row["budget"], row["arm"], row["seed"]): row["metric"] for row in rows}
    assert all(
        value <= sums[budget, "uniform", seed] for (budget, arm, seed), value in sums.items() if arm == "planned"
    )
