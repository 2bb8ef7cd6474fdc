"""Exact blocks: classes without coupling among themselves, all else fixed, are one knapsack with sorted items."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure


def sweep(state: State, colour: IntArray) -> bool:
    """Choose counts and units of all classes of one colour anew; whether that gained anything.

    With the other classes fixed, each unit of the block has a fixed worth (its gradient) and each count of a class a
    fixed cost. Steps sorted by worth for cost are taken while they fit: with one budget this misses the optimum of the
    block by less than one step. Several budgets are weighed in several ways and the best is taken. Where costs are
    looked up, a step reaches to the next corner of the concave envelope of worth over cost.

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
        costs: for each class what its first k steps cost of each budget, ``(budgets, steps + 1)``.
        base: ``(k,)`` use with the block at its least counts.
        levels: where the classes are now.
        looked_up: whether costs need not be proportional to counts.
    """

    gains: list[FloatArray]
    order: list[list[IntArray]]
    costs: list[IntArray]
    base: IntArray
    levels: IntArray
    looked_up: bool

    def worth(self, levels: IntArray) -> float:
        return sum(float(g[k]) for g, k in zip(self.gains, levels.tolist(), strict=True))


def _items(state: State, colour: IntArray) -> _Items:
    s = state.structure
    gains, orders = [], []
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
    counts = state.counts.copy()
    counts[colour] = [s.allowed[t][0] for t in colour]
    slope = s.linear + s.curvature @ counts
    base = ((s.linear + slope) @ counts) // 2 + s.table_use(counts)
    costs = []
    for t in colour.tolist():
        cost = slope[:, t, None] * (s.allowed[t] - s.allowed[t][0])
        if s.tables is not None:
            looked = s.tables.along(counts, t, s.allowed[t])
            cost = cost + looked - looked[:, :1]
        costs.append(cost)
    return _Items(gains, orders, costs, base, state.level[colour], s.tables is not None)


def _weightings(budgets: int) -> list[FloatArray]:
    if budgets <= 1:
        return [np.ones(budgets)]
    corners = [np.eye(budgets)[k] * 0.9 + 0.1 / budgets for k in range(budgets)]
    return [np.ones(budgets) / budgets, *corners]


def _pack(items: _Items, room: IntArray, weights: FloatArray) -> IntArray:
    """Levels of a greedy knapsack: steps by worth for weighted cost, each class in order."""
    share = weights / np.maximum(room, 1)
    stops = [
        _corners((share @ c).tolist(), g.tolist()) if items.looked_up else np.arange(len(g))
        for c, g in zip(items.costs, items.gains, strict=True)
    ]
    owner = np.repeat(np.arange(len(stops)), [len(s) - 1 for s in stops])
    if not len(owner):
        return np.zeros(len(stops), np.int64)
    size = np.concatenate([np.diff(s) for s in stops])
    gain = np.concatenate([np.diff(g[s]) for g, s in zip(items.gains, stops, strict=True)])
    cost = np.concatenate([np.diff(c[:, s], axis=1) for c, s in zip(items.costs, stops, strict=True)], axis=1)
    price = share @ cost
    with np.errstate(divide="ignore"):
        ratio = np.where(gain >= 0, gain, 0.0) / np.maximum(price, 1e-300)
    order = np.argsort(-ratio, kind="stable")
    order = order[gain[order] >= 0]
    levels = np.zeros(len(stops), np.int64)
    left, blocked = room.copy(), np.zeros(len(stops), np.bool_)
    while len(order):
        total = np.cumsum(cost[:, order], axis=1)
        fits = (total <= left[:, None]).all(axis=0)
        taken = len(order) if fits.all() else int(fits.argmin())
        np.add.at(levels, owner[order[:taken]], size[order[:taken]])
        if taken == len(order):
            break
        if taken:
            left = left - total[:, taken - 1]
        blocked[owner[order[taken]]] = True
        order = order[taken + 1 :]
        order = order[~blocked[owner[order]]]
    return levels


def _corners(price: list[float], gain: list[float]) -> IntArray:
    """Places on the upper concave envelope of ``gain`` over ``price``, both ends kept."""
    corners: list[int] = []
    for k in range(len(price)):
        while corners and price[k] <= price[corners[-1]] and gain[k] >= gain[corners[-1]] and corners[-1]:
            corners.pop()
        while len(corners) > 1:
            i, j = corners[-2], corners[-1]
            if (gain[j] - gain[i]) * (price[k] - price[i]) < (gain[k] - gain[i]) * (price[j] - price[i]):
                corners.pop()
            else:
                break
        corners.append(k)
    return np.asarray(corners, np.int64)


def _selection(state: State, colour: IntArray, items: _Items, levels: IntArray) -> BoolArray:
    s: Structure = state.structure
    x = state.x.copy()
    for t, orders, k in zip(colour.tolist(), items.order, levels.tolist(), strict=True):
        for g, order in zip(s.members[t], orders, strict=True):
            x[s.program.groups[g].span] = False
            x[order[: s.allowed[t][k]]] = True
    return x
