"""Exact blocks: classes without coupling among themselves, all else fixed, are one knapsack with sorted items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure


def sweep(state: State, colour: IntArray) -> bool:
    """Choose counts and units of all classes of one colour anew; whether that gained anything.

    With the other classes fixed, each unit of the block has a fixed worth (its gradient) and each class a fixed cost
    for one unit. Steps sorted by worth for cost are taken while they fit: with one budget this misses the optimum of
    the block by less than one step. Several budgets are weighed in several ways and the best is taken.

    References:
        Jeong et al. (AISTATS 2022), section 3.4, which proposes block coordinate descent and leaves it to a supplement.
    """
    if state.structure.curved[colour].any():
        return False
    before = state.snapshot()
    items = _items(state, colour)
    room = state.structure.limits - items.base
    if (room < 0).any():
        return False
    best, best_value = None, before.value + 1e-10 * abs(before.value)
    for weights in _weightings(len(room)):
        levels = _pack(items, room, weights)
        value = before.value + items.worth(levels) - items.worth(items.levels)
        if value > best_value:
            best, best_value = levels, value
    if best is None:
        return False
    state.reset(_selection(state, colour, items, best))
    state.work += 1
    if state.value <= before.value + 1e-12 * abs(before.value) or (state.slack < 0).any():
        state.restore(before)
        return False
    return True


@dataclass(frozen=True, eq=False)
class _Items:
    """Steps of the classes of one colour.

    Attributes:
        gains: for each class the worth of its first k steps, from the least count, ``(steps + 1,)``.
        order: for each class and each of its groups the units by falling worth.
        unit_cost: ``(k, classes)``.
        sizes: units in each step of each class.
        base: ``(k,)`` use with the block at its least counts.
        levels: where the classes are now.
    """

    gains: list[FloatArray]
    order: list[list[IntArray]]
    unit_cost: IntArray
    sizes: list[IntArray]
    base: IntArray
    levels: IntArray

    def worth(self, levels: IntArray) -> float:
        return sum(float(g[k]) for g, k in zip(self.gains, levels.tolist(), strict=True))


def _items(state: State, colour: IntArray) -> _Items:
    s = state.structure
    gains, orders, sizes = [], [], []
    for t in colour.tolist():
        allowed = s.allowed[t]
        prefix, order = np.zeros(len(allowed)), []
        for g in s.members[t]:
            span = s.program.groups[g].span
            ranked = np.argsort(-state.gradient[span], kind="stable")
            sums = np.concatenate([[0.0], np.cumsum(state.gradient[span][ranked])])
            prefix = prefix + sums[allowed]
            order.append(ranked + span.start)
        gains.append(prefix)
        orders.append(order)
        sizes.append(np.diff(allowed))
    counts = state.counts.copy()
    counts[colour] = [s.allowed[t][0] for t in colour]
    slope = s.linear + s.curvature @ counts
    base = ((s.linear + slope) @ counts) // 2
    return _Items(gains, orders, slope[:, colour], sizes, base, state.level[colour])


def _weightings(budgets: int) -> list[FloatArray]:
    if budgets <= 1:
        return [np.ones(budgets)]
    corners = [np.eye(budgets)[k] * 0.9 + 0.1 / budgets for k in range(budgets)]
    return [np.ones(budgets) / budgets, *corners]


def _pack(items: _Items, room: IntArray, weights: FloatArray) -> IntArray:
    """Levels of a greedy knapsack: steps by worth for weighted cost, each class in order."""
    owner = np.repeat(np.arange(len(items.sizes)), [len(s) for s in items.sizes])
    if not len(owner):
        return np.zeros(len(items.sizes), np.int64)
    size = np.concatenate(items.sizes)
    gain = np.concatenate([np.diff(g) for g in items.gains])
    cost = items.unit_cost[:, owner] * size
    price = weights @ (cost / np.maximum(room, 1)[:, None])
    with np.errstate(divide="ignore"):
        ratio = np.where(gain >= 0, gain, 0.0) / np.maximum(price, 1e-300)
    order = np.argsort(-ratio, kind="stable")
    order = order[gain[order] >= 0]
    levels = np.zeros(len(items.sizes), np.int64)
    left, blocked = room.copy(), np.zeros(len(items.sizes), np.bool_)
    while len(order):
        total = np.cumsum(cost[:, order], axis=1)
        fits = (total <= left[:, None]).all(axis=0)
        taken = len(order) if fits.all() else int(fits.argmin())
        np.add.at(levels, owner[order[:taken]], 1)
        if taken == len(order):
            break
        if taken:
            left = left - total[:, taken - 1]
        blocked[owner[order[taken]]] = True
        order = order[taken + 1 :]
        order = order[~blocked[owner[order]]]
    return levels


def _selection(state: State, colour: IntArray, items: _Items, levels: IntArray) -> BoolArray:
    s: Structure = state.structure
    x = state.x.copy()
    for t, orders, k in zip(colour.tolist(), items.order, levels.tolist(), strict=True):
        for g, order in zip(s.members[t], orders, strict=True):
            x[s.program.groups[g].span] = False
            x[order[: s.allowed[t][k]]] = True
    return x
