"""Copy the results of a comparison (``wnq compare``) into ``benchmarks/results``, as it wrote them, with local folders left out.

    python benchmarks/publish.py runs/compare-digits digits_methods [--hardware TAG] [--gate W2A2=4]

A gate is the largest drop against the float network, in points, that a method at a width should have; the table then ends with
who meets it. The script gives ``benchmarks/results/<theme>_<hardware>_<yyyymm>.{json,md,svg}``, with the month of the
comparison.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from results import FOLDER, hardware_tag

from wnq.files import write_text


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the comparison")
    parser.add_argument("theme", help="name of the results files")
    parser.add_argument(
        "--hardware", help="tag in the name; by default that of this machine, which must be the one that measured"
    )
    parser.add_argument("--gate", action="append", default=[], metavar="WIDTH=POINTS", help="can be repeated")
    options = parser.parse_args()
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
