"""Copy the results of a comparison (``wnq compare``) or a verdict (``wnq settle``) into ``benchmarks/results``, as it was written,
with local folders left out.

    python benchmarks/publish.py runs/compare-digits digits_methods [--hardware TAG] [--gate W2A2=4]
    python benchmarks/publish.py runs/settle-digits settle-digits

A gate is the largest drop against the float network, in points, that a method at a width should have; the table then ends with
who meets it. The script gives ``benchmarks/results/<theme>_<hardware>_<yyyymm>.{json,md}``, with the month of the experiment, and
beside it the plot of a comparison as ``.svg``.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from results import FOLDER, hardware_tag

from wnq.files import write_text
from wnq.settle.wording import SIGNS, accuracy_rows, amount, answer, interval, runs_text


def without_folders(value: Any) -> Any:
    """Return JSON types with the data's folder removed and absolute paths cut to their last part."""
    if isinstance(value, dict):
        return {key: None if key == "folder" else without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_folders(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def gate_lines(results: dict[str, Any], gates: list[str]) -> list[str]:
    """Return, for each gate, which methods' mean drop keeps it and which one's does not."""
    lines: list[str] = []
    for gate in gates:
        width, most = gate.split("=")
        rows = [
            row for row in results["table"] if f"W{row['w_bits']}A{row['a_bits']}" == width and row["drop"] is not None
        ]
        parts = {True: [], False: []}
        for row in rows:
            parts[row["drop"] <= float(most)].append(f"`{row['label']}` {row['drop']:+.2f}")
        kept, missed = (", ".join(parts[met]) or "none" for met in (True, False))
        lines.append(f"- {width}, a drop of at most {float(most):g} points: kept by {kept}; missed by {missed}.")
    return ["", "## Gates", "", *lines] if lines else []


def publish_verdict(run: Path, theme: str, hardware: str) -> Path:
    """Copy ``verdict.json``, a line a run, and ``verdict.md``; return the path of the former."""
    verdict = without_folders(json.loads((run / "verdict.json").read_text(encoding="utf-8")))
    path = FOLDER / f"{theme}_{hardware}_{verdict['written'][:7].replace('-', '')}.json"
    runs = [width.pop("runs") for width in verdict["widths"]]
    lines = [",\n".join("   " + json.dumps(entry) for entry in own) for own in runs]
    widths = [
        json.dumps(width, indent=1)[:-2] + f',\n "runs": [\n{own}\n ]\n}}'
        for width, own in zip(verdict.pop("widths"), lines, strict=True)
    ]
    text = json.dumps(verdict, indent=1)
    write_text(path, text[: text.rindex("}")].rstrip() + ',\n "widths": [\n' + ",\n".join(widths) + "\n]\n}\n")
    json.loads(path.read_text(encoding="utf-8"))
    shutil.copyfile(run / "verdict.md", path.with_suffix(".md"))
    lines = summary(json.loads(path.read_text(encoding="utf-8")))
    write_text(path.with_name(f"{path.stem}_summary.md"), "\n".join(lines) + "\n")
    return path


def summary(verdict: dict[str, Any]) -> list[str]:
    """Return a verdict in one sentence and one table: a row a test, a column a width."""
    counted = [width for width in verdict["widths"] if not width["control"]]
    names = [width["bits"] for width in counted]
    lines = [f"**{answer(verdict)}**", "", runs_text(verdict), ""]
    lines += [f"| | {' | '.join(names)} |", f"| --- |{' --- |' * len(names)}"]
    for place, claim in enumerate(counted[0]["claims"]):
        own = [width["claims"][place] for width in counted]
        verdicts = " | ".join(f"{SIGNS[found['verdict']]} {found['verdict']}" for found in own)
        lines.append(f"| **{claim['letter']}: {claim['text']}** | {verdicts} |")
        for number, test in enumerate(claim["tests"]):
            cells = [f"{amount(t, t['estimate'])} [{interval(t)}]" for t in (found["tests"][number] for found in own)]
            lines.append(f"| {test['name'].replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    lines += ["", "| | " + " | ".join(names) + " |", f"| --- |{' --- |' * len(names)}"]
    for arm in verdict["arms"]:
        cells = [row[2][-1] for name in names for row in accuracy_rows(verdict, counted) if row[:2] == (name, arm)]
        lines.append(f"| accuracy, {arm} (%) | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the comparison")
    parser.add_argument("theme", help="name of the results files")
    parser.add_argument(
        "--hardware", help="tag in the name; by default that of this machine, which must be the one that measured"
    )
    parser.add_argument("--gate", action="append", default=[], metavar="WIDTH=POINTS", help="can be repeated")
    options = parser.parse_args()
    if (options.run / "verdict.json").exists():
        print(publish_verdict(options.run, options.theme, options.hardware or hardware_tag()))
        return
    results = without_folders(json.loads((options.run / "results.json").read_text(encoding="utf-8")))
    month = results["written"][:7].replace("-", "")
    path = FOLDER / f"{options.theme}_{options.hardware or hardware_tag()}_{month}.json"
    # One recipe a cell is most of the file and the same in all but a few keys: one line a cell keeps it readable.
    cells = ",\n".join("  " + json.dumps(cell) for cell in results.pop("cells"))
    text = json.dumps(results, indent=1)
    write_text(path, text[: text.rindex("}")].rstrip() + ',\n "cells": [\n' + cells + "\n ]\n}\n")
    json.loads(path.read_text(encoding="utf-8"))
    table = (options.run / "results.md").read_text(encoding="utf-8").rstrip("\n").splitlines()
    write_text(path.with_suffix(".md"), "\n".join([*table, *gate_lines(results, options.gate)]) + "\n")
    shutil.copyfile(options.run / "accuracy.svg", path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
