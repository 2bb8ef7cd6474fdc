"""Branching on counts: the relaxation again, with the counts of one class split in two, best bound first.

A smaller range of counts tightens everything that depends on them: top sums, products, the mixture. Each case starts
from its parent's multipliers, which prove the parent's bound for it, and refines them. The cases make a tree, so that
their bounds together prove one for the program.

References:
    Land and Doig, "An automatic method of solving discrete programming problems" (Econometrica, 1960).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from qcqp_prune.program.program import Program
from qcqp_prune.solve.proof import AnyProof, Branching
from qcqp_prune_solvers.decomposition.proofs import proof_of
from qcqp_prune_solvers.decomposition.relaxation import Relaxation, Step

MOST_UNITS = 4000
"""Larger programs are not branched on: one case would take too long for what it gains."""
REFITS = 2
"""New diagonals for a case, beside its parent's."""
DOUBLINGS = 200


@dataclass(eq=False)
class Case:
    """A node of the tree.

    Attributes:
        relaxation: with the counts that the case allows.
        step: the best bound of the case.
        split: class of groups and largest count of the low case; None for a leaf.
        cases: low and high; empty for a leaf.
    """

    relaxation: Relaxation
    step: Step
    split: tuple[int, int] | None = None
    cases: list[Case] = field(default_factory=list)

    def proof(self) -> AnyProof:
        """Of the largest bound among the leaves."""
        if self.split is None:
            return proof_of(self.relaxation, self.step)
        low, high = (case.proof() for case in self.cases)
        return Branching(*self.split, low, high)


@dataclass(frozen=True, eq=False)
class Progress:
    """One call of the oracle for a case: its step, and what is proved for the whole program by now."""

    step: Step
    bound: float


class Tree:
    """The search tree over the counts of a program."""

    def __init__(self, relaxation: Relaxation, best: Step) -> None:
        """Start at the root.

        Args:
            relaxation: of the whole program.
            best: its best step.
        """
        self.root = Case(relaxation, best)
        self._order = itertools.count()
        self._open: list[tuple[float, int, Case]] = [(-best.bound, next(self._order), self.root)]
        self._settled = -np.inf

    @property
    def bound(self) -> float:
        """Proved for the program: the largest of all leaves."""
        return max(self._settled, -self._open[0][0] if self._open else -np.inf)

    def steps(self, worth: Callable[[], float], halted: Callable[[], bool]) -> Iterator[Progress]:
        """Split the case with the largest bound, until no case is open.

        Args:
            worth: of the best selection known: a case that cannot beat it is settled.
            halted: polled inside of long computations.
        """
        while self._open and not halted():
            case = self._open[0][2]
            if case.step.bound <= worth():
                return
            split = _split(case.relaxation)
            if split is None:
                heapq.heappop(self._open)
                self._settled = max(self._settled, case.step.bound)
                continue
            group, at_most = split
            done = []
            for program in _halves(case.relaxation.program, group, at_most):
                child = Case(case.relaxation.restricted(program), case.step)
                done.append(child)
                for step in self._refined(child, worth, halted):
                    # Until both halves are bounded the parent stays open, and its bound stands.
                    yield Progress(step, self.bound)
            case.split, case.cases = split, done
            heapq.heappop(self._open)
            for child in done:
                heapq.heappush(self._open, (-child.step.bound, next(self._order), child))
            yield Progress(done[-1].step, self.bound)

    def _refined(self, case: Case, worth: Callable[[], float], halted: Callable[[], bool]) -> Iterator[Step]:
        relaxation, parent = case.relaxation, case.step
        case.step = relaxation.bound(parent.multipliers)
        if case.step.bound > parent.bound:
            # The same multipliers prove the parent's bound for a part of its points, but for rounding.
            case.step = replace(case.step, bound=parent.bound)
        yield case.step
        if not relaxation.has_point:
            case.step = _priced_out(relaxation, case.step, worth())
            return
        for step in relaxation.refined(case.step.multipliers, REFITS, halted):
            if step.bound < case.step.bound:
                case.step = step
            yield step
            if case.step.bound <= worth() or halted():
                return


def _halves(program: Program, group: int, at_most: int) -> Iterator[Program]:
    """The program with a group's counts, and those of the groups tied to it, at most and above a count."""
    tie = program.groups[group].tie
    for low in (True, False):
        groups = tuple(
            replace(g, counts=tuple(n for n in g.counts if (n <= at_most) == low)) if g.tie == tie else g
            for g in program.groups
        )
        if len(program.needs):
            counts = program.needs.settled([g.counts for g in groups], [g.tie for g in groups])
            groups = tuple(replace(g, counts=tuple(n)) for g, n in zip(groups, counts, strict=True))
        yield replace(program, groups=groups)


def _split(relaxation: Relaxation) -> tuple[int, int] | None:
    """The group whose count varies most among the points of the mixture, and where to cut; None where none can be."""
    best, chosen = -1.0, None
    mean, variance = relaxation.count_moments()
    for g, group in enumerate(relaxation.program.groups):
        if len(group.counts) < 2:
            continue
        if variance[g] > best:
            cut = int(np.clip(np.searchsorted(group.counts, mean[g], side="right"), 1, len(group.counts) - 1))
            best, chosen = float(variance[g]), (g, int(group.counts[cut - 1]))
    return chosen


def _priced_out(relaxation: Relaxation, step: Step, worth: float) -> Step:
    """A step for a case in which even the least counts exceed a budget: a price on it proves any bound."""
    least = np.asarray([g.counts[0] for g in relaxation.program.groups], np.int64)
    over = np.asarray([c.form.evaluate(least) > c.limit for c in relaxation.program.constraints])
    size = abs(step.bound) + abs(worth)
    price = size
    for _ in range(DOUBLINGS):
        if step.bound <= worth:
            break
        prices = np.where(over, np.maximum(step.multipliers.prices, price), step.multipliers.prices)
        step = relaxation.bound(replace(step.multipliers, prices=prices))
        price *= 2.0
    return step
