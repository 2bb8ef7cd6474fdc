"""A small convex quadratic program over the simplex with budgets, by an interior point method."""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import FloatArray

ITERATIONS = 80
CENTRING = 0.15


def best_mixture(gram: FloatArray, worth: FloatArray, use: FloatArray) -> tuple[FloatArray, FloatArray]:
    """``max worth . p - p^T gram p / 2`` over ``p >= 0``, ``sum p = 1``, ``use p <= 1``.

    Args:
        gram: ``(k, k)`` positive semidefinite.
        worth: ``(k,)``.
        use: ``(budgets, k)`` use of each budget as a share of its limit; some column should be at most 1.

    Returns:
        ``p`` and the price of each budget. They are approximate: bounds that are built on them do not depend on it.
    """
    k, budgets = len(worth), len(use)
    size = k + budgets
    rows = np.zeros((1 + budgets, size))
    rows[0, :k] = 1.0
    rows[1:, :k] = use
    rows[1:, k:] = np.eye(budgets)
    quadratic = np.zeros((size, size))
    quadratic[:k, :k] = gram
    linear = np.concatenate([-(worth - worth.max()), np.zeros(budgets)])
    scale = float(np.abs(linear).max() + np.abs(gram).max()) + 1.0
    x = np.full(size, 1.0 / k)
    x[k:] = np.maximum(1.0 - use @ x[:k], 0.1)
    s, y = np.full(size, scale), np.zeros(1 + budgets)
    for _ in range(ITERATIONS):
        dual = quadratic @ x + linear - rows.T @ y - s
        primal = rows @ x - 1.0
        mean = float(x @ s) / size
        if mean < 1e-11 * scale and np.abs(primal).max() < 1e-9 and np.abs(dual).max() < 1e-8 * scale:
            break
        centre = x * s - CENTRING * mean
        system = np.zeros((size + 1 + budgets, size + 1 + budgets))
        system[:size, :size] = quadratic + np.diag(s / x)
        system[:size, size:] = -rows.T
        system[size:, :size] = rows
        try:
            step = np.linalg.solve(system, np.concatenate([-dual - centre / x, -primal]))
        except np.linalg.LinAlgError:
            break
        dx, dy = step[:size], step[size:]
        ds = (-centre - s * dx) / x
        length = min(_longest(x, dx), _longest(s, ds))
        x, y, s = x + length * dx, y + length * dy, s + length * ds
    mixture = np.maximum(x[:k], 0.0)
    return mixture / mixture.sum(), np.maximum(-y[1:], 0.0)


def _longest(x: FloatArray, dx: FloatArray) -> float:
    """The longest step up to 1 that keeps ``x`` positive."""
    falling = dx < 0
    return min(1.0, 0.95 * float((-x[falling] / dx[falling]).min())) if falling.any() else 1.0
