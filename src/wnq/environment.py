"""Where a result was computed."""

import platform
from pathlib import Path
from typing import Any

import torch


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its recipe: versions, processor, threads."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {}
    versions["torch"] = torch.__version__  # with the build, which the package's metadata may leave out
    for package in ("wnq", "numpy", "accelerate", "datasets", "scikit-learn"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu
        )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "python": platform.python_version(),
        **versions,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": device,
    }
