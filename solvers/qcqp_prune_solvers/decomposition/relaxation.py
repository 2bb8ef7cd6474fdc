"""The count-lifted relaxation: bounds, hull points and prices, refined step after step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.program import Program
from qcqp_prune_solvers.decomposition.lifted import Atom, Lift, LiftedMatrix, Oracle
from qcqp_prune_solvers.decomposition.master import best_mixture
from qcqp_prune_solvers.decomposition.semidefinite import certified, cheap_diagonal, random_vectors

FIRST_SWEEPS, SWEEPS = 40, 8
MOST_ATOMS, KEPT_ATOMS = 60, 40
ORACLE_CALLS = 12
FLOORS = (0.1, 0.02)
"""First and last floor of the weights: how much the diagonal of a unit that looks decided still costs."""
SAFETY = 1e-9
"""Relative margin for rounding in the evaluation of a bound."""


@dataclass(frozen=True, eq=False)
class Multipliers:
    """All that a bound depends on; any values with a positive semidefinite matrix give a valid one.

    Attributes:
        lift: ``N``.
        diagonal: ``d``, ``(n,)``.
        centre: ``r0``, ``(n,)``.
        prices: ``(budgets,)`` for a use of the whole limit.
    """

    lift: Lift
    diagonal: FloatArray
    centre: FloatArray
    prices: FloatArray


@dataclass(frozen=True, eq=False)
class Step:
    """One call of the oracle.

    Attributes:
        bound: valid upper bound on the program's objective, with its constant.
        multipliers: what proves it.
        atom: the 0/1 point that attains the relaxed maximum; it may exceed a budget.
    """

    bound: float
    multipliers: Multipliers
    atom: Atom


class Relaxation:
    """Alternates three things: the hull of points (simplicial decomposition), the diagonal, and the lift."""

    def __init__(self, program: Program, start: FloatArray, seed: int) -> None:
        """Prepare.

        Args:
            program: to be bounded.
            start: a feasible 0/1 point, ``(n,)``; the hull starts there.
            seed: for the semidefinite vectors.

        Raises:
            TooWide: the coupling of groups is too dense for the count program.
        """
        self.program = program
        self.matrix = LiftedMatrix(program)
        self.oracle = Oracle(program, self.matrix.couplings)
        counts = program.counts(start.astype(np.bool_))
        self.atoms = [self.oracle.atom(start, counts)]
        self._vectors = random_vectors(program.size, np.random.default_rng(seed))
        self._mean = 0.3 + 0.4 * start

    def steps(self) -> Iterator[Step]:
        """Bounds without end, not monotone: the caller keeps the best and stops when it likes."""
        floor = FLOORS[0]
        weights = np.maximum(self._mean * (1 - self._mean), floor)
        lift = self.matrix.fitted_lift(weights)
        sweeps = FIRST_SWEEPS
        while True:
            diagonal = cheap_diagonal(self.matrix, lift, weights, self._vectors, sweeps=sweeps)
            diagonal = certified(self.matrix, lift, weights, diagonal)
            yield from self._hull(lift, diagonal)
            fractional = np.maximum(self._mean * (1 - self._mean), floor)
            weights = 0.7 * weights + 0.3 * fractional
            lift = self.matrix.lift(0.5 * lift.values + 0.5 * self.matrix.fitted_lift(fractional).values)
            floor, sweeps = max(0.8 * floor, FLOORS[1]), SWEEPS

    def _hull(self, lift: Lift, diagonal: FloatArray) -> Iterator[Step]:
        """Simplicial decomposition at a fixed lift and diagonal: mix the points, ask for a better one."""
        for _ in range(ORACLE_CALLS):
            value, multipliers = self._mix(lift, diagonal)
            step = self.bound(multipliers)
            yield step
            if step.bound - value <= 1e-4 * abs(value):
                return
            self.atoms.append(step.atom)

    def _mix(self, lift: Lift, diagonal: FloatArray) -> tuple[float, Multipliers]:
        """The best mixture of the points held: its value, and the multipliers that it suggests."""
        points = np.stack([a.x for a in self.atoms], 1)
        lifted = np.asarray([self.oracle.couplings.products(a.counts) @ lift.values for a in self.atoms])
        gram = points.T @ (diagonal[:, None] * points - self.matrix.times(points, lift))
        worth = (self.program.linear + diagonal / 2) @ points + lifted
        use = np.stack([a.use for a in self.atoms], 1)
        mixture, prices = best_mixture((gram + gram.T) / 2, worth, use)
        value = self.program.constant + float(worth @ mixture - mixture @ gram @ mixture / 2)
        self._mean = np.clip(points @ mixture, 0.0, 1.0)
        if len(self.atoms) > MOST_ATOMS:
            kept = np.sort(np.argsort(-mixture, kind="stable")[:KEPT_ATOMS])
            self.atoms = [self.atoms[0], *(self.atoms[k] for k in kept if k > 0)]
        return value, Multipliers(lift, diagonal, self._mean, prices)

    def bound(self, multipliers: Multipliers) -> Step:
        """Evaluate the bound that multipliers prove."""
        alpha, constant = self.linearised(multipliers)
        value, atom = self.oracle.solve(alpha, multipliers.lift, multipliers.prices)
        total = self.program.constant + constant + value
        return Step(total + self.margin(constant, value), multipliers, atom)

    def linearised(self, multipliers: Multipliers) -> tuple[FloatArray, float]:
        """Linear worth of units, ``(n,)``, and the constant that multipliers leave for the oracle."""
        d, centre = multipliers.diagonal, multipliers.centre
        product = self.matrix.times(centre, multipliers.lift)
        alpha = self.program.linear + product + d / 2 - d * centre
        constant = float(-centre @ product / 2 + (d * centre) @ centre / 2) + float(multipliers.prices.sum())
        return alpha, constant

    def margin(self, constant: float, value: float) -> float:
        """What rounding may take from a bound with these parts."""
        return SAFETY * (abs(self.program.constant) + abs(constant) + abs(value))
