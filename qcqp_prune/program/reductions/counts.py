"""The part that all linear reformulations share: variables, counts, their products, ties and budgets.

A product of two counts is linear and exact through ``w_i = n_h x_i``, one column for each unit ``i`` of group ``g``:
``w_i <= C x_i``, ``w_i <= n_h``, ``w_i >= n_h - C (1 - x_i)``, and ``sum_i w_i = n_g n_h``.
Tables are in ``levels``.

References:
    Glover, "Improved linear integer programming formulations of nonlinear integer problems" (1975), section 2;
    Sherali and Adams, "A hierarchy of relaxations" (1990), for the sums over the cardinality row.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.program import CountConstraint, Program
from qcqp_prune.program.reductions.levels import LevelColumns
from qcqp_prune.program.reductions.linear_model import LinearModelBuilder

# A budget row is scaled so that one unit of it stays well above a solver's absolute feasibility tolerance of 1e-6.
LARGEST_SIDE, SMALLEST_STEP = 1e3, 2.0**-17


def reachable_counts(program: Program) -> list[tuple[int, ...]]:
    """The allowed counts of each group that some feasible point has: the others at their least, budgets met.

    What a group needs is not empty where the group is not.
    """
    least = np.asarray([g.counts[0] for g in program.groups], dtype=np.int64)
    ties = np.asarray([g.tie for g in program.groups], dtype=np.int64)
    allowed, needing = [g.counts for g in program.groups], set(program.needs.members)

    def fits(group: int, n: int) -> bool:
        counts = np.where(ties == ties[group], n, least)
        if n > 0 and group in needing:
            counts = np.asarray(program.needs.completed(counts.tolist(), allowed, ties.tolist()), np.int64)
        return all(c.form.evaluate(counts) <= c.limit for c in program.constraints)

    return [tuple(n for n in g.counts if fits(k, n)) or g.counts[:1] for k, g in enumerate(program.groups)]


class CountModel:
    """A builder that already holds variables, counts, ties; hands out products of counts, and closes with budgets.

    Attributes:
        builder: for further columns and rows.
        x: columns of each group's variables.
        n: column of each group's count.
        low, high: reachable range of each count.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.builder = LinearModelBuilder(program.size, program.constant)
        allowed = reachable_counts(program)
        self.low = [a[0] for a in allowed]
        self.high = [a[-1] for a in allowed]
        every = self.builder.columns(program.size, 1.0, lambda x: x, objective=program.linear, integer=True)
        self.x: list[IntArray] = [every[g.span] for g in program.groups]
        self.n: list[int] = [self._count(k, a) for k, a in enumerate(allowed)]
        self._products: dict[tuple[int, int], int] = {}
        self.levels = LevelColumns(self.builder, program, (self.n, self.low, self.high))
        self._weighted: dict[tuple[int, int], IntArray] = {}
        self._tie()
        self._link(every)
        self._need()

    def count_of(self, group: int) -> Callable[[FloatArray], float]:
        """The function that gives a group's count from a point."""
        span = self.program.groups[group].span
        return lambda x: float(x[span].sum())

    def _count(self, group: int, allowed: tuple[int, ...]) -> int:
        b, count = self.builder, self.count_of(group)
        n = int(b.columns(1, allowed[-1], count, lower=allowed[0], integer=True)[0])
        b.sums(self.x[group][None, :], (n, -1.0), lower=0.0, upper=0.0)
        if len(allowed) < allowed[-1] - allowed[0] + 1:
            levels = np.asarray(allowed, dtype=np.float64)
            pick = b.columns(len(allowed), 1.0, lambda x: levels == count(x), integer=True)
            b.sums(pick[None, :], lower=1.0, upper=1.0)
            b.block(levels[None, :], pick, (n, -1.0), lower=0.0, upper=0.0)
        return n

    def _tie(self) -> None:
        first: dict[int, int] = {}
        for g, group in enumerate(self.program.groups):
            head = first.setdefault(group.tie, g)
            if head != g:
                self.builder.rows(1, (self.n[g], 1.0), (self.n[head], -1.0), lower=0.0, upper=0.0)

    def _link(self, x: IntArray) -> None:
        """A part needs its whole, and a whole one of its parts."""
        links = self.program.links
        if len(links):
            self.builder.rows(len(links), (x[links.parts], 1.0), (x[links.wholes], -1.0), upper=0.0)
        for wholes, parts in links.by_size:
            self.builder.sums(x[parts], (x[wholes], -1.0), lower=0.0)

    def _need(self) -> None:
        """A unit of a group is kept only where the group that it needs is not empty."""
        for g, h in self.program.needs.pairs:
            self.builder.rows(len(self.x[g]), (self.x[g], 1.0), (self.n[h], -1.0), upper=0.0)

    def weighted(self, g: int, h: int) -> IntArray:
        """Columns ``w_i = n_h x_i`` for the units ``i`` of group ``g``."""
        if (g, h) in self._weighted:
            return self._weighted[g, h]
        b, x, n, low, high = self.builder, self.x[g], self.n[h], self.low[h], self.high[h]
        span, count = self.program.groups[g].span, self.count_of(h)
        k = len(x)
        w = b.columns(k, float(high), lambda p: p[span] * count(p))
        b.rows(k, (w, 1.0), (x, -high), upper=0.0)
        b.rows(k, (w, 1.0), (n, -1.0), (x, -low), upper=-low)
        b.rows(k, (w, 1.0), (n, -1.0), (x, -high), lower=-high)
        b.rows(k, (w, 1.0), (x, -low), lower=0.0)
        self._weighted[g, h] = w
        product = self._product_column(g, h)
        b.sums(w[None, :], (product, -1.0), lower=0.0, upper=0.0)
        return w

    def product(self, g: int, h: int) -> int:
        """Column of ``n_g n_h``, exact at 0/1 points."""
        key = (min(g, h), max(g, h))
        if key not in self._products:
            small = g if len(self.x[g]) <= len(self.x[h]) else h
            self.weighted(small, h if small == g else g)
        return self._products[key]

    def sum_to_product(self, g: int, h: int, columns: IntArray) -> None:
        """Take the sum of columns for ``n_g n_h``."""
        first, second = self.count_of(g), self.count_of(h)
        top = float(self.high[g] * self.high[h])
        product = int(self.builder.columns(1, top, lambda x: first(x) * second(x))[0])
        self.builder.sums(columns[None, :], (product, -1.0), lower=0.0, upper=0.0)
        self._products[min(g, h), max(g, h)] = product

    def _product_column(self, g: int, h: int) -> int:
        key = (min(g, h), max(g, h))
        if key in self._products:
            return self._products[key]
        b, first, second = self.builder, self.count_of(g), self.count_of(h)
        lg, hg, lh, hh = (float(v) for v in (self.low[g], self.high[g], self.low[h], self.high[h]))
        column = int(b.columns(1, hg * hh, lambda x: first(x) * second(x), lower=lg * lh)[0])
        n, m = self.n[g], self.n[h]
        for a, c, sign in ((lh, lg, 1), (hh, hg, 1), (hh, lg, -1), (lh, hg, -1)):
            b.rows(1, (column, sign), (n, -sign * a), (m, -sign * c), lower=-sign * a * c)
        self._products[key] = column
        return column

    def add_budgets(self) -> None:
        """One row for each budget, in products of counts."""
        for constraint in self.program.constraints:
            self._budget(constraint)

    def _budget(self, constraint: CountConstraint) -> None:
        form = constraint.form
        entries = [(self.n[g], int(c)) for g, c in enumerate(form.linear.tolist()) if c]
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            entries.append((self.product(g, h), int(c)))
        for table in form.tables:
            entries += self.levels.cost(table)
        if entries:
            divisor, side = scaled_side([c for _, c in entries], constraint.limit - form.constant)
            columns = np.asarray([column for column, _ in entries], np.int64)
            costs = np.asarray([c / divisor for _, c in entries])
            least = constraint.at_least
            lower = -np.inf if least is None else (least - form.constant) / divisor
            self.builder.block(costs[None, :], columns, lower=lower, upper=side)


def scaled_side(coefficients: list[int], limit: int) -> tuple[float, float]:
    """A divisor for an integer row ``sum c v <= limit`` and the right-hand side after it.

    Dividing by the greatest common divisor first, and rounding the limit down, loses no integer point.
    """
    common = math.gcd(*coefficients)
    steps = limit // common
    scale = 1.0
    while steps * scale > LARGEST_SIDE and scale > SMALLEST_STEP:
        scale /= 2
    return common / scale, steps * scale
