"""Every backend passes the test that is offered to third parties, keeps its limits, and honours a warm start."""

from __future__ import annotations

from typing import Any

import pytest

from qcqp_prune.errors import BackendError, InvalidOptionError, NoIncumbentError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import Outlook, ProblemClass, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import STRUCTURES, chain_problem, check_backend, exhaustive, random_problem

EXACT = ["scip", "highs:cardinality_rlt", "highs:perspective", "pyomo:scip_direct", "pyomo:highs"]
ALL, HALF = tuple(STRUCTURES), tuple(STRUCTURES)[::2]
EXTENT = pytest.mark.parametrize(
    ("structures", "seeds"),
    [pytest.param(HALF, 1, id="half"), pytest.param(ALL, 2, id="all", marks=pytest.mark.slow)],
)


@EXTENT
@pytest.mark.parametrize(
    "solver",
    # The solvers behind Pyomo are those that stand here without it, and every other test of this file has them too.
    [pytest.param(name, marks=pytest.mark.slow if name.startswith("pyomo") else ()) for name in EXACT],
)
def test_exact_backends_prove_everything(solver: str, structures: tuple[str, ...], seeds: int) -> None:
    check = check_backend(get_backend(solver), seeds=seeds, structures=structures)
    assert check.problems == seeds * len(structures)
    assert check.proved == check.problems
    assert check.missed == 0


@pytest.mark.parametrize(
    "options", [{"seeds": 0}, {"structures": ()}, {"structures": ("chain", "nothing")}], ids=str
)
def test_a_check_without_problems_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidOptionError, match="one or more of chain"):
        check_backend(get_backend("relaxation"), **options)


def test_the_relaxation_claims_nothing_false() -> None:
    check = check_backend(get_backend("relaxation"), seeds=3)
    assert check.problems == 3 * len(STRUCTURES)


@EXTENT
def test_block_coordinate_misses_few_of_the_small_optima(structures: tuple[str, ...], seeds: int) -> None:
    check = check_backend(get_backend("block_coordinate"), seeds=2 + seeds, structures=structures)
    assert check.problems == (2 + seeds) * len(structures)
    assert check.missed <= 0.1 * check.problems


@pytest.mark.parametrize("solver", [*EXACT, "relaxation"])
def test_bounds_are_valid_after_one_unit_of_work(solver: str) -> None:
    for k, structure in enumerate(STRUCTURES):
        problem = random_problem(50 + k, structure)
        best = exhaustive(problem).objective
        raw = get_backend(solver).solve(
            Program.from_problem(problem), SolveOptions(work_limit=1, gap_limit=0.0)
        )
        assert raw.termination.reason in (Reason.WORK_LIMIT, Reason.OPTIMAL)
        assert raw.bound is None or raw.bound >= best * (1 - 1e-6) - 1e-9


@pytest.mark.parametrize("solver", ["scip", "highs"])
def test_time_limit_is_kept_and_reported(solver: str) -> None:
    problem = chain_problem("medium")
    start = solve(problem, "block_coordinate", options=SolveOptions(work_limit=50))
    report = solve(problem, solver, time_limit=2.0, gap_limit=0.0, warm_start=start)
    assert report.termination.reason is Reason.TIME_LIMIT
    assert "time_limit" in report.termination.sentence
    assert report.seconds < 12
    assert report.objective >= start.objective
    assert report.bound is None or report.bound >= report.objective


@pytest.mark.parametrize("solver", ["scip", "highs", "pyomo"])
def test_work_limit_is_kept_and_reported(solver: str) -> None:
    problem = chain_problem("tiny")
    start = solve(problem, "block_coordinate", options=SolveOptions(work_limit=1))
    report = solve(problem, solver, warm_start=start, options=SolveOptions(work_limit=2, gap_limit=0.0))
    assert report.termination.reason is Reason.WORK_LIMIT
    assert report.statistics is not None
    assert report.statistics.get(f"{solver}.nodes", 0) <= 3


