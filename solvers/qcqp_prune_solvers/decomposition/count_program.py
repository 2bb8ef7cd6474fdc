"""The count program: maximise unary tables and bilinear couplings over kept counts, exactly, by elimination.

Groups that are tied share one variable. Variables are eliminated one after another along a tree decomposition of the
coupling graph. What makes this fast is that couplings are bilinear: where a variable meets a neighbour only through a
product of counts, the best count depends on one slope, and the maximum over it is a concave envelope.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.program import Program
from qcqp_prune_solvers.decomposition.kernels import envelope_maxima

TABLE_LIMIT = 20_000_000
"""Entries of the largest table that elimination may build (8 bytes each)."""

Couplings = dict[tuple[int, int], float]


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


@dataclass(frozen=True)
class _Step:
    """Elimination of one variable.

    Attributes:
        variable: the class that goes.
        tabled: neighbours that an earlier message shares with it, ascending.
        free: neighbours that it meets through products only, ascending.
        coupled: all neighbours that it is coupled with directly.
        messages: indices of earlier steps whose messages it takes in.
    """

    variable: int
    tabled: tuple[int, ...]
    free: tuple[int, ...]
    coupled: tuple[int, ...]
    messages: tuple[int, ...]

    @property
    def scope(self) -> tuple[int, ...]:
        """Dimensions of its message."""
        return (*self.tabled, *self.free)


class CountProgram:
    """Exact maximisation over counts; the elimination order is planned once."""

    def __init__(self, classes: Classes) -> None:
        """Plan the elimination.

        Raises:
            TooWide: the greedy order needs a table above ``TABLE_LIMIT``.
        """
        self.classes = classes
        self._sizes = [len(a) for a in classes.allowed]
        self._counts = [a.astype(np.float64) for a in classes.allowed]
        self._steps = self._plan()

    @property
    def table_entries(self) -> int:
        """Entries of all messages together, as they are held during one elimination."""
        return sum(math.prod(self._sizes[c] for c in s.scope) for s in self._steps)

    def _plan(self) -> list[_Step]:
        """Greedy: eliminate the variable that takes the smallest tables."""
        neighbours: list[set[int]] = [set() for _ in self._sizes]
        for a, b in self.classes.edges:
            neighbours[a].add(b)
            neighbours[b].add(a)
        direct = [frozenset(n) for n in neighbours]
        scopes: dict[int, tuple[int, ...]] = {}
        steps: list[_Step] = []
        left = set(range(len(self._sizes)))
        while left:
            candidates = (self._step(v, neighbours[v], direct[v] & left, scopes) for v in sorted(left))
            size, step = min(((self._work(s), s) for s in candidates), key=lambda pair: pair[0])
            if size > TABLE_LIMIT:
                raise TooWide(f"a table of {size:,} entries is needed, at most {TABLE_LIMIT:,} are allowed")
            for k in step.messages:
                del scopes[k]
            scopes[len(steps)] = step.scope
            steps.append(step)
            for a, b in itertools.permutations(step.scope, 2):
                neighbours[a].add(b)
            for other in step.scope:
                neighbours[other].discard(step.variable)
            left.remove(step.variable)
        return steps

    @staticmethod
    def _step(
        variable: int,
        others: set[int],
        coupled: frozenset[int] | set[int],
        scopes: dict[int, tuple[int, ...]],
    ) -> _Step:
        messages = tuple(k for k, scope in scopes.items() if variable in scope)
        tabled = {c for k in messages for c in scopes[k]} - {variable}
        return _Step(
            variable, tuple(sorted(tabled)), tuple(sorted(others - tabled)), tuple(sorted(coupled)), messages
        )

    def _work(self, step: _Step) -> int:
        """Entries of the larger of the two tables that a step builds."""
        rows = math.prod(self._sizes[c] for c in step.tabled)
        return rows * max(self._sizes[step.variable], math.prod(self._sizes[c] for c in step.free))

    def maximise(self, unary: Sequence[FloatArray], couplings: Couplings) -> tuple[float, IntArray]:
        """``max sum_c unary[c][n_c] + sum_ab couplings[a, b] n_a n_b`` over allowed counts.

        Args:
            unary: for each class one value for each allowed count.
            couplings: for each edge of the classes its coefficient.

        Returns:
            The maximum and the maximising counts, ``(classes,)``.
        """
        tables: list[FloatArray] = []
        for step in self._steps:
            tables.append(self._message(step, self._gathered(step, tables, unary, couplings), couplings))
        value = sum(float(t) for t, step in zip(tables, self._steps, strict=True) if not step.scope)
        return value, self._backtrack(tables, unary, couplings)

    def _gathered(
        self, step: _Step, tables: list[FloatArray], unary: Sequence[FloatArray], couplings: Couplings
    ) -> FloatArray:
        """All that depends on the variable and its tabled neighbours, the variable's dimension last."""
        scope = (*step.tabled, step.variable)
        total = unary[step.variable].reshape([1] * len(step.tabled) + [-1])
        for k in step.messages:
            earlier = self._steps[k].scope
            table = tables[k].transpose([earlier.index(c) for c in scope if c in earlier])
            total = total + table.reshape([self._sizes[c] if c in earlier else 1 for c in scope])
        for other in step.coupled:
            if other in step.tabled:
                slope = self._coefficient(step.variable, other, couplings) * self._counts[other]
                slope = slope.reshape([-1 if c == other else 1 for c in step.tabled])
                total = total + slope[..., None] * self._counts[step.variable]
        return total

    def _message(self, step: _Step, table: FloatArray, couplings: Couplings) -> FloatArray:
        """The maximum over the variable, ``(tabled..., free...)``."""
        if not step.free:
            return np.asarray(table.max(-1))
        counts = self._counts[step.variable]
        slopes = [self._coefficient(step.variable, c, couplings) * self._counts[c] for c in step.free]
        base = np.zeros(1)
        for part in slopes[:-1]:
            base = np.add.outer(base, part).ravel()
        rows = np.ascontiguousarray(table.reshape(-1, len(counts)))
        out = np.empty((len(rows), len(base), len(slopes[-1])))
        envelope_maxima(rows, counts, base, slopes[-1], out)
        return out.reshape([*table.shape[:-1], *(self._sizes[c] for c in step.free)])

    def _backtrack(
        self, tables: list[FloatArray], unary: Sequence[FloatArray], couplings: Couplings
    ) -> IntArray:
        """Choose the variables in reverse order, each given those after it."""
        index = np.zeros(len(self._sizes), np.int64)
        for step in reversed(self._steps):
            values = unary[step.variable].copy()
            for k in step.messages:
                earlier = self._steps[k].scope
                values += tables[k][tuple(slice(None) if c == step.variable else index[c] for c in earlier)]
            for other in step.coupled:
                slope = self._coefficient(step.variable, other, couplings) * self._counts[other][index[other]]
                values += slope * self._counts[step.variable]
            index[step.variable] = int(values.argmax())
        return np.asarray([a[i] for a, i in zip(self.classes.allowed, index.tolist(), strict=True)], np.int64)

    @staticmethod
    def _coefficient(a: int, b: int, couplings: Couplings) -> float:
        return couplings.get((min(a, b), max(a, b)), 0.0)
