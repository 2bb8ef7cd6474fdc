"""Exact backends use what is known before: a bound, interchangeable units, and what a bound decided."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import Reason
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import chain_problem, exhaustive, random_problem
from qcqp_prune_solvers.block_coordinate import BlockCoordinateBackend
from qcqp_prune_solvers.linear import ordered_pairs

EXACT = ["scip", "scip:cardinality_rlt", "highs", "highs:mccormick", "pyomo:scip_direct", "pyomo:highs"]


def found(program: Program) -> tuple[BoolArray, float]:
    raw = BlockCoordinateBackend().solve(program, SolveOptions())
    assert raw.objective is not None
    return np.asarray(raw.x, np.bool_), raw.objective


@pytest.mark.parametrize("solver", EXACT[:4])
def test_a_bound_that_is_met_ends_the_run(solver: str) -> None:
    """The start is known to be within 0.1 % of the best: nothing is left to prove, where a proof takes minutes."""
    program = Program.from_problem(chain_problem("small"))
    x, worth = found(program)
    options = SolveOptions(warm_start=x, known_bound=1.001 * worth, gap_limit=2e-3, time_limit=30)
    raw = get_backend(solver).solve(program, options)
    assert raw.termination.reason is Reason.OPTIMAL
    assert raw.trace[-1].seconds < 10
    assert raw.bound is not None
    assert raw.bound <= 1.001 * worth
    np.testing.assert_array_equal(raw.x, x)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("slack", [0.0, 1e-4, 0.3])
def test_a_known_bound_cuts_off_no_optimum(solver: str, slack: float) -> None:
    for structure in ("residual", "negative"):
        problem = random_problem(3, structure)
        best, program = exhaustive(problem), Program.from_problem(problem)
        known = best.objective + slack * abs(best.objective)
        raw = get_backend(solver).solve(program, SolveOptions(known_bound=known, gap_limit=1e-7))
        assert raw.objective == pytest.approx(best.objective, rel=1e-6)
        assert raw.bound is not None
        assert best.objective * (1 - 1e-9) <= raw.bound <= known * (1 + 1e-12)


@pytest.mark.parametrize("solver", EXACT)
def test_twins_are_ordered_and_the_start_follows(solver: str) -> None:
    program = Program.from_problem(random_problem(2, "chain"))
    pair = program.pairs[0]
    coef = np.repeat(np.asarray(pair.coef)[:, :1], program.groups[pair.second].width, axis=1)
    others = [p for p in program.pairs if pair.second not in (p.first, p.second)]
    linear = program.linear.copy()
    linear[program.groups[pair.second].span] = 0.1
    twins = replace(program, linear=linear, pairs=(replace(pair, coef=coef), *others))
    pairs = ordered_pairs(twins)
    assert len(pairs) == program.groups[pair.second].width - 1
    free = get_backend("block_coordinate").solve(twins, SolveOptions())
    assert free.x is not None
    backwards = np.asarray(free.x, np.bool_).copy()
    span = twins.groups[pair.second].span
    backwards[span] = np.sort(backwards[span])
    raw = get_backend(solver).solve(twins, SolveOptions(warm_start=backwards, gap_limit=0.0))
    x = np.asarray(raw.x, np.bool_)
    assert twins.is_feasible(x)
    assert raw.objective is not None
    assert raw.objective >= twins.objective(backwards) - 1e-9
    assert (x[pairs[:, 0]] >= x[pairs[:, 1]]).all()


def test_a_known_bound_must_be_a_number() -> None:
    for wrong in (math.nan, math.inf, "1"):
        with pytest.raises(InvalidOptionError, match="no selection exceeds"):
            SolveOptions(known_bound=wrong)  # type: ignore[arg-type]
    assert SolveOptions(known_bound=3.0).to_json()["known_bound"] == 3.0


@pytest.mark.slow
def test_auto_closes_192_channels_by_deciding_units_first() -> None:
    report = solve(chain_problem("medium"), time_limit=120)
    assert report.termination.reason is Reason.OPTIMAL
    assert report.gap is not None
    assert report.gap <= 1e-4
    assert any("the bound decided" in note for note in report.notes)
    assert report.solver.endswith("highs")


@pytest.mark.parametrize("structure", ["ties", "concat", "negative", "two_budgets"])
def test_auto_stays_exact_when_the_bound_goes_first(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On instances that a prover would take at once, with the prover told to be slow."""
    from qcqp_prune_solvers.highs import HighsBackend

    quick = HighsBackend.outlook

    def slow(self: HighsBackend, program: Program):  # type: ignore[no-untyped-def]
        outlook = quick(self, program)
        return None if outlook is None else replace(outlook, seconds=1e6)

    monkeypatch.setattr(HighsBackend, "outlook", slow)
    for seed in range(4):
        problem = random_problem(70 + seed, structure)
        best = exhaustive(problem).objective
        report = solve(problem, gap_limit=0.0)
        assert report.objective == pytest.approx(best, rel=1e-6)
        assert report.bound is not None
        assert report.bound >= best * (1 - 1e-6)
        assert report.termination.reason is Reason.OPTIMAL
