"""A 0/1 point with everything that moves need, kept up to date one step at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray, dense
from qcqp_prune_solvers.search.structure import Structure, column_sum

CANDIDATES = 64
"""Units of each side that are tried for a swap."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A copy of a state's arrays, to go back to."""

    x: BoolArray
    gradient: FloatArray
    level: IntArray
    value: float


class State:
    """The current point.

    Attributes:
        x: ``(n,) bool``.
        gradient: ``(n,)`` worth of each unit given all others.
        level: ``(classes,)`` index of each class's count among its allowed ones.
        counts: ``(classes,)``.
        value: objective.
        work: steps taken since the search began.
    """

    def __init__(self, structure: Structure, x: BoolArray) -> None:
        self.structure = structure
        self.work = 0
        self._strides = structure.coarse
        self._spans = [g.span for g in structure.program.groups]
        self._own = {
            g: dense(coef, (structure.program.groups[g].width,) * 2)
            for g, found in enumerate(structure.neighbours)
            for h, coef in found
            if h == g
        }
        self.reset(x)

    def reset(self, x: BoolArray) -> None:
        """Go to another point; everything is recomputed."""
        program = self.structure.program
        self.x = x.copy()
        self.gradient = program.gradient(x.astype(np.float64))
        self.value = program.objective(x)
        counts = program.counts(x)
        heads = [int(counts[m[0]]) for m in self.structure.members]
        self.level = np.asarray(
            [np.searchsorted(a, n) for a, n in zip(self.structure.allowed, heads, strict=True)],
            dtype=np.int64,
        )
        self._recount()

    def _recount(self) -> None:
        s = self.structure
        self.counts = np.asarray([a[k] for a, k in zip(s.allowed, self.level, strict=True)], dtype=np.int64)
        self._slope = s.linear + s.curvature @ self.counts
        self.used = ((s.linear + self._slope) @ self.counts) // 2 + s.table_use(self.counts)
        self._forget(range(len(s.members)))

    def _forget(self, classes: range) -> None:
        count = len(self.structure.members)
        self._stale_up = np.ones(count, np.bool_)
        self._stale_down = np.ones(count, np.bool_)
        self._up_value, self._down_value = np.full(count, -np.inf), np.full(count, np.inf)
        self._up_units: list[list[IntArray]] = [[] for _ in classes]
        self._down_units: list[list[IntArray]] = [[] for _ in classes]
        self._steps()

    def _steps(self) -> None:
        """Sizes of the next step up and down of each class; 0 where there is none."""
        count = len(self.structure.members)
        self.step_up, self.step_down = np.zeros(count, np.int64), np.zeros(count, np.int64)
        for t in range(count):
            self._step(t)

    def _step(self, t: int) -> None:
        allowed, k = self.structure.allowed[t], int(self.level[t])
        up, down = self._strides[t][:, k]
        self.step_up[t], self.step_down[t] = allowed[up] - allowed[k], allowed[k] - allowed[down]

    def use_strides(self, *, coarse: bool) -> None:
        """Let steps reach to where the level of a table ends, or to the next allowed count only."""
        wanted = self.structure.coarse if coarse else self.structure.fine
        if wanted is not self._strides:
            self._strides = wanted
            self._forget(range(len(self.structure.members)))

    def snapshot(self) -> Snapshot:
        """Copy what ``restore`` needs."""
        return Snapshot(self.x.copy(), self.gradient.copy(), self.level.copy(), self.value)

    def restore(self, saved: Snapshot) -> None:
        """Go back."""
        self.x, self.gradient = saved.x.copy(), saved.gradient.copy()
        self.level, self.value = saved.level.copy(), saved.value
        self._recount()

    @property
    def slack(self) -> IntArray:
        """What is left of each budget, ``(k,)``; negative where it is exceeded."""
        return self.structure.limits - self.used

    def cost_up(self) -> IntArray:
        """Cost of each class's next step up, ``(k, classes)``."""
        return self._cost(self.step_up)

    def cost_down(self) -> IntArray:
        """What each class's next step down frees, ``(k, classes)``."""
        return -self._cost(-self.step_down)

    def _cost(self, step: IntArray) -> IntArray:
        diagonal = self.structure.curvature.diagonal(axis1=1, axis2=2)
        cost = np.asarray(step * self._slope + diagonal * (step * step) // 2)
        tables = self.structure.tables
        return cost if tables is None else cost + tables.changes(self.counts, step)

    def up_values(self) -> FloatArray:
        """Worth of the best next step up of each class, ``(classes,)``; -inf where there is none."""
        for t in np.flatnonzero(self._stale_up).tolist():
            self._up_value[t], self._up_units[t] = self._best_up(t)
        self._stale_up[:] = False
        return self._up_value

    def down_values(self) -> FloatArray:
        """What the cheapest next step down of each class loses, ``(classes,)``; inf where there is none."""
        for t in np.flatnonzero(self._stale_down).tolist():
            self._down_value[t], self._down_units[t] = self._best_down(t)
        self._stale_down[:] = False
        return self._down_value

    def _best_up(self, t: int) -> tuple[float, list[IntArray]]:
        d = int(self.step_up[t])
        if d == 0:
            return -np.inf, []
        total, units = 0.0, []
        for g in self.structure.members[t]:
            span = self._spans[g]
            scores = np.where(self.x[span], -np.inf, self.gradient[span])
            best = _largest(scores, d)
            units.append(best + span.start)
            total += float(scores[best].sum())
        return total, units

    def _best_down(self, t: int) -> tuple[float, list[IntArray]]:
        d = int(self.step_down[t])
        if d == 0:
            return np.inf, []
        total, units = 0.0, []
        for g in self.structure.members[t]:
            span = self._spans[g]
            scores = np.where(self.x[span], -self.gradient[span], -np.inf)
            best = _largest(scores, d)
            units.append(best + span.start)
            total -= float(scores[best].sum())
        return total, units

    def raise_class(self, t: int) -> None:
        """Take a class's best next step up."""
        self.up_values()
        self._move(t, self._up_units[t], 1)

    def lower_class(self, t: int) -> None:
        """Take a class's cheapest next step down."""
        self.down_values()
        self._move(t, self._down_units[t], -1)

    def _move(self, t: int, units: list[IntArray], sign: int) -> None:
        s = self.structure
        step = int(self.step_up[t]) if sign > 0 else -int(self.step_down[t])
        for g, chosen in zip(s.members[t], units, strict=True):
            self._flip(g, chosen, sign)
        self.used = self.used + step * self._slope[:, t] + s.curvature[:, t, t] * (step * step) // 2
        if s.tables is not None:
            at = np.asarray([self.counts[t], self.counts[t] + step], np.int64)
            before, after = s.tables.along(self.counts, t, at).T
            self.used = self.used + after - before
        self._slope = self._slope + step * s.curvature[:, :, t]
        self.level[t] = self._strides[t][0 if sign > 0 else 1, self.level[t]]
        self.counts[t] += step
        self._step(t)
        self.work += 1

    def _flip(self, g: int, units: IntArray, sign: int) -> None:
        """Set or clear off-by-``sign`` units of one group; value and gradients follow exactly."""
        s, span = self.structure, self._spans[g]
        local = units - span.start
        self.value += sign * float(self.gradient[units].sum())
        self.x[units] = sign > 0
        groups = s.program.groups
        self._touch(groups[g].tie)
        for h, coef in s.neighbours[g]:
            other = self._spans[h]
            change = column_sum(coef, local, groups[h].width)
            if h == g:
                self.value += 0.5 * float(change[local].sum())
            self.gradient[other] += sign * change
            self._touch(groups[h].tie)

    def _touch(self, t: int) -> None:
        self._stale_up[t] = self._stale_down[t] = True

    def reselect(self, t: int) -> bool:
        """Give a class the best units for its count, all else fixed; whether that gained anything.

        Exact for a class that is not coupled with itself. Otherwise undone where it does not gain, and units of a
        group that is coupled with itself are swapped one for one while that gains.
        """
        top, swapped = self._best_for_count(t), False
        for g in self.structure.members[t]:
            while self._swap(g):
                swapped = True
        return top or swapped

    def _best_for_count(self, t: int) -> bool:
        """The units of largest worth in each group, as if none changed that of another."""
        before, saved = self.value, None
        for g in self.structure.members[t]:
            span = self._spans[g]
            n = int(self.counts[t])
            if n in (0, span.stop - span.start):
                continue
            wanted = np.zeros(span.stop - span.start, np.bool_)
            wanted[_largest(self.gradient[span], n)] = True
            off = np.flatnonzero(self.x[span] & ~wanted)
            on = np.flatnonzero(~self.x[span] & wanted)
            least = 1e-12 * abs(before)
            if not len(off) or self.gradient[span][on].sum() <= self.gradient[span][off].sum() + least:
                continue
            if saved is None:
                saved = self.snapshot()
            self._flip(g, off + span.start, -1)
            self._flip(g, on + span.start, 1)
            self.work += 1
        if saved is None:
            return False
        if self.value <= before + 1e-12 * abs(before):
            self.restore(saved)
            return False
        return True

    def _swap(self, g: int) -> bool:
        """Take the best exchange of two units of a group that is coupled with itself; False where none gains.

        Among the ``CANDIDATES`` units outside that are worth most, and as many inside that are worth least.
        """
        own, span = self._own.get(g), self._spans[g]
        inside, outside = np.flatnonzero(self.x[span]), np.flatnonzero(~self.x[span])
        if own is None or not len(inside) or not len(outside):
            return False
        worth = self.gradient[span]
        inside = inside[_largest(-worth[inside], CANDIDATES)]
        outside = outside[_largest(worth[outside], CANDIDATES)]
        gains = worth[outside][:, None] - worth[inside] - own[np.ix_(outside, inside)]
        best = int(gains.argmax())
        if gains.flat[best] <= 1e-12 * abs(self.value):
            return False
        i, j = divmod(best, len(inside))
        self._flip(g, inside[[j]] + span.start, -1)
        self._flip(g, outside[[i]] + span.start, 1)
        self.work += 1
        return True


def _largest(scores: FloatArray, count: int) -> IntArray:
    """Indices of the ``count`` largest scores."""
    if count == 1:
        return np.asarray([scores.argmax()])
    if count >= len(scores):
        return np.arange(len(scores))
    return np.argpartition(scores, len(scores) - count)[len(scores) - count :]
