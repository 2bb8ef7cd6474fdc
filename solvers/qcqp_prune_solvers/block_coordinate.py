"""Block coordinate search: exact blocks from several starts, then fill, exchanges and random shifts. No bound.

Two kinds of block are solved exactly: the units of one class of groups at a given count (take the top k), and the
counts and units of all classes that have no coupling among themselves (a knapsack with sorted items, to within one
step). The search ends with a fill, so that no step that would lose nothing fits into the budgets any more.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from importlib.metadata import version

import numpy as np

from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, Role, answer_to_nothing
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint, TraceRecorder
from qcqp_prune_solvers.search.bands import enter_bands, shortage
from qcqp_prune_solvers.search.blocks import sweep
from qcqp_prune_solvers.search.families import Families
from qcqp_prune_solvers.search.linked import LinkedState, improve
from qcqp_prune_solvers.search.linked import drop as drop_steps
from qcqp_prune_solvers.search.linked import perturb as perturb_steps
from qcqp_prune_solvers.search.merged import Merged, merged
from qcqp_prune_solvers.search.moves import drop_to_budget, exchange, fill, perturb, polish
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure

RANDOM_STARTS = 2
ROUNDS = 40
# Without a limit the number of random shifts follows the size, so that the run ends and can be repeated.
# First allowances for a loss, as shares of the objective, of the rounds of random shifts.
HEATS = (1e-2, 1e-3)
TRIALS_PER_CLASS, LEAST_TRIALS, MOST_TRIALS = 30, 150, 1500
MOST_LINKED_TRIALS = 300
PATTERNS = 9
"""Of empty blocks, from none to all, to start from."""
LEAST_GAIN = 1e-10
STRICT_SHARE = 0.3
"""Of the time, for the strict restriction of a program with links."""


class BlockCoordinateBackend:
    """Heuristic for programs of any size, repeatable by seed and work limit (one unit of work is one step).

    References:
        Jeong et al. (AISTATS 2022), section 3.4; Pisinger, Rasmussen and Sandvik, "Solution of large quadratic knapsack
        problems through aggressive reduction" (INFORMS Journal on Computing, 2007), section 4, for fill and exchange.
    """

    name = "block_coordinate"
    scope = "searches: a good selection for any size, no bound"
    classes = (ProblemClass(2, 2, integral=True, convex=False, tables=True),)

    def availability(self) -> Availability:
        """Always available: NumPy only."""
        return Availability(True, version=version("qcqp-prune"))

    def outlook(self, program: Program) -> Outlook | None:
        """A good selection for any size."""
        return Outlook(Role.SEARCHES, 10, f"{program.size:,} units in {len(program.groups)} groups")

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        """Search from several starts until the search ends or a limit is met; always holds a feasible point."""
        if (answer := answer_to_nothing(program)) is not None:
            return replace(answer, solver_version=version("qcqp-prune"))
        least = np.asarray([g.counts[0] for g in program.groups], dtype=np.int64)
        if not program.counts_within(least):
            # Costs never fall with counts, so this is a proof.
            return RawSolution(Termination(Reason.INFEASIBLE), solver_version=version("qcqp-prune"))
        if len(program.links) and len(program.needs):
            raise SolverIncapableError(
                "units are linked and blocks can be removed, which this search cannot do together: trace without one "
                'of the two, or use solver="scip" or solver="highs"'
            )
        kind = _LinkedSearch if len(program.links) else _BlockSearch if len(program.needs) else _Search
        return kind(program, options).run()


class _Holder(ABC):
    """The best point of a run, its log, and its limits."""

    def __init__(self, program: Program, options: SolveOptions) -> None:
        self.started = time.perf_counter()
        self.program, self.options = program, options
        self.rng = np.random.default_rng(options.seed)
        self.recorder = TraceRecorder(options.on_event)
        self.state: State | LinkedState
        self.best_x: BoolArray | None = None
        self.near: BoolArray | None = None
        self.missing = np.inf
        self.best_value = -np.inf
        self.log: list[str] = []

    def _hold(self, name: str) -> None:
        """Keep the state where it is the best so far."""
        self._note_shortage()
        value = self.program.objective(self.state.x)
        if value > self.best_value and self.program.is_feasible(self.state.x):
            self.best_x, self.best_value = self.state.x.copy(), value
        seconds = time.perf_counter() - self.started
        self.log.append(f"{seconds:8.2f} s  {self.state.work:8d} steps  {value:.9g}  {name}")
        held = None if self.best_x is None else self.best_value
        self.recorder.add(TracePoint(seconds, self.state.work, held, None))

    @abstractmethod
    def run(self) -> RawSolution:
        """Search until the search ends or a limit is met."""

    @abstractmethod
    def _note_shortage(self) -> None:
        """Remember the point that comes nearest to the lower ends of the budgets."""

    def _go_to_best(self) -> None:
        if self.best_x is not None:
            self.state.reset(self.best_x)

    def _stop(self) -> bool:
        options = self.options
        return (
            options.stop()
            or (options.work_limit is not None and self.state.work >= options.work_limit)
            or (options.time_limit is not None and time.perf_counter() - self.started >= options.time_limit)
        )

    def _result(self) -> RawSolution:
        options = self.options
        found = self.best_x is not None
        termination = Termination(Reason.SEARCH_ENDED) if found else Termination(Reason.NOTHING_FOUND)
        if options.stop():
            termination = Termination(Reason.INTERRUPTED)
        elif options.work_limit is not None and self.state.work >= options.work_limit:
            termination = Termination(Reason.WORK_LIMIT, f"work_limit={options.work_limit}")
        elif self._stop():
            termination = Termination(Reason.TIME_LIMIT, f"time_limit={options.time_limit}")
        return RawSolution(
            termination=termination,
            x=self.best_x,
            objective=self.best_value if found else None,
            near=self.near,
            trace=self.recorder.points,
            log="\n".join(self.log) + "\n",
            solver_version=version("qcqp-prune"),
            statistics={"steps": float(self.state.work)},
        )


class _LinkedSearch(_Holder):
    """One run on a program with links: from the strict restriction to patterns of single units."""

    state: LinkedState

    def __init__(self, program: Program, options: SolveOptions) -> None:
        super().__init__(program, options)
        self.state = LinkedState(program, np.ones(program.size, np.bool_))

    def run(self) -> RawSolution:
        """Starts, each improved; then random changes of the best."""
        for name, start in self._starts():
            if self.best_x is not None and self._stop():
                break
            x = start()
            if x is None:
                continue
            self.state.reset(x)
            if drop_steps(self.state):
                self._hold(name)
                improve(self.state, self._stop)
                self._hold(f"{name}, improved")
        if self.best_x is not None and not self._stop():
            self._go_to_best()
            trials = min(max(TRIALS_PER_CLASS * len(self.state.blocks), LEAST_TRIALS), MOST_LINKED_TRIALS)
            perturb_steps(self.state, self.rng, trials, self._stop)
            self._hold("random changes")
        return self._result()

    def _note_shortage(self) -> None:
        state, missing = self.state, self.state.shortage()
        if 0 < missing < self.missing and state.allowed() and not (state.excess() > 0).any():
            self.missing, self.near = missing, state.x.copy()

    def _starts(self) -> Iterator[tuple[str, Callable[[], BoolArray | None]]]:
        warm = self.options.warm_start
        if warm is not None and self.program.is_feasible(warm):
            yield "warm start", lambda: warm
        yield "linked units together", self._strict
        yield "fewest linked units", self._fewest
        yield "all", lambda: np.ones(self.program.size, np.bool_)

    @cached_property
    def _small(self) -> Merged | None:
        """The strict restriction; made where a start needs it."""
        return merged(self.program)

    def _fewest(self) -> BoolArray | None:
        """The least counts of the strict restriction, which parts still leave: for budgets that it cannot meet."""
        if self.best_x is not None or (small := self._small) is None:
            return None
        worth = small.program.gradient(np.ones(small.program.size))
        x = np.zeros(small.program.size, np.bool_)
        for group in small.program.groups:
            order = np.argsort(-worth[group.span], kind="stable")
            x[group.start + order[: group.counts[0]]] = True
        return small.expanded(x)

    def _strict(self) -> BoolArray | None:
        small = self._small
        if small is None:
            return None
        share = None if self.options.time_limit is None else STRICT_SHARE * self.options.time_limit
        options = replace(self.options, warm_start=None, on_event=None, time_limit=share)
        found = BlockCoordinateBackend().solve(small.program, options)
        return None if found.x is None else small.expanded(np.asarray(found.x, np.bool_))


class _Search(_Holder):
    """One run."""

    state: State

    def __init__(self, program: Program, options: SolveOptions) -> None:
        super().__init__(program, options)
        self.structure = Structure.of(program)
        self.state = State(self.structure, np.ones(program.size, np.bool_))

    def run(self) -> RawSolution:
        """All starts, then random shifts of the best."""
        for name, start in self._starts():
            if self.best_x is not None and self._stop():
                break
            start()
            self._improve()
            self._hold(name)
        self._shift()
        return self._result()

    def _shift(self) -> None:
        """Exchanges and random shifts of the best point."""
        classes = len(self.structure.members)
        if not self._stop():
            self._go_to_best()
            exchange(self.state, self._stop)
            self._hold("exchanges")
            trials = min(max(TRIALS_PER_CLASS * classes, LEAST_TRIALS), MOST_TRIALS)
            for heat in HEATS:
                self._go_to_best()
                self.state.restore(perturb(self.state, self.rng, trials, heat, self._stop))
                exchange(self.state, self._stop)
                self._hold(f"random shifts {heat:g}")
                if self._stop():
                    break

    def _note_shortage(self) -> None:
        if not enter_bands(self.state) and shortage(self.state) < self.missing:
            self.missing, self.near = shortage(self.state), self.state.x.copy()

    def _starts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        if self.options.warm_start is not None and self.program.is_feasible(self.options.warm_start):
            warm = self.options.warm_start
            yield "warm start", lambda: self.state.reset(warm)
        yield "uniform", lambda: self._uniform(0.0)
        yield "backward greedy", lambda: self._backward(None)
        budgets = self.program.constraints
        for k in range(len(budgets) if len(budgets) > 1 else 0):
            yield f"backward greedy, {budgets[k].name} first", lambda k=k: self._backward(k)  # type: ignore[misc]
        for k in range(RANDOM_STARTS):
            yield f"random {k + 1}", lambda: self._uniform(0.3)

    def _uniform(self, noise: float) -> None:
        """The same share of every class, units ranked by their worth in the dense network, times noise."""
        program = self.program
        scores = program.gradient(np.ones(program.size))
        if noise:
            scores = scores * np.exp(noise * self.rng.standard_normal(program.size))
        shares = np.exp(noise * self.rng.standard_normal(len(self.structure.members))) if noise else None
        low, high = 0.0, 1.0
        for _ in range(30):
            middle = (low + high) / 2
            if program.counts_within(self._group_counts(middle, shares)):
                low = middle
            else:
                high = middle
        counts = self._group_counts(low, shares)
        x = np.zeros(program.size, np.bool_)
        for group, n in zip(program.groups, counts.tolist(), strict=True):
            x[group.start + np.argsort(-scores[group.span], kind="stable")[:n]] = True
        self.state.reset(x)
        fill(self.state)

    def _group_counts(self, share: float, shares: np.ndarray | None) -> np.ndarray:
        counts = np.zeros(len(self.program.groups), np.int64)
        for t, (members, allowed) in enumerate(
            zip(self.structure.members, self.structure.allowed, strict=True)
        ):
            part = share if shares is None else min(share * shares[t], 1.0)
            k = int(np.searchsorted(allowed, part * allowed[-1], side="right")) - 1
            counts[list(members)] = allowed[max(k, 0)]
        return counts

    def _backward(self, first: int | None) -> None:
        self.state.reset(np.ones(self.program.size, np.bool_))
        if first is not None:
            drop_to_budget(self.state, only=first)
        drop_to_budget(self.state)
        fill(self.state)

    def _improve(self) -> None:
        """Exact blocks, colour after colour, until a round gains nothing; then fill."""
        for _ in range(ROUNDS):
            gained = [sweep(self.state, colour) for colour in self.structure.colours]
            polish(self.state)
            if not any(gained) or self._stop():
                break
        fill(self.state)


class _BlockSearch(_Search):
    """One run on a program with blocks: within patterns of empty blocks as ever, and from pattern to pattern."""

    def __init__(self, program: Program, options: SolveOptions) -> None:
        super().__init__(program, options)
        self.families = Families(self.structure)

    def run(self) -> RawSolution:
        """Starts with more and more blocks emptied; flips of single blocks until none gains, around random shifts."""
        warm = self.options.warm_start
        if warm is not None and self.program.is_feasible(warm):
            self._try("warm start", self.families.empty(warm), warm)
        order, whole = self.families.by_worth(), np.ones(self.program.size, np.bool_)
        for count in np.unique(np.linspace(0, len(order), PATTERNS).astype(int)).tolist():
            if self.best_x is not None and self._stop():
                break
            empty = np.asarray(self.families.above[:, order[:count]].any(1))
            self._try(f"{int(empty.sum())} blocks empty", empty, whole)
        self._flip()
        if not self._stop():
            self._go_to_best()
            self._shift()
            self._flip()
        return self._result()

    def _try(self, name: str, empty: BoolArray, x: BoolArray) -> bool:
        """Enter a pattern from a point; whether that gave the best selection so far."""
        before = self.best_value
        self._enter(empty, x)
        if not drop_to_budget(self.state):
            return False
        polish(self.state)
        fill(self.state)
        self._improve()
        self._hold(name)
        return self.best_value > before + LEAST_GAIN * abs(before) if np.isfinite(before) else True

    def _flip(self) -> None:
        """Empty or open one block after the other, from the best selection, until none gains."""
        quiet, k = 0, 0
        order = self.rng.permutation(len(self.families))
        while quiet < len(order) and not self._stop() and self.best_x is not None:
            empty = self.families.flipped(self.families.empty(self.best_x), int(order[k]))
            gained = self._try(
                f"block {order[k]} {'emptied' if empty[order[k]] else 'opened'}", empty, self.best_x
            )
            quiet, k = 0 if gained else quiet + 1, (k + 1) % len(order)

    def _enter(self, empty: BoolArray, x: BoolArray) -> None:
        work = self.state.work
        self.structure = self.families.narrowed(empty)
        self.state = State(self.structure, self.families.entered(x, empty))
        self.state.work = work

    def _go_to_best(self) -> None:
        if self.best_x is not None:
            self._enter(self.families.empty(self.best_x), self.best_x)
