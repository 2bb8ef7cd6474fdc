"""The linear models that branch and cut can be asked for by name, and what every exact backend adds to its model."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from qcqp_prune.errors import InvalidOptionError, SolverIncapableError
from qcqp_prune.program.coefficients import IntArray
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.linear_model import LinearModel, Reduction
from qcqp_prune.program.reductions.mccormick import McCormick
from qcqp_prune.program.reductions.perspective import Perspective
from qcqp_prune.program.symmetry import interchangeable
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import relative_gap

REDUCTIONS: dict[str, type[CardinalityRLT] | type[Perspective] | type[McCormick]] = {
    CardinalityRLT.name: CardinalityRLT,
    Perspective.name: Perspective,
    McCormick.name: McCormick,
}


def require_reduction(solver: str, name: str | None) -> None:
    """Raise ``InvalidOptionError`` for a name that is no reduction."""
    if name is not None and name not in REDUCTIONS:
        raise InvalidOptionError(
            f"{solver} has no reduction {name!r} here: choose from {', '.join(sorted(REDUCTIONS))}"
        )


def require_room(program: Program, reduction: Reduction) -> None:
    """Raise ``SolverIncapableError`` where a reduction of the program would not fit into memory."""
    if not reduction.accepts(program):
        raise SolverIncapableError(
            f"the {reduction.name} model of {program.size:,} units and {program.pair_count:,} products is too "
            'large: use solver="block_coordinate" or "auto"'
        )


def strengthened(program: Program, reduction: Reduction) -> LinearModel:
    """The model, with interchangeable units in order."""
    model = reduction.apply(program)
    pairs = ordered_pairs(program)
    if not len(pairs):
        return model
    row = np.repeat(np.arange(len(pairs)), 2)
    values = np.tile([1.0, -1.0], len(pairs))
    shape = (len(pairs), len(model.objective))
    rows = sp.csr_array((values, (row, pairs.ravel())), shape=shape)
    return model.with_rows(rows, np.zeros(len(pairs)), np.full(len(pairs), np.inf))


def ordered_pairs(program: Program) -> IntArray:
    """``(k, 2)`` variables ``i``, ``j`` with ``x_i >= x_j`` asked for: neighbours among interchangeable ones."""
    found = [np.stack([c[:-1], c[1:]], axis=1) for c in interchangeable(program)]
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


def lower_of(bound: float | None, known: float | None) -> float | None:
    """The lower of two upper bounds, either of which may be missing."""
    both = [b for b in (bound, known) if b is not None and np.isfinite(b)]
    return min(both, default=None)


def meets(incumbent: float | None, bound: float | None, options: SolveOptions) -> bool:
    """Whether a selection worth so much is close enough to the bound, or to the one that was known before."""
    if incumbent is None or not np.isfinite(incumbent):
        return False
    gap = relative_gap(incumbent, lower_of(bound, options.known_bound))
    return gap is not None and gap <= options.gap_limit
