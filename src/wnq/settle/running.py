"""Running the experiment, and writing what it says."""

import datetime
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wnq.compare import ANCHOR, CellState, Comparison, Contender, Width, compare, width_name
from wnq.data import Dataset
from wnq.environment import environment
from wnq.files import write_text
from wnq.settle.claims import CLAIMS, Claim, combined, hold
from wnq.settle.experiment import ARMS
from wnq.settle.markdown import markdown
from wnq.settle.measures import RunMeasure, measure_run
from wnq.settle.page import require_page, write_page

VERDICT = "verdict.json"


def settle(
    comparison: Comparison,
    out: str | Path,
    *,
    controls: tuple[Width, ...] = (),
    workers: int = 1,
    threads: int = 1,
    data: Dataset | None = None,
    watch: Callable[[CellState], None] | None = None,
) -> dict[str, Any]:
    """Run what is not finished of the experiment in its folder, hold the claims against it, and write the verdict.

    Args:
        comparison: from :func:`wnq.settle.experiment`.
        out: the folder, made if missing; it also holds everything that :func:`wnq.compare.compare` writes.
        controls: the widths that are reported beside and do not count.
        workers: as for :func:`wnq.compare.compare`.
        threads: as there.
        data: as there.
        watch: as there.

    Returns:
        What ``verdict.json`` holds. ``verdict.md`` and ``verdict.html`` beside it say the same to people.

    Raises:
        ValueError: as there, or a run's files are damaged.
        Interrupted: Ctrl-C; the state is saved.
        OSError: the folder cannot be written.
        ImportError: matplotlib or jinja2 is missing; found before anything is run.
    """
    require_page()
    results = compare(comparison, out, workers=workers, threads=threads, data=data, watch=watch)
    text = json.dumps(judge(comparison, Path(out), results, controls), indent=1, allow_nan=False)
    verdict: dict[str, Any] = json.loads(text)
    write_text(Path(out) / VERDICT, text + "\n")
    write_text(Path(out) / "verdict.md", markdown(verdict))
    write_page(verdict, Path(out) / "verdict.html")
    return verdict


def judge(
    comparison: Comparison, out: Path, results: Mapping[str, Any], controls: tuple[Width, ...] = ()
) -> dict[str, Any]:
    """Return the verdict on the runs in a folder.

    Args:
        comparison: from :func:`wnq.settle.experiment`.
        out: the folder.
        results: what :func:`wnq.compare.compare` returned.
        controls: the widths that do not count.

    Raises:
        ValueError: a run's files are damaged.
    """
    inner = comparison.section.first_last_bits is not None
    runs: dict[Width, dict[str, dict[int, RunMeasure]]] = {}
    unfinished: list[dict[str, Any]] = []
    for cell in results["cells"]:
        width = (int(cell["w_bits"]), int(cell["a_bits"]))
        if cell["kind"] != "method" or width not in comparison.widths:
            continue
        if cell["state"] == "done":
            run = measure_run(out / cell["name"], cell["label"], width, cell["seed"], cell["accuracy"], inner)
            runs.setdefault(width, {}).setdefault(cell["label"], {})[cell["seed"]] = run
        else:
            unfinished.append(
                {key: cell[key] for key in ("name", "label", "w_bits", "a_bits", "seed", "state", "reason")}
            )
    images = results["images"]["evaluation"]
    held = {width: hold(runs.get(width, {}), 100 / images) for width in _widths(comparison)}
    return {
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "comparison": comparison.to_json(),
        "environment": environment(),
        "images": results["images"],
        "float": _accuracies(results),
        "arms": {contender.label: _about(contender) for contender in comparison.contenders},
        "overall": [_overall(letter, held, controls) for letter in CLAIMS],
        "widths": [
            {
                "bits": width_name(width),
                "w_bits": width[0],
                "a_bits": width[1],
                "control": width in controls,
                "claims": [asdict(claim) for claim in claims],
                "runs": [
                    run.to_json()
                    for contender in comparison.contenders
                    for run in runs.get(width, {}).get(contender.label, {}).values()
                ],
            }
            for width, claims in held.items()
        ],
        "unfinished": unfinished,
    }


def _widths(comparison: Comparison) -> list[Width]:
    return [width for width in comparison.widths if width is not None]


def _about(contender: Contender) -> str:
    gain = contender.options.get("max_gain")
    return ARMS.get(contender.label, f"as attached, with {gain} of the gradient through the maximum")


def _accuracies(results: Mapping[str, Any]) -> dict[str, float]:
    """Return seed -> accuracy of the float starts."""
    return {
        str(cell["seed"]): cell["accuracy"]
        for cell in results["cells"]
        if cell["label"] == ANCHOR and cell["kind"] == "float" and cell["state"] == "done"
    }


def _overall(letter: str, held: Mapping[Width, list[Claim]], controls: tuple[Width, ...]) -> dict[str, Any]:
    """Return what became of a claim over the widths that count."""
    own = {w: claim for w, claims in held.items() for claim in claims if claim.letter == letter and w not in controls}
    return {
        "letter": letter,
        "claim": CLAIMS[letter],
        "verdict": combined(claim.verdict for claim in own.values()),
        "by_width": {width_name(width): claim.verdict for width, claim in own.items()},
    }
