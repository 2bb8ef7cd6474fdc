"""What a bound proves of single units and counts: reduced costs, exact in the counts.

The bound is a maximum over counts of a linear function's best units. Asking for the maximum with one count set gives a
bound for each count; at a set count, forcing a unit in or out costs its distance from the last unit kept or the first
one dropped. What stays below the selection held can be in no better one.

References:
    Caprara, Pisinger and Toth, "Exact solution of the quadratic knapsack problem" (INFORMS Journal on Computing, 1999),
    section 4.
"""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune.program.restriction import Restriction
from qcqp_prune_solvers.decomposition.relaxation import Multipliers, Relaxation


def restriction(relaxation: Relaxation, multipliers: Multipliers, worth: float) -> Restriction:
    """Units and counts that every feasible point worth at least ``worth`` has.

    Args:
        relaxation: of the program.
        multipliers: of a bound, the lower the better.
        worth: of the selection held, with the program's constant.
    """
    program = relaxation.program
    alpha, constant = relaxation.linearised(multipliers)
    marginals = relaxation.oracle.marginals(alpha, multipliers.lift, multipliers.prices)
    found = Restriction.none(program)
    kept, dropped, counts = found.kept, found.dropped, list(found.counts)
    for g, (group, c) in enumerate(
        zip(program.groups, relaxation.oracle.couplings.of_group.tolist(), strict=True)
    ):
        values = marginals[c]
        if values is None:
            continue
        top = float(values.max())
        needed = worth - program.constant - constant - relaxation.margin(constant, top)
        allowed = np.asarray(group.counts, np.int64)
        possible = values >= needed
        counts[g] = tuple(allowed[possible].tolist())
        slack = values[possible] - needed
        kept[group.span], dropped[group.span] = _decided(alpha[group.span], allowed[possible], slack)
    return Restriction(kept, dropped, tuple(counts), worth)


def _decided(alpha: FloatArray, counts: IntArray, slack: FloatArray) -> tuple[BoolArray, BoolArray]:
    """Units that must be in, and units that must be out, at every count that is left.

    Args:
        alpha: ``(width,)`` linear worth.
        counts: ``(k,)`` the counts left.
        slack: ``(k,)`` how much may be lost at each.
    """
    ordered = -np.sort(-alpha)
    width = len(alpha)
    may_be_in, may_be_out = np.zeros(width, np.bool_), np.zeros(width, np.bool_)
    for n, loss in zip(counts.tolist(), slack.tolist(), strict=True):
        # A unit comes in for the last one kept, and goes out for the first one dropped.
        if n > 0:
            may_be_in |= alpha >= ordered[n - 1] - loss
        if n < width:
            may_be_out |= alpha <= ordered[n] + loss
    return ~may_be_out, ~may_be_in
