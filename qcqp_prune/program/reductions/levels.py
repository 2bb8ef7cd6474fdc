"""Tables in a linear model: the level of each sum of counts as 0/1 columns, and a column for each pair of levels.

For a sum ``s`` with levels ``t_1 < t_2 < ...`` and 0/1 columns ``l_i``, one of which is 1::

    sum_i (t_{i-1} + 1) l_i <= s <= sum_i t_i l_i

A table of two sums costs ``sum_ij v_ij p_ij`` with ``sum_j p_ij = l_i``, ``sum_i p_ij = m_j``, ``p >= 0``. At 0/1
levels ``p_ij = l_i m_j``: the model is exact.

References:
    Padberg, "Approximating separable nonlinear functions via mixed zero-one programs" (Operations Research Letters,
    2000), section 2, for the choice of a level; Sherali and Adams (1990) for the marginals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.linear_model import LinearModelBuilder
from qcqp_prune.program.tables import CountTable, Shares, places

Counts = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""Column, least and largest value of each group's count."""


def reachable_levels(
    shares: Shares, levels: IntArray, low: Sequence[int], high: Sequence[int]
) -> tuple[slice, IntArray, IntArray]:
    """The levels that a sum can be at, with the least and the largest sum at each.

    Args:
        shares: the sum.
        levels: all levels.
        low: least count of each group.
        high: largest count of each group.
    """
    least, most = (sum(n * bound[g] for g, n in shares) for bound in (low, high))
    first, last = places(levels, [least, most]).tolist()
    tops = levels[first : last + 1].copy()
    bottoms = np.append(least, tops[:-1] + 1)
    tops[-1] = most
    return slice(first, last + 1), bottoms, tops


class LevelColumns:
    """The columns that tables share."""

    def __init__(self, builder: LinearModelBuilder, program: Program, counts: Counts) -> None:
        """Prepare.

        Args:
            builder: of the model.
            program: it belongs to.
            counts: columns and ranges of the counts.
        """
        self._builder, self._program = builder, program
        self._columns, self._low, self._high = counts
        self._found: dict[tuple[Shares, bytes], IntArray] = {}

    def cost(self, table: CountTable) -> list[tuple[int, int]]:
        """Columns whose sum, weighted by the integers, is what a table costs."""
        rows, first = self._levels(table.first, table.first_levels)
        if not table.second:
            return _weighted(first, table.values[rows, 0])
        cols, second = self._levels(table.second, table.second_levels)
        values = table.values[rows, cols]
        pairs = self._pairs(table, (rows, first), (cols, second))
        return _weighted(pairs.ravel(), values.ravel())

    def _levels(self, shares: Shares, levels: IntArray) -> tuple[slice, IntArray]:
        part, bottoms, tops = reachable_levels(shares, levels, self._low, self._high)
        key = (shares, levels.tobytes())
        if key not in self._found:
            b, at = self._builder, self._place(shares, levels)
            own = np.arange(part.start, part.stop)
            columns = b.columns(len(tops), 1.0, lambda x: own == at(x), integer=True)
            b.sums(columns[None, :], lower=1.0, upper=1.0)
            counts = [(self._columns[g], -float(n)) for g, n in shares]
            b.block(tops[None, :].astype(np.float64), columns, *counts, lower=0.0)
            b.block(bottoms[None, :].astype(np.float64), columns, *counts, upper=0.0)
            self._found[key] = columns
        return part, self._found[key]

    def _place(self, shares: Shares, levels: IntArray) -> Callable[[FloatArray], int]:
        spans = [(self._program.groups[g].span, n) for g, n in shares]

        def place(x: FloatArray) -> int:
            return int(np.searchsorted(levels, round(sum(n * float(x[span].sum()) for span, n in spans))))

        return place

    def _pairs(
        self, table: CountTable, first: tuple[slice, IntArray], second: tuple[slice, IntArray]
    ) -> IntArray:
        """One column for each pair of levels, ``(p, q)``."""
        b, (rows, ours), (cols, theirs) = self._builder, first, second
        row = self._place(table.first, table.first_levels)
        col = self._place(table.second, table.second_levels)
        i, j = np.arange(rows.start, rows.stop), np.arange(cols.start, cols.stop)
        grid = b.columns(
            len(ours) * len(theirs), 1.0, lambda x: np.multiply.outer(i == row(x), j == col(x)).ravel()
        )
        grid = grid.reshape(len(ours), len(theirs))
        b.sums(grid, (ours, -1.0), lower=0.0, upper=0.0)
        b.sums(np.ascontiguousarray(grid.T), (theirs, -1.0), lower=0.0, upper=0.0)
        return grid


def _weighted(columns: IntArray, values: IntArray) -> list[tuple[int, int]]:
    return [(c, v) for c, v in zip(columns.tolist(), values.tolist(), strict=True) if v]


def table_entries(program: Program) -> int:
    """About how many matrix entries the tables of a program take."""
    return sum(4 * t.values.size for c in program.constraints for t in c.form.tables)
