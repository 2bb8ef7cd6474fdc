"""From the relaxation's multipliers to what the library and the independent checker understand."""

from __future__ import annotations

import numpy as np

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.solve.proof import Proof, Tangent
from qcqp_prune_solvers.decomposition.block_cholesky import elimination_order
from qcqp_prune_solvers.decomposition.relaxation import Relaxation, Step


def unit_prices(relaxation: Relaxation, step: Step) -> FloatArray:
    """Worth of one unit of each budget's resource, ``(budgets,)``; the relaxation prices whole limits."""
    return np.asarray(step.multipliers.prices / relaxation.oracle.limits)


def tangent_of(relaxation: Relaxation, step: Step) -> Tangent:
    """The step's bound as a function of the limits."""
    prices: dict[str, float] = {}
    for constraint, price in zip(
        relaxation.program.constraints, unit_prices(relaxation, step).tolist(), strict=True
    ):
        # A use that is a maximum has several constraints with one limit.
        prices[constraint.name] = prices.get(constraint.name, 0.0) + price
    return Tangent(step.bound, prices)


def proof_of(relaxation: Relaxation, step: Step) -> Proof:
    """What proves a step's bound, with the orders of elimination that make it quick to check."""
    m, matrix, counts = step.multipliers, relaxation.matrix, relaxation.oracle.counts
    items = zip(m.lift.values.tolist(), matrix.couplings.items, strict=True)
    return Proof(
        bound=step.bound,
        lift=tuple((value, item.first, item.second) for value, item in items),
        diagonal=m.diagonal,
        centre=m.centre,
        prices=unit_prices(relaxation, step),
        link_prices=m.link_prices if len(relaxation.program.links) else None,
        hints={
            "groups": elimination_order(matrix.widths.tolist(), [*matrix.blocks, *m.lift.entries]),
            "sums": counts.definitions,
            "counts": counts.order,
        },
    )
