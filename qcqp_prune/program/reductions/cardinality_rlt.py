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

from qcqp_prune.program.coefficients import Coefficient, FloatArray, dense
from qcqp_prune.program.program import GroupPair, Program
from qcqp_prune.program.reductions.counts import CountModel
from qcqp_prune.program.reductions.levels import table_entries
from qcqp_prune.program.reductions.linear_model import LinearModel

NONZEROS_PER_PAIR = 9
LARGEST = 8_000_000


class CardinalityRLT:
    """Exact mixed-integer linear model of a program."""

    name = "cardinality_rlt"

    def nonzeros(self, program: Program) -> int:
        """About how many matrix entries the model has."""
        widths = [g.width for g in program.groups]
        pairs = sum(widths[p.first] * widths[p.second] for p in program.pairs if not is_scalar(p.coef))
        products = sum(len(c.form.coefs) for c in program.constraints)
        return NONZEROS_PER_PAIR * (pairs + max(widths, default=0) * products) + table_entries(program)

    def accepts(self, program: Program) -> bool:
        """Whether the model stays within about a gigabyte."""
        return self.nonzeros(program) <= LARGEST

    def apply(self, program: Program) -> LinearModel:
        """The model; its maximum over integer points is the program's."""
        model = CountModel(program)
        for pair in program.pairs:
            if is_scalar(pair.coef):
                _add_scalar(model, pair)
            elif pair.first == pair.second:
                _add_within(model, pair)
            else:
                _add_between(model, pair)
        model.add_budgets()
        return model.builder.build()

    def invert(self, program: Program, values: FloatArray) -> FloatArray:
        """The program's variables: the first columns."""
        return values[: program.size]


def is_scalar(coef: Coefficient) -> bool:
    """Whether a coefficient stands for a constant matrix."""
    return isinstance(coef, float | int)


def _add_scalar(model: CountModel, pair: GroupPair) -> None:
    """``c 1^T`` times two groups is ``c n_g n_h``: no product of units is needed."""
    add_count_product(model, pair.first, pair.second, float(pair.coef))  # type: ignore[arg-type]


def add_count_product(model: CountModel, g: int, h: int, coefficient: float) -> None:
    """Add ``coefficient * n_g n_h`` to the objective through a column of its own."""
    if coefficient == 0.0:
        return
    product, first, second = model.product(g, h), model.count_of(g), model.count_of(h)
    top = float(model.high[g] * model.high[h])
    copy = model.builder.columns(1, top, lambda x: first(x) * second(x), objective=coefficient)
    model.builder.rows(1, (copy, 1.0), (product, -1.0), lower=0.0, upper=0.0)


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
