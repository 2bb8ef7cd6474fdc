"""Sorting pair terms over any units into one coefficient for each pair of groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from qcqp_prune.errors import InvalidScoreError
from qcqp_prune.program.coefficients import (
    Coefficient,
    FloatArray,
    IntArray,
    LowRank,
    added,
    block,
    dense,
    times,
    transposed,
)
from qcqp_prune.program.forms import PairTerm


@dataclass(frozen=True, eq=False)
class Gathered:
    """A quadratic form by pairs of groups.

    Attributes:
        unary: value of each unit by itself, ``(units,)``; what it makes with units that always stay is in it.
        constant: what the units that always stay make among themselves.
        pairs: for each pair ``g <= h`` of free groups, by their places, the coefficient between their units. That of a
            group with itself is dense and strictly upper triangular.
    """

    unary: FloatArray
    constant: float
    pairs: tuple[tuple[int, int, Coefficient], ...]


def gather(
    unary: FloatArray,
    terms: Iterable[PairTerm],
    layout: tuple[IntArray, IntArray],
    index: Mapping[int, int],
    constant: float = 0.0,
) -> Gathered:
    """Sort ``constant + unary . x + sum of terms`` by groups.

    Args:
        unary: value of each unit by itself, ``(units,)``.
        terms: between units; a unit may occur more than once in a term.
        layout: the group of each unit, and the first unit of each group followed by the number of units. Units of a
            group are consecutive.
        index: the place of each free group; units of all others always stay.
        constant: value of nothing.

    Raises:
        InvalidScoreError: sums are not finite.
    """
    gathering = _Gathering(unary, layout, index, constant)
    for term in terms:
        gathering.add(term)
    return gathering.result()


class _Gathering:
    """The sums so far. All units that always stay count as one group, -1."""

    def __init__(
        self, unary: FloatArray, layout: tuple[IntArray, IntArray], index: Mapping[int, int], constant: float
    ) -> None:
        self._group_of_unit, self._offsets = layout
        self._widths = np.diff(self._offsets)
        self._index = index
        self._unary = unary.astype(np.float64)
        self._constant = float(constant)
        self._free = np.isin(self._group_of_unit, list(index))
        self._pairs: dict[tuple[int, int], Coefficient] = {}

    def add(self, term: PairTerm) -> None:
        for rows, g in self._by_group(term.rows):
            for cols, h in self._by_group(term.cols):
                self._add_block(term, (rows, g), (cols, h))

    def _by_group(self, units: IntArray) -> list[tuple[IntArray, int]]:
        """Positions of a term's side that lie in each group, with the group; -1 gathers all frozen ones."""
        groups = np.where(self._free[units], self._group_of_unit[units], -1)
        return [(np.flatnonzero(groups == g), int(g)) for g in np.unique(groups)]

    def _add_block(self, term: PairTerm, first: tuple[IntArray, int], second: tuple[IntArray, int]) -> None:
        (rows, g), (cols, h) = first, second
        coef = block(term.coef, rows, cols)
        if g == -1 or h == -1:
            shape = (len(rows), len(cols))
            if g == -1 and h == -1:
                self._constant += float(dense(coef, shape).sum())
            elif h == -1:
                np.add.at(self._unary, term.rows[rows], times(coef, np.ones(shape[1])))
            else:
                np.add.at(self._unary, term.cols[cols], times(coef, np.ones(shape[0]), transpose=True))
            return
        coef = self._to_units(coef, term.rows[rows], term.cols[cols], (g, h))
        if g == h:
            matrix = dense(coef, (self._widths[g], self._widths[g]))
            self._unary[self._offsets[g] : self._offsets[g + 1]] += np.diag(matrix)
            coef = np.triu(matrix + matrix.T, 1)
        elif g > h:
            g, h, coef = h, g, transposed(coef)
        key = (self._index[g], self._index[h])
        shape = (self._widths[g], self._widths[h])
        self._pairs[key] = added(self._pairs[key], coef, shape) if key in self._pairs else coef

    def _to_units(
        self, coef: Coefficient, rows: IntArray, cols: IntArray, groups: tuple[int, int]
    ) -> Coefficient:
        """Add up positions of the same unit."""
        g, h = groups
        sum_rows = _aggregator(rows - self._offsets[g], self._widths[g])
        sum_cols = _aggregator(cols - self._offsets[h], self._widths[h])
        if isinstance(coef, LowRank):
            return LowRank(np.asarray(sum_rows @ coef.left), np.asarray(sum_cols @ coef.right))
        if isinstance(coef, np.ndarray):
            return np.asarray((sum_cols @ np.asarray(sum_rows @ coef).T).T)
        r, c = np.asarray(sum_rows.sum(1)).ravel(), np.asarray(sum_cols.sum(1)).ravel()
        if (r == r[0]).all() and (c == c[0]).all():
            return float(coef * r[0] * c[0])
        return LowRank(coef * r[:, None], c[:, None])

    def result(self) -> Gathered:
        constant = self._constant + float(self._unary[~self._free].sum())
        if not np.isfinite(constant) or not np.isfinite(self._unary).all():
            raise InvalidScoreError("importance scores overflow when they are added up: scale them down")
        pairs = sorted(self._pairs.items(), key=lambda item: item[0])
        return Gathered(self._unary, constant, tuple((g, h, coef) for (g, h), coef in pairs))


def _aggregator(local: IntArray, width: int) -> sp.csr_array:
    """``(width, len(local))`` matrix that adds up the rows that belong to one unit."""
    count = len(local)
    return sp.csr_array((np.ones(count), (local, np.arange(count))), shape=(width, count))
