"""Results files: what was measured, by which command, on what machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, rows: list[dict[str, Any]], *, packages: Sequence[str] = ()) -> Path:
    """Write ``results/<name>.json`` aside, then rename. Versions of further packages are noted where installed."""
    wanted = ("torch", "numpy", "pyscipopt", "highspy", *packages)
    data = {
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "packages": {p: _version(p) for p in wanted},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
