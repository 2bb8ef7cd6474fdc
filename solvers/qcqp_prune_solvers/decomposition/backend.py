"""The decomposition backend: a search for the incumbent, the count-lifted relaxation for the bound."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version

import numpy as np
from threadpoolctl import threadpool_limits

from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.restriction import Restriction
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role, answer_to_nothing
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.proof import AnyProof, Tangent, useful_tangents
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder, relative_gap
from qcqp_prune.solve.verify import is_closed
from qcqp_prune_solvers.block_coordinate import BlockCoordinateBackend
from qcqp_prune_solvers.decomposition.block_cholesky import factor_entries
from qcqp_prune_solvers.decomposition.branching import MOST_UNITS, Tree
from qcqp_prune_solvers.decomposition.count_program import CountProgram
from qcqp_prune_solvers.decomposition.couplings import Couplings
from qcqp_prune_solvers.decomposition.elimination import TooWide
from qcqp_prune_solvers.decomposition.fixing import restriction
from qcqp_prune_solvers.decomposition.proofs import proof_of, tangent_of
from qcqp_prune_solvers.decomposition.relaxation import Relaxation, Step
from qcqp_prune_solvers.search.bands import enter_bands
from qcqp_prune_solvers.search.families import Families
from qcqp_prune_solvers.search.linked import LinkedState, improve
from qcqp_prune_solvers.search.linked import drop as drop_steps
from qcqp_prune_solvers.search.linked import fill as fill_steps
from qcqp_prune_solvers.search.moves import drop_to_budget, fill, polish
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure

MOST_BYTES = 8 * 10**9
"""Largest predicted memory: beyond it the backend declines before it starts."""
SEARCH_SHARE = 0.3
SECONDS_PER_PAIR = 2e-6
"""Measured on ResNet-50, to a first useful bound."""
IMPROVE_EVERY = 8
"""Of the rounded means of linked programs so many are filled only, for one that is improved."""
PATIENCE, BRANCHING_PATIENCE, PROGRESS = 60, 24, 1e-5
"""Stop after so many steps that together improved the bound by less than this, relatively."""
FIXING_SHARE, FIXING_SECONDS = 0.1, 0.5
"""Units and counts are decided at the end where that takes this share of the run, or so many seconds, at most."""


def predicted_bytes(program: Program) -> int:
    """Memory that the bound takes: the coupling by blocks, scaled and factorised, and the tables of counts.

    Raises:
        TooWide: counts are coupled too densely to be eliminated.
    """
    widths = [g.width for g in program.groups]
    pairs = [(p.first, p.second) for p in program.pairs]
    entries = sum(widths[g] * widths[h] for g, h in pairs) + sum(w * w for w in widths)
    factor = factor_entries(widths, pairs)
    tables = CountProgram(Couplings.of(program)).table_entries
    return 8 * (3 * entries + 2 * factor + tables)


class DecompositionBackend:
    """Certified gaps far beyond branch and cut: counts exactly, units by a semidefinite bound.

    One unit of work is one call of the count program.

    References:
        Jeong et al. (AISTATS 2022), eq. 2, for the program; ``relaxation`` and ``lifted`` for the bound.
    """

    name = "decomposition"
    scope = "bounds: within a few percent, often a tenth of one, up to tens of thousands of channels; searches too"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def availability(self) -> Availability:
        """Always available: NumPy and SciPy only."""
        return Availability(True, version=version("qcqp-prune"))

    def outlook(self, program: Program) -> Outlook | None:
        """A bound within a few percent at the most, where counts can be eliminated and the matrix fits into memory."""
        if not program.size:
            return None
        try:
            need = predicted_bytes(program)
        except TooWide:
            return None
        if need > MOST_BYTES:
            return None
        why = f"{program.size:,} units, whose counts can be eliminated exactly"
        return Outlook(Role.BOUNDS, 30, why, seconds=0.5 + SECONDS_PER_PAIR * program.pair_count)

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Search, then bound until the gap is closed, a limit is met, or nothing improves any more.

        Raises:
            SolverIncapableError: too much memory would be needed, or counts are coupled too densely.
        """
        if (answer := answer_to_nothing(program)) is not None:
            return replace(answer, solver_version=version("qcqp-prune"))
        try:
            need = predicted_bytes(program)
        except TooWide as error:
            raise SolverIncapableError(
                f"the counts of this program are coupled too densely to be eliminated ({error}): use another solver"
            ) from error
        if need > MOST_BYTES:
            raise SolverIncapableError(
                f"the bound of this program would take about {need / 1e9:.1f} GB, more than {MOST_BYTES / 1e9:.1f}: "
                'use solver="block_coordinate"'
            )
        # Several threads on matrices of this size wait for each other longer than they compute.
        with threadpool_limits(limits=1, user_api="blas"):
            return _Run(program, options).run()


