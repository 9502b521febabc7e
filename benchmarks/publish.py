"""Copy the results of a comparison (``wnq compare``) into ``benchmarks/results``, as it wrote them, with local folders left out.

    python benchmarks/publish.py runs/compare-digits digits_methods [--hardware TAG]

gives ``benchmarks/results/<theme>_<hardware>_<yyyymm>.{json,md,svg}``. The month is that of the comparison.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the comparison")
    parser.add_argument("theme", help="name of the results files")
    parser.add_argument(
        "--hardware", help="tag in the name; by default that of this machine, which must be the one that measured"
    )
    options = parser.parse_args()
    results = without_folders(json.loads((options.run / "results.json").read_text(encoding="utf-8")))
    month = results["written"][:7].replace("-", "")
    path = FOLDER / f"{options.theme}_{options.hardware or hardware_tag()}_{month}.json"
    # One recipe a cell is most of the file and the same in all but a few keys: one line a cell keeps it readable.
    cells = ",\n".join("  " + json.dumps(cell) for cell in results.pop("cells"))
    text = json.dumps(results, indent=1)
    write_text(path, text[: text.rindex("}")].rstrip() + ',\n "cells": [\n' + cells + "\n ]\n}\n")
    json.loads(path.read_text(encoding="utf-8"))
    write_text(path.with_suffix(".md"), (options.run / "results.md").read_text(encoding="utf-8"))
    shutil.copyfile(options.run / "accuracy.svg", path.with_suffix(".svg"))
    print(path)


if __name__ == "__main__":
    main()
