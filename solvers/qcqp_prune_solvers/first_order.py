"""A first-order method for the linear relaxation that gives a valid bound at any moment. NumPy and SciPy only.

Interior-point and simplex codes give nothing before they end; here each iterate's duals prove a bound, so a limit or
Ctrl-C costs tightness, never validity. The iterates live in single precision, which is twice as fast; bounds are
computed from them in double precision on the unscaled model, and are valid whatever the iterates' errors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.reductions.linear_model import LinearModel

Single = npt.NDArray[np.float32]

RUIZ_ROUNDS, POWER_ROUNDS = 10, 40
# Restart tests of the reference: enough decay; some decay and no progress; too long since the last one.
ENOUGH, SOME, TOO_LONG = np.float32(0.2), np.float32(0.8), 0.36
TEST_EVERY, BOUND_EVERY, MOST = 20, 100, 100_000
# Converged once the fixed-point residual has fallen by this factor, or the bound has stalled.
RESIDUAL = 3e-6
STALLED, STALL_SHARE, LEAST_STALL = 1e-5, 0.3, 2000


@dataclass(frozen=True, eq=False)
class Relaxed:
    """What is known of a relaxation.

    Attributes:
        bound: best upper bound proved, with the model's constant.
        point: ``(columns,)`` the last primal iterate, nearly feasible.
        iterations: done.
        converged: whether the method ended by itself.
    """

    bound: float
    point: FloatArray
    iterations: int
    converged: bool


Listener = Callable[[int, float], bool]
"""Called with iterations and best bound; True stops the method."""


def relax(model: LinearModel, listener: Listener, *, limit: int | None = None) -> Relaxed:
    """Bound ``max objective . v + constant`` over the relaxation by restarted Halpern iterations.

    With ``T`` one primal-dual step, ``z_{k+1} = (k+1)/(k+2) (2 T(z_k) - z_k) + 1/(k+2) z_0``, restarted from ``T(z_k)``
    when the fixed-point residual has decayed; the primal weight is rebalanced at restarts.

    Args:
        model: the relaxation; integrality is ignored.
        listener: polled every 20 iterations.
        limit: most iterations.

    References:
        Chambolle and Pock, "A first-order primal-dual algorithm" (2011); Applegate et al., "Practical large-scale
        linear programming using primal-dual hybrid gradient" (2021), sections 3.3 and 3.4 for restarts and weights;
        Lu and Yang, "Restarted Halpern PDHG for linear programming" (2024), eq. 7, for the reflected iteration.
    """
    method = _Method(_Scaled.of(model), model)
    most = MOST if limit is None else min(limit, MOST)
    while method.done < most:
        method.step()
        if method.done % TEST_EVERY == 0 and listener(method.done, method.best):
            break
        if method.converged:
            break
    method.prove()
    return Relaxed(method.best, method.point(), method.done, method.converged)


@dataclass(frozen=True, eq=False)
class _Scaled:
    """The relaxation as ``min cost . x``, equilibrated: rows and columns of norm near 1, sides and costs near 1."""

    matrix: sp.csr_array
    transposed: sp.csr_array
    cost: Single
    lower: Single
    upper: Single
    row_lower: Single
    row_upper: Single
    dual_scale: FloatArray
    primal_scale: FloatArray
    step: np.float32

    @classmethod
    def of(cls, model: LinearModel) -> _Scaled:
        rows, cols = _equilibrate(model.matrix)
        scaled = (sp.diags_array(rows) @ model.matrix @ sp.diags_array(cols)).tocsr()
        cost = -model.objective * cols
        low, high = model.row_lower * rows, model.row_upper * rows
        finite = [np.where(np.isfinite(side), np.abs(side), 0.0) for side in (low, high)]
        side = 1.0 / (1.0 + float(np.linalg.norm(np.maximum(*finite))))
        price = 1.0 / (1.0 + float(np.linalg.norm(cost)))
        matrix = scaled.astype(np.float32)
        transposed = matrix.T.tocsr()
        return cls(
            matrix,
            transposed,
            _single(cost * price),
            _single(model.lower / cols * side),
            _single(model.upper / cols * side),
            _single(low * side),
            _single(high * side),
            rows / price,
            cols / side,
            np.float32(0.998 / _norm(matrix, transposed)),
        )


class _Method:
    """The iteration. Products of the iterates with the matrix are carried along, because they are linear in them."""

    def __init__(self, scaled: _Scaled, model: LinearModel) -> None:
        self.scaled, self.model = scaled, model
        self.weight = np.float32(1.0)
        self.done = 0
        self.best = model.dual_bound(np.zeros(len(model.row_lower)))
        self.converged = False
        self._proofs: list[tuple[int, float]] = []
        self._first_residual = np.float32(0.0)
        zero = np.zeros(len(scaled.cost), np.float32)
        x = np.clip(zero, scaled.lower, scaled.upper)
        y = np.zeros(len(scaled.row_lower), np.float32)
        self._start(_Point(x, y, scaled.matrix @ x, scaled.transposed @ y))

    def _start(self, point: _Point) -> None:
        """Restart from a point."""
        self.anchor = self.current = self.target = point
        self._age = 0
        self._residual0 = self._last = np.float32(np.inf)

    def step(self) -> None:
        """One iteration, with the tests that are due."""
        self.target = self._primal_dual(self.current)
        if (self._age % TEST_EVERY == 0 and self._is_due()) or not np.isfinite(self._last):
            self._restart()
        else:
            self.current = _halpern(self._age, self.current, self.target, self.anchor)
            self._age += 1
        self.done += 1
        if self.done % BOUND_EVERY == 0:
            self.prove()

    def _primal_dual(self, z: _Point) -> _Point:
        s = self.scaled
        tau, sigma = s.step / self.weight, s.step * self.weight
        x = np.clip(z.x - tau * (s.cost + z.aty), s.lower, s.upper)
        ax = s.matrix @ x
        y = z.y + sigma * (2 * ax - z.ax)
        y -= sigma * np.clip(y / sigma, s.row_lower, s.row_upper)
        return _Point(x, y, ax, s.transposed @ y)

    def _is_due(self) -> bool:
        """Whether the fixed-point residual calls for a restart."""
        dx, dy = self.target.x - self.current.x, self.target.y - self.current.y
        step, weight = self.scaled.step, self.weight
        square = (
            weight / step * (dx @ dx)
            - 2 * (dy @ (self.target.ax - self.current.ax))
            + dy @ dy / (step * weight)
        )
        residual = np.float32(np.sqrt(max(float(square), 0.0)))
        if self._age == 0:
            self._residual0 = self._last = residual
            self._first_residual = max(self._first_residual, residual)
            return False
        if residual <= RESIDUAL * self._first_residual:
            self.converged = True
        due = residual <= ENOUGH * self._residual0 or (
            residual <= SOME * self._residual0 and residual > self._last
        )
        self._last = residual
        return bool(due) or (self._age >= TOO_LONG * self.done and self._age >= 500)

    def _restart(self) -> None:
        dx = float(np.linalg.norm(self.target.x - self.anchor.x))
        dy = float(np.linalg.norm(self.target.y - self.anchor.y))
        if dx > 1e-10 and dy > 1e-10:
            self.weight = np.float32(np.sqrt(dy / dx * float(self.weight)))
        self._start(self.target)

    def prove(self) -> None:
        """Turn the duals at hand into a bound."""
        bound = self.model.dual_bound(self.target.y.astype(np.float64) * self.scaled.dual_scale)
        self.best = min(self.best, bound)
        self._proofs.append((self.done, self.best))
        since = max(LEAST_STALL, int(STALL_SHARE * self.done))
        earlier = [b for k, b in self._proofs if k <= self.done - since]
        if earlier and earlier[-1] - self.best <= STALLED * abs(self.best):
            self.converged = True

    def point(self) -> FloatArray:
        """The primal iterate in the model's own scale."""
        return self.target.x.astype(np.float64) * self.scaled.primal_scale


