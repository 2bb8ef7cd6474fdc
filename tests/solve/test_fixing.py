"""What the decomposition decides holds for every point that is worth as much as the selection held."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcqp_prune.program.program import Program
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem
from qcqp_prune_solvers.decomposition.backend import DecompositionBackend
from qcqp_prune_solvers.decomposition.fixing import restriction
from qcqp_prune_solvers.decomposition.relaxation import Relaxation


def every_point(program: Program) -> list[np.ndarray]:
    points = (np.asarray(bits, np.bool_) for bits in itertools.product((False, True), repeat=program.size))
    return [x for x in points if program.is_feasible(x)]


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_nothing_worth_enough_is_cut_off(structure: str) -> None:
    for seed in range(3):
        program = Program.from_problem(random_problem(seed, structure))
        if program.size > 13:
            continue
        points = every_point(program)
        worths = np.asarray([program.objective(x) for x in points])
        best = points[int(worths.argmax())]
        relaxation = Relaxation(program, best.astype(np.float64), seed)
        for k, step in enumerate(itertools.islice(relaxation.steps(lambda: False), 12)):
            # The optimum itself, and a selection that is worth a little less.
            worth = float(worths.max()) * (1.0 if k % 2 else 0.97)
            found = restriction(relaxation, step.multipliers, worth)
            for x, value in zip(points, worths.tolist(), strict=True):
                assert value < worth - 1e-12 or found.holds(program, x)


def test_marginals_are_the_maxima_with_a_count_set() -> None:
    """Against the count program with all other counts of the class forbidden."""
    program = Program.from_problem(chain_problem("tiny"))
    relaxation = Relaxation(program, np.ones(program.size), 0)
    step = next(itertools.islice(relaxation.steps(lambda: False), 5, None))
    alpha, _ = relaxation.linearised(step.multipliers)
    lift, prices = step.multipliers.lift, step.multipliers.prices
    found = relaxation.oracle.marginals(alpha, lift, prices)
    best, atom = relaxation.oracle.solve(alpha, lift, prices)
    _, constant, (unary, *others) = relaxation.oracle._weighed(alpha, lift, prices)
    for c, values in enumerate(found):
        assert values is not None
        assert values.max() == pytest.approx(best, rel=1e-12)
        for k in range(len(values)):
            only = [
                np.where(np.arange(len(u)) == k, u, -np.inf) if i == c else u for i, u in enumerate(unary)
            ]
            alone, _ = relaxation.oracle.counts.maximise(only, *others)
            assert values[k] == pytest.approx(alone + constant, rel=1e-12)
    assert np.isfinite(atom.x).all()


def test_the_backend_hands_it_over() -> None:
    problem = random_problem(1, "residual")
    program, best = Program.from_problem(problem), exhaustive(problem)
    raw = DecompositionBackend().solve(program, SolveOptions(gap_limit=0.0))
    assert raw.restriction is not None
    assert raw.restriction.worth == raw.objective
    assert raw.restriction.holds(program, best.mask[program.units])
    small = Program.from_problem(chain_problem("small"))
    decided = DecompositionBackend().solve(small, SolveOptions(gap_limit=0.0)).restriction
    assert decided is not None
    assert (decided.kept | decided.dropped).sum() > small.size // 5
    assert sum(map(len, decided.counts)) < 0.8 * sum(len(g.counts) for g in small.groups)
