"""What a verdict says, in sentences made from its numbers: as plainly against the claims as for them."""

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wnq.compare import t_quantile
from wnq.drawing.text import COUNTS, listed, number
from wnq.settle.claims import CONTRADICTED, MISSING, SUPPORTED, UNDECIDED

SIGNS = {SUPPORTED: "✓", CONTRADICTED: "✕", UNDECIDED: "~", MISSING: "–"}
"""Beside the word of each verdict, so that none is told by colour alone."""

ASKS = {
    "a": "In the attached arm, the gradient at the largest weight of a layer should point so that descent shrinks it, and the "
    "weight should end smaller than it began. Weight decay shrinks weights as well, in every arm: whether it is the gradient is "
    "the question of claim e.",
    "b": "In the attached arm, the crest factor, max|w| / rms, should fall: the largest weight comes closer to the others.",
    "c": "In the attached arm, the relative error |w − w_q|² / |w|² should fall, and end below that of the arm without "
    "normalization.",
    "d": "The accuracy after the last epoch should be above that of the arm without normalization.",
    "e": "The arms attached and detached differ in nothing but the gradient through the maximum. What the claims say should come "
    "out stronger with it than without.",
}
"""What each claim predicts here, by its letter."""

LOST = (
    "Their seeds are missing from every number of their arm; an arm that lost seeds is judged by the others only. That a run "
    "fails or diverges speaks against its arm, and no interval counts it."
)

Json = Mapping[str, Any]


def value_of(value: Any) -> float:
    """Return a number of the verdict, NaN where it holds none."""
    return math.nan if value is None else float(value)


def mean_of(values: Iterable[Any]) -> float:
    """Return the mean of the finite values, NaN if there is none."""
    finite = [value for item in values if math.isfinite(value := value_of(item))]
    return statistics.fmean(finite) if finite else math.nan


def amount(test: Json, value: float | None, *, unit: bool = True) -> str:
    """Return a value in the unit of its test: ``×0.717``, ``+0.28 points``, ``87.5 %``, ``+50.0 %`` for a difference of shares."""
    if value is None or not math.isfinite(value):
        return "–"
    if test["unit"] == "factor":
        near = abs(value - 1)  # two digits of what makes the difference
        return f"×{value:.{min(6, 1 - math.floor(math.log10(near)))}f}" if 1e-6 < near < 0.1 else f"×{number(value)}"
    sign = "+" if test["chance"] == 0 and value else ""
    text = f"{value:{sign}.2f}" if test["unit"] == "points" else f"{100 * value:{sign}.1f} %"
    return text.replace("-", "−") + (" points" if unit and test["unit"] == "points" else "")


def interval(test: Json) -> str:
    """Return ``×0.565 to ×0.909``, or a dash."""
    if test["low"] is None or test["high"] is None:
        return "–"
    return f"{amount(test, test['low'], unit=False)} to {amount(test, test['high'], unit=False)}"


def wanted(test: Json) -> str:
    """Return where the claim puts the number, next to what chance would give: ``below ×1``."""
    chance = "×1" if test["unit"] == "factor" else "0" if not test["chance"] else f"{100 * test['chance']:g} %"
    return f"{test['expected']} {chance}"


def finding(test: Json) -> str:
    """Return one test in words, with its numbers."""
    chance = wanted(test).split(" ", 1)[1]
    if test["estimate"] is None:
        return f"{test['name']}: not measured, two seeds are needed and {COUNTS[min(len(test['values']), 1)]} has it"
    said = f"{test['name']}: {amount(test, test['estimate'])}, 95 % interval {interval(test)}"
    if test["verdict"] == UNDECIDED:
        return f"{said}, which holds {chance}"
    side = "as claimed" if test["verdict"] == SUPPORTED else "the opposite of the claim"
    above = (test["verdict"] == SUPPORTED) == (test["expected"] == "above")
    return f"{said}, {'above' if above else 'below'} {chance}: {side}"


def reason(claim: Json) -> str:
    """Return why a claim has its verdict at one width."""
    tests: Sequence[Json] = claim["tests"]
    told = {verdict: [test for test in tests if test["verdict"] == verdict] for verdict in SIGNS}
    if claim["verdict"] == SUPPORTED:
        every = {1: "its test supports", 2: "both tests support"}.get(len(tests), f"all {len(tests)} tests support")
        return f"{every} it."
    against = told[claim["verdict"]]
    text = "; ".join(finding(test) for test in against)
    rest = [
        f"{len(found)} of {len(tests)} tests {'supports' if len(found) == 1 else 'support'} it"
        if verdict == SUPPORTED
        else f"{len(found)} of {len(tests)} {'is' if len(found) == 1 else 'are'} {verdict}"
        for verdict, found in told.items()
        if found and verdict != claim["verdict"]
    ]
    return "; ".join([text, *rest]) + "."


