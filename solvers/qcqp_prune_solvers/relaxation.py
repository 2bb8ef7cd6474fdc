"""A valid bound from the tightest linear relaxation that fits, and a selection rounded from it."""

from __future__ import annotations

import time
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import scipy

from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray, FloatArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.linear_model import Reduction
from qcqp_prune.program.reductions.perspective import Perspective
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role, answer_to_nothing
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import (
    RawSolution,
    Reason,
    Termination,
    TracePoint,
    TraceRecorder,
)
from qcqp_prune.solve.verify import is_closed
from qcqp_prune_solvers.first_order import Relaxed, relax
from qcqp_prune_solvers.linear import REDUCTIONS, require_reduction, require_room
from qcqp_prune_solvers.search.families import Families, rounded
from qcqp_prune_solvers.search.linked import LinkedState
from qcqp_prune_solvers.search.linked import drop as drop_steps
from qcqp_prune_solvers.search.linked import fill as fill_steps
from qcqp_prune_solvers.search.moves import drop_to_budget, fill, polish
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure

THRESHOLDS = (0.5, 0.1, -1.0)
"""Relaxed values above which a leaf is kept at first: the next lower one is tried where floors are missed."""


class RelaxationBackend:
    """Bounds by a linear relaxation; no branching. One unit of work is one iteration of the first-order method.

    Args:
        reduction: ``cardinality_rlt``, ``perspective`` or ``mccormick``; the first, or the second where that is too
            large, when None.
    """

    name = "relaxation"
    scope = "bounds: by a linear relaxation, up to a few thousand channels; rounds it to a selection"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def __init__(self, reduction: str | None = None) -> None:
        require_reduction("relaxation", reduction)
        self._reduction = reduction

    def availability(self) -> Availability:
        """Always available: NumPy and SciPy only."""
        return Availability(True, version=_version())

    def outlook(self, program: Program) -> Outlook | None:
        """A bound for up to a few thousand units."""
        size = CardinalityRLT().nonzeros(program)
        if not CardinalityRLT().accepts(program):
            return None
        return Outlook(Role.BOUNDS, 10, f"its linear relaxation has about {size:,} entries")

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Tighten the bound until it stalls, the gap is closed, or a limit is met.

        Raises:
            SolverIncapableError: no relaxation would fit into memory.
        """
        started = time.perf_counter()
        if (answer := answer_to_nothing(program)) is not None:
            return replace(answer, solver_version=_version())
        least = np.asarray([g.counts[0] for g in program.groups], dtype=np.int64)
        if not program.counts_within(least):
            # Costs never fall with counts, so this is a proof.
            return RawSolution(Termination(Reason.INFEASIBLE), solver_version=_version())
        reduction = self._choose(program)
        recorder = TraceRecorder(options.on_event)
        held = None if options.warm_start is None else program.objective(options.warm_start)

        def listen(iterations: int, bound: float) -> bool:
            seconds = time.perf_counter() - started
            recorder.add(TracePoint(seconds, iterations, held, bound))
            late = options.time_limit is not None and seconds >= options.time_limit
            return late or options.stop() or is_closed(program, held, bound, options.gap_limit)

        relaxed = relax(reduction.apply(program), listen, limit=options.work_limit)
        fraction = reduction.invert(program, relaxed.point)
        x = _linked(program, fraction) if len(program.links) else _rounded(program, fraction)
        start = options.warm_start
        if start is not None and (x is None or program.objective(start) >= program.objective(x)):
            x = start
        if x is None or not program.is_feasible(x):
            return RawSolution(
                _termination(relaxed, options),
                near=x,
                bound=relaxed.bound,
                trace=recorder.points,
                reduction=reduction.name,
                relaxed=fraction,
            )
        worth = program.objective(x)
        recorder.add(TracePoint(time.perf_counter() - started, relaxed.iterations, worth, relaxed.bound))
        closed = is_closed(program, worth, relaxed.bound, options.gap_limit)
        return RawSolution(
            termination=Termination(Reason.OPTIMAL) if closed else _termination(relaxed, options),
            x=x,
            bound=relaxed.bound,
            objective=worth,
            trace=recorder.points,
            solver_version=_version(),
            reduction=reduction.name,
            relaxed=fraction,
            statistics={"iterations": float(relaxed.iterations), "converged": float(relaxed.converged)},
        )

    def _choose(self, program: Program) -> Reduction:
        if self._reduction is not None:
            reduction = REDUCTIONS[self._reduction]()
            require_room(program, reduction)
            return reduction
        for reduction in (CardinalityRLT(), Perspective()):
            if reduction.accepts(program):
                return reduction
        raise SolverIncapableError(
            f"no relaxation of {program.size:,} units and {program.pair_count:,} products fits into memory: use "
            'solver="block_coordinate", which gives a selection without a bound'
        )


def _rounded(program: Program, fraction: FloatArray) -> BoolArray:
    """Each class at the allowed count nearest to its relaxed one, units by relaxed value; then mended and filled."""
    structure = Structure.of(program)
    x = np.zeros(program.size, np.bool_)
    for members, allowed in zip(structure.members, structure.allowed, strict=True):
        spans = [program.groups[g].span for g in members]
        mean = float(np.mean([fraction[span].sum() for span in spans]))
        n = int(allowed[np.abs(allowed - mean).argmin()])
        for span in spans:
            x[span.start + np.argsort(-fraction[span], kind="stable")[:n]] = True
    if len(program.needs):
        return rounded(Families(structure), x).x
    state = State(structure, x)
    drop_to_budget(state)
    fill(state)
    polish(state)
    fill(state)
    return state.x


def _linked(program: Program, fraction: FloatArray) -> BoolArray | None:
    """Leaves by relaxed value, wholes by their leaves; then mended and filled. None where that obeys no floors."""
    state = LinkedState(program, fraction > 0.5)
    for threshold in THRESHOLDS:
        state.reset(fraction > threshold)
        if state.allowed() and drop_steps(state):
            fill_steps(state)
            if program.is_feasible(state.x):
                return state.x
    return None


def _termination(relaxed: Relaxed, options: SolveOptions) -> Termination:
    if options.stop():
        return Termination(Reason.INTERRUPTED)
    if relaxed.converged:
        return Termination(Reason.BOUND_COMPUTED)
    if options.work_limit is not None and relaxed.iterations >= options.work_limit:
        return Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}")
    if options.time_limit is not None:
        return Termination(Reason.TIME_LIMIT, f"time_limit={options.time_limit}")
    return Termination(Reason.BOUND_COMPUTED)


def _version() -> str:
    return f"{version('qcqp-prune')} (scipy {scipy.__version__})"
