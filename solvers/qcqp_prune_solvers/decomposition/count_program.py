"""The count program: maximise unary tables and bilinear couplings over kept counts, exactly, by elimination.

Groups that are tied share one variable. Variables are eliminated one after another along a tree decomposition of the
coupling graph. A variable that has couplings but no table yet is eliminated by its conjugate function: the best count
depends on one slope only, which is linear in the neighbours' counts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.program import Program

TABLE_LIMIT = 20_000_000
"""Entries of the largest table that elimination may build (8 bytes each)."""


class TooWide(Exception):
    """The coupling graph needs a table larger than ``TABLE_LIMIT``."""


@dataclass(frozen=True, eq=False)
class Classes:
    """Tie classes of a program's groups: each is one count variable.

    Attributes:
        of_group: class of each group.
        allowed: for each class the allowed counts, ascending.
        edges: pairs of classes ``(a, b)``, ``a < b``, that are coupled by the objective or a budget.
    """

    of_group: IntArray
    allowed: tuple[IntArray, ...]
    edges: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, program: Program) -> Classes:
        """Classes and couplings of a program."""
        index: dict[int, int] = {}
        of_group = np.asarray([index.setdefault(g.tie, len(index)) for g in program.groups], np.int64)
        allowed: list[IntArray] = [np.zeros(0, np.int64)] * len(index)
        for group, c in zip(program.groups, of_group.tolist(), strict=True):
            allowed[c] = np.asarray(group.counts, np.int64)
        pairs = [(p.first, p.second) for p in program.pairs]
        for constraint in program.constraints:
            pairs += zip(constraint.form.rows.tolist(), constraint.form.cols.tolist(), strict=True)
        found = {tuple(sorted((int(of_group[g]), int(of_group[h])))) for g, h in pairs}
        edges = tuple(sorted((a, b) for a, b in found if a != b))
        return cls(of_group, tuple(allowed), edges)


@dataclass(frozen=True, eq=False)
class _Step:
    """Elimination of one variable.

    Attributes:
        variable: the class that goes.
        others: classes that its message depends on, ascending.
        coupled: those among ``others`` that it is coupled with directly.
        messages: indices of earlier steps whose messages it takes in.
    """

    variable: int
    others: tuple[int, ...]
    coupled: tuple[int, ...]
    messages: tuple[int, ...]


class CountProgram:
    """Exact maximisation over counts; the elimination order is planned once."""

    def __init__(self, classes: Classes) -> None:
        """Plan the elimination.

        Raises:
            TooWide: every order found needs a table above ``TABLE_LIMIT``.
        """
        self.classes = classes
        self._sizes = [len(a) for a in classes.allowed]
        self._counts = [a.astype(np.float64) for a in classes.allowed]
        self._steps = self._plan()

    def _plan(self) -> list[_Step]:
        """Greedy: eliminate the variable that takes the smallest table."""
        neighbours: list[set[int]] = [set() for _ in self._sizes]
        for a, b in self.classes.edges:
            neighbours[a].add(b)
            neighbours[b].add(a)
        direct = [set(n) for n in neighbours]
        scopes: dict[int, tuple[int, ...]] = {}
        steps: list[_Step] = []
        left = set(range(len(self._sizes)))
        while left:
            size, variable = min((self._work(v, neighbours[v], scopes), v) for v in left)
            others = tuple(sorted(neighbours[variable]))
            messages = tuple(k for k, scope in scopes.items() if variable in scope)
            if size > TABLE_LIMIT:
                raise TooWide(f"a table of {size:,} entries is needed, at most {TABLE_LIMIT:,} are allowed")
            coupled = tuple(sorted(direct[variable] & left))
            for k in messages:
                del scopes[k]
            scopes[len(steps)] = others
            steps.append(_Step(variable, others, coupled, messages))
            for a, b in itertools.permutations(others, 2):
                neighbours[a].add(b)
            for other in others:
                neighbours[other].discard(variable)
            left.remove(variable)
        return steps

    def _work(self, variable: int, others: set[int], scopes: dict[int, tuple[int, ...]]) -> int:
        """Entries of the largest table that eliminating a variable builds."""
        size = self._sizes[variable] if any(variable in scope for scope in scopes.values()) else 1
        return size * math.prod(self._sizes[c] for c in others)

    def maximise(
        self, unary: Sequence[FloatArray], couplings: dict[tuple[int, int], float]
    ) -> tuple[float, IntArray]:
        """``max sum_c unary[c][n_c] + sum_ab couplings[a, b] n_a n_b`` over allowed counts.

        Args:
            unary: for each class one value for each allowed count.
            couplings: for each edge of the classes its coefficient.

        Returns:
            The maximum and the maximising counts, ``(classes,)``.
        """
        tables: dict[int, FloatArray] = {}
        choices: list[IntArray] = []
        for k, step in enumerate(self._steps):
            slope = self._slope(step, couplings)
            table = self._gathered(step, tables)
            values = unary[step.variable]
            if table is None:
                tables[k], choice = self._conjugate(values, self._counts[step.variable], slope)
            else:
                total = table + values + slope[..., None] * self._counts[step.variable]
                choice = total.argmax(-1)
                tables[k] = np.take_along_axis(total, choice[..., None], -1)[..., 0]
            choices.append(choice)
        value = sum(float(tables[k]) for k, step in enumerate(self._steps) if not step.others)
        return value, self._backtrack(choices)

    def _slope(self, step: _Step, couplings: dict[tuple[int, int], float]) -> FloatArray:
        """Coefficient of the variable's count as a table over ``others``."""
        slope = np.zeros([1] * len(step.others))
        for other in step.coupled:
            a, b = min(other, step.variable), max(other, step.variable)
            axis = step.others.index(other)
            shape = [-1 if k == axis else 1 for k in range(len(step.others))]
            slope = slope + couplings.get((a, b), 0.0) * self._counts[other].reshape(shape)
        return np.broadcast_to(slope, [self._sizes[c] for c in step.others])

    def _gathered(self, step: _Step, tables: dict[int, FloatArray]) -> FloatArray | None:
        """The sum of earlier messages, the variable's own dimension last."""
        scope = (*step.others, step.variable)
        total: FloatArray | None = None
        for k in step.messages:
            earlier = self._steps[k].others
            order = [c for c in scope if c in earlier]
            table = tables[k].transpose([earlier.index(c) for c in order])
            table = table.reshape([self._sizes[c] if c in earlier else 1 for c in scope])
            total = table if total is None else total + table
        return total

    @staticmethod
    def _conjugate(values: FloatArray, counts: FloatArray, slope: FloatArray) -> tuple[FloatArray, IntArray]:
        """``max_n values[n] + slope n`` for each slope, by the upper hull of the values."""
        hull = _upper_hull(counts, values)
        steps = -np.diff(values[hull]) / np.diff(counts[hull])
        choice = hull[np.searchsorted(steps, slope, side="left")]
        return values[choice] + slope * counts[choice], choice

    def _backtrack(self, choices: list[IntArray]) -> IntArray:
        index = np.zeros(len(self._sizes), np.int64)
        for step, choice in zip(reversed(self._steps), reversed(choices), strict=True):
            index[step.variable] = choice[tuple(index[c] for c in step.others)]
        return np.asarray([a[i] for a, i in zip(self.classes.allowed, index.tolist(), strict=True)], np.int64)


def _upper_hull(x: FloatArray, y: FloatArray) -> IntArray:
    """Indices of the points on the upper concave hull, ``x`` ascending."""
    hull: list[int] = []
    for k in range(len(x)):
        while len(hull) > 1 and (y[hull[-1]] - y[hull[-2]]) * (x[k] - x[hull[-2]]) <= (y[k] - y[hull[-2]]) * (
            x[hull[-1]] - x[hull[-2]]
        ):
            hull.pop()
        hull.append(k)
    return np.asarray(hull, np.int64)
