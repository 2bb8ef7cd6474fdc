"""The diagonal that makes the lifted matrix concave: cheapest by the mixing method, certified by Cholesky.

For weights ``w`` the cheapest diagonal ``min w . d  s.t. diag(d) - A >= 0`` is the dual of a MaxCut-type semidefinite
program ``max <A', V V^T>, |v_i| = 1`` with ``A' = sqrt(w) A sqrt(w)``. Rows of one group are updated at once, but for
groups that are coupled with themselves: there all at once need not be an ascent.

References:
    Wang, Chang and Kolter, "The mixing method: low-rank coordinate descent for semidefinite programming with diagonal
    constraints" (arXiv 1706.00476).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import scipy.linalg

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune_solvers.decomposition.block_cholesky import Blocks, elimination_order, factorises
from qcqp_prune_solvers.decomposition.kernels import rows_in_turn
from qcqp_prune_solvers.decomposition.lifted import Lift, LiftedMatrix

RANK = 16
LANCZOS_STEPS = 60
MARGIN, MARGIN_UNITS = 6 * 2.0**-42, 1000
"""Rise of each diagonal entry, relative to it, for each unit and for so many more: six times the shift of
``qcqp_prune.certify``, which leaves room for the rounding of both factorisations."""
LEAST = 2.0**-16
"""Least diagonal entry relative to the sizes in its row: what cancels between coupling and lift leaves rounding."""


def random_vectors(size: int, rng: np.random.Generator) -> FloatArray:
    """Unit rows, ``(size, RANK)``."""
    vectors = rng.standard_normal((size, RANK))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def dominant_diagonal(matrix: LiftedMatrix, lift: Lift, weights: FloatArray) -> FloatArray:
    """A diagonal that dominates its rows, scaled by the weights: dear, but there at once and certified by itself.

    References:
        Gershgorin's theorem for ``diag(root) (diag(d) - A) diag(root)``.
    """
    root = np.sqrt(weights)
    total = np.zeros(len(weights))
    for (g, h), block in matrix.scaled_blocks(lift, root).items():
        size = np.abs(block)
        total[matrix.spans[g]] += size.sum(1)
        if g != h:
            total[matrix.spans[h]] += size.sum(0)
    margin = 1.0 + 4.0 * len(weights) * float(np.finfo(np.float64).eps)
    return _checkable(matrix, lift, margin * total / weights)


def cheap_diagonal(
    matrix: LiftedMatrix,
    lift: Lift,
    weights: FloatArray,
    vectors: FloatArray,
    *,
    sweeps: int,
    halted: Callable[[], bool],
) -> FloatArray:
    """A diagonal near the cheapest, before it is certified.

    Args:
        matrix: ``H``.
        lift: ``N``.
        weights: ``(n,)`` positive: the price of each entry of the diagonal.
        vectors: ``(n, RANK)`` unit rows, updated in place: the next call starts from them.
        sweeps: passes over all groups.
        halted: polled before each pass; fewer passes make a dearer diagonal, not a wrong one.

    Returns:
        ``(n,)``; ``diag(d) - (H - N 1 1^T)`` is positive semidefinite up to the accuracy of the method.
    """
    root = np.sqrt(weights)[:, None]
    scaled = root * vectors
    for _ in range(sweeps):
        if halted():
            break
        for group, span in enumerate(matrix.spans):
            gradient = root[span] * matrix.rows_times(group, scaled, lift)
            within = matrix.within(group, lift)
            if within is not None:
                rows_in_turn(root[span] * within * root[span].T, gradient, vectors[span])
                scaled[span] = root[span] * vectors[span]
                continue
            norm = np.linalg.norm(gradient, axis=1, keepdims=True)
            vectors[span] = np.where(norm > 0, gradient / np.where(norm > 0, norm, 1.0), vectors[span])
            scaled[span] = root[span] * vectors[span]
    lifted = matrix.diagonal(lift)
    norms = np.linalg.norm(root * (matrix.times(scaled, lift) + lifted[:, None] * scaled), axis=1)
    return np.asarray(norms / weights - lifted)


def certified(
    matrix: LiftedMatrix,
    lift: Lift,
    weights: FloatArray,
    diagonal: FloatArray,
    halted: Callable[[], bool],
) -> FloatArray | None:
    """Raise a diagonal until the Cholesky factorisation of ``diag(d) - (H - N 1 1^T)`` exists; None where halted first.

    The rise is spread so that each entry costs the same. A factorisation in floating point proves positive
    semidefiniteness up to rounding; a rise far above that is added on top, so that an independent check succeeds.

    References:
        Rump, "Verification of positive definiteness" (BIT, 2006): from a floating-point factorisation to a proof.
    """
    root = np.sqrt(weights)
    base = diagonal * weights
    blocks = matrix.scaled_blocks(lift, root)
    order = elimination_order(matrix.widths.tolist(), list(blocks))
    scale = float(np.abs(base).max()) or 1.0
    lowest = _smallest_eigenvalue(lambda v: base * v - root * matrix.times(root * v, lift), len(base), halted)
    rise = 1.2 * max(-lowest, 0.0) + 1e-12 * scale
    while not halted():
        if factorises(_shifted(matrix, blocks, base + rise), order, halted):
            break
        rise = 3.0 * rise + 1e-8 * scale
    else:
        return None
    rise += 4.0 * len(base) * float(np.finfo(np.float64).eps) * scale
    return _checkable(matrix, lift, (base + rise) / weights)


def _checkable(matrix: LiftedMatrix, lift: Lift, diagonal: FloatArray) -> FloatArray:
    """A diagonal raised until an independent check succeeds; units that are coupled with nothing get a little, too."""
    lifted = matrix.diagonal(lift)
    sizes = matrix.row_sizes(lift)
    least = LEAST * np.maximum(sizes, 1e-4 * (float(sizes.max(initial=0.0)) or 1.0))
    found = np.maximum(diagonal + lifted, least) - lifted
    return np.asarray(found + MARGIN * (len(found) + MARGIN_UNITS) * (found + lifted))


def _shifted(matrix: LiftedMatrix, blocks: Blocks, diagonal: FloatArray) -> Blocks:
    """``diag - blocks``; off-diagonal blocks are shared, their sign with them."""
    shifted = dict(blocks)
    for g, span in enumerate(matrix.spans):
        shifted[g, g] = blocks[g, g] + np.diag(diagonal[span])
    return shifted


def _smallest_eigenvalue(
    times: Callable[[FloatArray], FloatArray], size: int, halted: Callable[[], bool]
) -> float:
    """By a few steps of Lanczos: never below the true one; the factorisation decides."""
    steps = min(LANCZOS_STEPS, size)
    basis = np.zeros((steps, size))
    diagonal, beside = np.zeros(steps), np.zeros(steps)
    v = np.random.default_rng(0).standard_normal(size)
    v /= np.linalg.norm(v)
    for k in range(steps):
        if k and halted():
            steps = k
            break
        basis[k] = v
        w = times(v)
        diagonal[k] = v @ w
        # Orthogonal to all that came before: without it the small eigenvalues come out several times, none accurate.
        w -= basis[: k + 1].T @ (basis[: k + 1] @ w)
        w -= basis[: k + 1].T @ (basis[: k + 1] @ w)
        beside[k] = np.linalg.norm(w)
        if beside[k] <= 1e-14 * abs(diagonal[k]):
            steps = k + 1
            break
        v = w / beside[k]
    ritz = scipy.linalg.eigvalsh_tridiagonal(
        diagonal[:steps], beside[: steps - 1], select="i", select_range=(0, 0)
    )
    return float(ritz[0])
