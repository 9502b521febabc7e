"""Writing a benchmark's results: one JSON with everything, one Markdown table beside it."""

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

import torch

from wnq.environment import environment
from wnq.files import write_text

FOLDER = Path(__file__).resolve().parent / "results"


def hardware_tag() -> str:
    """Return a short name of the machine, such as ``epyc-2core`` or ``h200``."""
    if torch.cuda.is_available():
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    words = re.findall(r"[a-z0-9]+", environment()["cpu"].lower())
    word = next((w for w in words if w in {"epyc", "xeon", "ryzen", "core", "apple", "arm"}), "cpu")
    return f"{word}-{os.cpu_count()}core"


def write_results(
    theme: str, hardware: str, config: dict[str, Any], env: dict[str, Any], rows: list[dict[str, Any]], table: list[str]
) -> Path:
    """Write ``results/<theme>_<hardware>_<yyyymm>.{json,md}`` and return the path of the JSON."""
    now = datetime.datetime.now(datetime.UTC)
    path = FOLDER / f"{theme}_{hardware}_{now:%Y%m}.json"
    content = {
        "theme": theme,
        "written": now.isoformat(timespec="seconds"),
        "config": config,
        "environment": env,
        "rows": rows,
    }
    write_text(path, json.dumps(content, indent=1) + "\n")
    facts = ", ".join(f"{key} {value}" for key, value in env.items())
    about = "\n".join(f"- {key}: {value}" for key, value in config.items())
    write_text(path.with_suffix(".md"), f"# {theme}\n\n{about}\n- environment: {facts}\n\n" + "\n".join(table) + "\n")
    return path
