"""A mixed-integer linear model in arrays, and the builder that reductions fill."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune.program.program import Program

UNIT, TINY = 2.0**-53, 2.0**-900
"""Largest relative error of one rounding; and what stands in for terms that vanish below the smallest number."""

Values = Callable[[FloatArray], npt.ArrayLike]
"""Gives the values of a block of columns from the program's 0/1 point ``(n,) float64``."""


@dataclass(frozen=True, eq=False)
class LinearModel:
    """Maximise ``objective . v + constant`` so that ``row_lower <= matrix v <= row_upper`` and ``lower <= v <= upper``.

    The first ``size`` columns are the program's variables. All columns are bounded, so any dual vector gives a bound.

    Attributes:
        size: number of the program's variables.
        objective, lower, upper: ``(columns,)``.
        integer: ``(columns,) bool``.
        matrix: ``(rows, columns)`` CSR.
        row_lower, row_upper: ``(rows,)``, infinite where open.
        constant: added to the objective.
    """

    size: int
    objective: FloatArray
    lower: FloatArray
    upper: FloatArray
    integer: BoolArray
    matrix: sp.csr_array
    row_lower: FloatArray
    row_upper: FloatArray
    constant: float
    _blocks: tuple[tuple[IntArray, Values], ...] = field(default=(), repr=False)

    def extend(self, x: BoolArray) -> FloatArray:
        """The full point ``(columns,)`` that belongs to a 0/1 point of the program, for warm starts."""
        point = x.astype(np.float64)
        full = np.zeros(len(self.objective))
        for columns, values in self._blocks:
            full[columns] = values(point)
        return full

    def with_rows(self, rows: sp.csr_array, lower: FloatArray, upper: FloatArray) -> LinearModel:
        """The model with further rows ``lower <= rows v <= upper``, ``rows`` of shape ``(k, columns)``."""
        return replace(
            self,
            matrix=sp.csr_array(sp.vstack([self.matrix, rows])),
            row_lower=np.concatenate([self.row_lower, lower]),
            row_upper=np.concatenate([self.row_upper, upper]),
        )

    def dual_bound(self, duals: FloatArray) -> float:
        """The upper bound that any row duals ``(rows,)`` prove.

        ``sum_r max(y_r lo_r, y_r hi_r)`` over the sides that exist ``+ sum_j max over the box of (c - A^T y)_j v_j``.
        Valid for every ``y``, so a relaxation that was stopped early, or solved loosely, still proves something. A dual
        of the sign of an open side is set to zero first. Rounding is covered: what each operation may lose is added up
        and put on top, so the result is a bound in exact arithmetic too.

        References:
            Neumaier and Shcherbina, "Safe bounds in linear and mixed-integer linear programming" (2004), eq. 4; Higham,
            "Accuracy and Stability of Numerical Algorithms" (2002), section 3.1, for the error of an inner product.
        """
        y = np.where((duals > 0) & ~np.isfinite(self.row_upper), 0.0, duals)
        y = np.where((y < 0) & ~np.isfinite(self.row_lower), 0.0, y)
        sides = np.where(y > 0, self.row_upper, np.where(y < 0, self.row_lower, 0.0))
        reduced = self.objective - self.matrix.T @ y
        box = np.maximum(reduced * self.lower, reduced * self.upper)
        rows = y * sides
        value = math.fsum((*rows.tolist(), *box.tolist(), self.constant))
        # One rounding for each product of rows and box, and for each term of a column's inner product.
        terms, reach, size = self._rounding
        sizes = np.abs(self.objective) + size.T @ np.abs(y)
        slips = terms * sizes * reach + np.abs(box) + TINY * (sizes > 0)
        lost = math.fsum(slips.tolist()) + math.fsum((np.abs(rows) + TINY * (y != 0)).tolist())
        if lost == 0.0:
            return value
        return math.nextafter(value + UNIT * (1.0 + 1e-6) * (lost + abs(value)), math.inf)

    @cached_property
    def _rounding(self) -> tuple[FloatArray, FloatArray, sp.csr_array]:
        """Roundings in each column's reduced cost, the column's largest value in size, and the sizes of the matrix."""
        entries = np.bincount(self.matrix.indices, minlength=len(self.objective))
        reach = np.maximum(np.abs(self.lower), np.abs(self.upper))
        return np.asarray(entries + 2.0, np.float64), np.asarray(reach, np.float64), abs(self.matrix)


