"""Scores of any size: absolute tolerances inside solvers must not pass for proofs. And stops between two rounds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from qcqp_prune.errors import BackendError
from qcqp_prune.program.coefficients import Coefficient, LowRank
from qcqp_prune.program.forms import PairTerm, PairwiseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.solve.verify import checked
from qcqp_prune.testing import exhaustive, random_problem
from qcqp_prune_solvers.decomposition.backend import DecompositionBackend
from qcqp_prune_solvers.retry import solve_exactly

EXACT = ["scip", "highs:cardinality_rlt", "highs:perspective", "pyomo:scip_direct", "pyomo:highs"]


def scaled(problem: PruningProblem, factor: float) -> PruningProblem:
    def times(coef: Coefficient) -> Coefficient:
        return LowRank(coef.left * factor, coef.right) if isinstance(coef, LowRank) else coef * factor

    form = problem.objective
    pairs = tuple(PairTerm(t.rows, t.cols, times(t.coef)) for t in form.pairs)
    return replace(problem, objective=PairwiseForm(form.unary * factor, pairs, form.constant * factor))


@pytest.mark.parametrize("factor", [1e-12, 1e-7, 1e9])
@pytest.mark.parametrize("structure", ["chain", "negative", "factors"])
@pytest.mark.parametrize("solver", EXACT)
def test_scores_of_any_size_are_solved_to_the_optimum(solver: str, structure: str, factor: float) -> None:
    problem = scaled(random_problem(0, structure), factor)
    best = exhaustive(problem).objective
    seen: list[TracePoint] = []
    report = solve(problem, solver, options=SolveOptions(gap_limit=0.0, on_event=seen.append))
    assert report.termination.reason is Reason.OPTIMAL
    assert report.objective == pytest.approx(best, rel=1e-6, abs=0.0)
    assert report.bound is not None
    assert report.bound == pytest.approx(best, rel=1e-5, abs=0.0)
    assert seen
    for point in (*seen, *report.trace):
        assert point.incumbent is None or point.incumbent <= best + 1e-6 * abs(best)
        assert point.bound is None or point.bound >= best - 1e-6 * abs(best)


def test_a_bound_below_the_selection_is_refused_however_small_the_scores() -> None:
    problem = scaled(random_problem(0, "chain"), 1e-12)
    program = Program.from_problem(problem)
    best = exhaustive(problem)
    x = best.mask[program.units]
    raw = RawSolution(Termination(Reason.OPTIMAL), x=x, bound=best.objective * 0.9)
    with pytest.raises(BackendError, match="bound"):
        checked(problem, program, raw, "liar")


def test_a_stop_between_two_rounds_is_an_interruption_and_not_a_failure() -> None:
    program = Program.from_problem(random_problem(0, "chain"))
    too_much = np.ones(program.size, np.bool_)
    assert not program.is_feasible(too_much)

    def attempt(_program: Program, _options: SolveOptions) -> RawSolution:
        return RawSolution(Termination(Reason.OPTIMAL), x=too_much, bound=1e9)

    found = solve_exactly(program, SolveOptions(stop=lambda: True), attempt)
    assert found.x is None
    assert found.termination.reason is Reason.INTERRUPTED


def test_the_decomposition_computes_no_bound_after_a_stop() -> None:
    program = Program.from_problem(random_problem(0, "chain"))
    found = DecompositionBackend().solve(program, SolveOptions(stop=lambda: True))
    assert found.x is not None
    assert program.is_feasible(np.asarray(found.x, np.bool_))
    assert found.bound is None
    assert found.termination.reason is Reason.INTERRUPTED