class _Run:
    """One run."""

    def __init__(self, program: Program, options: SolveOptions) -> None:
        self.started = time.perf_counter()
        self.program, self.options = program, options
        self.recorder = TraceRecorder(options.on_event)
        self.log: list[str] = []
        self.bound: float | None = None
        self.work = 0
        self.x: BoolArray
        self.objective: float
        self._state: State
        self._linked: LinkedState
        self._families: Families | None = None
        self._tried: set[bytes] = set()
        self._relaxation: Relaxation | None = None
        self._best: Step | None = None
        self._tree: Tree | None = None
        self._tangents: list[Tangent] = []

    def run(self) -> RawSolution:
        """Refine the bound, and try each point that the relaxation brings up."""
        termination = Termination(Reason.BOUND_COMPUTED)
        unable = self._start()
        if unable is not None:
            return unable
        if not self.program.linear.any() and not self.program.pair_count:
            # Every selection is worth the same, and there is nothing to scale a relaxation by.
            return self._result(Termination(Reason.OPTIMAL), bound=self.objective)
        if self.options.stop():
            return self._result(Termination(Reason.INTERRUPTED), bound=None)
        relaxation = Relaxation(self.program, self.x.astype(np.float64), self.options.seed)
        self._relaxation = relaxation
        termination = self._root(relaxation)
        if termination.reason is Reason.BOUND_COMPUTED and self.program.size <= MOST_UNITS:
            termination = self._branch(relaxation)
        return self._result(termination, bound=self.bound)

    def _root(self, relaxation: Relaxation) -> Termination:
        """Refine the bound of the whole program until nothing improves any more."""
        mark, since = np.inf, 0
        patience = PATIENCE if self.program.size > MOST_UNITS else BRANCHING_PATIENCE
        for step in relaxation.steps(self._halted):
            self.work += 1
            self._take(step, tangent_of(relaxation, step))
            ended = self._ended()
            if ended is not None:
                return ended
            since += 1
            if step.bound < mark - PROGRESS * abs(mark if np.isfinite(mark) else 1.0):
                mark, since = step.bound, 0
            if since >= patience:
                return Termination(Reason.BOUND_COMPUTED)
        return self._ended() or Termination(Reason.BOUND_COMPUTED)

    def _branch(self, relaxation: Relaxation) -> Termination:
        """Split counts until the gap is closed or a limit is met."""
        assert self._best is not None
        self._tree = Tree(relaxation, self._best)
        for progress in self._tree.steps(lambda: self.objective, self._halted):
            self.work += 1
            self.bound = progress.bound if self.bound is None else min(self.bound, progress.bound)
            self._try(progress.step)
            self._record(f"case {self.work:4d}", {})
            ended = self._ended()
            if ended is not None:
                return ended
        self.bound = min(self.bound, self._tree.bound) if self.bound is not None else self._tree.bound
        self._record("tree", {})
        return self._ended() or Termination(Reason.BOUND_COMPUTED)

    def _start(self) -> RawSolution | None:
        """Take over or find an incumbent; the search's own answer where it finds none."""
        warm = self.options.warm_start
        if warm is not None and self.program.is_feasible(warm):
            self.x, self.objective = warm.copy(), self.program.objective(warm)
        else:
            share = None if self.options.time_limit is None else SEARCH_SHARE * self.options.time_limit
            options = replace(self.options, time_limit=share, work_limit=None, warm_start=None, on_event=None)
            found = BlockCoordinateBackend().solve(self.program, options)
            if found.x is None or found.objective is None:
                return found
            self.x, self.objective = np.asarray(found.x, np.bool_), float(found.objective)
            seconds = time.perf_counter() - self.started
            self.log.append(f"{seconds:8.2f} s  incumbent {self.objective:.9g}  search")
        if len(self.program.links):
            self._linked = LinkedState(self.program, self.x)
        elif len(self.program.needs):
            self._families = Families(Structure.of(self.program))
        else:
            self._state = State(Structure.of(self.program), self.x)
        return None

    def _take(self, step: Step, tangent: Tangent) -> None:
        self._tangents.append(tangent)
        if self.bound is None or step.bound < self.bound:
            self.bound, self._best = step.bound, step
        improved = self._try(step)
        self._record(f"step {self.work:4d}", tangent.prices, improved=improved)

    def _record(self, what: str, prices: Mapping[str, float], *, improved: bool = False) -> None:
        seconds = time.perf_counter() - self.started
        self.recorder.add(TracePoint(seconds, self.work, self.objective, self.bound, prices))
        gap = relative_gap(self.objective, self.bound)
        shown = "-" if gap is None else f"{gap:.4%}"
        note = "  new incumbent" if improved else ""
        self.log.append(f"{seconds:8.2f} s  {what}  bound {self.bound:.9g}  gap {shown}{note}")

    def _try(self, step: Step) -> bool:
        """Repair and polish the relaxation's point; keep it where it is the best."""
        key = step.atom.counts.tobytes()
        if key in self._tried or self.options.bound_only:
            return False
        self._tried.add(key)
        x = self._repaired_links(step) if len(self.program.links) else self._repaired(step)
        if x is None or not self.program.is_feasible(x):
            return False
        value = self.program.objective(x)
        if value <= self.objective:
            return False
        self.x, self.objective = x.copy(), value
        return True

    def _repaired(self, step: Step) -> BoolArray | None:
        """The oracle's point within the budgets, polished."""
        point = step.atom.x.astype(np.bool_)
        if self._families is not None:
            self._state = self._families.state(point)
        else:
            self._state.reset(point)
        if not drop_to_budget(self._state, stop=self._halted):
            return None
        polish(self._state, stop=self._halted)
        fill(self._state)
        if not enter_bands(self._state):
            return None
        return self._state.x

    def _repaired_links(self, step: Step) -> BoolArray | None:
        """The relaxation's means rounded along the links, within the budgets, improved."""
        self._linked.reset(step.multipliers.centre > 0.5)
        if not self._linked.allowed() or not drop_steps(self._linked):
            return None
        if self.work % IMPROVE_EVERY == 0:
            improve(self._linked, self._halted)
        else:
            fill_steps(self._linked)
        return self._linked.x

    def _halted(self) -> bool:
        """Whether time is over or the user asked to stop: polled inside of long computations."""
        limit = self.options.time_limit
        return self.options.stop() or (limit is not None and time.perf_counter() - self.started >= limit)

    def _ended(self) -> Termination | None:
        options = self.options
        if is_closed(self.program, self.objective, self.bound, options.gap_limit):
            return Termination(Reason.OPTIMAL)
        if options.stop():
            return Termination(Reason.INTERRUPTED)
        if options.work_limit is not None and self.work >= options.work_limit:
            return Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}")
        if self._halted():
            return Termination(Reason.TIME_LIMIT, f"time_limit={options.time_limit}")
        return None

    def _decided(self) -> Restriction | None:
        """What the best bound says of units and counts, where that costs little beside the run."""
        relaxation, best = self._relaxation, self._best
        if relaxation is None or best is None:
            return None
        started = time.perf_counter()
        relaxation.bound(best.multipliers)
        once = time.perf_counter() - started
        spent = time.perf_counter() - self.started
        if once * len(self.program.groups) > max(FIXING_SHARE * spent, FIXING_SECONDS):
            return None
        found = restriction(relaxation, best.multipliers, self.objective)
        units = int(found.kept.sum()), int(found.dropped.sum())
        levels = sum(map(len, found.counts)), sum(len(g.counts) for g in self.program.groups)
        self.log.append(
            f"{time.perf_counter() - self.started:8.2f} s  decided: {units[0]} units kept and {units[1]} dropped of "
            f"{self.program.size}, {levels[0]} of {levels[1]} counts left"
        )
        return found

    def _proof(self) -> AnyProof | None:
        if self._best is None or self._relaxation is None:
            return None
        if self._tree is not None and self._tree.bound < self._best.bound:
            return self._tree.root.proof()
        return proof_of(self._relaxation, self._best)

    def _result(self, termination: Termination, *, bound: float | None) -> RawSolution:
        decided = None if termination.reason is Reason.INTERRUPTED else self._decided()
        return RawSolution(
            termination=termination,
            x=self.x,
            objective=self.objective,
            bound=bound,
            trace=self.recorder.points,
            log="\n".join(self.log) + "\n",
            solver_version=version("qcqp-prune"),
            reduction="count-lifted semidefinite relaxation",
            statistics={"oracle_calls": float(self.work)},
            proof=self._proof(),
            tangents=useful_tangents(self._tangents, {c.name: c.limit for c in self.program.constraints}),
            restriction=decided,
        )
