"""The count-lifted relaxation: bounds, hull points and prices, refined step after step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.program import Program
from qcqp_prune_solvers.decomposition.couplings import Couplings
from qcqp_prune_solvers.decomposition.lifted import Atom, Lift, LiftedMatrix, Oracle
from qcqp_prune_solvers.decomposition.link_prices import LinkPricer
from qcqp_prune_solvers.decomposition.master import best_mixture
from qcqp_prune_solvers.decomposition.semidefinite import (
    certified,
    cheap_diagonal,
    dominant_diagonal,
    random_vectors,
)

FIRST_SWEEPS, SWEEPS = 4, 8
MOST_ATOMS, KEPT_ATOMS = 60, 40
ORACLE_CALLS = 12
PRICE_STEPS = 50
"""Gradient steps on the prices of links before each call of the oracle."""
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
        link_prices: ``(rows,)`` of ``LinkRows``; empty where units are not linked.
    """

    lift: Lift
    diagonal: FloatArray
    centre: FloatArray
    prices: FloatArray
    link_prices: FloatArray


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
    """Alternates three things: the hull of points (simplicial decomposition), the diagonal, and the lift.

    Attributes:
        program: that is bounded.
        matrix, oracle: its coupling, and the count program.
        atoms: the points of the hull; the first one is within the budgets.
        has_point: whether any counts meet the budgets.
    """

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
        self._shares = np.ones(1)
        self.has_point = True
        self._pricer = LinkPricer(program) if len(program.links) else None
        self._averaged: Atom | None = None
        self._count_prices = np.zeros(0)
        self._count_scale = float(max((g.width for g in program.groups), default=1))

    def restricted(self, program: Program) -> Relaxation:
        """The same relaxation of the program with fewer counts allowed; it starts from the points that are left."""
        other = copy.copy(self)
        other.program = program
        other.oracle = Oracle(program, Couplings.of(program))
        allowed = [set(g.counts) for g in program.groups]
        other.atoms = [
            atom for atom in self.atoms if all(int(n) in a for n, a in zip(atom.counts, allowed, strict=True))
        ]
        least = other.least_atom(self._mean)
        other.has_point = bool((least.use <= 1.0).all())
        other.atoms.insert(0, least)
        other._averaged = None
        if self._pricer is not None:
            other._pricer = self._pricer.copy()
        return other

    def least_atom(self, scores: FloatArray) -> Atom:
        """The point with the least allowed counts and the units of largest score."""
        x = np.zeros(self.program.size)
        for group in self.program.groups:
            order = np.argsort(-scores[group.span], kind="stable")
            x[group.start + order[: group.counts[0]]] = 1.0
        return self.oracle.atom(x, np.asarray([g.counts[0] for g in self.program.groups], np.int64))

    def count_moments(self) -> tuple[FloatArray, FloatArray]:
        """Mean and variance of each group's count in the last mixture, ``(groups,)`` each."""
        counts = np.stack([a.counts for a in self.atoms[: len(self._shares)]], 1).astype(np.float64)
        shares = self._shares / max(float(self._shares.sum()), 1e-300)
        mean = counts @ shares
        return mean, np.asarray(np.maximum((counts * counts) @ shares - mean * mean, 0.0))

    def refined(self, multipliers: Multipliers, refits: int, halted: Callable[[], bool]) -> Iterator[Step]:
        """Steps that start from given multipliers, with so many new diagonals."""
        lift, diagonal = multipliers.lift, multipliers.diagonal
        yield from self._hull(lift, diagonal)
        for _ in range(refits):
            weights = np.maximum(self._mean * (1 - self._mean), FLOORS[1])
            lift = self.matrix.lift(0.5 * lift.values + 0.5 * self.matrix.fitted_lift(weights).values)
            diagonal = cheap_diagonal(self.matrix, lift, weights, self._vectors, sweeps=SWEEPS, halted=halted)
            proved = certified(self.matrix, lift, weights, diagonal, halted)
            if proved is None:
                return
            yield from self._hull(lift, proved)

    def steps(self, halted: Callable[[], bool]) -> Iterator[Step]:
        """Bounds without end, not monotone: the caller keeps the best and stops when it likes.

        The first ones rest on a diagonal that is there at once; the others on one that the mixing method makes cheap.

        Args:
            halted: polled inside of long computations; once it says True no further bound comes.
        """
        floor = FLOORS[0]
        weights = np.maximum(self._mean * (1 - self._mean), floor)
        lift = self.matrix.fitted_lift(weights)
        yield from self._hull(lift, dominant_diagonal(self.matrix, lift, weights))
        sweeps = FIRST_SWEEPS
        while not halted():
            diagonal = cheap_diagonal(self.matrix, lift, weights, self._vectors, sweeps=sweeps, halted=halted)
            proved = certified(self.matrix, lift, weights, diagonal, halted)
            if proved is None:
                return
            yield from self._hull(lift, proved)
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
        atoms = self.atoms if self._averaged is None else [*self.atoms, self._averaged]
        points = np.stack([a.x for a in atoms], 1)
        lifted = np.stack([a.products for a in atoms], 1)
        gram = points.T @ (diagonal[:, None] * points - self.matrix.times(points, lift))
        linear = self.program.linear + diagonal / 2
        use = np.stack([a.use for a in atoms], 1)
        if self._pricer is not None:
            linear = linear - self._pricer.charge(self._pricer.prices)
            use = np.concatenate([use, self._count_rows(atoms)])
        worth = linear @ points + lift.values @ lifted
        mixture, prices = best_mixture((gram + gram.T) / 2, worth, use)
        value = self.program.constant + float(worth @ mixture - mixture @ gram @ mixture / 2)
        self._mean = np.clip(points @ mixture, 0.0, 1.0)
        self._shares = mixture[: len(self.atoms)]
        budgets = len(self.program.constraints)
        if self._pricer is not None:
            average = Atom(
                self._mean,
                *(
                    sum(w * part for w, part in zip(mixture, parts, strict=True))
                    for parts in zip(*((a.counts, a.use, a.products) for a in atoms), strict=True)
                ),
            )
            self._agree(lift, diagonal, average, prices[budgets:])
        if len(self.atoms) > MOST_ATOMS:
            kept = np.sort(np.argsort(-mixture[: len(self.atoms)], kind="stable")[:KEPT_ATOMS])
            kept = np.concatenate([[0], kept[kept > 0]])
            self.atoms, self._shares = [self.atoms[k] for k in kept], mixture[kept]
        links = self._pricer.prices + self._count_prices if self._pricer is not None else np.zeros(0)
        return value, Multipliers(lift, diagonal, self._mean, prices[:budgets], links)

    def _count_rows(self, atoms: list[Atom]) -> FloatArray:
        """What links say about mean counts, as rows that must not exceed 1, ``(count rows, atoms)``."""
        assert self._pricer is not None
        rows = self._pricer.rows
        counts = np.stack([a.counts for a in atoms], 1).astype(np.float64)
        return np.asarray((rows.count_matrix @ counts - rows.offset[:, None]) / self._count_scale + 1.0)

    def _agree(self, lift: Lift, diagonal: FloatArray, average: Atom, count_prices: FloatArray) -> None:
        """Move the mean to where links hold at the mean counts, and price them."""
        assert self._pricer is not None
        # The duals of a mixture that can hardly obey the links are of any size; those of a good one are modest.
        most = float(np.median(diagonal))
        self._count_prices = self._pricer.spread(np.minimum(count_prices / self._count_scale, most))

        def gradient(r: FloatArray) -> FloatArray:
            return np.asarray(self.program.linear + diagonal / 2 - diagonal * r + self.matrix.times(r, lift))

        self._mean = self._pricer.solve(
            gradient, diagonal, self._mean, np.asarray(average.counts, np.float64), PRICE_STEPS
        )
        self._averaged = replace(average, x=self._mean)

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
        if self._pricer is not None:
            alpha = alpha - self._pricer.charge(multipliers.link_prices)
        constant = float(-centre @ product / 2 + (d * centre) @ centre / 2) + float(multipliers.prices.sum())
        return alpha, constant

    def margin(self, constant: float, value: float) -> float:
        """What rounding may take from a bound with these parts."""
        return SAFETY * (abs(self.program.constant) + abs(constant) + abs(value))
