"""Steps between blocks: drop until the budgets are met, fill until nothing fits, and exchanges of the two."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray
from qcqp_prune_solvers.search.bands import enter_bands
from qcqp_prune_solvers.search.state import Snapshot, State

Stop = Callable[[], bool]


def drop_to_budget(
    state: State, *, keep: int | None = None, only: int | None = None, stop: Stop = lambda: False
) -> bool:
    """Backward greedy: while a budget is exceeded, take the step down that loses least for what it frees.

    What a step frees is weighed by how far each exceeded budget is off.

    Args:
        state: changed in place.
        keep: a class that is not to be lowered.
        only: the one budget to meet; all when None.
        stop: polled before each step.

    Returns:
        Whether every budget is met.
    """
    state.use_strides(coarse=True)
    while True:
        excess = -state.slack
        over = excess > 0
        if only is not None:
            over[np.arange(len(over)) != only] = False
        if not over.any():
            return True
        if stop():
            return False
        freed = (state.cost_down()[over] / excess[over, None]).sum(axis=0)
        losses = state.down_values()
        with np.errstate(divide="ignore", invalid="ignore"):
            # A unit that is worth less than nothing goes first, the more it frees the sooner.
            price = np.where(losses > 0, losses / freed, losses * freed)
        price[(freed <= 0) | ~np.isfinite(losses)] = np.inf
        if keep is not None:
            price[keep] = np.inf
        if not np.isfinite(price.min()) and state.structure.tables is not None:
            # Costs that are looked up may fall only after several steps.
            price = losses.copy()
            if keep is not None:
                price[keep] = np.inf
        t = int(price.argmin())
        if not np.isfinite(price[t]):
            return False
        state.lower_class(t)


def fill(state: State, skip: int | None = None) -> None:
    """Forward greedy: while a step that loses nothing fits into every budget, take the one worth most for its cost.

    Args:
        state: changed in place; must meet the budgets.
        skip: a class that is not to be raised.
    """
    for coarse in (True, False) if state.structure.tables is not None else (True,):
        state.use_strides(coarse=coarse)
        _fill(state, skip)


def _fill(state: State, skip: int | None) -> None:
    while True:
        slack = state.slack
        costs, gains = state.cost_up(), state.up_values()
        fits = (costs <= slack[:, None]).all(axis=0) & np.isfinite(gains) & (gains >= 0)
        if skip is not None:
            fits[skip] = False
        if not fits.any():
            return
        state.raise_class(_most_for_cost(gains, costs / np.maximum(slack, 1)[:, None], fits))


def _most_for_cost(gains: FloatArray, shares: FloatArray, fits: BoolArray) -> int:
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = gains / np.maximum(shares.sum(axis=0), 1e-300)
    worth[~fits] = -np.inf
    return int(worth.argmax())


def polish(state: State, rounds: int = 20, stop: Stop = lambda: False) -> None:
    """Sweeps of exact top-k blocks: every class gets the best units for its count until none changes."""
    for _ in range(rounds):
        if stop():
            return
        changed = [state.reselect(t) for t in range(len(state.structure.members))]
        if not any(changed):
            return


def shift(state: State, t: int, steps: int) -> bool:
    """Move a class by some steps, mend the budgets with the others, fill up, and polish.

    Returns:
        Whether the result is better; otherwise the state is as before.
    """
    saved = state.snapshot()
    state.use_strides(coarse=True)
    for _ in range(abs(steps)):
        size = state.step_up[t] if steps > 0 else state.step_down[t]
        if size == 0:
            break
        if steps > 0:
            state.raise_class(t)
        else:
            state.lower_class(t)
    good = drop_to_budget(state, keep=t if steps > 0 else None)
    if good:
        fill(state, skip=t if steps < 0 else None)
        polish(state, rounds=3)
        fill(state)
        good = enter_bands(state)
    if not good or state.value <= saved.value + 1e-10 * abs(saved.value):
        state.restore(saved)
        return False
    return True


def exchange(state: State, stop: Stop) -> None:
    """Shift every class by one step up and one down until nothing gains."""
    classes = len(state.structure.members)
    quiet, t = 0, 0
    while quiet < classes and not stop():
        gained = shift(state, t, 1) or shift(state, t, -1)
        quiet = 0 if gained else quiet + 1
        t = (t + 1) % classes


def perturb(state: State, rng: np.random.Generator, trials: int, heat: float, stop: Stop) -> Snapshot:
    """Random shifts of one or two classes, each kept where it loses less than an allowance that shrinks to nothing.

    Args:
        state: changed in place.
        rng: of all choices.
        trials: number of shifts.
        heat: first allowance, as a share of the objective.
        stop: polled before each shift.

    Returns:
        The best state seen.

    References:
        Dueck and Scheuer, "Threshold accepting" (Journal of Computational Physics, 1990).
    """
    best = state.snapshot()
    for k in range(trials):
        if stop():
            break
        saved = state.snapshot()
        _shake(state, rng)
        allowance = heat * (1.0 - k / trials) ** 2 * abs(best.value)
        good = drop_to_budget(state)
        if good:
            fill(state)
            polish(state, rounds=3)
            fill(state)
            good = enter_bands(state)
        if not good or state.value < saved.value - allowance * rng.random():
            state.restore(saved)
        elif state.value > best.value + 1e-10 * abs(best.value):
            best = state.snapshot()
    return best


def _shake(state: State, rng: np.random.Generator) -> None:
    state.use_strides(coarse=True)
    classes = len(state.structure.members)
    for t in rng.choice(classes, size=min(int(rng.integers(1, 3)), classes), replace=False).tolist():
        reach = max(1, len(np.unique(state.structure.coarse[t][0])) // 8)
        steps = int(rng.integers(1, reach + 1)) * (1 if rng.random() < 0.5 else -1)
        for _ in range(abs(steps)):
            if (state.step_up[t] if steps > 0 else state.step_down[t]) == 0:
                break
            if steps > 0:
                state.raise_class(t)
            else:
                state.lower_class(t)
