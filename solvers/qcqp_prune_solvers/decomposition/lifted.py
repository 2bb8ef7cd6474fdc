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
from qcqp_prune_solvers.decomposition.count_program import Classes, CountProgram

Lift = dict[tuple[int, int], float]
"""``N``: for each coupled pair of groups ``(g, h)``, ``g <= h``, its entry."""


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
        self._rows: list[list[tuple[int, FloatArray]]] = [[] for _ in groups]
        for (g, h), matrix in self.blocks.items():
            self._rows[g].append((h, matrix))
            if g != h:
                self._rows[h].append((g, np.ascontiguousarray(matrix.T)))

    def times(self, x: FloatArray, lift: Lift) -> FloatArray:
        """``(H - N 1 1^T) x`` for ``x`` of shape ``(n,)`` or ``(n, k)``."""
        return np.concatenate([self.rows_times(g, x, lift) for g in range(len(self.spans))])

    def rows_times(self, group: int, x: FloatArray, lift: Lift) -> FloatArray:
        """The rows of ``(H - N 1 1^T) x`` that belong to one group."""
        span = self.spans[group]
        out = np.zeros_like(x[span])
        for other, matrix in self._rows[group]:
            out += matrix @ x[self.spans[other]]
            out -= lift.get((min(group, other), max(group, other)), 0.0) * x[self.spans[other]].sum(0)
        if (group, group) not in self.blocks:
            out -= lift.get((group, group), 0.0) * x[span].sum(0)
        return out

    def scaled_blocks(self, lift: Lift, root: FloatArray) -> dict[tuple[int, int], FloatArray]:
        """The blocks of ``-diag(root) (H - N 1 1^T) diag(root)``, every diagonal block among them."""
        blocks = {}
        for g, h in {*self.blocks, *lift, *((g, g) for g in range(len(self.spans)))}:
            shape = (int(self.widths[g]), int(self.widths[h]))
            block = lift.get((g, h), 0.0) - self.blocks.get((g, h), np.zeros(shape))
            blocks[g, h] = root[self.spans[g], None] * block * root[None, self.spans[h]]
        return blocks

    def weighted_means(self, weights: FloatArray) -> Lift:
        """The mean entry of each block, units weighted."""
        means: Lift = {}
        for (g, h), matrix in self.blocks.items():
            a, b = weights[self.spans[g]], weights[self.spans[h]]
            means[g, h] = float(a @ matrix @ b / (a.sum() * b.sum()))
        return means


@dataclass(frozen=True, eq=False)
class Atom:
    """A 0/1 point that the oracle found: what the hull is made of.

    Attributes:
        x: ``(n,) float64``.
        counts: ``(groups,)``.
        use: ``(budgets,)`` use of each budget as a share of its limit.
    """

    x: FloatArray
    counts: IntArray
    use: FloatArray


class Oracle:
    """``max over 0/1 points of alpha . x + n^T N n / 2 - sum_r price_r use_r(n)``, exactly."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.classes = Classes.of(program)
        self.counts = CountProgram(self.classes)
        self.limits = np.asarray([max(c.limit, 1) for c in program.constraints], np.float64)

    def solve(self, alpha: FloatArray, lift: Lift, prices: FloatArray) -> tuple[float, Atom]:
        """The maximum and a point that attains it.

        Args:
            alpha: ``(n,)`` linear worth of units.
            lift: ``N``.
            prices: ``(budgets,)``, non-negative, for a use of the whole limit.
        """
        unary, orders = self._top_sums(alpha)
        couplings: dict[tuple[int, int], float] = {}
        for (g, h), value in lift.items():
            self._couple(unary, couplings, (g, h), value / 2 if g == h else value)
        constant = 0.0
        for price, limit, constraint in zip(prices, self.limits, self.program.constraints, strict=True):
            form, scale = constraint.form, -float(price) / limit
            constant += scale * form.constant
            for g, coefficient in enumerate(form.linear.tolist()):
                c = int(self.classes.of_group[g])
                unary[c] = unary[c] + scale * coefficient * self.classes.allowed[c]
            for g, h, coefficient in zip(
                form.rows.tolist(), form.cols.tolist(), form.coefs.tolist(), strict=True
            ):
                self._couple(unary, couplings, (g, h), scale * coefficient)
        value, counts = self.counts.maximise(unary, couplings)
        group_counts = counts[self.classes.of_group]
        x = np.zeros(self.program.size)
        for group, order, n in zip(self.program.groups, orders, group_counts.tolist(), strict=True):
            x[group.start + order[:n]] = 1.0
        return value + constant, self.atom(x, group_counts)

    def atom(self, x: FloatArray, counts: IntArray) -> Atom:
        """An atom from a point and its counts."""
        use = [c.form.evaluate(counts) for c in self.program.constraints]
        return Atom(x, counts, np.asarray(use, np.float64) / self.limits)

    def _top_sums(self, alpha: FloatArray) -> tuple[list[FloatArray], list[IntArray]]:
        """For each class the sum of its groups' top-n sums at each allowed n; for each group its order."""
        unary = [np.zeros(len(a)) for a in self.classes.allowed]
        orders = []
        for group, c in zip(self.program.groups, self.classes.of_group.tolist(), strict=True):
            part = alpha[group.span]
            order = np.argsort(-part, kind="stable")
            sums = np.concatenate([[0.0], np.cumsum(part[order])])
            unary[c] = unary[c] + sums[self.classes.allowed[c]]
            orders.append(order)
        return unary, orders

    def _couple(
        self,
        unary: list[FloatArray],
        couplings: dict[tuple[int, int], float],
        pair: tuple[int, int],
        value: float,
    ) -> None:
        a, b = sorted((int(self.classes.of_group[pair[0]]), int(self.classes.of_group[pair[1]])))
        if a == b:
            unary[a] = unary[a] + value * self.classes.allowed[a].astype(np.float64) ** 2
        else:
            couplings[a, b] = couplings.get((a, b), 0.0) + value