def question(verdict: Json) -> str:
    """Return what was asked, in one sentence."""
    recipe = verdict["comparison"]["recipe"]
    return (
        "Does it help to divide the weights of a layer by the largest of them and to let the gradient through that division: does "
        "the tail go, does the quantization error fall, does accuracy rise, and is it that gradient that does it? Asked of "
        f"{recipe['model']['name']} on {recipe['data']['name']}."
    )


def answer(verdict: Json) -> str:
    """Return what came of it, in one sentence."""
    overall: Sequence[Json] = verdict["overall"]
    widths = [width["bits"] for width in verdict["widths"] if not width["control"]]
    parts: list[str] = []
    for word in SIGNS:
        found = [f"{row['letter']} ({row['claim']})" for row in overall if row["verdict"] == word]
        if found:
            count = COUNTS[len(found)] if len(found) < len(COUNTS) else str(len(found))
            parts.append(f"{count} {'is' if len(found) == 1 else 'are'} {word}: {listed(found)}")
    where = f" at {listed(widths)}" if widths else ", with no width that counts"
    total = COUNTS[len(overall)] if len(overall) < len(COUNTS) else str(len(overall))
    return f"Of the {total} claims{where}, {'; '.join(parts)}."


def rule() -> str:
    """Return how verdicts combine."""
    return (
        "A claim is supported at a width if every test supports it, contradicted if one test contradicts it, not measured "
        "if one lacks its seeds, and undecided otherwise; over the widths the same rule holds. So a claim can be "
        "contradicted over all and supported at some width."
    )


def notes(verdict: Json) -> list[str]:
    """Return how to read the numbers and what they do not cover, one paragraph each."""
    comparison, images = verdict["comparison"], verdict["images"]["evaluation"]
    seeds = len(comparison["seeds"])
    reach = t_quantile(0.975, seeds - 1) if seeds > 1 else math.inf
    resolution = number(100 / images) if images else "–"
    counted = [test for width in verdict["widths"] if not width["control"] for test in tests_of(width)]
    beside = sum(len(tests_of(width)) for width in verdict["widths"] if width["control"])
    measured = sum(test["verdict"] != MISSING for test in counted)
    decided = sum(test["verdict"] in (SUPPORTED, CONTRADICTED) for test in counted)
    controls = f", and {beside} at the controls" if beside else ""
    return [
        "Each estimate is a mean over seeds; a factor is the exponential of a mean of logarithms. Its interval is the paired "
        f"t interval over the seeds, 95 %: with {seeds} seeds it reaches {reach:.1f} standard errors to either side. It is "
        "about other seeds, not about other images, networks or data.",
        "A test supports its claim if the interval lies wholly on the side that the claim predicts, contradicts it if "
        "wholly on the other, and is undecided if it holds the value that chance would give. Undecided means that these "
        f"seeds cannot tell; it does not mean that there is nothing. {rule()}",
        f"Each test stands by itself, uncorrected for their number: {len(counted)} at the widths that count{controls}. If "
        f"chance alone were at work, about one in twenty, {0.05 * measured:.1f} of the {measured} measured, would still be "
        f"decided one way or the other; {decided} {'is' if decided == 1 else 'are'}. Tests of the same runs are not "
        "independent of each other.",
        "The interval knows no limits: one of a share can reach beyond 0 or 100 %. A spread smaller than the resolution of "
        f"what is counted (one record; one of {images:,} images, {resolution} points of accuracy) is taken for that "
        "resolution, so seeds that happen to agree prove nothing.",
        f"{_start(comparison)} {_layers(comparison)}",
    ]


def tests_of(width: Json) -> list[Json]:
    """Return all tests at a width."""
    return [test for claim in width["claims"] for test in claim["tests"]]


def _start(comparison: Json) -> str:
    start = comparison["recipe"]["model"]["start"]
    same = "All arms of a seed start from the same float network, with the same order of images."
    if start is not None and "{seed}" not in start:
        return f"{same} One float network was given for all seeds, so the spread is that of the training from it alone."
    return f"{same} Each seed has a float network of its own."


def _layers(comparison: Json) -> str:
    section = comparison["recipe"]["quantize"]
    bits = 8 if section is None else section["first_last_bits"]
    if bits is None:
        return "All quantized layers are measured, the first and the last among them."
    kept = "stay float" if bits == 32 else f"have {bits} bits"
    return f"The first and the last layer {kept} in every arm and are left out of all measures of layers."