@dataclass(frozen=True, eq=False)
class _Point:
    """Primal and dual iterate with ``A x`` and ``A^T y``."""

    x: Single
    y: Single
    ax: Single = field(repr=False)
    aty: Single = field(repr=False)


def _halpern(age: int, now: _Point, target: _Point, anchor: _Point) -> _Point:
    a = np.float32((age + 1) / (age + 2))
    twice, back, rest = 2 * a, a, 1 - a

    def mix(t: Single, z: Single, z0: Single) -> Single:
        out = twice * t
        out -= back * z
        out += rest * z0
        return out

    return _Point(
        mix(target.x, now.x, anchor.x),
        mix(target.y, now.y, anchor.y),
        mix(target.ax, now.ax, anchor.ax),
        mix(target.aty, now.aty, anchor.aty),
    )


def _equilibrate(matrix: sp.csr_array) -> tuple[FloatArray, FloatArray]:
    """Row and column factors: Ruiz rounds for the largest entries, then one round for the sums."""
    size = abs(matrix).tocsr()
    by_column = size.tocsc()
    rows, cols = np.ones(matrix.shape[0]), np.ones(matrix.shape[1])
    row_of = np.repeat(np.arange(matrix.shape[0]), np.diff(size.indptr))
    col_of = np.repeat(np.arange(matrix.shape[1]), np.diff(by_column.indptr))
    for k in range(RUIZ_ROUNDS + 1):
        combine = np.maximum if k < RUIZ_ROUNDS else np.add
        high, wide = np.zeros_like(rows), np.zeros_like(cols)
        combine.at(high, row_of, size.data * rows[row_of] * cols[size.indices])
        combine.at(wide, col_of, by_column.data * rows[by_column.indices] * cols[col_of])
        rows /= np.sqrt(np.where(high > 0, high, 1.0))
        cols /= np.sqrt(np.where(wide > 0, wide, 1.0))
    return rows, cols


def _norm(matrix: sp.csr_array, transposed: sp.csr_array) -> float:
    """Largest singular value, by power iterations from a fixed start."""
    v = np.random.default_rng(0).standard_normal(matrix.shape[1]).astype(np.float32)
    size = 1.0
    for _ in range(POWER_ROUNDS):
        v = v / np.float32(np.linalg.norm(v))
        v = transposed @ (matrix @ v)
        size = float(np.sqrt(np.linalg.norm(v)))
    return max(size, 1e-12)


def _single(values: FloatArray) -> Single:
    return np.asarray(values, dtype=np.float32)
