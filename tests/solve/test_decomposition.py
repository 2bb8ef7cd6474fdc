"""The decomposition's bound is a bound: against exhaustive optima, for any multipliers, on every structure."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import qcqp_prune_solvers.decomposition.backend as backend_module
from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.program.program import Program
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import Reason
from qcqp_prune.testing import STRUCTURES, chain_problem, check_backend, exhaustive, random_problem
from qcqp_prune_solvers.decomposition import count_program
from qcqp_prune_solvers.decomposition.block_cholesky import elimination_order, factorises
from qcqp_prune_solvers.decomposition.backend import DecompositionBackend
from qcqp_prune_solvers.decomposition.count_program import Classes, CountProgram, TooWide
from qcqp_prune_solvers.decomposition.lifted import LiftedMatrix
from qcqp_prune_solvers.decomposition.master import best_mixture
from qcqp_prune_solvers.decomposition.relaxation import Multipliers, Relaxation
from qcqp_prune_solvers.decomposition.semidefinite import certified


def full(matrix: LiftedMatrix, lift: dict[tuple[int, int], float]) -> np.ndarray:
    """``H - N 1 1^T`` entry by entry."""
    dense = np.zeros((matrix.size, matrix.size))
    for (g, h), block in matrix.blocks.items():
        dense[matrix.spans[g], matrix.spans[h]] = block
        dense[matrix.spans[h], matrix.spans[g]] = block.T
    for g, h in {tuple(pair) for key in lift for pair in (key, key[::-1])}:
        dense[matrix.spans[g], matrix.spans[h]] -= lift[min(g, h), max(g, h)]
    return dense


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
@pytest.mark.parametrize("seed", range(4))
def test_bound_is_above_the_optimum_and_incumbent_below(structure: str, seed: int) -> None:
    problem = random_problem(seed, structure)
    program = Program.from_problem(problem)
    best = exhaustive(problem).objective
    found = DecompositionBackend().solve(program, SolveOptions(work_limit=30, seed=seed, gap_limit=0.0))
    assert found.bound is not None
    assert found.x is not None
    assert found.bound >= best - 1e-12 * abs(best)
    assert program.is_feasible(np.asarray(found.x, np.bool_))
    assert problem.objective.evaluate(program.mask(np.asarray(found.x, np.bool_))) <= best + 1e-9 * abs(best)


def test_every_step_is_a_bound_also_with_arbitrary_multipliers() -> None:
    rng = np.random.default_rng(0)
    for seed, structure in itertools.product(
        range(3), ("chain", "residual", "ties", "self_pairs", "two_budgets")
    ):
        problem = random_problem(seed, structure)
        program = Program.from_problem(problem)
        best = exhaustive(problem).objective
        start = np.zeros(program.size)
        relaxation = Relaxation(program, start, 0)
        for step in itertools.islice(relaxation.steps(), 5):
            assert step.bound >= best
        lift = {pair: float(rng.normal()) for pair in relaxation.matrix.blocks}
        weights = rng.uniform(0.1, 1.0, program.size)
        diagonal = certified(relaxation.matrix, lift, weights, rng.uniform(0, 0.1, program.size))
        prices = rng.uniform(0, 2, len(program.constraints))
        centre = rng.uniform(0, 1, program.size)
        assert relaxation.bound(Multipliers(lift, diagonal, centre, prices)).bound >= best


def test_certified_diagonal_makes_the_matrix_semidefinite() -> None:
    program = Program.from_problem(random_problem(1, "residual"))
    matrix = LiftedMatrix(program)
    lift = matrix.weighted_means(np.ones(program.size))
    diagonal = certified(matrix, lift, np.full(program.size, 0.25), np.zeros(program.size))
    smallest = np.linalg.eigvalsh(np.diag(diagonal) - full(matrix, lift))[0]
    assert smallest >= -1e-12 * np.abs(diagonal).max()
    # Not absurdly large either: the rise is of the order of the largest eigenvalue.
    assert diagonal.max() <= 3 * np.linalg.eigvalsh(full(matrix, lift))[-1] + 1e-6


def test_products_agree_with_the_dense_matrix() -> None:
    program = Program.from_problem(random_problem(0, "self_pairs"))
    matrix = LiftedMatrix(program)
    rng = np.random.default_rng(0)
    lift = {pair: float(rng.normal()) for pair in matrix.blocks} | {(0, 0): 0.7}
    x = rng.normal(size=(program.size, 3))
    np.testing.assert_allclose(matrix.times(x, lift), full(matrix, lift) @ x, rtol=1e-12)
    mask = rng.random(program.size) < 0.5
    coupling = program.objective(mask) - program.constant - program.linear[mask].sum()
    assert coupling == pytest.approx(float(mask @ full(matrix, {}) @ mask) / 2)


def test_count_program_equals_enumeration() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        size = int(rng.integers(1, 6))
        allowed = tuple(np.sort(rng.choice(9, size=rng.integers(2, 6), replace=False)) for _ in range(size))
        edges = tuple(e for e in itertools.combinations(range(size), 2) if rng.random() < 0.6)
        plan = CountProgram(Classes(np.arange(size), allowed, edges))
        unary = [rng.normal(size=len(a)) * 10 for a in allowed]
        couplings = {e: float(rng.normal()) for e in edges}

        def worth(n: tuple[int, ...]) -> float:
            own = sum(u[int(np.flatnonzero(a == k)[0])] for u, a, k in zip(unary, allowed, n, strict=True))
            return float(own) + sum(c * n[a] * n[b] for (a, b), c in couplings.items())

        value, counts = plan.maximise(unary, couplings)
        assert value == pytest.approx(
            max(worth(n) for n in itertools.product(*(a.tolist() for a in allowed)))
        )
        assert worth(tuple(counts.tolist())) == pytest.approx(value)


def test_block_factorisation_decides_definiteness() -> None:
    rng = np.random.default_rng(0)
    widths, pairs = [3, 4, 2, 5], [(0, 1), (0, 3), (1, 2), (2, 3)]
    starts = np.cumsum([0, *widths])
    spans = [slice(a, b) for a, b in itertools.pairwise(starts)]
    order = elimination_order(widths, pairs)
    assert sorted(order) == [0, 1, 2, 3]
    for _ in range(50):
        dense = np.zeros((14, 14))
        for g, h in [*pairs, *((g, g) for g in range(4))]:
            block = rng.normal(size=(widths[g], widths[h]))
            dense[spans[g], spans[h]] += block
            dense[spans[h], spans[g]] += block.T
        lowest = np.linalg.eigvalsh(dense)[0]
        for shift, definite in ((-lowest + 1e-6, True), (-lowest - 1e-6, False)):
            shifted = dense + shift * np.eye(14)
            blocks = {(g, h): shifted[spans[g], spans[h]] for g, h in [*pairs, *((g, g) for g in range(4))]}
            assert factorises(blocks, order) is definite


def test_mixture_meets_budgets_and_is_optimal() -> None:
    # Two points, one of use 2 worth 1, one of use 0 worth 0, budget 1: half of each; the budget's price is 1/2.
    mixture, prices = best_mixture(np.zeros((2, 2)), np.array([1.0, 0.0]), np.array([[2.0, 0.0]]))
    np.testing.assert_allclose(mixture, [0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(prices, [0.5], atol=1e-6)
    # Without a tight budget: max p - p^2 over p in [0, 1] is at 1/2.
    mixture, _ = best_mixture(
        np.array([[2.0, 0.0], [0.0, 0.0]]), np.array([1.0, 0.0]), np.array([[0.1, 0.1]])
    )
    np.testing.assert_allclose(mixture, [0.5, 0.5], atol=1e-6)


def test_same_seed_and_work_give_the_same_answer() -> None:
    program = Program.from_problem(chain_problem("small"))
    runs = [DecompositionBackend().solve(program, SolveOptions(work_limit=15, seed=3)) for _ in range(2)]
    assert runs[0].bound == runs[1].bound
    np.testing.assert_array_equal(runs[0].x, runs[1].x)


def test_limits_and_interruption() -> None:
    program = Program.from_problem(chain_problem("small"))
    one = DecompositionBackend().solve(program, SolveOptions(work_limit=1, gap_limit=0.0))
    assert one.termination.reason is Reason.WORK_LIMIT
    assert one.bound is not None
    assert one.objective is not None
    assert one.bound >= one.objective
    stopped = DecompositionBackend().solve(program, SolveOptions(stop=lambda: True, gap_limit=0.0))
    assert stopped.termination.reason is Reason.INTERRUPTED
    assert stopped.x is not None


def test_what_it_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program.from_problem(chain_problem("small"))
    monkeypatch.setattr(backend_module, "MOST_BYTES", 1000)
    with pytest.raises(SolverIncapableError, match="would take about"):
        DecompositionBackend().solve(program, SolveOptions())
    assert DecompositionBackend().outlook(program) is None
    monkeypatch.undo()
    monkeypatch.setattr(count_program, "TABLE_LIMIT", 5)
    with pytest.raises(TooWide):
        CountProgram(Classes.of(program))
    with pytest.raises(SolverIncapableError, match="coupled too densely"):
        DecompositionBackend().solve(program, SolveOptions())


def test_passes_the_backend_contract() -> None:
    check_backend(DecompositionBackend())
