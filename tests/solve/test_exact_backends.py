"""Identity 1: every exact backend finds the exhaustive optimum on 200 small problems, and proves it."""

from __future__ import annotations

from functools import lru_cache

import pytest

from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.solve.result import Reason
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import STRUCTURES, Optimum, exhaustive, random_problem

COUNT = 200
BATCH = 20
NAMES = list(STRUCTURES)


@lru_cache(maxsize=BATCH)
def instance(k: int) -> tuple[PruningProblem, Optimum]:
    problem = random_problem(1000 + k, NAMES[k % len(NAMES)])
    return problem, exhaustive(problem)


def assert_optimal(k: int, solver: str) -> None:
    problem, optimum = instance(k)
    report = solve(problem, solver, gap_limit=0.0)
    assert report.termination.reason is Reason.OPTIMAL, k
    assert report.objective == pytest.approx(optimum.objective, rel=1e-6, abs=1e-9), k
    assert report.bound is not None
    assert report.bound >= optimum.objective * (1 - 1e-6) - 1e-9, k
    assert report.gap is not None
    assert report.gap <= 2e-6, k


# All by one of them, every fifth batch by the others: the rest is slow.
EVERY = "highs:cardinality_rlt"
CASES = [
    pytest.param(solver, batch, marks=pytest.mark.slow if solver != EVERY and batch % 5 else ())
    for solver in (EVERY, "highs:perspective", "scip")
    for batch in range(COUNT // BATCH)
]


@pytest.mark.parametrize(("solver", "batch"), CASES)
def test_optimum_of_200_problems(solver: str, batch: int) -> None:
    for k in range(batch * BATCH, (batch + 1) * BATCH):
        assert_optimal(k, solver)


@pytest.mark.parametrize(
    "solver",
    [
        "pyomo",
        "pyomo:highs",
        "auto",
        "highs:mccormick",
        pytest.param("scip:cardinality_rlt", marks=pytest.mark.slow),
        pytest.param("scip:perspective", marks=pytest.mark.slow),
        pytest.param("scip:mccormick", marks=pytest.mark.slow),
    ],
)
def test_optimum_through_other_doors(solver: str) -> None:
    for k in range(len(NAMES)):
        assert_optimal(k, solver)
