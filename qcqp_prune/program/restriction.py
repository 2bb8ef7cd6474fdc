"""What a bound proves of single units and counts, and the smaller program that is left.

A bound on "the best selection without unit ``i``" that is below the selection held proves that every better one keeps
``i``. Such facts are a *restriction*; folding it into the program leaves one over the undecided units only, of the same
class, which any backend takes.

References:
    Caprara, Pisinger and Toth, "Exact solution of the quadratic knapsack problem" (INFORMS Journal on Computing, 1999),
    section 4, for reduction by bounds on both values of a variable.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.graph.links import Links
from qcqp_prune.graph.needs import Needs
from qcqp_prune.program.coefficients import BoolArray, Coefficient, FloatArray, IntArray, block, times
from qcqp_prune.program.program import GroupPair, Program, ProgramGroup


@dataclass(frozen=True, eq=False)
class Restriction:
    """Every feasible point worth at least ``worth`` lies within it.

    Attributes:
        kept: ``(n,) bool``, variables that are 1 at all these points.
        dropped: ``(n,) bool``, variables that are 0 at all these points.
        counts: for each group the counts that are left, ascending.
        worth: objective, with the program's constant.
    """

    kept: BoolArray
    dropped: BoolArray
    counts: tuple[tuple[int, ...], ...]
    worth: float

    @classmethod
    def none(cls, program: Program) -> Restriction:
        """Nothing is known: every point lies within it."""
        zero = np.zeros(program.size, np.bool_)
        return cls(zero, zero.copy(), tuple(g.counts for g in program.groups), -np.inf)

    def __and__(self, other: Restriction) -> Restriction:
        """Both, for points that are worth enough for either."""
        counts = tuple(
            tuple(n for n in first if n in set(second))
            for first, second in zip(self.counts, other.counts, strict=True)
        )
        worth = max(self.worth, other.worth)
        return Restriction(self.kept | other.kept, self.dropped | other.dropped, counts, worth)

    def holds(self, program: Program, x: BoolArray) -> bool:
        """Whether a point ``(n,)`` lies within it."""
        counts = program.counts(x).tolist()
        inside = all(n in allowed for n, allowed in zip(counts, self.counts, strict=True))
        return inside and not (self.kept & ~x).any() and not (self.dropped & x).any()


@dataclass(frozen=True, eq=False)
class Folded:
    """A program over the undecided variables of another one, and the way back.

    Groups that are tied to others, variables in links, and groups of blocks that may be there or not keep all their
    variables: what is known of these is used for their counts only.

    Attributes:
        program: the smaller program; its objective includes the worth of what is decided.
        left: ``(n',)`` its variables among those of the original.
        base: ``(n,) bool``, the decided variables that are 1.
        groups, inside: for each group of the smaller program its index in the original, and how many of its variables
            are decided to be 1.
        is_possible: whether any count is left for every group; otherwise no point lies within the restriction.
    """

    program: Program
    left: IntArray
    base: BoolArray
    groups: tuple[int, ...]
    inside: tuple[int, ...]
    is_possible: bool

    @classmethod
    def of(cls, program: Program, restriction: Restriction) -> Folded:
        """Fold a restriction into its program."""
        allowed = _shared_counts(program, restriction)
        needs = program.needs.open_pairs(allowed)
        fixed = (restriction.kept | restriction.dropped) & ~_unfoldable(program, needs)
        base = restriction.kept & fixed
        left = np.flatnonzero(~fixed)
        inside = program.counts(base)
        spans = [np.flatnonzero(~fixed[g.span]) for g in program.groups]
        stay = [k for k, units in enumerate(spans) if len(units)]
        index = {g: k for k, g in enumerate(stay)}
        groups, start = [], 0
        for g in stay:
            width, shift = len(spans[g]), int(inside[g])
            counts = tuple(n - shift for n in allowed[g] if 0 <= n - shift <= width)
            groups.append(replace(program.groups[g], start=start, width=width, counts=counts))
            start += width
        linear, pairs = _objective(program, base, spans, index)
        free = {g: {k: 1} for g, k in index.items()}
        smaller = replace(
            program,
            groups=_renumbered(groups),
            linear=linear[left],
            pairs=pairs,
            constraints=tuple(
                replace(c, form=c.form.substituted(free, len(stay), inside)) for c in program.constraints
            ),
            constant=program.objective(base),
            units=program.units[left],
            links=_links(program, left),
            needs=Needs(tuple((index[g], index[h]) for g, h in needs.pairs)),
        )
        decided = all(int(inside[g]) in allowed[g] for g in range(len(allowed)) if g not in index)
        shifts = tuple(int(inside[g]) for g in stay)
        possible = decided and all(g.counts for g in groups)
        return cls(smaller, left, base, tuple(stay), shifts, possible)

    def project(self, x: BoolArray) -> BoolArray:
        """A point of the original within the restriction, as a point of the smaller program, ``(n',)``."""
        return np.asarray(x[self.left])

    def lift(self, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The point of the original that belongs to one of the smaller program, ``(n,)``; of the dtype of ``x``."""
        full = self.base.astype(x.dtype)
        full[self.left] = x
        return full

    def whole(self, found: Restriction, before: Restriction) -> Restriction:
        """What was proved within the smaller program, together with what it was folded from."""
        kept, dropped = before.kept.copy(), before.dropped.copy()
        kept[self.left] |= found.kept
        dropped[self.left] |= found.dropped
        counts = list(before.counts)
        for g, shift, allowed in zip(self.groups, self.inside, found.counts, strict=True):
            counts[g] = tuple(n + shift for n in allowed)
        return Restriction(kept, dropped, tuple(counts), max(found.worth, before.worth))


def _unfoldable(program: Program, needs: Needs) -> BoolArray:
    """Variables of groups whose count another group shares or depends on, and variables in links."""
    ties = np.asarray([g.tie for g in program.groups], np.int64)
    shared = np.bincount(ties, minlength=int(ties.max(initial=0)) + 1)[ties] > 1
    found = np.asarray(shared[program.group_of], np.bool_)
    found[program.links.wholes] = True
    found[program.links.parts] = True
    for g in needs.members:
        found[program.groups[g].span] = True
    return found


def _shared_counts(program: Program, restriction: Restriction) -> list[tuple[int, ...]]:
    """The counts that are left for every group of a tie class, and that the groups which it needs leave."""
    common: dict[int, set[int]] = {}
    for group, counts in zip(program.groups, restriction.counts, strict=True):
        common[group.tie] = common.get(group.tie, set(counts)) & set(counts)
    ties = [g.tie for g in program.groups]
    return [tuple(n) for n in program.needs.settled([sorted(common[t]) for t in ties], ties)]


def _objective(
    program: Program, base: BoolArray, spans: list[IntArray], index: dict[int, int]
) -> tuple[FloatArray, tuple[GroupPair, ...]]:
    """Linear worth of all variables given the decided ones, and the pairs among undecided ones."""
    linear = program.linear.copy()
    pairs = []
    for pair in program.pairs:
        g, h = pair.first, pair.second
        first, second = program.groups[g].span, program.groups[h].span
        linear[first] += times(pair.coef, base[second].astype(np.float64))
        linear[second] += times(pair.coef, base[first].astype(np.float64), transpose=True)
        if g in index and h in index:
            coef: Coefficient = block(pair.coef, spans[g], spans[h])
            pairs.append(GroupPair(index[g], index[h], coef))
    return linear, tuple(pairs)


def _renumbered(groups: list[ProgramGroup]) -> tuple[ProgramGroup, ...]:
    """Tie classes numbered from zero in order of appearance."""
    order: dict[int, int] = {}
    return tuple(replace(g, tie=order.setdefault(g.tie, len(order))) for g in groups)


def _links(program: Program, left: IntArray) -> Links:
    place = np.full(program.size, -1, np.int64)
    place[left] = np.arange(len(left))
    return Links(place[program.links.wholes], place[program.links.parts])
