"""The cardinality-RLT model: one column for each product of two units, tied to the counts by exact row sums.

For groups with variables ``r``, ``s`` and counts ``n_r``, ``n_s``::

    X_ij <= r_i,  X_ij <= s_j,  X_ij >= r_i + s_j - 1
    sum_j X_ij = n_s r_i,   sum_i X_ij = n_r s_j

Tightest of the linear models and the largest: about nine nonzeros for each pair of units.

References:
    Adams and Sherali, "A tight linearization and an algorithm for zero-one quadratic programming problems"
    (Management Science, 1986), constraints 3 to 6, applied to the cardinality rows.
"""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import dense
from qcqp_prune.program.program import GroupPair, Program
from qcqp_prune.program.reductions.counts import CountModel
from qcqp_prune.program.reductions.levels import table_entries
from qcqp_prune.program.reductions.pairwise import PairwiseReduction, is_scalar

NONZEROS_PER_PAIR = 9
LARGEST = 8_000_000


class CardinalityRLT(PairwiseReduction):
    """The tightest model: every product of two units, tied to the counts."""

    name = "cardinality_rlt"
    largest = LARGEST

    def nonzeros(self, program: Program) -> int:
        """About how many matrix entries the model has."""
        widths = [g.width for g in program.groups]
        pairs = sum(widths[p.first] * widths[p.second] for p in program.pairs if not is_scalar(p.coef))
        products = sum(len(c.form.coefs) for c in program.constraints)
        return NONZEROS_PER_PAIR * (pairs + max(widths, default=0) * products) + table_entries(program)

    def add_pair(self, model: CountModel, pair: GroupPair) -> None:
        """One column for each product."""
        (_add_within if pair.first == pair.second else _add_between)(model, pair)


def _add_between(model: CountModel, pair: GroupPair) -> None:
    b, g, h = model.builder, pair.first, pair.second
    first, second = model.program.groups[g], model.program.groups[h]
    p, q = first.width, second.width
    weights = dense(pair.coef, (p, q))
    columns = b.columns(
        p * q, 1.0, lambda x: np.outer(x[first.span], x[second.span]).ravel(), objective=weights.ravel()
    )
    r, s = np.repeat(model.x[g], q), np.tile(model.x[h], p)
    b.rows(p * q, (columns, 1.0), (r, -1.0), upper=0.0)
    b.rows(p * q, (columns, 1.0), (s, -1.0), upper=0.0)
    b.rows(p * q, (columns, 1.0), (r, -1.0), (s, -1.0), lower=-1.0)
    grid = columns.reshape(p, q)
    b.sums(grid, (model.weighted(g, h), -1.0), lower=0.0, upper=0.0)
    b.sums(grid.T, (model.weighted(h, g), -1.0), lower=0.0, upper=0.0)


def _add_within(model: CountModel, pair: GroupPair) -> None:
    """A group with itself: ``sum over j != i of X_ij = (n - 1) r_i``."""
    b, g = model.builder, pair.first
    group = model.program.groups[g]
    i, j = np.triu_indices(group.width, 1)
    if not len(i):
        return
    weights = dense(pair.coef, (group.width, group.width))
    columns = b.columns(len(i), 1.0, lambda x: x[group.span][i] * x[group.span][j], objective=weights[i, j])
    r, s = model.x[g][i], model.x[g][j]
    b.rows(len(i), (columns, 1.0), (r, -1.0), upper=0.0)
    b.rows(len(i), (columns, 1.0), (s, -1.0), upper=0.0)
    b.rows(len(i), (columns, 1.0), (r, -1.0), (s, -1.0), lower=-1.0)
    grid = np.zeros((group.width, group.width), dtype=np.int64)
    grid[i, j] = grid[j, i] = columns
    others = grid[~np.eye(group.width, dtype=np.bool_)].reshape(group.width, group.width - 1)
    b.sums(others, (model.weighted(g, g), -1.0), (model.x[g], 1.0), lower=0.0, upper=0.0)
