"""The McCormick model: one column for each product of two units, and nothing that ties products to counts.

For units ``i``, ``j`` with a coefficient::

    X_ij <= r_i,   X_ij <= s_j,   X_ij >= r_i + s_j - 1

The textbook linearisation, whose relaxation may set every product to the smaller of two halves. It is here to be
compared with; ``cardinality_rlt`` has the same columns and a far tighter relaxation.

References:
    McCormick, "Computability of global solutions to factorable nonconvex programs" (Mathematical Programming, 1976);
    Glover and Woolsey, "Converting the 0-1 polynomial programming problem to a 0-1 linear program" (1974).
"""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import dense
from qcqp_prune.program.program import GroupPair, Program
from qcqp_prune.program.reductions.counts import CountModel
from qcqp_prune.program.reductions.pairwise import PairwiseReduction

NONZEROS_PER_PAIR = 7
LARGEST = 8_000_000


class McCormick(PairwiseReduction):
    """The textbook model, with the weakest of the relaxations."""

    name = "mccormick"
    largest = LARGEST

    def nonzeros(self, program: Program) -> int:
        """About how many matrix entries the model has."""
        return NONZEROS_PER_PAIR * program.pair_count

    def add_pair(self, model: CountModel, pair: GroupPair) -> None:
        """One column for each product that has a coefficient or that a budget needs."""
        b, g, h = model.builder, pair.first, pair.second
        first, second = model.program.groups[g], model.program.groups[h]
        weights = dense(pair.coef, (first.width, second.width))
        # Budgets need the product of two counts, which is the sum of all products of their units.
        if g == h:
            i, j = np.nonzero(weights)
        else:
            i, j = (a.ravel() for a in np.indices(weights.shape))
        if not len(i):
            return
        x, y = first.start + i, second.start + j
        columns = b.columns(len(i), 1.0, lambda p: p[x] * p[y], objective=weights[i, j])
        r, s = model.x[g][i], model.x[h][j]
        b.rows(len(i), (columns, 1.0), (r, -1.0), upper=0.0)
        b.rows(len(i), (columns, 1.0), (s, -1.0), upper=0.0)
        b.rows(len(i), (columns, 1.0), (r, -1.0), (s, -1.0), lower=-1.0)
        if g != h:
            model.sum_to_product(g, h, columns)
