"""Cholesky factorisation of a symmetric matrix given by blocks of groups, in an order that keeps fill small."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import scipy.linalg

from qcqp_prune.program.coefficients import FloatArray

Blocks = dict[tuple[int, int], FloatArray]
"""Blocks ``(g, h)`` with ``g <= h``; a block that is missing is zero."""


def elimination_order(widths: list[int], pairs: list[tuple[int, int]]) -> list[int]:
    """Groups in the order of greedily least work: the width of what each leaves behind, squared, times its own."""
    return [g for g, _ in _eliminated(widths, pairs)]


def factor_entries(widths: list[int], pairs: list[tuple[int, int]]) -> int:
    """Entries of the blocks of the factor, fill included."""
    return sum(
        widths[g] * (widths[g] + sum(widths[h] for h in left)) for g, left in _eliminated(widths, pairs)
    )


def _eliminated(widths: list[int], pairs: list[tuple[int, int]]) -> list[tuple[int, set[int]]]:
    """Each group in order, with those that its elimination ties together."""
    neighbours: dict[int, set[int]] = {g: set() for g in range(len(widths))}
    for g, h in pairs:
        if g != h:
            neighbours[g].add(h)
            neighbours[h].add(g)
    order = []
    while neighbours:
        g = min(neighbours, key=lambda k: (widths[k] * sum(widths[h] for h in neighbours[k]) ** 2, k))
        around = neighbours.pop(g)
        order.append((g, around))
        for a, b in itertools.permutations(around, 2):
            neighbours[a].add(b)
        for a in around:
            neighbours[a].discard(g)
    return order


def factorises(blocks: Blocks, order: list[int], halted: Callable[[], bool] = lambda: False) -> bool:
    """Whether the Cholesky factorisation exists, in floating point.

    Args:
        blocks: the matrix; every diagonal block is there. Not changed.
        order: all groups, from ``elimination_order``.
        halted: polled between columns; False is returned once it says True.
    """
    place = {g: k for k, g in enumerate(order)}
    columns: list[dict[int, FloatArray]] = [{} for _ in order]
    for (g, h), block in blocks.items():
        a, b = sorted((place[g], place[h]))
        columns[a][b] = np.array(block if place[g] == b else block.T, order="F")
    for k, column in enumerate(columns):
        if halted():
            return False
        try:
            pivot = scipy.linalg.cholesky(column.pop(k), lower=True, overwrite_a=True, check_finite=False)
        except np.linalg.LinAlgError:
            return False
        rows = sorted(column)
        # L[i, k] = A[i, k] L[k, k]^-T
        parts = {
            i: scipy.linalg.solve_triangular(
                pivot, column[i].T, lower=True, overwrite_b=True, check_finite=False
            )
            for i in rows
        }
        columns[k] = {}
        for position, j in enumerate(rows):
            for i in rows[position:]:
                update = parts[i].T @ parts[j]
                if i in columns[j]:
                    columns[j][i] -= update
                else:
                    columns[j][i] = -update
    return True
