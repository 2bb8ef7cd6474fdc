"""A program as a PySCIPOpt model: as it stands, or through a linear reduction."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, IntArray, dense
from qcqp_prune.program.program import CountConstraint, GroupPair, Program
from qcqp_prune.program.reductions.counts import reachable_counts
from qcqp_prune.program.reductions.levels import reachable_levels
from qcqp_prune.program.reductions.linear_model import Reduction
from qcqp_prune.program.reductions.pairwise import is_scalar
from qcqp_prune.program.tables import CountTable, Shares, share_sum
from qcqp_prune_solvers.linear import ordered_pairs, strengthened

# SCIP compares sides of a row relative to their size, so a large budget needs a small tolerance to be kept.
LOOSEST, TIGHTEST = 1e-6, 1e-9


class Built(Protocol):
    """A model that SCIP can run.

    Attributes:
        model: PySCIPOpt's.
        x: its variables that are the program's.
        reduction: name of the reformulation, empty for the program itself.
    """

    model: Any
    x: list[Any]
    reduction: str

    def start_from(self, x: BoolArray) -> None:
        """Hand over a point of the program, ``(n,)``, as a first solution."""


class NativeModel:
    """0/1 variables, integer counts, bilinear budgets, and an epigraph for each pair of groups."""

    reduction = ""

    def __init__(self, program: Program) -> None:
        from pyscipopt import Model

        self.program = program
        self.model = Model("program")
        self._variables()
        self._objective()
        for constraint in program.constraints:
            self._budget(constraint)
        for i, j in ordered_pairs(program).tolist():
            self.model.addCons(self.x[i] >= self.x[j])

    def _variables(self) -> None:
        from pyscipopt import quicksum

        m = self.model
        self.x = [m.addVar(f"x{i}", vtype="B") for i in range(self.program.size)]
        self.n: list[Any] = []
        self.levels: dict[int, list[tuple[int, Any]]] = {}
        self.steps: dict[tuple[Shares, bytes], tuple[IntArray, list[Any]]] = {}
        first: dict[int, int] = {}
        self.allowed = reachable_counts(self.program)
        for g, (group, allowed) in enumerate(zip(self.program.groups, self.allowed, strict=True)):
            n = m.addVar(f"n{g}", vtype="I", lb=allowed[0], ub=allowed[-1])
            m.addCons(quicksum(self.x[group.span]) == n)
            if len(allowed) < allowed[-1] - allowed[0] + 1:
                pick = [(k, m.addVar(f"z{g}_{k}", vtype="B")) for k in allowed]
                m.addCons(quicksum(z for _, z in pick) == 1)
                m.addCons(quicksum(k * z for k, z in pick) == n)
                self.levels[g] = pick
            self.n.append(n)
            head = first.setdefault(group.tie, g)
            if head != g:
                m.addCons(n == self.n[head])
        for whole, part in zip(
            self.program.links.wholes.tolist(), self.program.links.parts.tolist(), strict=True
        ):
            m.addCons(self.x[part] <= self.x[whole])
        for g, h in self.program.needs.pairs:
            for x in self.x[self.program.groups[g].span]:
                m.addCons(x <= self.n[h])
        for wholes, parts in self.program.links.by_size:
            for whole, row in zip(wholes.tolist(), parts.tolist(), strict=True):
                m.addCons(quicksum(self.x[i] for i in row) >= self.x[whole])

    def _objective(self) -> None:
        from pyscipopt import quicksum

        m, linear = self.model, self.program.linear
        # One epigraph variable for each pair of groups, because SCIP takes linear objectives only.
        self.worth = []
        for pair in self.program.pairs:
            top = self._largest(pair)
            t = m.addVar(vtype="C", lb=-top, ub=top)
            m.addCons(t <= self._expression(pair))
            self.worth.append((t, pair))
        terms = [float(linear[i]) * self.x[i] for i in np.flatnonzero(linear)]
        m.setObjective(quicksum([*terms, *(t for t, _ in self.worth)]) + self.program.constant, "maximize")

    def _largest(self, pair: GroupPair) -> float:
        groups = self.program.groups
        shape = (groups[pair.first].width, groups[pair.second].width)
        return float(np.abs(dense(pair.coef, shape)).sum()) + 1.0

    def _expression(self, pair: GroupPair) -> Any:
        from pyscipopt import quicksum

        if is_scalar(pair.coef):
            return float(pair.coef) * self.n[pair.first] * self.n[pair.second]  # type: ignore[arg-type]
        first, second = self.program.groups[pair.first], self.program.groups[pair.second]
        weights = dense(pair.coef, (first.width, second.width))
        x, y = self.x[first.span], self.x[second.span]
        return quicksum(float(weights[i, j]) * x[i] * y[j] for i, j in zip(*np.nonzero(weights), strict=True))

    def _budget(self, constraint: CountConstraint) -> None:
        from pyscipopt import quicksum

        form = constraint.form
        looked_up = [pair for table in form.tables for pair in self._table(table)]
        coefficients = [*form.linear.tolist(), *form.coefs.tolist(), *(c for c, _ in looked_up)]
        common = int(np.gcd.reduce(coefficients)) if any(coefficients) else 1
        limit = (constraint.limit - form.constant) // common
        terms = [c // common * self.n[g] for g, c in enumerate(form.linear.tolist()) if c]
        for g, h, c in zip(form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True):
            terms.append(c // common * self.n[g] * self.n[h])
        terms += [c // common * column for c, column in looked_up]
        if terms:
            if constraint.at_least is None:
                self.model.addCons(quicksum(terms) <= limit)
            else:
                least = -((form.constant - constraint.at_least) // common)
                # One row with two ends: SCIP 10.0 crashes where the same products stand in two rows.
                self.model.addCons(least <= (quicksum(terms) <= limit))
            tolerance = min(max(0.3 / max(limit, 1), TIGHTEST), LOOSEST)
            if tolerance < float(self.model.getParam("numerics/feastol")):
                self.model.setParam("numerics/feastol", tolerance)

    def _table(self, table: CountTable) -> list[tuple[int, Any]]:
        """A table as integers times products of levels."""
        rows, first = self._level(table.first, table.first_levels)
        if not table.second:
            return [(int(v), z) for v, z in zip(table.values[rows, 0], first, strict=True) if v]
        cols, second = self._level(table.second, table.second_levels)
        values = table.values[rows, cols].tolist()
        return [
            (v, a * b)
            for a, row in zip(first, values, strict=True)
            for b, v in zip(second, row, strict=True)
            if v
        ]

    def _level(self, shares: Shares, levels: IntArray) -> tuple[slice, list[Any]]:
        """0/1 variables for the level of a sum of counts, one of which is 1."""
        from pyscipopt import quicksum

        low, high = [a[0] for a in self.allowed], [a[-1] for a in self.allowed]
        part, bottoms, tops = reachable_levels(shares, levels, low, high)
        key = (shares, levels.tobytes())
        if key not in self.steps:
            m, total = self.model, quicksum(n * self.n[g] for g, n in shares)
            pick = [m.addVar(vtype="B") for _ in tops]
            m.addCons(quicksum(pick) == 1)
            m.addCons(total <= quicksum(int(t) * z for t, z in zip(tops, pick, strict=True)))
            m.addCons(total >= quicksum(int(t) * z for t, z in zip(bottoms, pick, strict=True)))
            self.steps[key] = (levels[part], pick)
        return part, self.steps[key][1]

    def start_from(self, x: BoolArray) -> None:
        """Hand over a point of the program, ``(n,)``, as a first solution."""
        m, point = self.model, x.astype(np.float64)
        solution = m.createSol()
        for variable, value in zip(self.x, point.tolist(), strict=True):
            m.setSolVal(solution, variable, value)
        counts = self.program.counts(x)
        for g, n in enumerate(self.n):
            m.setSolVal(solution, n, float(counts[g]))
            for k, z in self.levels.get(g, []):
                m.setSolVal(solution, z, float(counts[g] == k))
        for (shares, _), (levels, pick) in self.steps.items():
            place = int(np.searchsorted(levels, share_sum(shares, counts)))
            for k, z in enumerate(pick):
                m.setSolVal(solution, z, float(k == place))
        for t, pair in self.worth:
            groups = self.program.groups
            first, second = point[groups[pair.first].span], point[groups[pair.second].span]
            weights = dense(pair.coef, (len(first), len(second)))
            m.setSolVal(solution, t, float(first @ weights @ second))
        m.addSol(solution)


class ReducedModel:
    """A mixed-integer linear model."""

    def __init__(self, program: Program, reduction: Reduction) -> None:
        from pyscipopt import Model

        self.reduction = reduction.name
        self.linear = strengthened(program, reduction)
        self.model = Model("reduced program")
        self._columns()
        self._rows()
        self.x = self.variables[: program.size]

    def _columns(self) -> None:
        linear = self.linear
        self.variables = [
            self.model.addVar(vtype="I" if integer else "C", lb=low, ub=high, obj=worth)
            for integer, low, high, worth in zip(
                linear.integer.tolist(),
                linear.lower.tolist(),
                linear.upper.tolist(),
                linear.objective.tolist(),
                strict=True,
            )
        ]
        self.model.addObjoffset(linear.constant)
        self.model.setMaximize()

    def _rows(self) -> None:
        matrix, variables = self.linear.matrix, self.variables
        starts, columns, values = matrix.indptr.tolist(), matrix.indices.tolist(), matrix.data.tolist()
        for r, (low, high) in enumerate(
            zip(self.linear.row_lower.tolist(), self.linear.row_upper.tolist(), strict=True)
        ):
            first, end = starts[r], starts[r + 1]
            if first == end:
                continue
            head = values[first] * variables[columns[first]]
            row = self.model.addCons(
                (head <= high) if low == -np.inf else (head >= low) if high == np.inf else (head == high)
            )
            # Expressions of thousands of terms are slow to build; coefficients are not.
            for k in range(first + 1, end):
                self.model.addCoefLinear(row, variables[columns[k]], values[k])

    def start_from(self, x: BoolArray) -> None:
        """Hand over a point of the program, ``(n,)``, as a first solution."""
        solution = self.model.createSol()
        for variable, value in zip(self.variables, self.linear.extend(x).tolist(), strict=True):
            self.model.setSolVal(solution, variable, value)
        self.model.addSol(solution)
