"""Scores that are negative, all zero, or of absurd size; programs without variables; and what a record may claim."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from qcqp_prune.errors import BackendError, InvalidScoreError
from qcqp_prune.program.coefficients import Coefficient, LowRank
from qcqp_prune.program.forms import PairTerm, PairwiseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.linear_model import LinearModel
from qcqp_prune.program.reductions.perspective import Perspective
from qcqp_prune.solve.backend import Availability, Outlook, ProblemClass, get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution, Reason, Termination, TracePoint
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import check_backend, exhaustive, random_problem
from qcqp_prune_solvers.retry import solve_exactly

EXACT = ["scip", "highs:cardinality_rlt", "highs:perspective", "pyomo:highs"]
ALL = [*EXACT, "block_coordinate", "relaxation", "decomposition"]


def with_signs(problem: PruningProblem, seed: int | None) -> PruningProblem:
    """Every score with a random sign, or all of them negative where there is no seed."""
    rng = np.random.default_rng(seed)

    def signs(shape: tuple[int, ...]) -> np.ndarray:
        return -np.ones(shape) if seed is None else rng.choice([-1.0, 1.0], shape)

    def turned(coef: Coefficient) -> Coefficient:
        if isinstance(coef, LowRank):
            return LowRank(coef.left * signs((coef.left.shape[0], 1)), coef.right)
        return coef * signs(coef.shape) if isinstance(coef, np.ndarray) else -coef

    form = problem.objective
    pairs = tuple(PairTerm(t.rows, t.cols, turned(t.coef)) for t in form.pairs)
    return replace(
        problem, objective=PairwiseForm(form.unary * signs(form.unary.shape), pairs, form.constant)
    )


@pytest.mark.parametrize("seed", [3, None], ids=["mixed", "all negative"])
@pytest.mark.parametrize("solver", ALL)
def test_negative_scores_are_allowed_everywhere(solver: str, seed: int | None) -> None:
    for structure in ("chain", "ties", "self_pairs", "multiple_of", "factors"):
        problem = with_signs(random_problem(1, structure), seed)
        best = exhaustive(problem).objective
        slip = 1e-6 * abs(best)
        report = solve(problem, solver, time_limit=20.0)
        assert report.objective <= best + slip
        if solver in EXACT:
            assert report.termination.reason is Reason.OPTIMAL
            assert report.objective >= best - 1e-4 * abs(best) - slip
        if report.bound is not None:
            assert report.bound >= best - slip


@pytest.mark.parametrize("solver", ["auto", *ALL])
@pytest.mark.parametrize("size", [1e-95, 1e95])
def test_the_largest_and_the_smallest_scores_that_are_taken(solver: str, size: float) -> None:
    problem = random_problem(1, "chain")
    form = problem.objective
    pairs = tuple(PairTerm(t.rows, t.cols, t.coef * size) for t in form.pairs)
    problem = replace(problem, objective=PairwiseForm(form.unary * size, pairs, form.constant * size))
    best = exhaustive(problem).objective
    report = solve(problem, solver, time_limit=20.0)
    assert report.objective == pytest.approx(best, rel=1e-3, abs=0.0)
    assert report.bound is None or report.bound >= best * (1 - 1e-6)


@pytest.mark.parametrize("size", [1e-320, 1e-300, 1e200, 1e305])
def test_scores_of_absurd_size_are_refused_where_they_come_in(size: float) -> None:
    units = np.arange(2)
    for form in (
        lambda: PairwiseForm(np.asarray([size, 0.0])),
        lambda: PairwiseForm(np.zeros(2), (PairTerm(units, units, np.full((2, 2), -size)),)),
        lambda: PairwiseForm(np.zeros(2), (PairTerm(units, units, size),)),
        lambda: PairwiseForm(
            np.zeros(2), (PairTerm(units, units, LowRank(np.full((2, 1), size), np.ones((2, 1)))),)
        ),
    ):
        with pytest.raises(InvalidScoreError, match="multiply all scores by one factor"):
            form()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InvalidScoreError, match="NaN or infinity: check"):
        PairwiseForm(np.asarray([1.0, bad]))


@pytest.mark.parametrize("solver", ["auto", *EXACT, "relaxation", "decomposition"])
@pytest.mark.parametrize("worth", [0.0, -1.0])
def test_the_gap_closes_at_an_objective_of_zero(solver: str, worth: float) -> None:
    """All scores 0; and scores of -1, where the best is to keep nothing."""
    problem = random_problem(0)
    groups = tuple(replace(g, min_keep=0) for g in problem.graph.groups)
    problem = replace(
        problem,
        graph=replace(problem.graph, groups=groups),
        objective=PairwiseForm(np.full(problem.graph.unit_count, worth)),
    )
    report = solve(problem, solver)
    assert report.objective == 0.0
    assert report.termination.reason is Reason.OPTIMAL
    assert report.gap == 0.0


@pytest.mark.parametrize("solver", [*ALL, "pyomo:scip_direct"])
def test_a_program_without_variables_goes_straight_to_a_backend(solver: str) -> None:
    empty = Program((), np.zeros(0), (), (), 2.5, np.zeros(0, np.int64), 3)
    raw = get_backend(solver).solve(empty, SolveOptions())
    assert raw.termination.reason is Reason.OPTIMAL
    assert (np.shape(raw.x), raw.objective, raw.bound) == ((0,), 2.5, 2.5)


def exact_dual_value(model: LinearModel, duals: np.ndarray) -> Fraction:
    """The Lagrangian bound of a model in rational arithmetic."""
    sides, reduced = Fraction(0), [Fraction(c) for c in model.objective.tolist()]
    matrix = model.matrix.toarray()
    for i, y in enumerate(duals.tolist()):
        side = model.row_upper[i] if y > 0 else model.row_lower[i]
        if y == 0 or not np.isfinite(side):
            continue
        sides += Fraction(y) * Fraction(float(side))
        for j in np.flatnonzero(matrix[i]).tolist():
            reduced[j] -= Fraction(float(matrix[i, j])) * Fraction(y)
    box = sum(
        max(r * Fraction(low), r * Fraction(high))
        for r, low, high in zip(reduced, model.lower.tolist(), model.upper.tolist(), strict=True)
    )
    return sides + box + Fraction(model.constant)


@pytest.mark.parametrize("reduction", [CardinalityRLT(), Perspective()], ids=lambda r: r.name)
def test_a_dual_bound_is_one_in_exact_arithmetic(reduction: CardinalityRLT | Perspective) -> None:
    rng = np.random.default_rng(0)
    for structure in ("chain", "negative", "two_budgets"):
        model = reduction.apply(Program.from_problem(random_problem(2, structure)))
        for scale in (1e-12, 1.0, 1e9):
            duals = (
                scale * rng.standard_normal(len(model.row_lower)) * (rng.random(len(model.row_lower)) < 0.7)
            )
            exact = exact_dual_value(model, duals)
            bound = model.dual_bound(duals)
            assert Fraction(bound) >= exact
            # The margin is rounding, not slack: at most 1e-12 of what is added up.
            size = (
                abs(model.objective).sum()
                + abs(duals).sum() * abs(model.matrix).max() * abs(model.upper).max()
            )
            assert float(Fraction(bound) - exact) <= 1e-12 * size * len(model.objective)


class Boaster:
    """Announces more than it holds, then hands over a good answer."""

    name = "boaster"
    classes = (ProblemClass(2, 2, integral=True, convex=False),)

    def __init__(self, problem: PruningProblem) -> None:
        self.best = exhaustive(problem)

    def availability(self) -> Availability:
        return Availability(True)

    def outlook(self, program: Program) -> Outlook | None:
        return None

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        best = self.best.objective
        assert options.on_event is not None
        for k, (incumbent, bound) in enumerate(
            (
                (None, 3 * best),
                (0.5 * best, 2 * best),
                (1.7 * best, 1.9 * best),
                (best, 0.9 * best),
                (best, best),
            )
        ):
            options.on_event(TracePoint(0.1 * k, k, incumbent, bound))
        x = self.best.mask[program.units]
        return RawSolution(Termination(Reason.OPTIMAL), x=x, bound=best)


def test_rejected_claims_are_no_part_of_the_record() -> None:
    problem = random_problem(0)
    report = solve(problem, Boaster(problem))
    best = report.objective
    shares = [(p.incumbent and p.incumbent / best, p.bound and p.bound / best) for p in report.trace]
    assert shares == [(None, 3.0), (0.5, 2.0), (0.5, 1.9), (1.0, 1.9), (1.0, 1.0)]


def test_rounds_of_a_retry_share_the_work_and_only_the_first_announces_bounds() -> None:
    program = Program.from_problem(random_problem(0, "chain"))
    limits: list[int | None] = []

    def attempt(tightened: Program, options: SolveOptions) -> RawSolution:
        limits.append(options.work_limit)
        point = TracePoint(0.0, 30, None, 10.0 - len(limits))
        assert options.on_event is not None
        options.on_event(point)
        return RawSolution(
            Termination(Reason.OPTIMAL), x=np.ones(program.size, np.bool_), bound=9.0, trace=(point,)
        )

    seen: list[TracePoint] = []
    solve_exactly(program, SolveOptions(work_limit=70, on_event=seen.append), attempt)
    assert limits == [70, 40, 10, 1]
    assert [(p.work, p.bound is None) for p in seen] == [(30, False), (60, True), (90, True), (120, True)]


class AbsoluteTolerance(Boaster):
    """Takes differences below 1e-6 for nothing, as solvers do: right at usual sizes, wrong for small scores."""

    def __init__(self) -> None:
        self.inner = get_backend("highs:cardinality_rlt")

    def solve(self, program: Program, options: SolveOptions) -> RawSolution:
        largest = max(
            [0.0, *(float(np.abs(p.coef).max()) for p in program.pairs if isinstance(p.coef, np.ndarray))]
        )
        if program.size and largest < 1e-6:
            x = np.zeros(program.size, np.bool_)
            for group in program.groups:
                x[group.start : group.start + group.counts[0]] = True
            return RawSolution(Termination(Reason.OPTIMAL), x=x)
        return self.inner.solve(program, options)


def test_the_contract_catches_an_absolute_tolerance() -> None:
    with pytest.raises(BackendError, match=r"with scores times 1e-09: .* is reported as optimal"):
        check_backend(AbsoluteTolerance(), seeds=1)


def test_a_budget_that_asks_for_nothing_is_noted() -> None:
    problem = random_problem(0)
    row = replace(problem.rows[0], limit=problem.rows[0].dense + 5)
    report = solve(replace(problem, rows=(row, *problem.rows[1:])), "highs")
    assert any("asks for nothing: check the number" in note for note in report.notes)
    assert not any("asks for nothing" in note for note in solve(problem, "highs").notes)


def test_an_objective_that_is_not_one_of_this_graph() -> None:
    graph = random_problem(0).graph
    n = graph.unit_count
    one, outside, negative = np.asarray([0]), np.asarray([n]), np.asarray([-1])
    for objective, message in (
        (np.zeros(n), "is a ndarray: give the PairwiseForm"),
        (PairwiseForm(np.zeros(n + 1)), "compute the importance on this graph"),
        (PairwiseForm(np.zeros(n), (PairTerm(one, outside, 1.0),)), f"units {n} to {n}, the graph has {n}"),
        (PairwiseForm(np.zeros(n), (PairTerm(negative, one, 1.0),)), "units -1 to -1"),
    ):
        with pytest.raises(InvalidScoreError, match=message):
            PruningProblem.build(graph, objective, "50%")  # type: ignore[arg-type]
