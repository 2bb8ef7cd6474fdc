"""Bad input gives a clear error that ends with what to do."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qcqp_prune.errors import (
    InfeasibleError,
    InvalidOptionError,
    MaskMismatchError,
    SolverIncapableError,
    SolverUnavailableError,
)
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import available_solvers, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import chain_problem, exhaustive, random_problem


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("time_limit", v) for v in (0, 0.0, -1, math.nan, math.inf, "60", True)],
        *[("work_limit", v) for v in (0, -3, 1.5, math.nan, True)],
        *[("gap_limit", v) for v in (-1e-9, math.nan, math.inf, "1%", None, True)],
        *[("threads", v) for v in (0, -1, 1.5)],
        *[("seed", v) for v in (-1, 2**31, 0.5, True)],
    ],
)
def test_options_outside_their_domain(name: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError, match=f"{name} is .*give a"):
        SolveOptions(**{name: value})


def test_zero_gap_asks_for_a_proof() -> None:
    assert SolveOptions(gap_limit=0).gap_limit == 0


@pytest.mark.parametrize(
    ("name", "near"),
    [("hihgs", "highs"), ("SCIP", "scip"), ("block-coordinate", "block_coordinate"), ("aut", "auto")],
)
def test_unknown_solver_suggests_the_nearest(name: str, near: str) -> None:
    with pytest.raises(SolverUnavailableError, match=f"did you mean {near!r}|Choose from .*{near}"):
        solve(random_problem(0), name)


@pytest.mark.parametrize(
    ("solver", "package"), [("scip", "pyscipopt"), ("highs", "highspy"), ("pyomo", "pyomo")]
)
def test_missing_package_says_which_to_install(
    solver: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n == package else real(n, *a))
    with pytest.raises(SolverUnavailableError, match=f"pip install {package}"):
        solve(random_problem(0), solver)
    listed = {info.name: info.availability for info in available_solvers()}
    assert not listed[solver].ok
    assert f"pip install {package}" in listed[solver].reason


def test_auto_does_without_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    gone = ("pyscipopt", "highspy", "pyomo")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n, *a: None if n in gone else real(n, *a))
    problem = random_problem(0)
    report = solve(problem, "auto")
    assert report.bound is not None
    assert report.bound >= exhaustive(problem).objective - 1e-9


def test_arguments_after_the_colon() -> None:
    with pytest.raises(InvalidOptionError, match="no reduction 'nothing' here: choose from"):
        get_backend("highs:nothing")
    with pytest.raises(InvalidOptionError, match="SCIP has no reduction 'something' here: choose from"):
        get_backend("scip:something")
    with pytest.raises(SolverUnavailableError, match="leave out what follows the colon"):
        get_backend("block_coordinate:something")
    with pytest.raises(InvalidOptionError, match="relaxation has no reduction 'something' here: choose from"):
        get_backend("relaxation:something")
    with pytest.raises(
        SolverUnavailableError,
        match=r"Pyomo knows no solver 'nosuch': .* one that runs here: .*highs",
    ):
        get_backend("pyomo:nosuch")
    with pytest.raises((SolverIncapableError, SolverUnavailableError), match=r"choose pyomo|use pyomo"):
        solve(random_problem(0), "pyomo:ipopt")


def test_too_large_for_the_solver() -> None:
    problem = chain_problem("resnet56")
    with pytest.raises(SolverIncapableError, match=r"use .*auto"):
        solve(problem, "pyomo")


def test_warm_start_of_another_graph_or_kind() -> None:
    problem, other = random_problem(0), random_problem(1)
    masks = Masks.from_flat(other.graph, np.ones(other.graph.unit_count, np.bool_))
    with pytest.raises(MaskMismatchError, match="use the graph that the problem was built from"):
        solve(problem, "highs", warm_start=masks)
    with pytest.raises(InvalidOptionError, match="give Masks, a SolveReport, or a bool array"):
        solve(problem, "highs", warm_start=np.ones(3, np.bool_))
    with pytest.raises(InvalidOptionError, match="pass warm_start to solve"):
        solve(problem, "highs", options=SolveOptions(warm_start=np.ones(problem.graph.unit_count, np.bool_)))


def test_warm_start_over_budget_is_left_out_and_noted() -> None:
    problem = random_problem(0)
    report = solve(problem, "highs", warm_start=np.ones(problem.graph.unit_count, np.bool_))
    assert any("left out" in note for note in report.notes)
    assert report.objective == pytest.approx(exhaustive(problem).objective)


def test_infeasible_budget_names_resource_and_smallest_use() -> None:
    problem = random_problem(0)
    row = replace(problem.rows[0], limit=problem.rows[0].smallest - 1)
    broken = replace(problem, rows=(row, *problem.rows[1:]))
    with pytest.raises(InfeasibleError, match="smallest attainable use is") as caught:
        solve(broken, "block_coordinate")
    assert caught.value.resource == "macs"
    assert caught.value.smallest == row.smallest


def test_nothing_to_choose_is_answered_without_a_solver() -> None:
    problem = random_problem(0)
    groups = tuple(replace(g, min_keep=g.width) for g in problem.graph.groups)
    rows = tuple(replace(r, limit=r.dense, smallest=r.dense) for r in problem.rows)
    fixed = replace(problem, graph=replace(problem.graph, groups=groups), rows=rows)
    report = solve(fixed, "scip")
    assert Program.from_problem(fixed).size == 0
    assert all(mask.all() for mask in report.masks.keep.values())
    assert report.gap == 0.0
