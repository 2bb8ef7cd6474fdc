"""Coefficient matrices of pair terms: a scalar (times all ones), a dense matrix, or low-rank factors.

Scalars and factors are never expanded unless a caller asks, so that a language model's layers fit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A coefficient matrix ``left @ right.T`` that is never multiplied out: ``(p, k)`` and ``(q, k)``."""

    left: FloatArray
    right: FloatArray

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the product."""
        return self.left.shape[0], self.right.shape[0]


Coefficient = float | FloatArray | LowRank


def dense(coef: Coefficient, shape: tuple[int, int]) -> FloatArray:
    """Any coefficient as a matrix."""
    if isinstance(coef, LowRank):
        return coef.left @ coef.right.T
    return coef if isinstance(coef, np.ndarray) else np.full(shape, float(coef))


def times(coef: Coefficient, x: FloatArray, *, transpose: bool = False) -> FloatArray:
    """``coef @ x`` or ``coef.T @ x``; a 0-d array, to be broadcast, where the coefficient is a scalar."""
    if isinstance(coef, LowRank):
        left, right = (coef.right, coef.left) if transpose else (coef.left, coef.right)
        return left @ (right.T @ x)
    if isinstance(coef, np.ndarray):
        return np.asarray((coef.T if transpose else coef) @ x)
    return np.asarray(coef * x.sum())


def block(coef: Coefficient, rows: IntArray, cols: IntArray) -> Coefficient:
    """The part of a coefficient in some rows and columns, as float64."""
    if isinstance(coef, LowRank):
        return LowRank(coef.left[rows], coef.right[cols])
    return coef[np.ix_(rows, cols)].astype(np.float64) if isinstance(coef, np.ndarray) else float(coef)


def transposed(coef: Coefficient) -> Coefficient:
    """The coefficient with its two sides exchanged."""
    if isinstance(coef, LowRank):
        return LowRank(coef.right, coef.left)
    return np.ascontiguousarray(coef.T) if isinstance(coef, np.ndarray) else coef


def added(a: Coefficient, b: Coefficient, shape: tuple[int, int]) -> Coefficient:
    """The sum of two coefficients of one shape, expanded only where their kinds differ."""
    if isinstance(a, float) and isinstance(b, float):
        return a + b
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        return LowRank(np.hstack([a.left, b.left]), np.hstack([a.right, b.right]))
    return dense(a, shape) + dense(b, shape)
