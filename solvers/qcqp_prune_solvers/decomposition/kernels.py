"""Loops that NumPy cannot express: maxima of concave envelopes along steady slopes, and rows updated one by one."""

from __future__ import annotations

import numba
import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray


@numba.njit(cache=True, nogil=True)
def envelope_maxima(
    table: FloatArray, counts: FloatArray, base: FloatArray, last: FloatArray, out: FloatArray
) -> None:
    """``out[a, b, c] = max_v table[a, v] + (base[b] + last[c]) counts[v]``.

    For each row the upper concave envelope over the counts is built once; along ``c`` the maximiser moves one way
    only, so that a pointer finds all of them in one pass.

    Args:
        table: ``(A, V)``; ``-inf`` where a value is impossible.
        counts: ``(V,)`` ascending.
        base: ``(B,)``.
        last: ``(C,)`` monotone.
        out: ``(A, B, C)``, written.
    """
    rows, width = table.shape
    hull = np.empty(width, np.int64)
    falls = np.empty(width, np.float64)
    rising = last[-1] >= last[0]
    for a in range(rows):
        size = 0
        for v in range(width):
            value = table[a, v]
            if value == -np.inf:
                continue
            while size > 1:
                i, j = hull[size - 2], hull[size - 1]
                if (table[a, j] - table[a, i]) * (counts[v] - counts[i]) <= (value - table[a, i]) * (
                    counts[j] - counts[i]
                ):
                    size -= 1
                else:
                    break
            hull[size] = v
            size += 1
        if size == 0:
            out[a] = -np.inf
            continue
        # Moving from hull point k to k + 1 pays where the slope exceeds falls[k]; these ascend.
        for k in range(size - 1):
            i, j = hull[k], hull[k + 1]
            falls[k] = (table[a, i] - table[a, j]) / (counts[j] - counts[i])
        for b in range(base.shape[0]):
            k = 0 if rising else size - 1
            for c in range(last.shape[0]):
                slope = base[b] + last[c]
                if rising:
                    while k < size - 1 and slope > falls[k]:
                        k += 1
                else:
                    while k > 0 and slope <= falls[k - 1]:
                        k -= 1
                out[a, b, c] = table[a, hull[k]] + slope * counts[hull[k]]


@numba.njit(cache=True, nogil=True)
def run_maxima(
    table: FloatArray,
    counts: FloatArray,
    base: FloatArray,
    last: FloatArray,
    runs: tuple[IntArray, FloatArray, FloatArray],
    out: FloatArray,
) -> None:
    """``out[a, b, c] = max_r (base_worth[r, b] + last_worth[r, c] + max_{v in run r} of the same as above)``.

    Args:
        table: ``(A, V)``; ``-inf`` where a value is impossible.
        counts: ``(V,)`` ascending.
        base: ``(B,)``.
        last: ``(C,)`` monotone.
        runs: the ends of the runs of values, ``(R,)``, and what each is worth with the neighbours, ``(R, B)`` and
            ``(R, C)``.
        out: ``(A, B, C)``, written.
    """
    ends, base_worth, last_worth = runs
    rows = table.shape[0]
    part = np.empty((1, base.shape[0], last.shape[0]))
    out[:] = -np.inf
    for a in range(rows):
        start = 0
        for r in range(ends.shape[0]):
            envelope_maxima(table[a : a + 1, start : ends[r]], counts[start : ends[r]], base, last, part)
            start = ends[r]
            for b in range(base.shape[0]):
                for c in range(last.shape[0]):
                    value = part[0, b, c] + base_worth[r, b] + last_worth[r, c]
                    if value > out[a, b, c]:
                        out[a, b, c] = value


@numba.njit(cache=True, nogil=True)
def rows_in_turn(block: FloatArray, gradient: FloatArray, vectors: FloatArray) -> None:
    """Point each row along its gradient, rows one after another, each with those before it already turned.

    Args:
        block: ``(w, w)`` symmetric: what the rows do to each other's gradients; the diagonal is left out.
        gradient: ``(w, k)`` with all rows as they are, the diagonal's part included; written.
        vectors: ``(w, k)`` rows of length 1, updated.
    """
    width, rank = vectors.shape
    change = np.empty(rank)
    for i in range(width):
        length = 0.0
        for k in range(rank):
            change[k] = gradient[i, k] - block[i, i] * vectors[i, k]
            length += change[k] * change[k]
        if length == 0.0:
            continue
        length = np.sqrt(length)
        for k in range(rank):
            change[k] = change[k] / length - vectors[i, k]
            vectors[i, k] += change[k]
        for j in range(width):
            for k in range(rank):
                gradient[j, k] += block[j, i] * change[k]
