"""Results files: what was measured, by which command, on what machine."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"


def record(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write ``results/<name>.json`` aside, then rename."""
    packages = ("torch", "numpy", "pyscipopt", "highspy")
    data = {
        "command": "python -m " + " ".join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "packages": {p: version(p) for p in packages},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)
    return path
