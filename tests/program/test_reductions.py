"""The linear models are exact at 0/1 points, and their dual bounds are valid whatever the duals are."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from qcqp_prune.program.program import Program
from qcqp_prune.program.reductions.cardinality_rlt import CardinalityRLT
from qcqp_prune.program.reductions.counts import reachable_counts, scaled_side
from qcqp_prune.program.reductions.linear_model import LinearModel, Reduction
from qcqp_prune.program.reductions.mccormick import McCormick
from qcqp_prune.program.reductions.perspective import Perspective
from qcqp_prune.testing import STRUCTURES, exhaustive, random_problem

REDUCTIONS = [CardinalityRLT(), Perspective(), Perspective(3), McCormick()]
NAMES = ["rlt", "perspective", "perspective-3", "mccormick"]


def is_feasible(model: LinearModel, point: np.ndarray) -> bool:
    rows = model.matrix @ point
    return bool(
        (rows <= model.row_upper + 1e-9).all()
        and (rows >= model.row_lower - 1e-9).all()
        and (point <= model.upper + 1e-9).all()
        and (point >= model.lower - 1e-9).all()
    )


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=NAMES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_models_have_the_programs_feasible_set_and_values(structure: str, reduction: Reduction) -> None:
    rng = np.random.default_rng(1)
    for seed in range(3):
        program = Program.from_problem(random_problem(seed, structure))
        model = reduction.apply(program)
        for _ in range(40):
            x = rng.random(program.size) < rng.random()
            point = model.extend(x)
            assert is_feasible(model, point) == program.is_feasible(x)
            assert model.objective @ point + model.constant == pytest.approx(program.objective(x), abs=1e-9)
            assert (reduction.invert(program, point) == x).all()


@pytest.mark.parametrize("reduction", REDUCTIONS, ids=NAMES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_any_duals_prove_a_bound(structure: str, reduction: Reduction) -> None:
    rng = np.random.default_rng(2)
    problem = random_problem(5, structure)
    best = exhaustive(problem).objective
    model = reduction.apply(Program.from_problem(problem))
    for scale in (0.0, 1e-3, 0.1, 1.0):
        for _ in range(10):
            assert model.dual_bound(scale * rng.standard_normal(len(model.row_lower))) >= best - 1e-9


def test_rlt_is_at_least_as_tight_as_the_others() -> None:
    import highspy

    from qcqp_prune_solvers.highs import as_highs

    def relaxed(model: LinearModel) -> float:
        lp = as_highs(model)
        lp.integrality_ = []
        solver = highspy.Highs()
        solver.setOptionValue("output_flag", False)
        solver.passModel(lp)
        solver.run()
        return float(solver.getInfo().objective_function_value)

    for seed in range(5):
        problem = random_problem(seed, "residual")
        program = Program.from_problem(problem)
        rlt, perspective, mccormick = (
            relaxed(r.apply(program)) for r in (CardinalityRLT(), Perspective(20), McCormick())
        )
        assert rlt <= mccormick + 1e-7
        assert exhaustive(problem).objective <= rlt + 1e-7
        assert rlt <= perspective + 1e-7


def test_scaled_budget_rows_keep_every_integer_point() -> None:
    """6 a + 10 b <= 31 has the same integer points as 3 a + 5 b <= 15, by hand."""
    divisor, side = scaled_side([6, 10], 31)
    assert (divisor, side) == (2.0, 15.0)
    big_divisor, big_side = scaled_side([10**9, 10**9 + 1], 5 * 10**12)
    assert big_side <= 5 * 10**12 / big_divisor
    assert 1 / big_divisor >= 2.0**-17


def test_reachable_counts_drop_what_no_feasible_point_has() -> None:
    for structure in STRUCTURES:
        problem = random_problem(3, structure)
        program = Program.from_problem(problem)
        every = np.asarray(list(itertools.product(*(g.counts for g in program.groups))))
        feasible = every[[program.counts_feasible(point) for point in every]]
        for g, (group, counts) in enumerate(zip(program.groups, reachable_counts(program), strict=True)):
            for n in group.counts:
                assert (n in counts) == (feasible[:, g] == n).any(), (structure, g, n)


def test_size_is_refused_before_anything_is_built() -> None:
    program = Program.from_problem(random_problem(0))
    assert CardinalityRLT().accepts(program)
    assert Perspective().accepts(program)
    assert CardinalityRLT().nonzeros(program) >= CardinalityRLT().apply(program).matrix.nnz * 0.2
