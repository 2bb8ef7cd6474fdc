"""Search on programs with links: blocks by patterns at a price, and single steps with all that they bring along.

A unit that is switched on brings its wholes, one that is switched off takes along the wholes that it alone kept. With
all else fixed and a price for each budget, the best pattern of a set of linked units follows from the parts upwards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune.program.program import Program
from qcqp_prune_solvers.search.structure import Structure, column_sum

Stop = Callable[[], bool]
PASSES = 6
BATCH = 0.3
"""Share of what is missing or left that one batch of steps may take."""


class LinkedState:
    """A point of a program with links.

    Attributes:
        x: ``(n,) bool``, obeys the links.
        gradient: ``(n,)`` worth of each unit given all others.
        value: objective.
        counts: ``(groups,)``.
        fixed: ``(n,) bool`` leaves that single steps leave alone for now.
        work: blocks and batches done.
    """

    def __init__(self, program: Program, x: BoolArray) -> None:
        self.program = program
        self.structure = Structure.of(program)
        self.links = program.links
        self._levels = self.links.levels or ()
        self.leaf = np.ones(program.size, np.bool_)
        self.leaf[self.links.heads] = False
        self._floor = np.asarray([g.counts[0] for g in program.groups], np.int64)
        self._single = self._moves_alone()
        self.limits = np.asarray([max(c.limit, 1) for c in program.constraints], np.float64)
        self.blocks = _blocks(program)
        self.work = 0
        self.fixed = np.zeros(program.size, np.bool_)
        self.reset(x)

    def _moves_alone(self) -> BoolArray:
        """Groups whose count may change by one, without ties, ``(groups,)``."""
        ties = np.bincount([g.tie for g in self.program.groups])
        return np.asarray(
            [
                len(g.counts) == g.counts[-1] - g.counts[0] + 1 and ties[g.tie] == 1
                for g in self.program.groups
            ],
            np.bool_,
        )

    def reset(self, x: BoolArray) -> None:
        """Go to another point; wholes are set to what their parts say."""
        self.x = self.links.closed(x)
        self.gradient = self.program.gradient(self.x.astype(np.float64))
        self.value = self.program.objective(self.x)
        self.counts = self.program.counts(self.x)
        self._support = np.bincount(self.links.wholes[self.x[self.links.parts]], minlength=self.program.size)

    def use(self) -> IntArray:
        """Use of each budget, ``(budgets,)``."""
        return np.asarray([c.form.evaluate(self.counts) for c in self.program.constraints], np.int64)

    def excess(self) -> IntArray:
        """How far each budget is exceeded, ``(budgets,)``; negative where something is left."""
        return self.use() - np.asarray([c.limit for c in self.program.constraints], np.int64)

    def shortage(self) -> float:
        """How far below the lower ends of the budgets the use is, as shares of the limits added up; 0 inside."""
        least = np.asarray([c.at_least or 0 for c in self.program.constraints], np.int64)
        return float((np.maximum(least - self.use(), 0) / self.limits).sum())

    def slopes(self) -> FloatArray:
        """What one more unit of each group takes of each budget, as a share of its limit, ``(budgets, groups)``."""
        rows = [c.form.slopes(self.counts) for c in self.program.constraints]
        return np.asarray(rows, np.float64).reshape(-1, len(self.counts)) / self.limits[:, None]

    def go_to(self, x: BoolArray) -> None:
        """Move to a point near the present one; value and gradient follow exactly."""
        x = self.links.closed(x)
        changed = np.flatnonzero(x != self.x)
        groups = self.program.group_of[changed]
        for g in np.unique(groups).tolist():
            here = changed[groups == g]
            for units, sign in ((here[x[here]], 1), (here[~x[here]], -1)):
                if len(units):
                    self._flip(g, units, sign)
        self._support = np.bincount(self.links.wholes[self.x[self.links.parts]], minlength=self.program.size)

    def _flip(self, g: int, units: IntArray, sign: int) -> None:
        groups = self.program.groups
        local = units - groups[g].start
        self.value += sign * float(self.gradient[units].sum())
        self.x[units] = sign > 0
        self.counts[g] += sign * len(units)
        for h, coef in self.structure.neighbours[g]:
            change = column_sum(coef, local, groups[h].width)
            if h == g:
                self.value += 0.5 * float(change[local].sum())
            self.gradient[groups[h].span] += sign * change

    def cascades(self, values: FloatArray, *, on: bool) -> FloatArray:
        """Values of units with all that switching them brings or takes along, ``(n,)`` or ``(n, k)``.

        Args:
            values: of each unit alone.
            on: for switching on what is off; otherwise for switching off what is on.
        """
        total = values.copy()
        wholes, parts = self.links.wholes, self.links.parts
        for level in reversed(self._levels):
            w, p = wholes[level], parts[level]
            follows = ~self.x[w] & ~self.x[p] if on else self.x[w] & self.x[p] & (self._support[w] == 1)
            np.add.at(total, p[follows], total[w[follows]])
        return total

    def pattern(self, worth: FloatArray) -> BoolArray:
        """The best obeying pattern for a linear worth of units, where each is a part of one whole at most.

        A unit with several wholes counts for the last of them; the result obeys the links in any case.
        """
        best = worth.copy()
        owner = np.full(len(worth), -1, np.int64)
        owner[self.links.parts] = self.links.wholes
        for level in self._levels:
            w, p = self.links.wholes[level], self.links.parts[level]
            own = owner[p] == w
            w, p = w[own], p[own]
            heads = np.unique(w)
            gains, most = np.zeros(len(worth)), np.full(len(worth), -np.inf)
            np.add.at(gains, w, np.maximum(best[p], 0.0))
            np.maximum.at(most, w, best[p])
            heads = heads[np.isfinite(most[heads])]
            best[heads] += np.where(most[heads] > 0, gains[heads], most[heads])
        chosen = (owner < 0) & (best > 0)
        for level in reversed(self._levels):
            w, p = self.links.wholes[level], self.links.parts[level]
            own = (owner[p] == w) & chosen[w]
            w, p = w[own], p[own]
            chosen[p[best[p] > 0]] = True
            # A whole that pays although none of its parts does keeps the least bad of them.
            order = np.lexsort((-best[p], w))
            first = order[np.unique(w[order], return_index=True)[1]]
            chosen[p[first]] = True
        return self.links.closed(chosen & self.leaf)

    def allowed(self) -> bool:
        """Whether every count is allowed and ties hold; budgets aside."""
        seen: dict[int, int] = {}
        return all(
            n in g.counts and seen.setdefault(g.tie, n) == n
            for g, n in zip(self.program.groups, self.counts.tolist(), strict=True)
        )

    def steps(self, *, on: bool) -> tuple[IntArray, FloatArray, FloatArray]:
        """Leaves that can be switched by themselves: their worth and use, with all that follows.

        Returns:
            Units ``(m,)``, worth ``(m,)``, and shares of the limits ``(m, budgets)``.
        """
        slopes = self.slopes().T[self.program.group_of]
        ends = self._single if on else self._single & (self.counts > self._floor)
        blocked = self.cascades(np.where(ends[self.program.group_of], 0.0, 1.0), on=on) > 0
        units = np.flatnonzero(self.leaf & (self.x != on) & ~blocked & ~self.fixed)
        worth = self.cascades(self.gradient, on=on)[units]
        return units, worth, self.cascades(slopes, on=on)[units]

    def within_floors(self, units: IntArray) -> IntArray:
        """As many of the units, in their order, as can be switched off with every count above its floor."""
        while True:
            x = self.x.copy()
            x[units] = False
            counts = self.program.counts(self.links.closed(x))
            short = counts < self._floor
            if not short.any() or not len(units):
                return units
            units = units[: len(units) // 2]


def _blocks(program: Program) -> tuple[IntArray, ...]:
    """Groups that are linked or tied, together; each set of groups is one block."""
    label = np.arange(len(program.groups))
    ties: dict[int, int] = {}
    pairs = [(link.whole, link.part) for link in program.count_links]
    pairs += [(ties.setdefault(g.tie, k), k) for k, g in enumerate(program.groups)]
    for a, b in pairs:
        label[label == label[a]] = label[b]
    return tuple(np.flatnonzero(label == k) for k in np.unique(label))


def sweep(state: LinkedState, prices: FloatArray) -> bool:
    """Choose every block anew at the given prices; whether the priced value rose."""
    gained = False
    for block in state.blocks:
        before = state.value - float(prices @ (state.use() / state.limits))
        saved = state.x.copy()
        worth = state.gradient - (prices @ state.slopes())[state.program.group_of]
        inside = np.isin(state.program.group_of, block)
        x = state.x.copy()
        if np.isin(state.program.group_of[state.links.parts], block).any():
            x[inside] = state.pattern(worth)[inside]
        else:
            _choose_counts(state, block, worth, x)
        if np.array_equal(x, saved):
            continue
        state.go_to(x)
        state.work += 1
        after = state.value - float(prices @ (state.use() / state.limits))
        if not state.allowed() or after <= before + 1e-12 * abs(before):
            state.go_to(saved)
        else:
            gained = True
    return gained


def _choose_counts(state: LinkedState, block: IntArray, worth: FloatArray, x: BoolArray) -> None:
    """The best units and common count of a set of tied groups, written into ``x``."""
    allowed = np.asarray(state.program.groups[block[0]].counts)
    orders, total = [], np.zeros(len(allowed))
    for g in block.tolist():
        group = state.program.groups[g]
        order = np.argsort(-worth[group.span], kind="stable")
        sums = np.concatenate([[0.0], np.cumsum(worth[group.span][order])])
        total += sums[allowed]
        orders.append(order + group.start)
    n = int(allowed[total.argmax()])
    for g, order in zip(block.tolist(), orders, strict=True):
        x[state.program.groups[g].span] = False
        x[order[:n]] = True


def drop(state: LinkedState) -> bool:
    """Switch off what loses least for what it frees until every budget is met; whether that was possible."""
    while True:
        excess = state.excess()
        over = excess > 0
        if not over.any():
            return True
        units, worth, shares = state.steps(on=False)
        freed = shares[:, over] @ (state.limits[over] / excess[over])
        useful = freed > 0
        units, worth, freed = units[useful], worth[useful], freed[useful]
        if not len(units):
            return False
        price = np.where(worth > 0, worth / freed, worth * freed)
        order = np.argsort(price, kind="stable")
        take = int(np.searchsorted(np.cumsum(freed[order]), BATCH)) + 1
        batch = state.within_floors(units[order[:take]])
        if not len(batch):
            return False
        x = state.x.copy()
        x[batch] = False
        state.go_to(x)
        state.work += 1


def fill(state: LinkedState) -> None:
    """Switch on what is worth most for its cost while something that loses nothing fits.

    Below the lower end of a budget what loses is switched on, too.
    """
    share, most, skip = BATCH, state.program.size, np.zeros(state.program.size, np.bool_)
    while True:
        slack = -state.excess()
        units, worth, shares = state.steps(on=True)
        free = ~skip[units]
        units, worth, shares = units[free], worth[free], shares[free]
        cost = shares * (state.limits / np.maximum(slack, 1))
        short = state.shortage() > 0
        fits = (shares * state.limits <= slack + 0.5).all(1) & ((worth >= 0) | short)
        units, worth, cost = units[fits], worth[fits], cost[fits]
        if not len(units):
            return
        order = np.argsort(-worth / np.maximum(cost.sum(1), 1e-300), kind="stable")
        total = np.cumsum(cost[order], axis=0).max(1)
        take = min(max(int(np.searchsorted(total, share, side="right")), 1), most)
        saved, value = state.x.copy(), state.value
        x = state.x.copy()
        x[units[order[:take]]] = True
        state.go_to(x)
        state.work += 1
        if (state.excess() > 0).any() or (state.value < value and not short):
            state.go_to(saved)
            # Several together took more than foreseen, or one did: its wholes may share a product.
            skip[units[order[:1]]] = take == 1
            # The share alone does not limit steps that seem to cost nothing.
            share, most = (share / 4, max(take // 4, 1)) if take > 2 else (0.0, 1)


def improve(state: LinkedState, stop: Stop) -> None:
    """From a feasible point: blocks at the prices of the last steps, then back into the budgets; the best is kept."""
    fill(state)
    best, value = state.x.copy(), state.value
    scale = 1.0
    for _ in range(PASSES):
        if stop():
            break
        prices = scale * _marginal_prices(state)
        for _ in range(PASSES):
            if not sweep(state, prices) or stop():
                break
        over = bool((state.excess() > 0).any())
        if drop(state):
            fill(state)
        if state.value > value * (1 + 1e-9) and state.program.is_feasible(state.x):
            best, value = state.x.copy(), state.value
        # Too much was taken at these prices, or too little: the next round corrects them a little.
        scale *= 1.05 if over else 0.97
    state.go_to(best)


def _marginal_prices(state: LinkedState) -> FloatArray:
    """For each budget what a use of the whole limit is worth, judged by the steps that could come or go next."""
    slack = np.maximum(-state.excess(), 0) / state.limits
    units, worth, shares = state.steps(on=False)
    if not len(units):
        return np.zeros(len(state.limits))
    tight = np.exp(-slack / max(float(slack.min()), 1e-3) * 0.5)
    ratio = worth / np.maximum(shares @ tight, 1e-300)
    # The last steps to go are those with the least worth for what they free.
    marginal = float(np.quantile(np.maximum(ratio, 0.0), 0.05))
    return np.asarray(marginal * tight)


def perturb(state: LinkedState, rng: np.random.Generator, trials: int, stop: Stop) -> None:
    """Random changes of one block, mended by the other leaves and kept where they gain."""
    best, value = state.x.copy(), state.value
    leaves = [np.flatnonzero(state.leaf & np.isin(state.program.group_of, b)) for b in state.blocks]
    leaves = [units for units in leaves if len(units)]
    for _ in range(trials):
        if stop():
            break
        units = leaves[int(rng.integers(len(leaves)))]
        chosen = _some(state, units, rng)
        x = state.x.copy()
        x[chosen] = rng.random() < 0.5 if rng.random() < 0.5 else ~x[chosen]
        state.go_to(x)
        state.fixed[chosen] = True
        good = state.allowed() and drop(state)
        if good:
            fill(state)
            state.fixed[:] = False
            fill(state)
        state.fixed[:] = False
        if good and state.value > value * (1 + 1e-12) and state.program.is_feasible(state.x):
            best, value = state.x.copy(), state.value
        else:
            state.go_to(best)


def _some(state: LinkedState, units: IntArray, rng: np.random.Generator) -> IntArray:
    """A few of the units at random, or all parts of one whole."""
    heads = np.unique(state.links.wholes[np.isin(state.links.parts, units)])
    if len(heads) and rng.random() < 0.5:
        parts = state.links.parts[state.links.wholes == rng.choice(heads)]
        return np.asarray(parts[state.leaf[parts]])
    size = min(len(units), 1 + int(rng.integers(1 + len(units) // 20)))
    return np.asarray(rng.choice(units, size=size, replace=False))
