"""A test that every solver backend must pass, ours and third parties' alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qcqp_prune.errors import BackendError, InvalidOptionError, NoIncumbentError
from qcqp_prune.program.coefficients import Coefficient, LowRank
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import Backend, problem_class, require_available
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import Reason
from qcqp_prune.solve.run import solve
from qcqp_prune.testing.exhaustive import Optimum, exhaustive
from qcqp_prune.testing.instances import STRUCTURES, random_problem

RELATIVE = 1e-6
SMALL = 1e-9


@dataclass(frozen=True)
class BackendCheck:
    """What a backend achieved on the small problems, all of which it answered correctly.

    Attributes:
        problems: how many were solved.
        proved: how many it reported as proved optimal (and were).
        missed: how many answers were feasible and not the best, without a claim to be.
    """

    problems: int
    proved: int
    missed: int


def check_backend(
    backend: Backend,
    *,
    seeds: int = 2,
    structures: Sequence[str] = tuple(STRUCTURES),
    work_limit: int | None = None,
) -> BackendCheck:
    """Run a backend on small problems of every structure and compare with all masks tried.

    Structures: chains, residual streams, depthwise costs, concatenation, ties, couplings of a group with itself, what
    layers lose without what they read, counts in multiples, two budgets, negative coefficients, frozen groups, scalar
    and low-rank coefficients, a use that is the largest of several steps and, where the backend takes them, costs that
    are looked up. Also: scores a billion times smaller, a work limit of 1, a warm start, a stop that was asked for at
    once, repeatability, a program without variables, and one without feasible points.

    Args:
        backend: must be available here.
        seeds: problems of each structure.
        structures: names from ``STRUCTURES``; fewer than all are for a quick look.
        work_limit: of each solve, in the backend's own unit; None lets each run to its end.

    Raises:
        SolverUnavailableError: the backend cannot run here.
        InvalidOptionError: there is no problem to solve, or no such structure.
        BackendError: it broke the contract; the message says where.
    """
    require_available(backend)
    options = SolveOptions(gap_limit=0.0, work_limit=work_limit)
    problems = proved = missed = 0
    unknown = [name for name in structures if name not in STRUCTURES]
    if unknown or not structures or seeds < 1:
        raise InvalidOptionError(
            f"seeds={seeds}, structures={list(structures)}: give a positive number, and one or more of "
            f"{', '.join(STRUCTURES)}"
        )
    for structure in structures:
        for seed in range(seeds):
            problem = random_problem(seed, structure)
            wanted = problem_class(Program.from_problem(problem))
            if wanted.tables and not any(c.covers(wanted) for c in backend.classes):
                continue
            optimum = exhaustive(problem)
            where = f"random_problem({seed}, {structure!r})"
            report = solve(problem, backend, options=options)
            _check_report(report, optimum, where)
            problems += 1
            proved += report.termination.reason is Reason.OPTIMAL
            missed += report.objective < optimum.objective - _slip(optimum)
        _check_small_scores(backend, problem, optimum, where, options)
        _check_limits(backend, problem, optimum, where)
        _check_warm_start(backend, problem, optimum, where, replace(options, gap_limit=1e-4))
    _check_nothing(backend)
    _check_stop(backend, problem)
    _check_repeatable(backend, problem)
    _check_infeasible(backend, problem)
    return BackendCheck(problems, proved, missed)


def _slip(optimum: Optimum) -> float:
    return RELATIVE * abs(optimum.objective)


def _check_report(report: SolveReport, optimum: Optimum, where: str) -> None:
    slip = _slip(optimum)
    if report.bound is not None and report.bound < optimum.objective - slip:
        raise BackendError(
            f"{where}: the bound {report.bound!r} is below the optimum {optimum.objective!r}: do not report bounds "
            "that are not valid"
        )
    if report.termination.reason is Reason.OPTIMAL and report.objective < optimum.objective - slip:
        raise BackendError(
            f"{where}: {report.objective!r} is reported as optimal, the optimum is {optimum.objective!r}: report "
            "another reason where nothing is proved"
        )


def _check_small_scores(
    backend: Backend, problem: PruningProblem, optimum: Optimum, where: str, options: SolveOptions
) -> None:
    """A tolerance that is absolute inside a solver takes small scores for nothing."""
    small = replace(problem, objective=_scaled(problem.objective, SMALL))
    report = solve(small, backend, options=options)
    expected = replace(optimum, objective=SMALL * optimum.objective)
    _check_report(report, expected, f"{where} with scores times {SMALL:g}")


def _scaled(form: PairwiseForm, factor: float) -> PairwiseForm:
    def times(coef: Coefficient) -> Coefficient:
        return LowRank(coef.left * factor, coef.right) if isinstance(coef, LowRank) else coef * factor

    pairs = tuple(replace(term, coef=times(term.coef)) for term in form.pairs)
    return replace(form, unary=form.unary * factor, pairs=pairs, constant=form.constant * factor)


def _check_nothing(backend: Backend) -> None:
    program = Program((), np.zeros(0), (), (), 2.5, np.zeros(0, np.int64), 0)
    raw = backend.solve(program, SolveOptions())
    if raw.x is None or np.shape(raw.x) != (0,) or (raw.bound is not None and raw.bound < program.constant):
        raise BackendError(
            "it does not answer a program without variables: return an empty selection, worth the constant "
            "(qcqp_prune.solve.backend.answer_to_nothing does)"
        )


def _check_limits(backend: Backend, problem: PruningProblem, optimum: Optimum, where: str) -> None:
    try:
        report = solve(problem, backend, options=SolveOptions(work_limit=1, gap_limit=0.0))
    except (NoIncumbentError, InvalidOptionError):
        return
    _check_report(report, optimum, f"{where} with work_limit=1")


def _check_warm_start(
    backend: Backend, problem: PruningProblem, optimum: Optimum, where: str, options: SolveOptions
) -> None:
    report = solve(problem, backend, warm_start=optimum.mask, options=options)
    _check_report(report, optimum, f"{where} from the optimum")
    if report.objective < optimum.objective - _slip(optimum):
        raise BackendError(
            f"{where}: a warm start at the optimum was lost: return the start if nothing is better"
        )


def _check_stop(backend: Backend, problem: PruningProblem) -> None:
    raw = backend.solve(Program.from_problem(problem), SolveOptions(stop=lambda: True))
    if raw.termination.reason not in (Reason.INTERRUPTED, Reason.OPTIMAL):
        raise BackendError(
            f"asked to stop at once it ended with {raw.termination.reason.name}: poll options.stop and report "
            "INTERRUPTED"
        )


def _check_repeatable(backend: Backend, problem: PruningProblem) -> None:
    program, options = Program.from_problem(problem), SolveOptions(seed=3, work_limit=20)
    try:
        first, second = (backend.solve(program, options).x for _ in range(2))
    except InvalidOptionError:
        return
    same = first is second if first is None or second is None else np.array_equal(first, second)
    if not same:
        raise BackendError(
            "the same seed and work limit gave two selections: seed everything, and count no seconds"
        )


def _check_infeasible(backend: Backend, problem: PruningProblem) -> None:
    program = Program.from_problem(problem)
    budget = replace(program.constraints[0], limit=program.constraints[0].form.constant - 1)
    raw = backend.solve(replace(program, constraints=(budget, *program.constraints[1:])), SolveOptions())
    if raw.x is not None:
        raise BackendError(
            "it returned a selection for a program that has none: check the budgets before returning"
        )
    if raw.termination.reason is Reason.OPTIMAL:
        raise BackendError("it reports OPTIMAL for a program without a feasible point: report INFEASIBLE")