def runs_text(verdict: Json) -> str:
    """Return how many runs there should be and how many finished."""
    counts = {"arm": len(verdict["arms"]), "width": len(verdict["widths"]), "seed": len(verdict["comparison"]["seeds"])}
    total = math.prod(counts.values())
    done = sum(len(width["runs"]) for width in verdict["widths"])
    size = ", ".join(f"{count} {what}{'' if count == 1 else 's'}" for what, count in counts.items())
    return f"{size}: {'all' if done == total else f'{done} of'} {total} runs finished."


def title(verdict: Json) -> str:
    """Return the heading."""
    recipe = verdict["comparison"]["recipe"]
    return f"What normalization does: {recipe['model']['name']} on {recipe['data']['name']}"


def trouble(run: Json) -> str:
    """Return what became of a run that did not finish."""
    return f"{run['name']}: {run['state']}{': ' if run['reason'] else ''}{run['reason']}"


def control_note(widths: Sequence[Json]) -> str:
    """Return why the controls are there and do not count."""
    return (
        f"{listed(width['bits'] for width in widths)}: the claims say little at these widths, as few bits leave no levels to waste "
        "and many leave enough. The same tests are shown, and none of them enters the verdict."
    )


def provenance(verdict: Json) -> dict[str, str]:
    """Return what the numbers depend on, name by name."""
    comparison, images = verdict["comparison"], verdict["images"]
    recipe = comparison["recipe"]
    train = recipe["train"]
    start = recipe["model"]["start"]
    given = comparison["float_train"] or train
    return {
        "model": f"{recipe['model']['name']}, {recipe['data']['name']}",
        "images": ", ".join(f"{count:,} {use}" for use, count in images.items() if isinstance(count, int)),
        "training": f"{train['epochs']} epochs, batch {train['batch_size']}, {train['optimizer']}, lr {train['lr']:g}, "
        f"weight decay {train['weight_decay']:g}",
        "float starts": f"given: {start}" if start is not None else f"trained {given['epochs']} epochs",
        "seeds": ", ".join(map(str, comparison["seeds"])),
        "command": command(verdict),
        **{key: str(value) for key, value in verdict["environment"].items()},
        "written": verdict["written"],
    }


def accuracy_rows(verdict: Json, widths: Sequence[Json]) -> list[tuple[str, str, list[str]]]:
    """Return width, arm and a cell a seed and their mean; a seed without accuracy has the state of its run. Float comes first."""
    seeds: Sequence[int] = verdict["comparison"]["seeds"]
    lost = {(run["w_bits"], run["a_bits"], run["label"], run["seed"]): run["state"] for run in verdict["unfinished"]}
    floats = {int(seed): value for seed, value in verdict["float"].items()}
    rows = [("float", "float start", [_points(floats.get(seed)) for seed in seeds], mean_of(floats.values()))]
    for width in widths:
        for arm in verdict["arms"]:
            found = {run["seed"]: run["accuracy"] for run in width["runs"] if run["label"] == arm}
            place = (width["w_bits"], width["a_bits"], arm)
            cells = [_points(found[s]) if s in found else lost.get((*place, s), "–") for s in seeds]
            rows.append((width["bits"], arm, cells, mean_of(found.values())))
    return [(bits, arm, [*cells, _points(mean)]) for bits, arm, cells, mean in rows]


def _points(value: Any) -> str:
    return f"{number:.2f}" if math.isfinite(number := value_of(value)) else "–"


def command(verdict: Json) -> str:
    """Return the command that asks the same, as far as the verdict knows it: it names no recipe file."""
    if verdict.get("command"):
        return str(verdict["command"])
    comparison = verdict["comparison"]
    seeds: list[int] = comparison["seeds"]
    groups = [
        ",".join(f"{w['w_bits']}/{w['a_bits']}" for w in verdict["widths"] if w["control"] is c) for c in (False, True)
    ]
    gains = [str(c["options"]["max_gain"]) for c in comparison["contenders"] if c["options"].get("max_gain")]
    words = ["wnq", "settle", "RECIPE.toml", "--bits", groups[0], "--controls", groups[1] or "none"]
    words += ["--seeds", str(len(seeds)), *(["--seed", str(seeds[0])] if seeds and seeds[0] else [])]
    words += [
        "--every",
        str(comparison["recipe"]["train"]["record_every"]),
        *(["--gains", ",".join(gains)] if gains else []),
    ]
    words += ["--float-recipe", "FLOAT.toml"] if comparison["float_train"] is not None else []
    return shlex.join(words)
