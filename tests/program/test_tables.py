"""Costs that are looked up and uses that are maxima, by hand and against evaluation after every rewriting."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from qcqp_prune.errors import InvalidBudgetError, SolverIncapableError
from qcqp_prune.program.forms import CountForm, CountFormBuilder, PeakForm, use_form_from_json
from qcqp_prune.program.program import Program
from qcqp_prune.program.relaxed import relaxed_use
from qcqp_prune.program.tables import steps_of
from qcqp_prune.solve.backend import Availability, ProblemClass
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import RawSolution
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import exhaustive, random_problem
from qcqp_prune.testing.instances import Sketch


def looked_up(*sides: dict[int, int], levels: list[list[int]], values: object, groups: int = 2) -> CountForm:
    builder = CountFormBuilder(groups)
    builder.add_table(values, sides, levels)
    return builder.build()


def test_between_two_levels_the_larger_one_counts() -> None:
    form = looked_up({0: 1}, {1: 1}, levels=[[2, 5], [3, 4]], values=[[1, 10], [100, 1000]])
    by_hand = {(0, 0): 1, (2, 3): 1, (3, 3): 100, (2, 4): 10, (5, 4): 1000}
    assert {n: form.evaluate(n) for n in by_hand} == by_hand
    with pytest.raises(InvalidBudgetError, match="ends at 5 and 6 can be kept: extend"):
        form.evaluate([6, 0])


def test_a_staircase_is_the_ceiling() -> None:
    levels = [steps_of(3, 7), steps_of(2, 5)]
    values = 11 * np.multiply.outer(np.arange(len(levels[0])), np.arange(len(levels[1])))
    form = looked_up({0: 1}, {1: 1}, levels=levels, values=values)
    for a, b in itertools.product(range(8), range(6)):
        assert form.evaluate([a, b]) == 11 * -(-a // 3) * -(-b // 2)
    # The last step ends where the counts do, so that the whole costs the same read between levels.
    assert relaxed_use(form, [7, 5])[0] == form.evaluate([7, 5])


@pytest.mark.parametrize(
    ("values", "levels", "problem"),
    [
        ([[1, 2]], [[3], [1, 2, 3]], "1 x 3 levels"),
        ([[1], [2]], [[3, 3], [1]], "do not ascend"),
        ([[-1]], [[3], [1]], "negative value"),
        ([[3], [2]], [[1, 2], [1]], "falls where more is kept"),
        ([[3, 2]], [[1], [1, 2]], "falls where more is kept"),
    ],
)
def test_what_is_no_table_is_refused(values: object, levels: list[list[int]], problem: str) -> None:
    with pytest.raises(InvalidBudgetError, match=problem):
        looked_up({0: 1}, {1: 1}, levels=levels, values=values)


def test_canonical_tables_cost_the_same() -> None:
    """Common factors, equal neighbours, empty sides, equal sums in either order: nothing changes a value."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        sketch = Sketch(rng)
        for _ in range(3):
            sketch.group(int(rng.integers(2, 5)))
        for _ in range(4):
            sides = [
                {
                    int(g): int(rng.choice([1, 2, 4]))
                    for g in rng.choice(3, size=rng.integers(1, 3), replace=False)
                }
                for _ in range(int(rng.integers(1, 3)))
            ]
            sketch.table(*sides)
        builder = CountFormBuilder(3)
        for values, sides, levels in sketch.tables:
            builder.add_table(values, sides, levels)
            if len(sides) == 2:
                builder.add_table(values.T, sides[::-1], levels[::-1])
        form = builder.build()
        again = use_form_from_json(json.loads(json.dumps(form.to_json())))
        keys = [(t.first, t.second) for t in form.tables]
        assert len(set(keys)) == len(keys)
        for counts in itertools.product(*(range(g.width + 1) for g in sketch.groups)):
            expected = 0
            for values, sides, levels in sketch.tables:
                place = tuple(
                    next(
                        k for k, top in enumerate(part) if top >= sum(n * counts[g] for g, n in side.items())
                    )
                    for side, part in zip(sides, levels, strict=True)
                )
                expected += int(values[place]) * len(sides)
            assert form.evaluate(counts) == again.evaluate(counts) == expected


def test_steps_below_another_are_dropped_and_the_maximum_stays() -> None:
    def step(constant: int, linear: list[int]) -> CountForm:
        return CountForm(constant, np.asarray(linear, np.int64))

    peak = PeakForm.of([step(0, [1, 2]), step(5, [3, 0]), step(0, [1, 1]), step(6, [3, 0])])
    assert [p.constant for p in peak.parts] == [0, 6]
    assert [peak.evaluate(n) for n in ([0, 0], [1, 1], [0, 4])] == [6, 9, 8]
    again = use_form_from_json(json.loads(json.dumps(peak.to_json())))
    assert again.evaluate([0, 4]) == 8
    with pytest.raises(InvalidBudgetError, match="at least one"):
        PeakForm.of([])


def test_steps_that_cannot_exceed_the_budget_are_no_constraints() -> None:
    problem = random_problem(0, "peaks")
    (row,) = (r for r in problem.budgeted if len(r.form.parts) > 1)
    widths = [g.width for g in problem.graph.groups]
    binding = [p.evaluate(widths) for p in row.form.parts if p.evaluate(widths) > row.limit]
    constraints = [c for c in Program.from_problem(problem).constraints if c.name == row.resource]
    assert sorted(c.form.evaluate(widths) for c in constraints) == sorted(binding)
    assert 0 < len(binding) < len(row.form.parts)


@pytest.mark.parametrize("structure", ["tables", "staircases", "peaks"])
@pytest.mark.parametrize(
    "solver", ["scip", "highs:cardinality_rlt", "highs:perspective", "pyomo:scip_direct"]
)
def test_exact_solvers_find_the_optimum(solver: str, structure: str) -> None:
    for seed in range(10, 13):
        problem = random_problem(seed, structure)
        report = solve(problem, solver, gap_limit=0.0)
        assert report.objective == pytest.approx(exhaustive(problem).objective, rel=1e-7)


def test_a_table_is_stored_by_its_levels() -> None:
    levels = [steps_of(64, 2048), steps_of(64, 2048)]
    values = np.multiply.outer(np.arange(33), np.arange(33))
    (table,) = looked_up({0: 1}, {1: 1}, levels=levels, values=values).tables
    assert table.values.size == 33 * 33


def test_a_solver_that_takes_no_tables_is_told_apart() -> None:
    class Plain:
        name = "plain"
        classes = (ProblemClass(2, 2),)

        def availability(self) -> Availability:
            return Availability(True)

        def outlook(self, program: Program) -> None:
            return None

        def solve(self, program: Program, options: SolveOptions) -> RawSolution:
            raise AssertionError("it must not be asked")

    with pytest.raises(SolverIncapableError, match="with tables"):
        solve(random_problem(0, "tables"), Plain())
