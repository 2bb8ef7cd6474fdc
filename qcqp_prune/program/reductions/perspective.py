"""The perspective model: one column for each unit and neighbouring group, bounded by tangents of its best sums.

For a unit ``i`` that meets a group with variables ``s`` and count ``n`` through the row ``a`` of coefficients, split
``a = m 1 + a'`` with ``m = min a``. Then ``r_i (a . s) = m w_i + y_i`` with ``w_i = n r_i`` exact, and::

    y_i <= a' . s                                        y_i <= (sum a') r_i
    y_i <= t_k w_i + (T_k - k t_k) r_i   for some k   (t_k the k-th largest entry of a', T_k the sum of the k largest)

The tangents are the perspective of the concave function "best sum of n entries" of ``a'``. Each pair of groups is
modelled from both sides and the two totals are equal. Exact at 0/1 points; the linear relaxation is weaker than the
cardinality-RLT model's, and smaller by the ratio of nonzeros.

References:
    Glover (1975) for ``y_i``; Frangioni and Gentile, "Perspective cuts for a class of convex 0-1 mixed integer
    programs" (Mathematical Programming, 2006), eq. 5, for the tangents.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcqp_prune.program.coefficients import FloatArray, IntArray, dense
from qcqp_prune.program.program import GroupPair, Program
from qcqp_prune.program.reductions.counts import CountModel
from qcqp_prune.program.reductions.levels import table_entries
from qcqp_prune.program.reductions.pairwise import PairwiseReduction, is_scalar

LARGEST = 60_000_000


class Perspective(PairwiseReduction):
    """The smaller model: one column for each unit and neighbouring group.

    Args:
        tangents: most tangents for each row; more give a tighter and larger relaxation.
    """

    name = "perspective"
    largest = LARGEST

    def __init__(self, tangents: int = 8, *, exact: bool = True) -> None:
        self._tangents, self._exact = tangents, exact

    def nonzeros(self, program: Program) -> int:
        """About how many matrix entries the model has."""
        total = table_entries(program)
        for pair in program.pairs:
            if not is_scalar(pair.coef):
                p, q = program.groups[pair.first].width, program.groups[pair.second].width
                total += 2 * p * q + (p + q) * (3 * self._tangents + 12)
        return total

    def add_pair(self, model: CountModel, pair: GroupPair) -> None:
        """One column for each unit and side."""
        (self._add_within if pair.first == pair.second else self._add_between)(model, pair)

    def _add_between(self, model: CountModel, pair: GroupPair) -> None:
        g, h = pair.first, pair.second
        shape = (model.program.groups[g].width, model.program.groups[h].width)
        weights = dense(pair.coef, shape)
        value = _total(model.program, pair)
        top = float(np.abs(weights).sum())
        total = model.builder.columns(1, top, value, lower=-top, objective=1.0)
        self._add_side(model, (g, h), weights, (total, 1.0))
        self._add_side(model, (h, g), np.ascontiguousarray(weights.T), (total, 1.0))

    def _add_within(self, model: CountModel, pair: GroupPair) -> None:
        """A group with itself: the symmetric matrix counts each product twice."""
        g, width = pair.first, model.program.groups[pair.first].width
        weights = dense(pair.coef, (width, width))
        top = float(np.abs(weights).sum())
        total = model.builder.columns(1, top, _total(model.program, pair), lower=-top, objective=1.0)
        self._add_side(model, (g, g), weights + weights.T, (total, 2.0))

    def _add_side(
        self, model: CountModel, groups: tuple[int, int], weights: FloatArray, total: tuple[IntArray, float]
    ) -> None:
        """``factor * total = sum_i (m_i w'_i + y_i)``, with ``w'_i`` the number of partners of unit ``i``."""
        b, (g, h) = model.builder, groups
        within = g == h
        others = _without_diagonal(weights) if within else weights
        if not others.size:
            b.rows(1, total, lower=0.0, upper=0.0)
            return
        least = others.min(axis=1)
        rest = weights - least[:, None]
        if within:
            np.fill_diagonal(rest, 0.0)
        full = rest.sum(axis=1)
        first, second = model.program.groups[g].span, model.program.groups[h].span
        x, w = model.x[g], model.weighted(g, h)
        k = len(x)
        y = b.columns(k, full, lambda p: p[first] * (rest @ p[second]))
        if self._exact:
            b.block(-rest, model.x[h], (y, 1.0), upper=0.0)
        b.rows(k, (y, 1.0), (x, -full), upper=0.0)
        self._add_tangents(model, groups, (others - least[:, None], x, w, y))
        partners = least * (1.0 if within else 0.0)
        b.block(
            np.concatenate([np.ones(k), least, -partners, [-total[1]]])[None, :],
            np.concatenate([y, w, x, total[0]]),
            lower=0.0,
            upper=0.0,
        )

    def _add_tangents(
        self,
        model: CountModel,
        groups: tuple[int, int],
        data: tuple[FloatArray, IntArray, IntArray, IntArray],
    ) -> None:
        (g, h), (rest, x, w, y) = groups, data
        itself = 1 if g == h else 0
        low, high = max(model.low[h] - itself, 1), model.high[h] - itself
        ordered = -np.sort(-rest, axis=1)
        sums = np.cumsum(ordered, axis=1)
        for k in np.unique(np.linspace(low, max(high, low), min(self._tangents, rest.shape[1])).astype(int)):
            slope = ordered[:, k - 1]
            # With itself left out, the number of partners is w_i - r_i.
            free = sums[:, k - 1] - k * slope - itself * slope
            model.builder.rows(len(x), (y, 1.0), (w, -slope), (x, -free), upper=0.0)


def _without_diagonal(weights: FloatArray) -> FloatArray:
    width = len(weights)
    return weights[~np.eye(width, dtype=np.bool_)].reshape(width, width - 1)


def _total(program: Program, pair: GroupPair) -> Callable[[FloatArray], float]:
    first, second = program.groups[pair.first].span, program.groups[pair.second].span
    weights = dense(pair.coef, (first.stop - first.start, second.stop - second.start))
    return lambda x: float(x[first] @ weights @ x[second])
