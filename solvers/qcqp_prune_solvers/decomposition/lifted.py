"""The lifted program: the objective as one symmetric block matrix, counts of coupled groups lifted out exactly.

Write ``H`` for the symmetric matrix with ``x^T H x / 2`` the coupling, ``N`` for any symmetric matrix over groups that
is zero where groups are not coupled, and ``d`` for a vector. For 0/1 points, with ``n`` the counts,

    x^T H x / 2 = x^T (H - N[g, h] 1 1^T - diag(d)) x / 2 + d . x / 2 + n^T N n / 2.

Where ``diag(d) + N 1 1^T - H`` is positive semidefinite the first term is concave, and its linearisation at any
``r0`` over-estimates it. What is left is separable in units but for the counts: top-k sums and a count program.

References:
    Billionnet, Elloumi and Lambert, "Extending the QCR method to general mixed-integer programs" (Mathematical
    Programming, 2012), for the convexification; the lift to counts keeps the products of counts exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray, dense
from qcqp_prune.program.program import Program
from qcqp_prune_solvers.decomposition.count_program import CountProgram
from qcqp_prune_solvers.decomposition.couplings import Couplings, Entries


@dataclass(frozen=True, eq=False)
class Lift:
    """``N``, in the two forms that are needed.

    Attributes:
        values: ``(couplings,)``: what each product of two sums of counts is worth.
        entries: the matrix over groups that they make.
    """

    values: FloatArray
    entries: Entries


class LiftedMatrix:
    """Products with ``H``, block by block; nothing of the full size is stored."""

    def __init__(self, program: Program) -> None:
        groups = program.groups
        self.size = program.size
        self.spans = [g.span for g in groups]
        self.widths = np.asarray([g.width for g in groups], np.int64)
        self.blocks: dict[tuple[int, int], FloatArray] = {}
        for pair in program.pairs:
            matrix = dense(pair.coef, (groups[pair.first].width, groups[pair.second].width))
            self.blocks[pair.first, pair.second] = matrix + matrix.T if pair.first == pair.second else matrix
        self.couplings = Couplings.of(program)
        self._rows: list[dict[int, FloatArray]] = [{} for _ in groups]
        for (g, h), matrix in self.blocks.items():
            self._rows[g][h] = matrix
            if g != h:
                self._rows[h][g] = np.ascontiguousarray(matrix.T)
        self._lifted: list[set[int]] = [set() for _ in groups]
        for g, h in self.couplings.entries(np.ones(len(self.couplings.items))):
            self._lifted[g].add(h)
            self._lifted[h].add(g)

    def times(self, x: FloatArray, lift: Lift) -> FloatArray:
        """``(H - N 1 1^T) x`` for ``x`` of shape ``(n,)`` or ``(n, k)``."""
        return np.concatenate([self.rows_times(g, x, lift) for g in range(len(self.spans))])

    def rows_times(self, group: int, x: FloatArray, lift: Lift) -> FloatArray:
        """The rows of ``(H - N 1 1^T) x`` that belong to one group."""
        span = self.spans[group]
        out = np.zeros_like(x[span])
        for other, matrix in self._rows[group].items():
            out += matrix @ x[self.spans[other]]
        for other in self._lifted[group]:
            value = lift.entries.get((min(group, other), max(group, other)), 0.0)
            out -= value * x[self.spans[other]].sum(0)
        return out

    def within(self, group: int, lift: Lift) -> FloatArray | None:
        """The block of ``H - N 1 1^T`` of a group with itself, ``(width, width)``; None where there is none."""
        value = lift.entries.get((group, group), 0.0)
        block = self.blocks.get((group, group))
        if block is None:
            return np.full((self.widths[group],) * 2, -value) if value else None
        return block - value

    def diagonal(self, lift: Lift) -> FloatArray:
        """The diagonal of ``N 1 1^T``, ``(n,)``; that of ``H`` is zero."""
        return np.repeat([lift.entries.get((g, g), 0.0) for g in range(len(self.spans))], self.widths)

    def row_sizes(self, lift: Lift) -> FloatArray:
        """Sizes of the entries of ``H`` and ``N 1 1^T``, added up along each row, ``(n,)``."""
        sizes = [np.zeros(w) for w in self.widths]
        for g, row in enumerate(self._rows):
            for matrix in row.values():
                sizes[g] += np.abs(matrix).sum(1)
        for (g, h), value in lift.entries.items():
            sizes[g] += abs(value) * self.widths[h]
            if g != h:
                sizes[h] += abs(value) * self.widths[g]
        return np.concatenate(sizes)

    def scaled_blocks(self, lift: Lift, root: FloatArray) -> dict[tuple[int, int], FloatArray]:
        """The blocks of ``-diag(root) (H - N 1 1^T) diag(root)``, every diagonal block among them."""
        blocks = {}
        for g, h in {*self.blocks, *lift.entries, *((g, g) for g in range(len(self.spans)))}:
            shape = (int(self.widths[g]), int(self.widths[h]))
            block = lift.entries.get((g, h), 0.0) - self.blocks.get((g, h), np.zeros(shape))
            blocks[g, h] = root[self.spans[g], None] * block * root[None, self.spans[h]]
        return blocks

    def fitted_lift(self, weights: FloatArray) -> Lift:
        """The lift nearest to the mean entries of the blocks, units weighted; no square is worth less than nothing.

        A square with a negative value is concave as it stands: lifted out it would only make the diagonal dearer.
        """
        means, importance = {}, {}
        for (g, h), matrix in self.blocks.items():
            a, b = weights[self.spans[g]], weights[self.spans[h]]
            importance[g, h] = float(a.sum() * b.sum())
            means[g, h] = float(a @ matrix @ b) / importance[g, h]
        values = self.couplings.fit(means, importance)
        squares = np.asarray([item.first == item.second for item in self.couplings.items], np.bool_)
        return self.lift(np.where(squares, np.maximum(values, 0.0), values))

    def lift(self, values: FloatArray) -> Lift:
        """A lift from the worth of each product of counts."""
        return Lift(values, self.couplings.entries(values))


@dataclass(frozen=True, eq=False)
class Atom:
    """A 0/1 point that the oracle found: what the hull is made of.

    Attributes:
        x: ``(n,) float64``.
        counts: ``(groups,)``.
        use: ``(budgets,)`` use of each budget as a share of its limit.
        products: ``(couplings,)`` of sums of counts.
    """

    x: FloatArray
    counts: IntArray | FloatArray
    use: FloatArray
    products: FloatArray


class Oracle:
    """``max over 0/1 points of alpha . x + n^T N n / 2 - sum_r price_r use_r(n)``, exactly."""

    def __init__(self, program: Program, couplings: Couplings) -> None:
        self.program = program
        self.couplings = couplings
        self.counts = CountProgram(couplings)
        self.limits = np.asarray([max(c.limit, 1) for c in program.constraints], np.float64)

    def solve(self, alpha: FloatArray, lift: Lift, prices: FloatArray) -> tuple[float, Atom]:
        """The maximum and a point that attains it.

        Args:
            alpha: ``(n,)`` linear worth of units.
            lift: ``N``.
            prices: ``(budgets,)``, non-negative, for a use of the whole limit.
        """
        orders, constant, data = self._weighed(alpha, lift, prices)
        value, counts = self.counts.maximise(*data)
        group_counts = counts[self.couplings.of_group]
        x = np.zeros(self.program.size)
        for group, order, n in zip(self.program.groups, orders, group_counts.tolist(), strict=True):
            x[group.start + order[:n]] = 1.0
        return value + constant, self.atom(x, group_counts)

    def marginals(self, alpha: FloatArray, lift: Lift, prices: FloatArray) -> list[FloatArray | None]:
        """For each class the same maximum at each of its allowed counts; None where it is out of reach."""
        _, constant, data = self._weighed(alpha, lift, prices)
        found = self.counts.marginals(*data)
        return [None if values is None else values + constant for values in found]

    def _weighed(
        self, alpha: FloatArray, lift: Lift, prices: FloatArray
    ) -> tuple[list[IntArray], float, tuple[list[FloatArray], FloatArray, FloatArray]]:
        """Order of units, a constant, and the count program's data: unary tables, worth of products and of tables."""
        unary, orders = self._top_sums(alpha)
        coefficients = lift.values.copy()
        constant = 0.0
        for price, limit, constraint in zip(prices, self.limits, self.program.constraints, strict=True):
            form, scale = constraint.form, -float(price) / limit
            constant += scale * form.constant
            for g, coefficient in enumerate(form.linear.tolist()):
                c = int(self.couplings.of_group[g])
                unary[c] = unary[c] + scale * coefficient * self.couplings.allowed[c]
            for coefficient, first, second in form.products:
                coefficients[self.couplings.index[first, second]] += scale * coefficient
        lookups = self.couplings.lookups
        weights = np.asarray([-float(prices[e.constraint]) / self.limits[e.constraint] for e in lookups])
        return orders, constant, (unary, coefficients, weights)

    def atom(self, x: FloatArray, counts: IntArray) -> Atom:
        """An atom from a point and its counts."""
        use = [c.form.evaluate(counts) for c in self.program.constraints]
        return Atom(x, counts, np.asarray(use, np.float64) / self.limits, self.couplings.products(counts))

    def _top_sums(self, alpha: FloatArray) -> tuple[list[FloatArray], list[IntArray]]:
        """For each class the sum of its groups' top-n sums at each allowed n; for each group its order."""
        unary = [np.zeros(len(a)) for a in self.couplings.allowed]
        orders = []
        for group, c in zip(self.program.groups, self.couplings.of_group.tolist(), strict=True):
            part = alpha[group.span]
            order = np.argsort(-part, kind="stable")
            sums = np.concatenate([[0.0], np.cumsum(part[order])])
            unary[c] = unary[c] + sums[self.couplings.allowed[c]]
            orders.append(order)
        return unary, orders