@pytest.mark.parametrize("solver", ["scip", "highs", "block_coordinate"])
def test_same_seed_and_work_same_masks(solver: str) -> None:
    problem = chain_problem("tiny")
    options = SolveOptions(seed=11, work_limit=30)
    start = solve(problem, "block_coordinate", options=SolveOptions(work_limit=1))
    first, second = (solve(problem, solver, options=options, warm_start=start) for _ in range(2))
    assert first.masks == second.masks
    assert first.bound == second.bound


@pytest.mark.parametrize("solver", ["scip", "highs", "relaxation", "block_coordinate", "pyomo"])
def test_a_warm_start_is_never_lost(solver: str) -> None:
    problem = random_problem(4, "residual")
    optimum = exhaustive(problem)
    report = solve(problem, solver, warm_start=optimum.mask, options=SolveOptions(work_limit=1))
    assert report.objective == pytest.approx(optimum.objective, rel=1e-12)
    again = solve(problem, solver, warm_start=report)
    assert again.objective == pytest.approx(optimum.objective, rel=1e-12)


@pytest.mark.parametrize("solver", ["scip", "highs"])
def test_the_solver_itself_starts_from_the_warm_start(solver: str) -> None:
    """The first incumbent in the backend's own trace is worth at least the start."""
    program = Program.from_problem(chain_problem("small"))
    start = get_backend("block_coordinate").solve(program, SolveOptions())
    assert start.x is not None
    assert start.objective is not None
    raw = get_backend(solver).solve(program, SolveOptions(warm_start=start.x, work_limit=1))
    first = next(p.incumbent for p in raw.trace if p.incumbent is not None)
    assert first >= start.objective * (1 - 1e-6)


@pytest.mark.parametrize("solver", ["scip", "highs", "relaxation"])
def test_trace_and_log_are_kept(solver: str) -> None:
    seen: list[TracePoint] = []
    problem = chain_problem("tiny")
    report = solve(problem, solver, options=SolveOptions(on_event=seen.append))
    assert seen == list(report.trace)
    bounds = [p.bound for p in report.trace if p.bound is not None]
    assert bounds
    assert all(b >= report.objective - 1e-6 for b in bounds)
    assert [p.seconds for p in report.trace] == sorted(p.seconds for p in report.trace)
    assert solver == "relaxation" or "highs" in report.log.lower() or "presolv" in report.log.lower()


class _Wrong:
    """A third party's backend that breaks one rule."""

    name = "wrong"
    classes = (ProblemClass(2, 2, tables=True),)

    def __init__(self, fault: str) -> None:
        self.fault = fault
        self.good = get_backend("highs")
        self.calls = 0

    availability = property(lambda self: self.good.availability)

    def outlook(self, program: Program) -> Outlook | None:
        return None

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        self.calls += 1
        raw = self.good.solve(program, options)
        if self.fault == "claims proof":
            heuristic = get_backend("block_coordinate").solve(program, SolveOptions(work_limit=1))
            return RawSolution(Termination(Reason.OPTIMAL), x=heuristic.x)
        if self.fault == "ignores stop":
            return RawSolution(Termination(Reason.SEARCH_ENDED), x=raw.x)
        if self.fault == "invents":
            least = program.mask(raw.x)[program.units] if raw.x is not None else None
            return RawSolution(raw.termination, x=raw.x if least is not None else self._any(program))
        return raw

    def _any(self, program: Program):  # type: ignore[no-untyped-def]
        import numpy as np

        return np.ones(program.size, np.bool_)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("claims proof", "is reported as optimal"),
        ("ignores stop", "poll options.stop"),
        ("invents", "returned a selection for a program that has none"),
    ],
)
def test_check_backend_finds_faults(fault: str, message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_backend(_Wrong(fault), seeds=1)


def test_no_incumbent_at_the_limit_names_a_remedy() -> None:
    with pytest.raises(NoIncumbentError, match=r"raise (time|work)_limit.*warm_start"):
        solve(chain_problem("medium"), "scip", time_limit=0.01)
