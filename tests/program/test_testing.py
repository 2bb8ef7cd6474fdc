"""``exhaustive`` against hand-computed optima, and the program against the problem it was made from."""

from __future__ import annotations

import numpy as np
import pytest

from qcqp_prune.errors import InfeasibleError, SolverIncapableError
from qcqp_prune.graph.channels import ChannelGraph, Group
from qcqp_prune.program.forms import CountFormBuilder, PairTerm, PairwiseForm
from qcqp_prune.program.problem import BudgetRow, PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem


def two_layers(limit: int) -> PruningProblem:
    """Groups a (2 units) and b (2 units); worth [[5, 1], [2, 3]] of pairs; cost n_a n_b."""
    groups = (Group("a", 2), Group("b", 2))
    graph = ChannelGraph("hand", groups, (), (), (), (), 1)
    term = PairTerm(np.asarray([0, 1]), np.asarray([2, 3]), np.asarray([[5.0, 1.0], [2.0, 3.0]]))
    builder = CountFormBuilder(2)
    builder.add_product(1, {0: 1}, {1: 1})
    return PruningProblem(
        graph, PairwiseForm(np.zeros(4), (term,)), (BudgetRow("macs", "MAC", builder.build(), 4, 1, limit),)
    )


@pytest.mark.parametrize(
    ("limit", "value", "kept"),
    [
        (1, 5.0, [True, False, True, False]),
        # Two pairs: row a0 gives 5 + 1, row a1 gives 2 + 3, column b0 gives 5 + 2, column b1 gives 1 + 3.
        (2, 7.0, [True, True, True, False]),
        (3, 7.0, [True, True, True, False]),
        (4, 11.0, [True, True, True, True]),
    ],
)
def test_hand_computed_optima(limit: int, value: float, kept: list[bool]) -> None:
    optimum = exhaustive(two_layers(limit))
    assert optimum.objective == value
    assert optimum.mask.tolist() == kept


def test_infeasible_and_too_large() -> None:
    with pytest.raises(InfeasibleError, match="raise a budget"):
        exhaustive(two_layers(0))
    with pytest.raises(SolverIncapableError, match=r"2\^28 masks"):
        exhaustive(chain_problem("tiny"))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_program_has_the_problems_values(structure: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        problem = random_problem(seed, structure)
        program = Program.from_problem(problem)
        for _ in range(20):
            x = rng.random(program.size) < 0.5
            mask = program.mask(x)
            assert program.objective(x) == pytest.approx(problem.objective.evaluate(mask), abs=1e-9)
            used = problem.usage(mask)
            for row in problem.budgeted:
                steps = [
                    c.form.evaluate(program.counts(x)) for c in program.constraints if c.name == row.resource
                ]
                if len(row.form.parts) == 1:
                    assert steps == [used[row.resource]]
                elif used[row.resource] > row.limit:
                    assert max(steps) == used[row.resource]
                else:  # steps that can never exceed the budget are left out
                    assert max(steps) <= row.limit
            listed = program.constant + program.linear @ x
            listed += sum(c for i, j, c in program.entries() if x[i] and x[j])
            assert listed == pytest.approx(program.objective(x), abs=1e-9)
            k = int(rng.integers(program.size))
            on, off = x.copy(), x.copy()
            on[k], off[k] = True, False
            gain = program.objective(on) - program.objective(off)
            assert program.gradient(off.astype(float))[k] == pytest.approx(gain, abs=1e-9)


def test_same_seed_same_problem() -> None:
    first, second = (random_problem(7, "ties") for _ in range(2))
    assert first.graph.fingerprint == second.graph.fingerprint
    assert exhaustive(first).objective == exhaustive(second).objective
