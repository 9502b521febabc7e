"""The verdict as Markdown, which reads as plain text too."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wnq.settle.wording import (
    LOST,
    SIGNS,
    Json,
    accuracy_rows,
    amount,
    answer,
    control_note,
    interval,
    notes,
    provenance,
    question,
    reason,
    rule,
    runs_text,
    title,
    trouble,
    wanted,
)


def markdown(verdict: Mapping[str, Any]) -> str:
    """Return the verdict with every test, its interval and seeds, and the accuracies.

    Args:
        verdict: what :func:`wnq.settle.judge` returned, or what ``verdict.json`` holds.
    """
    counted = [width for width in verdict["widths"] if not width["control"]]
    beside = [width for width in verdict["widths"] if width["control"]]
    names = [width["bits"] for width in counted]
    overall = [
        [
            f"{row['letter']}: {row['claim']}",
            _word(row["verdict"]),
            *(_word(row["by_width"].get(n, "–")) for n in names),
        ]
        for row in verdict["overall"]
    ]
    parts = [
        f"# {title(verdict)}",
        question(verdict),
        f"**{answer(verdict)}**",
        runs_text(verdict),
        _table(["claim", "all that count", *names], overall),
        rule(),
        "## Arms",
        "\n".join(f"- `{arm}`: {_safe(about)}" for arm, about in verdict["arms"].items()),
        "## Claim by claim",
        *_claims(counted),
        "## Accuracy after the last epoch, in percent",
        _accuracies(verdict, counted),
    ]
    if verdict["unfinished"]:
        troubles = [f"- {_safe(trouble(run))}" for run in verdict["unfinished"]]
        parts += ["## Runs that did not finish", "\n".join(troubles), LOST]
    parts += ["## How to read this", *(f"{_safe(note)}" for note in notes(verdict))]
    if beside:
        parts += [
            "## Controls, which do not count",
            control_note(beside),
            *_claims(beside),
            _accuracies(verdict, beside),
        ]
    parts += ["## Where the numbers come from"]
    parts += ["\n".join(f"- {name}: {_safe(value)}" for name, value in provenance(verdict).items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(widths: Sequence[Json]) -> list[str]:
    parts: list[str] = []
    for index, claim in enumerate(widths[0]["claims"] if widths else []):
        own = [(width["bits"], width["claims"][index]) for width in widths]
        parts.append(f"### {claim['letter']}: {claim['text']}")
        parts.append("\n".join(f"- **{bits}, {found['verdict']}:** {_safe(reason(found))}" for bits, found in own))
        rows = [
            [
                test["name"],
                bits,
                amount(found["tests"][place], found["tests"][place]["estimate"]),
                interval(found["tests"][place]),
                ", ".join(amount(found["tests"][place], value, unit=False) for value in found["tests"][place]["values"])
                or "–",
                wanted(found["tests"][place]),
                _word(found["tests"][place]["verdict"]),
            ]
            for place, test in enumerate(claim["tests"])
            for bits, found in own
        ]
        parts.append(_table(["test", "width", "estimate", "95 % interval", "each seed", "claimed", "verdict"], rows))
    return parts


def _accuracies(verdict: Json, widths: Sequence[Json]) -> str:
    rows = [[bits, arm, *cells] for bits, arm, cells in accuracy_rows(verdict, widths)]
    return _table(["width", "arm", *(f"seed {seed}" for seed in verdict["comparison"]["seeds"]), "mean"], rows)


def _word(verdict: str) -> str:
    return f"{SIGNS[verdict]} {verdict}" if verdict in SIGNS else verdict


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_safe(cell) for cell in line) + " |" for line in lines)


def _safe(text: str) -> str:
    """Keep data from being read as markup."""
    for character in "\\|`*_<":
        text = text.replace(character, "\\" + character)
    return " ".join(text.split())
