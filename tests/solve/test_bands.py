"""Budgets with a lower end: every solver against all masks, and clear words where nothing lies in the band."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.errors import InfeasibleError, InvalidBudgetError, NoIncumbentError
from qcqp_prune.program.problem import PruningProblem, allowed_counts
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import chain_problem, exhaustive, random_problem

BANDED = ("chain", "residual", "two_budgets", "negative", "multiple_of", "tables", "staircases")
EXACT = ("scip", "highs:cardinality_rlt", "highs:perspective", "pyomo:scip_direct")


def uses(problem: PruningProblem) -> list[int]:
    """Every use of the first budget that allowed counts within all budgets have."""
    row, found = problem.budgeted[0], set()
    ties = [g.tie for g in problem.graph.groups]
    for counts in itertools.product(*allowed_counts(problem.graph)):
        equal = all(
            len({n for n, t in zip(counts, ties, strict=True) if t == tie}) == 1 for tie in ties if tie
        )
        if equal and all(r.form.evaluate(counts) <= (r.limit or 0) for r in problem.budgeted):
            found.add(row.form.evaluate(counts))
    return sorted(found)


def banded(seed: int, structure: str, *, rank: int = -1) -> PruningProblem:
    """The first budget becomes an equality: the use that stands at ``rank`` among all that can be reached."""
    problem = random_problem(seed, structure)
    use = uses(problem)[rank]
    row = replace(problem.budgeted[0], least=use, limit=use)
    return replace(problem, rows=tuple(row if r.resource == row.resource else r for r in problem.rows))


@pytest.mark.parametrize("structure", BANDED)
@pytest.mark.parametrize("solver", EXACT)
def test_exact_solvers_find_the_best_in_the_band(solver: str, structure: str) -> None:
    for seed, rank in ((0, -1), (1, -3)):
        problem = banded(seed, structure, rank=rank)
        report = solve(problem, solver, gap_limit=0.0)
        usage = report.usage[problem.budgeted[0].resource]
        assert usage.used == usage.limit == usage.least
        assert report.objective == pytest.approx(exhaustive(problem).objective, rel=1e-7)


@pytest.mark.parametrize("structure", BANDED)
@pytest.mark.parametrize("solver", ["block_coordinate", "decomposition", "relaxation"])
def test_bounds_hold_and_selections_lie_in_the_band(solver: str, structure: str) -> None:
    found = 0
    for seed in range(4):
        problem = banded(seed, structure)
        program = Program.from_problem(problem)
        best = exhaustive(problem).objective
        raw = get_backend(solver).solve(program, SolveOptions(work_limit=200, gap_limit=0.0))
        assert raw.bound is None or raw.bound >= best - 1e-9
        if raw.x is not None:
            found += 1
            x = np.asarray(raw.x, np.bool_)
            assert program.is_feasible(x)
            assert program.objective(x) <= best + 1e-9
        else:
            assert raw.near is not None
    assert found >= 2 or solver == "relaxation"


def test_the_search_enters_a_narrow_band_of_a_realistic_network() -> None:
    problem = chain_problem("resnet20")
    (row,) = problem.budgeted
    row = replace(row, least=row.dense * 4995 // 10000)
    problem = replace(problem, rows=tuple(row if r.resource == row.resource else r for r in problem.rows))
    report = solve(problem, "decomposition", options=SolveOptions(work_limit=5))
    usage = report.usage[row.resource]
    assert (row.least or 0) <= usage.used <= (row.limit or 0)
    assert report.bound is not None


def test_an_empty_band_is_said_with_the_nearest_use() -> None:
    problem = random_problem(0, "chain")
    reached = uses(problem)
    gap = next(a for a, b in itertools.pairwise(reached) if b > a + 1)
    row = replace(problem.budgeted[0], least=gap + 1, limit=gap + 1)
    problem = replace(problem, rows=(row, *problem.rows[1:]))
    with pytest.raises(
        NoIncumbentError, match=rf"{gap + 1:,} to {gap + 1:,} .* nearest reached is [0-9,]+\. Widen"
    ):
        solve(problem, "block_coordinate")
    with pytest.raises(InfeasibleError, match="proved"):
        solve(problem, "highs")


def test_an_answer_below_the_band_is_refused() -> None:
    problem = banded(0, "chain")
    inner = get_backend("highs")

    class Below:
        name, classes = "below", inner.classes
        availability, outlook = inner.availability, inner.outlook

        def solve(self, program: Program, options: SolveOptions) -> RawSolution:
            free = tuple(replace(c, at_least=None, limit=c.limit - 1) for c in program.constraints)
            return inner.solve(replace(program, constraints=free), options)

    with pytest.raises(qp.BackendError, match=r"at least .* were asked for"):
        solve(problem, Below())


@pytest.mark.parametrize(
    ("text", "ends"),
    [("49%..51%", (49, 51)), ("40 .. 60", (40, 60)), ("10%..60", (10, 60)), ("0.25..0.5", (25, 50))],
)
def test_bands_as_they_are_written(text: str, ends: tuple[int, int]) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 10, bias=False), torch.nn.Linear(10, 5, bias=False))
    graph = qp.trace(model, torch.zeros(1, 5))
    scores = qp.Magnitude()(model, graph)
    (row,) = qp.PruningProblem.build(graph, scores, text).budgeted
    assert (row.least, row.limit) == ends  # of 100 MACs
    with pytest.raises(InvalidBudgetError, match="no use of macs lies between 60 and 40 MACs: swap"):
        qp.PruningProblem.build(graph, scores, "60%..40%")
    with pytest.raises(InvalidBudgetError, match="no use of macs lies between 50 and 49 MACs: widen"):
        qp.PruningProblem.build(graph, scores, "49.2%..49.8%")
    with pytest.raises(InvalidBudgetError, match="upper one only"):
        qp.PruningProblem.build(graph, scores, {"peak_memory": "40%..90%"})
    with pytest.raises(InvalidBudgetError, match="cannot be read"):
        qp.PruningProblem.build(graph, scores, "40%..")
