"""Resource forms at fractional counts: what relaxed masks use, and what a little more of a group would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from qcqp_prune.program.coefficients import FloatArray, IntArray
from qcqp_prune.program.forms import CountForm, PairwiseForm, UseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.ranks import by_ranks
from qcqp_prune.program.tables import CountTable

_TINY = 1e-12


@dataclass(frozen=True)
class ControlPoint:
    """Relaxed masks that follow budgets, at one moment of a training.

    Attributes:
        step: optimiser steps done.
        used: by resource, its relaxed use as a share of the limit.
        multipliers: by resource, what exceeding the limit by the whole limit costs, in units of the loss.
    """

    step: int
    used: Mapping[str, float]
    multipliers: Mapping[str, float]

    @property
    def violation(self) -> float:
        """By how much the worst budget is exceeded, as a share of its limit; 0 where all are met."""
        return max(0.0, *(use - 1 for use in self.used.values()))


def relaxed_use(form: UseForm, counts: npt.ArrayLike) -> tuple[float, FloatArray]:
    """Value and slopes of a form at fractional counts.

    Products are taken as they are, tables are read by linear interpolation between their levels, and of a maximum over
    steps the largest counts. At whole counts that lie on the levels of all tables the value is the form's.

    Args:
        form: the exact form.
        counts: ``(group_count,) float64`` relaxed counts, such as sums of relaxed masks.

    Returns:
        The use, and ``(group_count,)`` what a unit more of each group costs there.
    """
    n = np.asarray(counts, np.float64)
    return max((_relaxed(part, n) for part in form.parts), key=lambda found: found[0])


def marginal_prices(problem: PruningProblem, values: FloatArray) -> FloatArray:
    """What each unit costs at relaxed masks, ``(units,)``: shares of the limits, added up over the budgets."""
    of_unit = problem.graph.group_of_unit
    counts = np.bincount(of_unit, weights=values, minlength=len(problem.graph.groups))
    price = np.zeros(len(counts))
    for row in problem.budgeted:
        price += relaxed_use(row.form, counts)[1] / max(row.limit or row.dense, 1)
    # What is free of charge is kept for its value alone.
    of_group: FloatArray = np.maximum(price, price[price > 0].min(initial=1.0) * 1e-3)
    return of_group[of_unit]


def rounding_worth(problem: PruningProblem, values: FloatArray) -> PairwiseForm:
    """Relaxed masks as an objective whose best selection is as near to them as budgets allow.

    With ``n_g`` the sum of the values of a group, ``p_g`` its marginal price there and ``Y_r`` the sum of its r largest
    values, the unit of rank r is worth ``n_g p_g log(Y_r / Y_r-1)``. Units of a group cost the same, so those of the
    largest values stay and the worth is ``sum_g n_g p_g log(Y of what stays)``, which at a budget that the relaxed
    masks use up is best, among fractional counts of equal values, at the relaxed counts themselves. It is linear, so
    that exact solvers take it.

    (Values times marginal prices would be linear too, but under a budget of products of counts the best point of such
    an objective leaves one unit here so that all may stay there.)

    Args:
        problem: whose budgets to look at.
        values: ``(units,)`` in [0, 1].
    """
    of_unit = problem.graph.group_of_unit
    weights = np.bincount(of_unit, weights=values * marginal_prices(problem, values))
    return _logarithms(problem, values, np.asarray(weights, np.float64))


def balanced_worth(problem: PruningProblem, values: FloatArray) -> PairwiseForm:
    """Sizes within groups as an objective: the logarithm of the share that each layer retains of them, added up.

    A layer retains the share that is kept of its inputs' values times that of its outputs'. So the unit of rank r is
    worth ``ends log(Y_r / Y_r-1)`` with ``ends`` how many inputs and outputs of layers its group is. Nothing is said of
    one group against another, and the most goes where it costs the most.

    Args:
        problem: whose graph to look at.
        values: ``(units,)`` in [0, 1].
    """
    graph = problem.graph
    ends = np.zeros(len(graph.groups))
    for layer in graph.layers:
        for axis in dict.fromkeys((layer.in_axis, layer.out_axis, layer.made_axis)):
            units = graph.axes[axis]
            ends += np.bincount(graph.group_of_unit[units], minlength=len(ends)) / max(len(units), 1)
    return _logarithms(problem, values, np.where(ends > 0, ends, 1.0))


def _logarithms(problem: PruningProblem, values: FloatArray, weights: FloatArray) -> PairwiseForm:
    """The logarithm of the values that each group keeps, times its weight."""

    def gains(g: int, sums: FloatArray) -> FloatArray:
        return np.asarray(weights[g] * np.diff(np.log(sums), prepend=np.log(sums[0] / 2)))

    return PairwiseForm(by_ranks(problem.graph, np.maximum(values, _TINY), gains))


def _relaxed(form: CountForm, n: FloatArray) -> tuple[float, FloatArray]:
    rows, cols, coefs = form.rows, form.cols, form.coefs.astype(np.float64)
    value = float(form.constant) + float(form.linear @ n) + float(coefs @ (n[rows] * n[cols]))
    slopes = form.linear.astype(np.float64)
    np.add.at(slopes, rows, coefs * n[cols])
    np.add.at(slopes, cols, coefs * n[rows])
    for table in form.tables:
        use, rises = _between_levels(table, n)
        value += use
        for shares, rise in zip((table.first, table.second), rises, strict=True):
            for g, share in shares:
                slopes[g] += share * rise
    return value, slopes


def _between_levels(table: CountTable, n: FloatArray) -> tuple[float, tuple[float, float]]:
    (i, a, step_a), (j, b, step_b) = (
        _place(levels, sum(share * float(n[g]) for g, share in shares))
        for levels, shares in ((table.first_levels, table.first), (table.second_levels, table.second))
    )
    corner = table.values[
        np.ix_([i, min(i + 1, len(table.first_levels) - 1)], [j, min(j + 1, len(table.second_levels) - 1)])
    ].astype(np.float64)
    left, right = corner @ np.asarray([1 - b, b])
    low, high = np.asarray([1 - a, a]) @ corner
    rises = ((right - left) / step_a if step_a else 0.0, (high - low) / step_b if step_b else 0.0)
    return float((1 - a) * left + a * right), rises


def _place(levels: IntArray, total: float) -> tuple[int, float, float]:
    """The level below, the share of the way to the next one, and the distance between the two; 0 beyond the ends."""
    if len(levels) == 1 or total <= levels[0]:
        return 0, 0.0, 0.0
    i = min(int(np.searchsorted(levels, total, side="left")) - 1, len(levels) - 2)
    step = float(levels[i + 1] - levels[i])
    return i, min((total - float(levels[i])) / step, 1.0), step
