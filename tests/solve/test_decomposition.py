"""The decomposition's bound is a bound: against exhaustive optima, for any multipliers, on every structure."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import numpy as np
import pytest

import qcqp_prune_solvers.decomposition.backend as backend_module
from qcqp_prune.errors import SolverIncapableError
from qcqp_prune.graph.links import Links
from qcqp_prune.program.program import Program
from qcqp_prune.program.tables import CountTable, Shares
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import Reason
from qcqp_prune.testing import (
    STRUCTURES,
    chain_problem,
    check_backend,
    exhaustive,
    free_residual_problem,
    random_problem,
)
from qcqp_prune_solvers.decomposition import elimination
from qcqp_prune_solvers.decomposition.backend import DecompositionBackend
from qcqp_prune_solvers.decomposition.block_cholesky import elimination_order, factorises
from qcqp_prune_solvers.decomposition.count_program import CountProgram
from qcqp_prune_solvers.decomposition.couplings import Coupling, Couplings, Lookup
from qcqp_prune_solvers.decomposition.elimination import TooWide
from qcqp_prune_solvers.decomposition.lifted import Lift, LiftedMatrix
from qcqp_prune_solvers.decomposition.link_prices import LinkRows
from qcqp_prune_solvers.decomposition.master import best_mixture
from qcqp_prune_solvers.decomposition.relaxation import Multipliers, Relaxation
from qcqp_prune_solvers.decomposition.semidefinite import (
    certified,
    cheap_diagonal,
    dominant_diagonal,
    random_vectors,
)
from tests.within import within_program


def full(matrix: LiftedMatrix, lift: Lift | None = None) -> np.ndarray:
    """``H - N 1 1^T`` entry by entry, ``N`` from its definition ``n^T N n / 2 = sum of products``."""
    dense = np.zeros((matrix.size, matrix.size))
    for (g, h), block in matrix.blocks.items():
        dense[matrix.spans[g], matrix.spans[h]] = block
        dense[matrix.spans[h], matrix.spans[g]] = block.T
    if lift is not None:
        for value, item in zip(lift.values, matrix.couplings.items, strict=True):
            sides = [np.zeros(matrix.size), np.zeros(matrix.size)]
            for side, shares in zip(sides, (item.first, item.second), strict=True):
                for g, share in shares:
                    side[matrix.spans[g]] = share
            dense -= value * (np.outer(*sides) + np.outer(*sides[::-1]))
    return dense


def random_lift(matrix: LiftedMatrix, rng: np.random.Generator) -> Lift:
    return matrix.lift(rng.normal(size=len(matrix.couplings.items)))


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
        range(3), ("chain", "residual", "ties", "self_pairs", "two_budgets", "free_sharing", "columns")
    ):
        problem = random_problem(seed, structure)
        program = Program.from_problem(problem)
        best = exhaustive(problem).objective
        start = np.zeros(program.size)
        relaxation = Relaxation(program, start, 0)
        for step in itertools.islice(relaxation.steps(lambda: False), 5):
            assert step.bound >= best
        lift = random_lift(relaxation.matrix, rng)
        weights = rng.uniform(0.1, 1.0, program.size)
        diagonal = certified(
            relaxation.matrix, lift, weights, rng.uniform(0, 0.1, program.size), lambda: False
        )
        prices = rng.uniform(0, 2, len(program.constraints))
        centre = rng.uniform(0, 1, program.size)
        assert diagonal is not None
        rows = LinkRows(program).count if len(program.links) else 0
        links = rng.uniform(0, 0.3, rows)
        assert relaxation.bound(Multipliers(lift, diagonal, centre, prices, links)).bound >= best
        at_once = dominant_diagonal(relaxation.matrix, lift, weights)
        assert relaxation.bound(Multipliers(lift, at_once, centre, prices, links)).bound >= best


def test_dominant_diagonal_makes_the_matrix_semidefinite() -> None:
    rng = np.random.default_rng(0)
    for structure in ("residual", "self_pairs", "concat"):
        program = Program.from_problem(random_problem(2, structure))
        matrix = LiftedMatrix(program)
        lift = random_lift(matrix, rng)
        diagonal = dominant_diagonal(matrix, lift, rng.uniform(0.01, 1.0, program.size))
        assert np.linalg.eigvalsh(np.diag(diagonal) - full(matrix, lift))[0] >= 0


def test_link_rows_hold_exactly_for_points_that_obey_the_links() -> None:
    rng = np.random.default_rng(0)
    for structure in ("free_sharing", "columns"):
        program = Program.from_problem(random_problem(0, structure))
        rows = LinkRows(program)
        seen = set()
        for _ in range(200):
            x = rng.random(program.size) < rng.random()
            x = program.links.closed(x) if rng.random() < 0.5 else x
            good = bool((rows.matrix @ x.astype(float) <= 0).all())
            assert good == program.links.hold(x)
            if good:
                assert (rows.count_matrix @ program.counts(x) <= rows.offset).all()
            seen.add(good)
        assert seen == {True, False}


def test_prices_of_links_close_most_of_what_ignoring_them_loses() -> None:
    program = Program.from_problem(free_residual_problem())
    options = SolveOptions(work_limit=60, gap_limit=0.0)
    bare = DecompositionBackend().solve(replace(program, links=Links.none()), options)
    priced = DecompositionBackend().solve(program, options)
    assert bare.bound is not None
    assert priced.bound is not None
    assert priced.objective is not None
    assert priced.bound - priced.objective < 0.5 * (bare.bound - priced.objective)


def test_a_time_limit_ends_the_first_steps_of_a_large_program() -> None:
    """The first cheap diagonal of this one takes several seconds; a bound is there before."""
    program = Program.from_problem(chain_problem("resnet50"))
    started = time.perf_counter()
    found = DecompositionBackend().solve(program, SolveOptions(time_limit=4.0))
    assert found.termination.reason is Reason.TIME_LIMIT
    assert found.bound is not None
    assert time.perf_counter() - started < 12.0


def test_certified_diagonal_makes_the_matrix_semidefinite() -> None:
    program = Program.from_problem(random_problem(1, "residual"))
    matrix = LiftedMatrix(program)
    lift = matrix.fitted_lift(np.ones(program.size))
    diagonal = certified(matrix, lift, np.full(program.size, 0.25), np.zeros(program.size), lambda: False)
    assert diagonal is not None
    smallest = np.linalg.eigvalsh(np.diag(diagonal) - full(matrix, lift))[0]
    assert smallest >= -1e-12 * np.abs(diagonal).max()
    # Not absurdly large either: the rise is of the order of the largest eigenvalue.
    assert diagonal.max() <= 3 * np.linalg.eigvalsh(full(matrix, lift))[-1] + 1e-6


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_diagonals_are_near_the_cheapest_where_groups_are_coupled_with_themselves(
    seed: int, lifted: bool
) -> None:
    """Weak duality: no diagonal is cheaper than what the vectors of the mixing method are worth."""
    program, rng = within_program(seed), np.random.default_rng(seed)
    matrix, weights = LiftedMatrix(program), rng.uniform(0.05, 0.25, program.size)
    lift = matrix.lift(rng.normal(0, 0.3, len(matrix.couplings.items)) * lifted)
    vectors = random_vectors(program.size, rng)
    diagonal = cheap_diagonal(matrix, lift, weights, vectors, sweeps=60, halted=lambda: False)
    proved = certified(matrix, lift, weights, diagonal, lambda: False)
    assert proved is not None
    scaled = np.sqrt(weights)[:, None] * vectors
    least = float((scaled * (full(matrix, lift) @ scaled)).sum())
    size = float(weights @ np.abs(full(matrix, lift)).sum(1))
    assert weights @ proved >= least
    assert weights @ proved - least <= 0.01 * size


def test_only_squares_worth_something_are_lifted() -> None:
    """Lifting a concave one makes the diagonal dearer; lifting a convex one is what makes it cheap."""
    for structure in ("within", "self_pairs"):
        matrix = LiftedMatrix(Program.from_problem(random_problem(0, structure)))
        values = matrix.fitted_lift(np.ones(matrix.size)).values
        squares = [
            value
            for value, item in zip(values, matrix.couplings.items, strict=True)
            if item.first == item.second and (item.first[0][0],) * 2 in matrix.blocks
        ]
        assert squares
        assert min(squares) >= 0
        assert (max(squares) > 0) == (structure == "self_pairs")


@pytest.mark.parametrize("seed", range(2))
def test_what_layers_lose_is_bounded_within_a_percent(seed: int) -> None:
    program = within_program(seed)
    found = DecompositionBackend().solve(program, SolveOptions(work_limit=120))
    assert found.objective is not None
    assert found.bound is not None
    assert found.bound - found.objective <= 0.01 * found.objective


def test_products_agree_with_the_dense_matrix() -> None:
    program = Program.from_problem(random_problem(0, "self_pairs"))
    matrix = LiftedMatrix(program)
    rng = np.random.default_rng(0)
    lift = random_lift(matrix, rng)
    x = rng.normal(size=(program.size, 3))
    np.testing.assert_allclose(matrix.times(x, lift), full(matrix, lift) @ x, rtol=1e-12)
    mask = rng.random(program.size) < 0.5
    coupling = program.objective(mask) - program.constant - program.linear[mask].sum()
    assert coupling == pytest.approx(float(mask @ full(matrix) @ mask) / 2)


def sums(rng: np.random.Generator, size: int) -> tuple[tuple[int, int], ...]:
    chosen = np.sort(rng.choice(size, size=rng.integers(1, min(size, 4) + 1), replace=False)).tolist()
    shares = [int(s) for s in rng.integers(1, 4, len(chosen))]
    common = math.gcd(*shares)
    return tuple((c, share // common) for c, share in zip(chosen, shares, strict=True))


def random_couplings(rng: np.random.Generator) -> Couplings:
    """Up to five classes, and products of sums of them: concatenations, overlaps, squares."""
    size = int(rng.integers(1, 6))
    allowed = tuple(np.sort(rng.choice(7, size=rng.integers(2, 5), replace=False)) for _ in range(size))
    found: dict[tuple[Shares, Shares], None] = {}
    for _ in range(int(rng.integers(1, 7))):
        a, b = sorted((sums(rng, size), sums(rng, size)))
        found[a, b] = None
    items = tuple(Coupling(a, b, a, b, 1) for a, b in found)
    lookups = tuple(random_lookup(rng, allowed) for _ in range(int(rng.integers(0, 5))))
    return Couplings(np.arange(size), allowed, items, {key: k for k, key in enumerate(found)}, lookups)


def random_lookup(rng: np.random.Generator, allowed: tuple[np.ndarray, ...]) -> Lookup:
    """A table of one or two sums, with few levels or with many."""
    first, second = sums(rng, len(allowed)), sums(rng, len(allowed)) if rng.random() < 0.7 else ()
    levels = []
    for shares in (first, second):
        top = sum(n * int(allowed[c][-1]) for c, n in shares)
        inner = rng.choice(top + 1, size=int(rng.integers(0, min(top, 6) + 1)), replace=False)
        levels.append(np.unique(np.append(inner, top)))
    jumps = rng.integers(0, 3, (len(levels[0]), len(levels[1])))
    table = CountTable(first, second, levels[0], levels[1], jumps.cumsum(0).cumsum(1))
    return Lookup(0, table, first, second, (1, 1))


def worth(
    couplings: Couplings, unary: list[np.ndarray], values: np.ndarray, weights: np.ndarray, n: tuple[int, ...]
) -> float:
    looked_up = sum(
        w * e.table.evaluate(np.asarray(n)) for w, e in zip(weights, couplings.lookups, strict=True)
    )
    own = looked_up + sum(
        u[int(np.flatnonzero(a == k)[0])] for u, a, k in zip(unary, couplings.allowed, n, strict=True)
    )
    return float(own + couplings.products(np.asarray(n)) @ values)


def test_count_program_equals_enumeration() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        couplings = random_couplings(rng)
        plan = CountProgram(couplings)
        unary = [rng.normal(size=len(a)) * 10 for a in couplings.allowed]
        values = rng.normal(size=len(couplings.items))
        weights = rng.normal(size=len(couplings.lookups)) * rng.integers(0, 3)

        value, counts = plan.maximise(unary, values, weights)
        choices = itertools.product(*(a.tolist() for a in couplings.allowed))
        assert value == pytest.approx(max(worth(couplings, unary, values, weights, n) for n in choices))
        assert worth(couplings, unary, values, weights, tuple(counts.tolist())) == pytest.approx(value)


def test_long_concatenations_stay_narrow() -> None:
    """DenseNet: layer l reads the sum of all before it; pairs of groups would need a table over all of them."""
    couplings, items = 12, []
    for layer in range(1, couplings):
        before = tuple((2 * k, 1) for k in range(layer))
        inner, out = ((2 * layer - 1, 1),), ((2 * layer, 1),)
        items += [(before, inner), (inner, out)]
    found = {(min(a, b), max(a, b)): None for a, b in items}
    allowed = tuple(np.arange(9) for _ in range(2 * couplings - 1))
    program = CountProgram(
        Couplings(
            np.arange(len(allowed)),
            allowed,
            tuple(Coupling(a, b, a, b, 1) for a, b in found),
            dict.fromkeys(found, 0),
        )
    )
    # Sums of at most 12 groups of 8 channels: 97 values, so tables of two of them.
    assert program.table_entries <= 40 * 97 * 97


def test_levels_keep_tables_of_wide_layers_narrow() -> None:
    """A bottleneck of 2048, 512 and 512 channels: a message over all three would have 500 million entries."""
    widths = (2048, 512, 512)
    allowed = tuple(np.arange(1, w + 1) for w in widths)
    pairs = [(((a, 1),), ((b, 1),)) for a, b in ((0, 1), (1, 2), (0, 2))]
    steps = [np.arange(9) * (w // 8) for w in widths]
    lookups = []
    for first, second in pairs:
        levels = (steps[first[0][0]], steps[second[0][0]])
        table = CountTable(first, second, *levels, np.multiply.outer(np.arange(9), np.arange(9)))
        lookups.append(Lookup(0, table, first, second, (1, 1)))
    items = tuple(Coupling(a, b, a, b, 1) for a, b in pairs)
    index = {pair: k for k, pair in enumerate(pairs)}
    program = CountProgram(Couplings(np.arange(3), allowed, items, index, tuple(lookups)))
    assert program.table_entries <= 2048 * 512 + 2048 + 1


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
    monkeypatch.setattr(elimination, "TABLE_LIMIT", 5)
    with pytest.raises(TooWide):
        CountProgram(Couplings.of(program))
    with pytest.raises(SolverIncapableError, match="coupled too densely"):
        DecompositionBackend().solve(program, SolveOptions())


def test_passes_the_backend_contract() -> None:
    check_backend(DecompositionBackend(), seeds=1, structures=tuple(STRUCTURES)[::2], work_limit=60)


@pytest.mark.slow
def test_passes_the_backend_contract_without_a_limit() -> None:
    check_backend(DecompositionBackend())