class Reduction(Protocol):
    """From a program to a linear model and back."""

    name: str

    def accepts(self, program: Program) -> bool:
        """Whether the model stays small enough to be built."""

    def apply(self, program: Program) -> LinearModel:
        """The model; at 0/1 points it has the program's objective and feasible set exactly."""

    def invert(self, program: Program, values: FloatArray) -> FloatArray:
        """The program's variables, ``(n,)``, from a point of the model."""


class LinearModelBuilder:
    """Collects blocks of columns and rows, given as arrays."""

    def __init__(self, size: int, constant: float) -> None:
        self._size, self._constant = size, constant
        self._columns: list[tuple[FloatArray, FloatArray, FloatArray, BoolArray]] = []
        self._blocks: list[tuple[IntArray, Values]] = []
        self._count = 0
        self._entries: list[tuple[IntArray, IntArray, FloatArray]] = []
        self._sides: list[tuple[FloatArray, FloatArray]] = []
        self._rows = 0

    def columns(
        self,
        count: int,
        upper: npt.ArrayLike,
        values: Values,
        *,
        lower: npt.ArrayLike = 0.0,
        objective: npt.ArrayLike = 0.0,
        integer: bool = False,
    ) -> IntArray:
        """Add ``count`` columns; their indices. Everything is broadcast."""
        spread = [
            np.broadcast_to(np.asarray(a, np.float64), (count,)).copy() for a in (objective, lower, upper)
        ]
        self._columns.append((spread[0], spread[1], spread[2], np.full(count, integer)))
        index = np.arange(self._count, self._count + count, dtype=np.int64)
        self._blocks.append((index, values))
        self._count += count
        return index

    def rows(
        self,
        count: int,
        *entries: tuple[npt.ArrayLike, npt.ArrayLike],
        lower: npt.ArrayLike = -np.inf,
        upper: npt.ArrayLike = np.inf,
    ) -> None:
        """Add ``count`` rows; each entry is ``(column, coefficient)``, broadcast to one of each per row."""
        row = np.arange(count, dtype=np.int64)
        for column, coefficient in entries:
            self._put(row, np.broadcast_to(column, (count,)), np.broadcast_to(coefficient, (count,)))
        self._close(count, lower, upper)

    def sums(
        self,
        groups: IntArray,
        *entries: tuple[npt.ArrayLike, npt.ArrayLike],
        lower: npt.ArrayLike = -np.inf,
        upper: npt.ArrayLike = np.inf,
    ) -> None:
        """Add one row for each row of ``groups`` ``(rows, k)``: the sum of those columns plus further entries."""
        count, k = groups.shape
        row = np.arange(count, dtype=np.int64)
        self._put(np.repeat(row, k), groups.ravel(), np.ones(count * k))
        for column, coefficient in entries:
            self._put(row, np.broadcast_to(column, (count,)), np.broadcast_to(coefficient, (count,)))
        self._close(count, lower, upper)

    def block(
        self,
        matrix: FloatArray,
        columns: IntArray,
        *entries: tuple[npt.ArrayLike, npt.ArrayLike],
        lower: npt.ArrayLike = -np.inf,
        upper: npt.ArrayLike = np.inf,
    ) -> None:
        """Add one row for each row of a dense matrix over ``columns``, plus further entries."""
        row, col = np.nonzero(matrix)
        self._put(row, columns[col], matrix[row, col])
        count = len(matrix)
        for column, coefficient in entries:
            index = np.arange(count, dtype=np.int64)
            self._put(index, np.broadcast_to(column, (count,)), np.broadcast_to(coefficient, (count,)))
        self._close(count, lower, upper)

    def build(self) -> LinearModel:
        """The finished model."""
        objective, lower, upper, integer = (np.concatenate(part) for part in zip(*self._columns, strict=True))
        row, col, value = (np.concatenate(part) for part in zip(*self._entries, strict=True))
        matrix = sp.csr_array((value, (row, col)), shape=(self._rows, self._count))
        matrix.sum_duplicates()
        sides = [np.concatenate(part) for part in zip(*self._sides, strict=True)]
        blocks = tuple(self._blocks)
        return LinearModel(
            self._size, objective, lower, upper, integer, matrix, sides[0], sides[1], self._constant, blocks
        )

    def _put(self, row: IntArray, column: npt.ArrayLike, value: npt.ArrayLike) -> None:
        entry = (row + self._rows, np.asarray(column, np.int64), np.asarray(value, np.float64))
        self._entries.append(entry)

    def _close(self, count: int, lower: npt.ArrayLike, upper: npt.ArrayLike) -> None:
        sides = [np.broadcast_to(np.asarray(s, np.float64), (count,)).copy() for s in (lower, upper)]
        self._sides.append((sides[0], sides[1]))
        self._rows += count
