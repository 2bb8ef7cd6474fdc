"""What steps change in costs that are looked up, for all classes at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, IntArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.tables import CountTable


class TableCosts:
    """Every table of every budget, flattened into arrays.

    Attributes:
        coupled: ``(classes, classes) bool``: different classes that meet in a table.
        tops: for each class the counts after which one of its own levels ends, ascending: above them more is paid.
    """

    def __init__(self, program: Program, class_of: IntArray, allowed: Sequence[IntArray]) -> None:
        """Prepare.

        Args:
            program: with at least one table.
            class_of: ``(groups,)`` class of each group.
            allowed: allowed counts of each class.
        """
        self._budgets = len(program.constraints)
        largest = [int(a[-1]) for a in allowed]
        owners, tables = [], []
        for k, constraint in enumerate(program.constraints):
            for table in constraint.form.tables:
                owners.append(k)
                tables.append(table)
        self._owner = np.asarray(owners, np.int64)
        self._shares = np.zeros((2, len(tables), len(allowed)), np.int64)
        for j, table in enumerate(tables):
            for side, shares in enumerate((table.first, table.second)):
                np.add.at(
                    self._shares[side, j], [int(class_of[g]) for g, _ in shares], [n for _, n in shares]
                )
        self._flatten(tables, largest)
        touched = (self._shares != 0).any(axis=0)
        self.coupled: BoolArray = (touched.astype(np.int64).T @ touched.astype(np.int64)) > 0
        np.fill_diagonal(self.coupled, False)
        self._table, self._class = np.nonzero(touched)
        self.tops = [self._tops(t, tables, largest[t]) for t in range(len(allowed))]

    def _flatten(self, tables: Sequence[CountTable], largest: Sequence[int]) -> None:
        """Values of all tables in one array, and for each side the level of every sum that occurs."""
        self._values = np.concatenate([t.values.ravel() for t in tables])
        sizes = np.asarray([t.values.size for t in tables], np.int64)
        self._start = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64)
        self._width = np.asarray([t.values.shape[1] for t in tables], np.int64)
        places, starts, at = [], np.zeros((2, len(tables)), np.int64), 0
        for j, table in enumerate(tables):
            for side, levels in enumerate((table.first_levels, table.second_levels)):
                top = int(self._shares[side, j] @ np.asarray(largest))
                places.append(np.searchsorted(levels, np.arange(top + 1), side="left"))
                starts[side, j] = at
                at += top + 1
        self._place, self._place_start = np.concatenate(places).astype(np.int64), starts

    def _tops(self, t: int, tables: Sequence[CountTable], largest: int) -> IntArray:
        found = [np.asarray([largest], np.int64)]
        for j, table in enumerate(tables):
            for side, levels in enumerate((table.first_levels, table.second_levels)):
                shares = self._shares[side, j]
                if shares[t] and np.count_nonzero(shares) == 1:
                    found.append(levels // shares[t])
        return np.unique(np.concatenate(found).clip(0, largest))

    def _look_up(self, tables: IntArray, first: IntArray, second: IntArray) -> IntArray:
        row = self._place[self._place_start[0, tables] + first]
        col = self._place[self._place_start[1, tables] + second]
        return np.asarray(self._values[self._start[tables] + row * self._width[tables] + col])

    def total(self, counts: IntArray) -> IntArray:
        """What all tables of each budget cost, ``(budgets,)``."""
        every = np.arange(len(self._owner))
        values = self._look_up(every, self._shares[0] @ counts, self._shares[1] @ counts)
        total = np.zeros(self._budgets, np.int64)
        np.add.at(total, self._owner, values)
        return total

    def changes(self, counts: IntArray, steps: IntArray) -> IntArray:
        """What each budget changes by where one class alone moves by its step, ``(budgets, classes)``."""
        j, t = self._table, self._class
        sums = [shares @ counts for shares in self._shares]
        before = self._look_up(np.arange(len(self._owner)), sums[0], sums[1])
        moved = [now[j] + shares[j, t] * steps[t] for now, shares in zip(sums, self._shares, strict=True)]
        out = np.zeros((self._budgets, len(steps)), np.int64)
        np.add.at(out, (self._owner[j], t), self._look_up(j, moved[0], moved[1]) - before[j])
        return out

    def along(self, counts: IntArray, t: int, levels: IntArray) -> IntArray:
        """What each budget's tables cost with one class at each of several counts, ``(budgets, levels)``."""
        j = self._table[self._class == t]
        sums = [
            (shares[j] @ counts)[:, None] + shares[j, t][:, None] * (levels - counts[t])[None, :]
            for shares in self._shares
        ]
        out = np.zeros((self._budgets, len(levels)), np.int64)
        np.add.at(out, self._owner[j], self._look_up(j[:, None], sums[0], sums[1]))
        return out


def table_costs(program: Program, class_of: IntArray, allowed: Sequence[IntArray]) -> TableCosts | None:
    """The tables of a program, None where it has none."""
    if not any(c.form.tables for c in program.constraints):
        return None
    return TableCosts(program, class_of, allowed)
