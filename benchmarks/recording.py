"""Results files: what was measured, by which command, on what machine; and rows measured in processes of their own."""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

RESULTS = Path(__file__).resolve().parent / "results"

_ROW, _STAGE = "row: ", "stage: "
_POLL = 0.2


def record(name: str, rows: list[dict[str, Any]], *, packages: Sequence[str] = ()) -> Path:
    """Write ``results/<name>.json`` aside, then rename. Versions of further packages are noted where installed.

    The file names this command after those that made the rows which were there before and stay.
    """
    wanted = ("torch", "numpy", "pyscipopt", "highspy", *packages)
    path = RESULTS / f"{name}.json"
    command = "python -m " + shlex.join([f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"rows": [], "commands": []}
    earlier = before["commands"] if any(row in rows for row in before["rows"]) else []
    data = {
        "commands": [*(c for c in earlier if c != command), command],
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
        },
        "packages": {p: package_version(p) for p in wanted},
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    aside = path.with_suffix(".json.new")
    aside.write_text(json.dumps(data, indent=1) + "\n")
    aside.replace(path)
    return path


def recorded(name: str) -> list[dict[str, Any]]:
    """The rows of ``results/<name>.json``; none where it was not measured."""
    path = RESULTS / f"{name}.json"
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
    return rows


def matches(row: dict[str, Any], key: dict[str, Any]) -> bool:
    """Whether a row is of a run that a key names."""
    return all(row[name] == value for name, value in key.items())


def package_version(package: str) -> str | None:
    """The installed version, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def library_commit() -> str | None:
    """The commit that is measured, with a ``+`` where files of the library differ from it."""
    root = RESULTS.parent.parent
    try:
        head = _git(root, "rev-parse", "--short=10", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "qcqp_prune", "solvers")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def peak_mb() -> int:
    """Largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@dataclass(frozen=True)
class Limits:
    """What a process may take: seconds, and megabytes of resident memory; None for no limit."""

    seconds: float | None = None
    memory_mb: int | None = None


class ProcessFailed(RuntimeError):
    """A process gave no row; the message says why, ``stage`` what it did last."""

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


def in_a_process(function: str, *arguments: Any, limits: Limits = Limits()) -> dict[str, Any]:
    """Call a function in a process of its own, so that its peak of memory is its own and it can be stopped.

    Args:
        function: ``module:name``; it returns a row that JSON can hold.
        arguments: numbers and strings.
        limits: what the process may take.

    Returns:
        The row.

    Raises:
        ProcessFailed: the process died, or was stopped at a limit.
    """
    code = f"from benchmarks.recording import give; give({function!r}, {arguments!r})"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        # A session of its own: what the process started ends with it.
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=out, stderr=errors, start_new_session=True
        )
        stopped = _watch(process, limits)
        lines = _lines(out)
        stage = next((x.removeprefix(_STAGE) for x in reversed(lines) if x.startswith(_STAGE)), "start")
        row = next((x.removeprefix(_ROW) for x in reversed(lines) if x.startswith(_ROW)), None)
        if stopped or process.returncode or row is None:
            said = (_lines(errors) or [f"exit status {process.returncode}"])[-1]
            raise ProcessFailed(stopped or said, stage)
    found: dict[str, Any] = json.loads(row)
    return found


def give(function: str, arguments: tuple[Any, ...]) -> None:
    """The other side of ``in_a_process``."""
    module, _, name = function.partition(":")
    row = getattr(importlib.import_module(module), name)(*arguments)
    print(_ROW + json.dumps(row), flush=True)


def stage(name: str) -> None:
    """Say what a process of ``in_a_process`` does next, for the case that it does not come back."""
    print(_STAGE + name, flush=True)


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> str:
    """Wait for a process; why it was stopped, empty where it ended by itself."""
    started = time.monotonic()
    try:
        while True:
            try:
                process.wait(_POLL)
                return ""
            except subprocess.TimeoutExpired:
                pass
            if limits.seconds is not None and time.monotonic() - started > limits.seconds:
                return f"did not end within {limits.seconds:.0f} s"
            if limits.memory_mb is not None and _resident_mb(process.pid) > limits.memory_mb:
                return f"took more than {limits.memory_mb:,} MB of memory"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _resident_mb(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):  # it has just ended, or there is no /proc
        return 0
    return pages * resource.getpagesize() // 2**20


def _lines(file: IO[str]) -> list[str]:
    file.seek(0)
    return file.read().strip().splitlines()


def said(error: Exception) -> str:
    """What went wrong, in a line of a row."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def seed_count(rows: list[dict[str, Any]]) -> str:
    """How many runs there are, and how many of them diverged."""
    diverged = sum("error" in row for row in rows)
    return f"{len(rows)}, {diverged} diverged" if diverged else f"{len(rows)}"
