"""Where counts meet: products of two sums of counts, as they come from layers that read and write several groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.tables import CountTable, Shares

Entries = dict[tuple[int, int], float]
"""A symmetric matrix over groups: ``(g, h)``, ``g <= h``."""


@dataclass(frozen=True, eq=False)
class Coupling:
    """The product of two sums of counts, over groups and over tie classes.

    Attributes:
        first, second: sums over groups.
        class_first, class_second: the same over classes, without common factors.
        scale: product of the common factors that the class sums leave out.
    """

    first: Shares
    second: Shares
    class_first: Shares
    class_second: Shares
    scale: int


@dataclass(frozen=True, eq=False)
class Lookup:
    """A table of a budget, over tie classes.

    Attributes:
        constraint: which budget.
        table: over sums of groups.
        class_first, class_second: the sums over classes, without common factors; ``class_second`` may be empty.
        factors: the common factors that the class sums leave out.
    """

    constraint: int
    table: CountTable
    class_first: Shares
    class_second: Shares
    factors: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Couplings:
    """Every product that a budget or the objective needs, each once.

    Attributes:
        of_group: tie class of each group: classes are the variables of the count program.
        allowed: for each class the allowed counts, ascending.
        items: the products.
        index: place of each product by its two sums over groups.
        lookups: every table of every budget.
        needs: pairs of classes, of which the first is empty where the second is.
    """

    of_group: IntArray
    allowed: tuple[IntArray, ...]
    items: tuple[Coupling, ...]
    index: dict[tuple[Shares, Shares], int]
    lookups: tuple[Lookup, ...] = ()
    needs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, program: Program) -> Couplings:
        """Collect them: products of the budgets as layers have them, then pairs of groups that none of those holds."""
        order: dict[int, int] = {}
        of_group = np.asarray([order.setdefault(g.tie, len(order)) for g in program.groups], np.int64)
        allowed: list[IntArray] = [np.zeros(0, np.int64)] * len(order)
        for group, c in zip(program.groups, of_group.tolist(), strict=True):
            allowed[c] = np.asarray(group.counts, np.int64)
        found: dict[tuple[Shares, Shares], None] = {}
        for constraint in program.constraints:
            found.update(((first, second), None) for _, first, second in constraint.form.products)
        covered = {tuple(sorted((g, h))) for first, second in found for g, _ in first for h, _ in second}
        for pair in program.pairs:
            if (pair.first, pair.second) not in covered:
                found[((pair.first, 1),), ((pair.second, 1),)] = None
        items = tuple(_coupling(first, second, of_group) for first, second in found)
        lookups = tuple(
            _lookup(k, table, of_group)
            for k, constraint in enumerate(program.constraints)
            for table in constraint.form.tables
        )
        needs = {(int(of_group[g]), int(of_group[h])) for g, h in program.needs.pairs}
        index = {key: k for k, key in enumerate(found)}
        return cls(of_group, tuple(allowed), items, index, lookups, tuple(sorted(needs)))

    def entries(self, values: FloatArray) -> Entries:
        """The matrix ``N`` over groups with ``n^T N n / 2 = sum_e values[e] first_e(n) second_e(n)``."""
        matrix: Entries = {}
        for value, item in zip(values.tolist(), self.items, strict=True):
            for (g, h), share in _pattern(item).items():
                matrix[g, h] = matrix.get((g, h), 0.0) + value * share
        return matrix

    def fit(self, means: Entries, weights: Entries) -> FloatArray:
        """Values whose matrix is nearest to given entries, by weighted least squares, ``(couplings,)``."""
        pairs = list(means)
        row = {pair: k for k, pair in enumerate(pairs)}
        design = np.zeros((len(pairs), len(self.items)))
        for e, item in enumerate(self.items):
            for pair, share in _pattern(item).items():
                if pair in row:
                    design[row[pair], e] += share
        root = np.sqrt(np.asarray([weights[p] for p in pairs]))
        target = root * np.asarray([means[p] for p in pairs])
        return np.asarray(np.linalg.lstsq(root[:, None] * design, target, rcond=1e-10)[0])

    def products(self, counts: IntArray) -> FloatArray:
        """``first_e(n) second_e(n)`` of each coupling at kept counts of groups, ``(couplings,)``."""
        return np.asarray([_sum(e.first, counts) * _sum(e.second, counts) for e in self.items], np.float64)


def _coupling(first: Shares, second: Shares, of_group: IntArray) -> Coupling:
    (a, p), (b, q) = _over_classes(first, of_group), _over_classes(second, of_group)
    return Coupling(first, second, a, b, p * q)


def _lookup(constraint: int, table: CountTable, of_group: IntArray) -> Lookup:
    (a, p), (b, q) = _over_classes(table.first, of_group), _over_classes(table.second, of_group)
    return Lookup(constraint, table, a, b, (p, q))


def _over_classes(shares: Shares, of_group: IntArray) -> tuple[Shares, int]:
    """A sum over classes without its common factor, and that factor."""
    merged: dict[int, int] = {}
    for g, share in shares:
        c = int(of_group[g])
        merged[c] = merged.get(c, 0) + share
    common = math.gcd(*merged.values()) or 1
    return tuple(sorted((c, share // common) for c, share in merged.items())), common


def _pattern(item: Coupling) -> dict[tuple[int, int], int]:
    pattern: dict[tuple[int, int], int] = {}
    for g, a in item.first:
        for h, b in item.second:
            key = (min(g, h), max(g, h))
            pattern[key] = pattern.get(key, 0) + (2 if g == h else 1) * a * b
    return pattern


def _sum(shares: Shares, counts: IntArray) -> int:
    return sum(share * int(counts[g]) for g, share in shares)
