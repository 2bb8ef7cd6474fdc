"""Into the bands of budgets that also have a lower end: steps up that fit, then exchanges."""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune_solvers.search.state import State

DEEPEST = 3
"""Most steps down that one exchange makes room with."""


def shortage(state: State, used: IntArray | None = None) -> float:
    """How far below its bands a use is, as shares of the budgets added up; 0 inside."""
    s = state.structure
    missing = np.maximum(s.least - (state.used if used is None else used), 0)
    return float((missing / np.maximum(s.limits, 1)).sum())


def enter_bands(state: State) -> bool:
    """Raise uses into their bands; whether all are inside.

    Steps up are taken though they may lose: the one that loses least for what it brings. Where none fits, a class is
    lowered by a few steps and another raised, whichever pair leaves least missing; then again.

    Args:
        state: changed in place; must meet the upper ends.
    """
    if not shortage(state):
        return bool((state.slack >= 0).all())
    state.use_strides(coarse=False)
    while shortage(state):
        if not (_raise(state) or _exchange(state)):
            return False
    return bool((state.slack >= 0).all())


def _raise(state: State) -> bool:
    costs, gains = state.cost_up(), state.up_values()
    brings = _brought(state, costs)
    fits = (costs <= state.slack[:, None]).all(axis=0) & np.isfinite(gains) & (brings > 0)
    if not fits.any():
        return False
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(gains > 0, gains / brings, gains * brings)
    worth[~fits] = -np.inf
    state.raise_class(int(worth.argmax()))
    return True


def _brought(state: State, costs: IntArray) -> FloatArray:
    """What each step takes off the shortage, ``(classes,)``."""
    s = state.structure
    missing = np.maximum(s.least - state.used, 0)
    return np.asarray((np.minimum(costs, missing[:, None]) / np.maximum(s.limits, 1)[:, None]).sum(axis=0))


def _exchange(state: State) -> bool:
    """The pair of a class lowered and another raised that leaves least missing; False where none leaves less."""
    now, best = shortage(state), (shortage(state), -1, 0, -1)
    saved = state.snapshot()
    for u in range(len(state.structure.members)):
        for steps in range(1, DEEPEST + 1):
            if state.step_down[u] == 0:
                break
            state.lower_class(u)
            costs = state.cost_up()
            fits = (costs <= state.slack[:, None]).all(axis=0) & (state.step_up > 0)
            fits[u] = False
            for t in np.flatnonzero(fits).tolist():
                left = shortage(state, state.used + costs[:, t])
                if left < best[0]:
                    best = (left, u, steps, t)
        state.restore(saved)
    left, u, steps, t = best
    if left >= now:
        return False
    for _ in range(steps):
        state.lower_class(u)
    state.raise_class(t)
    return True
