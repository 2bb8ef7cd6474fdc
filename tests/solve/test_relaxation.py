"""The first-order bound is valid at every moment and reaches the relaxation's optimum."""

from __future__ import annotations

import highspy
import pytest

from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import Reason
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem
from qcqp_prune_solvers.first_order import relax
from qcqp_prune_solvers.highs import as_highs


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reaches_what_the_simplex_method_finds(structure: str) -> None:
    for seed in range(3):
        problem = random_problem(seed, structure)
        model = CardinalityRLT().apply(Program.from_problem(problem))
        lp = as_highs(model)
        lp.integrality_ = []
        simplex = highspy.Highs()
        simplex.setOptionValue("output_flag", False)
        simplex.passModel(lp)
        simplex.run()
        exact = float(simplex.getInfo().objective_function_value)
        seen: list[float] = []

        def listen(_: int, bound: float, seen: list[float] = seen) -> bool:
            seen.append(bound)
            return False

        relaxed = relax(model, listen)
        assert relaxed.bound >= exact - 1e-7 * abs(exact)
        assert relaxed.bound <= exact + 2e-3 * abs(exact)
        assert seen == sorted(seen, reverse=True)
        assert all(b >= exhaustive(problem).objective - 1e-9 for b in seen)


@pytest.mark.parametrize("iterations", [1, 2, 30, 300])
def test_valid_wherever_it_is_stopped(iterations: int) -> None:
    problem = chain_problem("tiny")
    best = solve(problem, "highs", gap_limit=0.0).objective
    report = solve(problem, "relaxation", options=SolveOptions(work_limit=iterations))
    assert report.bound is not None
    assert report.bound >= best * (1 - 1e-9)
    assert report.termination.reason in (Reason.WORK_LIMIT, Reason.BOUND_COMPUTED)


def test_same_work_same_bound() -> None:
    problem = chain_problem("small")
    first, second = (solve(problem, "relaxation", options=SolveOptions(work_limit=200)) for _ in range(2))
    assert first.bound == second.bound
    assert first.masks == second.masks


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet56"])
def test_auto_bounds_real_sizes_within_a_minute(name: str) -> None:
    for fractions in ((("macs", 0.5),), (("macs", 0.5), ("params", 0.5))):
        report = solve(chain_problem(name, fractions=fractions), "auto", time_limit=55)
        assert report.seconds < 60
        assert report.gap is not None
        assert report.gap < 0.02
