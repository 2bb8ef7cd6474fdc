"""Floating-point solvers accept points that break an integer budget by a tolerance. Here that is noticed and mended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from qcqp_prune.program.coefficients import BoolArray, IntArray
from qcqp_prune.program.program import CountConstraint, Program
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination

ROUNDS = 3

Attempt = Callable[[Program, SolveOptions], RawSolution]


def solve_exactly(program: Program, options: SolveOptions, attempt: Attempt) -> RawSolution:
    """Solve; while the point breaks a budget, lower that budget by the excess and solve again.

    The bound of the first attempt stays: it was proved for a set that holds every feasible point. What is lost by a
    lowered budget therefore shows in the gap.

    Args:
        program: to be solved.
        options: of the whole run; later rounds get the time that is left.
        attempt: solves a program and returns a rounded point, or none.
    """
    started = time.perf_counter()
    first = raw = attempt(program, options)
    tightened = program
    for _ in range(ROUNDS):
        if raw.x is None or program.is_feasible(raw.x):
            break
        tightened = _lowered(tightened, program.counts(raw.x))
        if options.stop():
            return replace(first, x=None, objective=None)
        raw = attempt(tightened, _remaining(tightened, options, time.perf_counter() - started))
    if raw is first:
        return raw
    if raw.x is None or not program.is_feasible(raw.x):
        failed = Termination(Reason.FAILED, "no point within the budgets to the last unit")
        return replace(first, x=None, objective=None, termination=failed)
    termination = raw.termination
    if termination.reason is Reason.OPTIMAL and first.termination.reason is not Reason.OPTIMAL:
        termination = first.termination
    return replace(
        first, x=raw.x, objective=program.objective(raw.x), termination=termination, log=first.log + raw.log
    )


def _lowered(program: Program, counts: IntArray) -> Program:
    def lower(c: CountConstraint) -> CountConstraint:
        excess = max(c.form.evaluate(counts) - c.limit, 0)
        return replace(c, limit=c.limit - excess)

    return replace(program, constraints=tuple(lower(c) for c in program.constraints))


def _remaining(program: Program, options: SolveOptions, spent: float) -> SolveOptions:
    start: BoolArray | None = options.warm_start
    if start is not None and not program.is_feasible(start):
        start = None
    limit = None if options.time_limit is None else max(options.time_limit - spent, 0.1)
    return replace(options, warm_start=start, time_limit=limit)
