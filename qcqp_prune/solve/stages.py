"""Running backends one after another on one program: each answer is checked, the best of each kind is held."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

import numpy as np

from qcqp_prune.errors import BackendError, QcqpPruneError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.program.restriction import Folded, Restriction
from qcqp_prune.solve.backend import Backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.proof import AnyProof, Tangent
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune.solve.verify import checked, is_closed, tolerance

SAME = 1e-9
"""Objectives this close, relatively, may be one selection's, added up in two orders."""


@dataclass
class Held:
    """What is held and proved so far, and what is to be said about it.

    Attributes:
        x, objective: the best checked point.
        bound: the lowest valid bound.
        proof: of the lowest bound that can be written down; branch and cut may have proved a lower one.
        tangents: bounds as functions of the limits, from all backends.
        termination: of the last backend that ran.
        restriction: what is proved of single units and counts.
        near: where nothing is held, a point that misses a band only.
    """

    problem: PruningProblem
    program: Program
    options: SolveOptions
    started: float = field(default_factory=time.perf_counter)
    x: BoolArray | None = None
    objective: float | None = None
    bound: float | None = None
    proof: AnyProof | None = None
    tangents: list[Tangent] = field(default_factory=list)
    termination: Termination | None = None
    solvers: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    logs: list[str] = field(default_factory=list)
    reductions: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    statistics: dict[str, float] = field(default_factory=dict)
    restriction: Restriction = field(init=False)
    near: BoolArray | None = None
    recorder: TraceRecorder = field(init=False)

    def __post_init__(self) -> None:
        self.recorder = TraceRecorder(self.options.on_event)
        self.restriction = Restriction.none(self.program)
        if self.options.warm_start is not None:
            self.x = self.options.warm_start
            self.objective = self.problem.objective.evaluate(self.program.mask(self.x))

    @property
    def seconds(self) -> float:
        """Since the run began."""
        return time.perf_counter() - self.started

    @property
    def interrupted(self) -> bool:
        """Whether the user asked to stop."""
        return self.options.stop() or (
            self.termination is not None and self.termination.reason is Reason.INTERRUPTED
        )

    @property
    def is_closed(self) -> bool:
        """Whether the proof reaches the gap asked for."""
        return is_closed(self.program, self.objective, self.bound, self.options.gap_limit)

    def hold_least(self) -> None:
        """Hold the least allowed counts, which meet every budget that can be met, and the best units at these.

        Nothing is held where these units do not obey the links.
        """
        worth = self.program.gradient(np.ones(self.program.size))
        x = np.zeros(self.program.size, np.bool_)
        for group in self.program.groups:
            best = np.argsort(-worth[group.span], kind="stable")[: group.counts[0]]
            x[group.start + best] = True
        if not self.program.is_feasible(x):
            return
        self.x = x
        self.objective = self.problem.objective.evaluate(self.program.mask(self.x))
        self.notes.append("interrupted before any search: the least allowed counts are returned")

    def undecided(self) -> Folded:
        """The program over what is not decided yet; all of it where nothing is."""
        return Folded.of(self.program, self.restriction)

    def settle(self) -> None:
        """Take what is held for the best: no other point is left."""
        self.bound = self.objective
        self.termination = Termination(Reason.OPTIMAL)

    def run(self, backend: Backend, *, folded: Folded | None = None, **changes: object) -> RawSolution:
        """Call a backend from what is held, check its answer, and keep what is better.

        Args:
            backend: the solver.
            folded: from ``undecided``, to solve only what is left. The answer is for the whole program again.
            changes: fields of ``SolveOptions`` that differ from the caller's.
        """
        offset, work = self.seconds, self._work_done()

        def listen(point: TracePoint) -> None:
            self._note(replace(point, seconds=point.seconds + offset, work=point.work + work))

        known = [b for b in (self.bound, self.options.known_bound) if b is not None]
        options = replace(
            self.options,
            warm_start=self.x,
            known_bound=min(known, default=None),
            on_event=listen,
            **changes,  # type: ignore[arg-type]
        )
        first = len(self.recorder.points)
        try:
            raw = (
                _call(backend, self.program, options)
                if folded is None
                else self._within(backend, folded, options)
            )
            self._keep(backend.name, raw)
        finally:
            # What the backend announced and the check did not confirm is no part of the record.
            self.recorder.revise(first, _up(self.objective), _down(self.bound))
        self._note(TracePoint(self.seconds, self._work_done(), self.objective, self.bound))
        return raw

    def _within(self, backend: Backend, folded: Folded, options: SolveOptions) -> RawSolution:
        """Solve what is left, and say it of the whole: what lies outside is worth less than what is held."""
        outside = self.restriction.worth

        def listen(point: TracePoint) -> None:
            assert options.on_event is not None
            options.on_event(replace(point, bound=None if point.bound is None else max(point.bound, outside)))

        start = options.warm_start
        inside = start is not None and self.restriction.holds(self.program, start)
        raw = _call(
            backend,
            folded.program,
            replace(
                options,
                warm_start=folded.project(start) if start is not None and inside else None,
                on_event=listen,
            ),
        )
        if raw.termination.reason is Reason.INFEASIBLE and raw.x is None and self.x is not None:
            # Nothing that is left is worth as much as what is held.
            bound = max(outside, self.objective or outside)
            return replace(
                raw, x=self.x, bound=bound, termination=Termination(Reason.OPTIMAL), proof=None, tangents=()
            )
        found = raw.restriction
        return replace(
            raw,
            x=None if raw.x is None else folded.lift(np.asarray(raw.x)),
            bound=None if raw.bound is None else max(raw.bound, outside),
            restriction=None if found is None else folded.whole(found, self.restriction),
            # Both are about the smaller program, and what it leaves out depends on the limits.
            proof=None,
            tangents=(),
        )

    def _keep(self, name: str, raw: RawSolution) -> None:
        answer = checked(self.problem, self.program, raw, name)
        if raw.termination.reason is Reason.INFEASIBLE and (self.x is not None or answer is not None):
            raise BackendError(
                f"solver {name!r} claims that no selection meets the budgets, and one does: choose another solver"
            )
        if answer is not None and (self.objective is None or answer.objective > self.objective):
            self.x, self.objective = answer.x, answer.objective
        if raw.restriction is not None:
            self._restrict(name, raw.restriction)
        bound = answer.bound if answer is not None else raw.bound
        if bound is not None:
            self._tighten(name, bound, raw)
        if raw.near is not None:
            self.near = np.asarray(raw.near, np.bool_)
        self.termination = raw.termination
        self.solvers.append(name)
        if raw.solver_version:
            self.versions.append(f"{name} {raw.solver_version}")
        if raw.log:
            self.logs.append(raw.log)
        if raw.reduction:
            self.reductions.append(raw.reduction)
        self.statistics.update({f"{name}.{key}": value for key, value in raw.statistics.items()})

    def _restrict(self, name: str, found: Restriction) -> None:
        if self.x is not None and self.objective is not None:
            slip = tolerance(self.objective, self.program)
            if self.objective > found.worth + slip and not found.holds(self.program, self.x):
                raise BackendError(
                    f"solver {name!r} claims that no selection outside of its restriction is worth more than "
                    f"{found.worth!r}, and a checked one is: choose another solver, and report it with the problem file"
                )
        self.restriction = self.restriction & found

    def _tighten(self, name: str, bound: float, raw: RawSolution) -> None:
        if self.objective is not None and bound < self.objective:
            # The check allows a bound to fall below the backend's own point by rounding; the point held here may be
            # another one, so the same allowance is made for it.
            if bound < self.objective - tolerance(self.objective, self.program):
                raise BackendError(
                    f"solver {name!r} claims the bound {bound!r}, and a checked selection is worth {self.objective!r}: "
                    "choose another solver, and report this with the problem file"
                )
            bound = self.objective
        if self.bound is None or bound < self.bound:
            self.bound = bound
        if raw.proof is not None and (self.proof is None or raw.proof.bound < self.proof.bound):
            self.proof = raw.proof
        self.tangents += raw.tangents

    def _note(self, point: TracePoint) -> None:
        """Record a point, with what earlier backends already held."""
        incumbents = [v for v in (point.incumbent, self.objective) if v is not None]
        bounds = [v for v in (point.bound, self.bound) if v is not None]
        self.recorder.add(
            replace(point, incumbent=max(incumbents, default=None), bound=min(bounds, default=None))
        )

    def _work_done(self) -> int:
        return self.recorder.points[-1].work if self.recorder.points else 0


def _up(value: float | None) -> float | None:
    """The value with room for the rounding of a sum in another order."""
    return None if value is None else value + SAME * abs(value)


def _down(value: float | None) -> float | None:
    return None if value is None else value - SAME * abs(value)


def _call(backend: Backend, program: Program, options: SolveOptions) -> RawSolution:
    try:
        return backend.solve(program, options)
    except (QcqpPruneError, MemoryError):
        raise
    except Exception as error:
        raise BackendError(
            f"solver {backend.name!r} failed with {type(error).__name__}: {error}. Try another solver, and report this "
            "with the problem file"
        ) from error
