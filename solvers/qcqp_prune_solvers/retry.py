"""What floating-point solvers need around them, because their tolerances are absolute.

They accept points that break an integer budget by a tolerance: that is noticed and mended. And they take differences in
the objective below a tolerance for nothing, so that scores of 1e-7 would be "solved" by any point: the objective is
brought to a size near 1 first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, Coefficient, IntArray, LowRank, dense
from qcqp_prune.program.program import CountConstraint, Program
from qcqp_prune.program.symmetry import interchangeable, ordered
from qcqp_prune.solve.backend import answer_to_nothing
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint

ROUNDS = 3
LARGEST_EXPONENT = 1000

Attempt = Callable[[Program, SolveOptions], RawSolution]


def solve_exactly(program: Program, options: SolveOptions, attempt: Attempt) -> RawSolution:
    """Solve with the objective at a size near 1, and with every budget kept to the last unit.

    The factor is a power of two, so that nothing is rounded by it. The warm start is brought into the order of
    interchangeable units that the models ask for.

    Args:
        program: to be solved.
        options: of the whole run.
        attempt: solves a program and returns a rounded point, or none.
    """
    if (answer := answer_to_nothing(program)) is not None:
        return answer
    factor = 2.0 ** -_exponent(program)

    def listen(point: TracePoint) -> None:
        if options.on_event is not None:
            options.on_event(_unscaled(point, factor))

    start, known = options.warm_start, options.known_bound
    scaled = replace(
        options,
        on_event=listen,
        warm_start=None if start is None else ordered(interchangeable(program), start),
        known_bound=None if known is None else known * factor,
    )
    raw = _mended(_scaled(program, factor), scaled, attempt)
    return replace(
        raw,
        bound=_divided(raw.bound, factor),
        objective=None if raw.x is None else program.objective(np.asarray(raw.x, np.bool_)),
        trace=tuple(_unscaled(point, factor) for point in raw.trace),
        log=raw.log if factor == 1.0 or not raw.log else f"objective times {factor:g}\n{raw.log}",
    )


def _exponent(program: Program) -> int:
    """The power of two above the largest coefficient of the objective; 0 where there is none."""
    largest = float(np.abs(program.linear).max(initial=0.0))
    for pair in program.pairs:
        shape = (program.groups[pair.first].width, program.groups[pair.second].width)
        largest = max(largest, float(np.abs(dense(pair.coef, shape)).max(initial=0.0)))
    return int(np.clip(np.frexp(largest)[1], -LARGEST_EXPONENT, LARGEST_EXPONENT))


def _scaled(program: Program, factor: float) -> Program:
    def times(coef: Coefficient) -> Coefficient:
        return LowRank(coef.left * factor, coef.right) if isinstance(coef, LowRank) else coef * factor

    return replace(
        program,
        linear=program.linear * factor,
        pairs=tuple(replace(pair, coef=times(pair.coef)) for pair in program.pairs),
        constant=program.constant * factor,
    )


def _unscaled(point: TracePoint, factor: float) -> TracePoint:
    return replace(point, incumbent=_divided(point.incumbent, factor), bound=_divided(point.bound, factor))


def _divided(value: float | None, factor: float) -> float | None:
    return None if value is None else value / factor


def _mended(program: Program, options: SolveOptions, attempt: Attempt) -> RawSolution:
    """Solve; while the point breaks a budget, lower that budget by the excess and solve again.

    The bound of the first attempt stays: it was proved for a set that holds every feasible point. What is lost by a
    lowered budget therefore shows in the gap.

    Args:
        program: to be solved.
        options: of the whole run; later rounds get the time and the work that are left.
        attempt: solves a program and returns a rounded point, or none.
    """
    started = time.perf_counter()
    first = raw = attempt(program, options)
    tightened, work = program, 0
    for _ in range(ROUNDS):
        if raw.x is None or program.is_feasible(raw.x):
            break
        tightened = _lowered(tightened, program.counts(raw.x))
        if options.stop() or raw.termination.reason is Reason.INTERRUPTED:
            stopped = Termination(Reason.INTERRUPTED)
            return replace(first, x=None, objective=None, termination=stopped)
        work += _work(raw)
        raw = attempt(tightened, _remaining(tightened, options, time.perf_counter() - started, work))
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
        if c.at_least is None:
            return replace(c, limit=c.limit - excess)
        lack = max(c.at_least - c.form.evaluate(counts), 0)
        return replace(c, limit=c.limit - excess, at_least=c.at_least + lack)

    return replace(program, constraints=tuple(lower(c) for c in program.constraints))


def _work(raw: RawSolution) -> int:
    return max((point.work for point in raw.trace), default=0)


def _remaining(program: Program, options: SolveOptions, spent: float, work: int) -> SolveOptions:
    """What a further round may still spend, at least a little; its bounds hold for the lowered budgets only."""

    def listen(point: TracePoint) -> None:
        if options.on_event is not None:
            options.on_event(replace(point, bound=None, work=point.work + work))

    start: BoolArray | None = options.warm_start
    if start is not None and not program.is_feasible(start):
        start = None
    limit = None if options.time_limit is None else max(options.time_limit - spent, 0.1)
    most = None if options.work_limit is None else max(options.work_limit - work, 1)
    return replace(options, warm_start=start, time_limit=limit, work_limit=most, on_event=listen)
