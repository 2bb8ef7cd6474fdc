"""The program that a solver sees: 0/1 variables in groups, a quadratic objective, integer budgets. Arrays only."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.links import CountLink, Links
from qcqp_prune.graph.needs import Needs
from qcqp_prune.program.coefficients import (
    BoolArray,
    Coefficient,
    FloatArray,
    IntArray,
    dense,
    times,
)
from qcqp_prune.program.forms import CountForm
from qcqp_prune.program.gather import gather
from qcqp_prune.program.problem import BudgetRow, PruningProblem, allowed_counts, tie_classes


@dataclass(frozen=True)
class ProgramGroup:
    """Like variables: a consecutive range, and the kept counts that are allowed.

    Attributes:
        name: the graph group's id.
        start, width: the range of its variables.
        counts: allowed numbers of ones, ascending.
        tie: index of its tie class; groups of one class have equal counts.
    """

    name: str
    start: int
    width: int
    counts: tuple[int, ...]
    tie: int

    @property
    def span(self) -> slice:
        """The range of its variables."""
        return slice(self.start, self.start + self.width)


@dataclass(frozen=True, eq=False)
class GroupPair:
    """Coupling of two groups: ``x[first]^T coef x[second]``.

    ``first < second``, or ``first == second`` with a dense strictly upper triangular ``coef``. A scalar stands for
    ``scalar * ones``; low-rank factors are kept as they are.
    """

    first: int
    second: int
    coef: Coefficient


@dataclass(frozen=True, eq=False)
class CountConstraint:
    """``at_least <= form(n) <= limit`` over the counts of the program's groups, in exact integers.

    A bound may leave the lower end out; a selection must meet both.
    """

    name: str
    unit: str
    form: CountForm
    limit: int
    at_least: int | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """Maximise ``constant + linear . x + sum of pairs`` over 0/1 ``x`` so that all count constraints hold.

    Attributes:
        groups: partition of the variables.
        linear: ``(n,)`` coefficients.
        pairs: coupling, each pair of groups at most once.
        constraints: the budgets; several of one name where a use is the maximum over steps.
        constant: worth of what is always kept.
        units: ``(n,)`` the graph unit behind each variable.
        unit_count: number of units of the graph; those without a variable are always kept.
        links: variables that are 1 exactly when one of their parts is.
        needs: groups that are empty where others are.
    """

    groups: tuple[ProgramGroup, ...]
    linear: FloatArray
    pairs: tuple[GroupPair, ...]
    constraints: tuple[CountConstraint, ...]
    constant: float
    units: IntArray
    unit_count: int
    links: Links = field(default_factory=Links.none)
    needs: Needs = field(default_factory=Needs)

    @property
    def size(self) -> int:
        """Number of 0/1 variables."""
        return len(self.linear)

    @cached_property
    def pair_count(self) -> int:
        """Number of nonzero products of two variables in the objective."""
        total = 0
        for pair in self.pairs:
            if isinstance(pair.coef, np.ndarray):
                total += int(np.count_nonzero(pair.coef))
            else:
                total += self.groups[pair.first].width * self.groups[pair.second].width
        return total

    @cached_property
    def group_of(self) -> IntArray:
        """Group index of each variable, ``(n,)``."""
        return np.repeat(np.arange(len(self.groups), dtype=np.int64), [g.width for g in self.groups])

    def counts(self, x: BoolArray) -> IntArray:
        """Ones in each group, ``(group_count,)``."""
        return np.bincount(self.group_of[x], minlength=len(self.groups)).astype(np.int64)

    def objective(self, x: BoolArray) -> float:
        """Worth of a 0/1 point ``(n,) bool``, with the constant."""
        return self.constant + float(self.linear[x].sum()) + sum(self._pair_value(p, x) for p in self.pairs)

    def gradient(self, x: FloatArray) -> FloatArray:
        """Derivative of the objective, ``(n,)``: at a 0/1 point the worth of each unit given the others."""
        g = self.linear.copy()
        for pair in self.pairs:
            first, second = self.groups[pair.first].span, self.groups[pair.second].span
            g[first] += times(pair.coef, x[second])
            g[second] += times(pair.coef, x[first], transpose=True)
        return g

    def is_feasible(self, x: BoolArray) -> bool:
        """Whether links, needs and ties hold, counts are allowed and every budget is met, in integers."""
        return self.counts_feasible(self.counts(x)) and self.links.hold(x)

    @cached_property
    def count_links(self) -> tuple[CountLink, ...]:
        """What the links say about the counts of groups."""
        return self.links.between(self.group_of, len(self.groups))

    def counts_feasible(self, counts: IntArray) -> bool:
        """The same for counts ``(group_count,)``: but for links, nothing else enters the constraints."""
        return self.counts_within(counts) and all(
            c.at_least is None or c.form.evaluate(counts) >= c.at_least for c in self.constraints
        )

    @property
    def has_bands(self) -> bool:
        """Whether some budget has a lower end too."""
        return any(c.at_least is not None for c in self.constraints)

    def counts_within(self, counts: IntArray) -> bool:
        """The same without the lower ends of bands: where the least counts fail, nothing is feasible."""
        ties: dict[int, int] = {}
        for group, n in zip(self.groups, counts.tolist(), strict=True):
            if n not in group.counts or ties.setdefault(group.tie, n) != n:
                return False
        return self.needs.hold(counts) and all(c.form.evaluate(counts) <= c.limit for c in self.constraints)

    def mask(self, x: BoolArray) -> BoolArray:
        """The mask over all units of the graph, ``(unit_count,)``."""
        mask = np.ones(self.unit_count, dtype=np.bool_)
        mask[self.units] = x
        return mask

    def entries(self) -> Iterator[tuple[int, int, float]]:
        """Every nonzero product ``(i, j, coefficient)`` of the objective, ``i < j``."""
        for pair in self.pairs:
            first, second = self.groups[pair.first], self.groups[pair.second]
            matrix = dense(pair.coef, (first.width, second.width))
            for i, j in zip(*np.nonzero(matrix), strict=True):
                yield first.start + int(i), second.start + int(j), float(matrix[i, j])

    def _pair_value(self, pair: GroupPair, x: BoolArray) -> float:
        rows, cols = x[self.groups[pair.first].span], x[self.groups[pair.second].span]
        return float((rows * times(pair.coef, cols.astype(np.float64))).sum())

    @classmethod
    def from_problem(cls, problem: PruningProblem) -> Program:
        """Drop what is frozen, and gather the objective by pairs of groups."""
        graph = problem.graph
        allowed = allowed_counts(graph)
        choice = np.asarray(
            [counts != [group.width] for counts, group in zip(allowed, graph.groups, strict=True)], np.bool_
        )
        links = _free_links(graph)
        # Both ends of a link are in the program, also where other constraints leave one count only.
        choice[graph.group_of_unit[np.concatenate([links.wholes, links.parts])]] = True
        free = np.flatnonzero(choice).tolist()
        index = {g: k for k, g in enumerate(free)}
        widths = [graph.groups[g].width for g in free]
        starts = list(itertools.accumulate(widths, initial=0))
        ties = tie_classes([graph.groups[g].tie or f"group {g}" for g in free])
        groups = tuple(
            ProgramGroup(graph.groups[g].id, starts[k], widths[k], tuple(allowed[g]), ties[k])
            for k, g in enumerate(free)
        )
        units = np.concatenate(
            [np.zeros(0, np.int64), *(np.arange(graph.units(g).start, graph.units(g).stop) for g in free)]
        )
        worth, layout = problem.objective, (graph.group_of_unit, graph.offsets)
        gathered = gather(worth.unary, worth.pairs, layout, index, worth.constant)
        constraints = tuple(c for row in problem.rows for c in _constraints(row, index, problem))
        pairs = tuple(GroupPair(*pair) for pair in gathered.pairs)
        place = np.full(graph.unit_count, -1, np.int64)
        place[units] = np.arange(len(units))
        linked = Links.of(np.stack([place[links.wholes], place[links.parts]], axis=1))
        linear, constant = gathered.unary[units], gathered.constant
        open_ = graph.needs.open_pairs(allowed)
        needs = Needs(tuple((index[g], index[h]) for g, h in open_.pairs))
        return cls(groups, linear, pairs, constraints, constant, units, graph.unit_count, linked, needs)


def _free_links(graph: ChannelGraph) -> Links:
    """The links whose wholes are a choice by themselves; one that stays anyway needs no part."""
    open_wholes = ~graph.stays[graph.links.wholes]
    return Links(graph.links.wholes[open_wholes], graph.links.parts[open_wholes])


def graph_widths(problem: PruningProblem) -> list[int]:
    """Full width of each group of the graph."""
    return [g.width for g in problem.graph.groups]


def _constraints(row: BudgetRow, index: dict[int, int], problem: PruningProblem) -> list[CountConstraint]:
    """A budget as constraints: one for each step that can exceed it, where the use is a maximum."""
    if row.limit is None:
        return []
    widths = graph_widths(problem)
    free = {g: {k: 1} for g, k in index.items()}
    fixed = [0 if g in index else width for g, width in enumerate(widths)]
    parts = list(row.form.parts)
    if len(parts) > 1:
        binding = [p for p in parts if p.evaluate(widths) > row.limit]
        parts = binding or [max(parts, key=lambda p: p.evaluate(widths))]
    return [
        CountConstraint(row.resource, row.unit, p.substituted(free, len(index), fixed), row.limit, row.least)
        for p in parts
    ]
