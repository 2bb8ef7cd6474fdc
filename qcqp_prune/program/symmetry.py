"""Units that are interchangeable, and the order among them that exact models ask for.

Two units of one group may be swapped where every term of the objective treats them alike and no link holds either:
budgets see counts only. A solver that does not know tries all their permutations.

References:
    Margot, "Symmetry in integer linear programming" (50 Years of Integer Programming, 2010), section 17.7.
"""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray, LowRank
from qcqp_prune.program.program import Program


def interchangeable(program: Program) -> tuple[IntArray, ...]:
    """Sets of at least two variables of one group that may be swapped freely, each ascending."""
    rows: list[list[FloatArray]] = [[program.linear[g.span, None]] for g in program.groups]
    own: dict[int, FloatArray] = {}
    for pair in program.pairs:
        if pair.first == pair.second:
            matrix = np.asarray(pair.coef)
            own[pair.first] = matrix + matrix.T
        elif isinstance(pair.coef, LowRank):
            rows[pair.first].append(pair.coef.left)
            rows[pair.second].append(pair.coef.right)
        elif isinstance(pair.coef, np.ndarray):
            rows[pair.first].append(pair.coef)
            rows[pair.second].append(pair.coef.T)
    linked = np.zeros(program.size, np.bool_)
    linked[program.links.wholes] = linked[program.links.parts] = True
    found: list[IntArray] = []
    for g, group in enumerate(program.groups):
        for local in _equal_rows(np.hstack(rows[g])):
            for units in _alike_among_themselves(local, own.get(g)):
                free = units[~linked[units + group.start]] + group.start
                if len(free) > 1:
                    found.append(free)
    return tuple(found)


def ordered(classes: tuple[IntArray, ...], x: BoolArray) -> BoolArray:
    """The point with the kept units of each class first, ``(n,)``: of the same worth and the same counts."""
    out = x.copy()
    for units in classes:
        out[units] = np.arange(len(units)) < x[units].sum()
    return out


def _equal_rows(matrix: FloatArray) -> list[IntArray]:
    """Indices of equal rows, sets of at least two."""
    _, label, size = np.unique(matrix, axis=0, return_inverse=True, return_counts=True)
    return [np.flatnonzero(label.ravel() == k) for k in np.flatnonzero(size > 1)]


def _alike_among_themselves(units: IntArray, own: FloatArray | None) -> list[IntArray]:
    """Split a set into those that a group's coupling with itself treats alike: ``own[i, k] == own[j, k]``, k apart."""
    if own is None:
        return [units]
    left, found = units.tolist(), []
    while left:
        first, same = left[0], [left[0]]
        rest: list[int] = []
        for unit in left[1:]:
            apart = np.ones(len(own), np.bool_)
            apart[[first, unit]] = False
            (same if np.array_equal(own[first, apart], own[unit, apart]) else rest).append(unit)
        found.append(np.asarray(same, np.int64))
        left = rest
    return found
