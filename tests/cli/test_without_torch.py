"""Solving on a machine without torch: a separate interpreter that does not find it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else find(name, path, target)

PathFinder.find_spec = find_others
"""


def without(blocked: set[str], code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED.format(blocked=blocked) + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


PROGRAM = "from qcqp_prune.cli import main; main()"


def test_solve_and_report(traced: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks.json"
    solved = without({"torch"}, PROGRAM, "solve", traced, "-b", "macs=50%", "-o", masks)
    assert solved.returncode == 0, solved.stderr
    usage = json.loads(masks.read_text())["usage"]["macs"]
    assert 0 < usage["used"] <= usage["limit"]
    shown = without({"torch"}, PROGRAM, "report", masks)
    assert shown.returncode == 0, shown.stderr
    assert f"{usage['used']:,}" in shown.stdout


@pytest.mark.parametrize("command", [["solvers"], ["--help"], ["--version"], ["solve", "--help"]])
def test_commands_that_need_no_torch(command: list[str]) -> None:
    result = without({"torch"}, PROGRAM, *command)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "command", [["demo"], ["run", "x.toml"], ["trace", "a:b", "--input-shape", "1", "-o", "x"]]
)
def test_commands_that_need_torch_say_so(command: list[str], tmp_path: Path) -> None:
    result = without({"torch"}, f"import os; os.chdir({str(tmp_path)!r}); {PROGRAM}", *command)
    assert result.returncode == 2
    assert "pip install torch" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_library() -> None:
    code = """
import qcqp_prune as qp
assert callable(qp.solve) and qp.PruningProblem.build and qp.SolveOptions(seed=3).seed == 3
try:
    qp.trace
except qp.MissingDependencyError as error:
    assert "qcqp_prune.trace needs PyTorch" in str(error)
else:
    raise AssertionError("trace without torch")
"""
    result = without({"torch"}, code)
    assert result.returncode == 0, result.stderr


def test_a_solver_whose_package_is_missing(traced: Path, tmp_path: Path) -> None:
    words = ["solve", traced, "-b", "50%", "--solver", "scip", "-o", tmp_path / "m.json"]
    result = without({"torch", "pyscipopt"}, PROGRAM, *words)
    assert result.returncode == 2
    assert "pyscipopt" in result.stderr
    assert "Traceback" not in result.stderr
    assert without({"pyscipopt"}, PROGRAM, "solvers").returncode == 0
