"""Functions of what a group keeps, exactly, as linear objectives: units of a group cost the same."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.coefficients import FloatArray, IntArray, LowRank, times
from qcqp_prune.program.forms import PairTerm, PairwiseForm


def by_ranks(
    graph: ChannelGraph, values: FloatArray, gains: Callable[[int, FloatArray], FloatArray]
) -> FloatArray:
    """What each unit is worth by its rank in its group, ``(units,)``.

    A solver of a linear objective keeps the units of the largest worth in a group, whichever number of them it keeps.
    So with gains that fall from rank to rank any function ``f`` of that sum of values is maximised exactly, where the
    unit of rank r is worth ``f(Y_r) - f(Y_r-1)`` with ``Y_r`` the sum of the r largest. Of a selection of other units
    (links, or kernel columns, may ask for one) a concave ``f`` is at least what the linear objective says.

    Args:
        graph: whose groups.
        values: ``(units,)``.
        gains: from a group's index and its ``Y_1 ... Y_width`` to the worth of each rank, ``(width,)``.
    """
    worth = np.zeros(len(values))
    for g in range(len(graph.groups)):
        span = graph.units(g)
        order = np.argsort(-values[span], kind="stable")
        worth[span.start + order] = gains(g, np.cumsum(values[span][order]))
    return worth


def worth_alone(form: PairwiseForm) -> FloatArray:
    """What each unit is worth with all others kept, ``(units,)``: by how much the form falls where it alone goes.

    The worth of a pair is part of what both of its units are worth, so the sum over all units counts it twice.
    """
    out = form.unary.astype(np.float64)
    for term in form.pairs:
        ones = [np.ones(len(units)) for units in (term.rows, term.cols)]
        np.add.at(out, term.rows, times(term.coef, ones[1]))
        np.add.at(out, term.cols, times(term.coef, ones[0], transpose=True))
        places, values = _with_itself(term)
        np.subtract.at(out, places, values)
    return out


def _with_itself(term: PairTerm) -> tuple[IntArray, FloatArray]:
    """Entries of a term between a unit and itself, which go with that one unit: the units and the entries."""
    if not np.isin(term.rows, term.cols).any():
        return np.zeros(0, np.int64), np.zeros(0)
    i, j = np.nonzero(term.rows[:, None] == term.cols)
    if isinstance(term.coef, LowRank):
        entries = (term.coef.left[i] * term.coef.right[j]).sum(1)
    else:
        entries = term.coef[i, j] if isinstance(term.coef, np.ndarray) else np.full(len(i), float(term.coef))
    return term.rows[i], entries
