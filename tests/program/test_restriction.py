"""Folding a restriction leaves the same objective, budgets and feasible points over what is undecided."""

from __future__ import annotations

import numpy as np
import pytest

from qcqp_prune.program.program import Program
from qcqp_prune.program.restriction import Folded, Restriction
from qcqp_prune.testing import STRUCTURES, random_problem
from qcqp_prune.testing.instances import LINKED


def random_restriction(program: Program, rng: np.random.Generator) -> Restriction:
    draw = rng.random(program.size)
    kept, dropped = draw < 0.3, draw > 0.75
    counts = tuple(tuple(n for n in g.counts if rng.random() < 0.8) for g in program.groups)
    return Restriction(kept, dropped, counts, 0.0)


@pytest.mark.parametrize("structure", [*STRUCTURES, *LINKED])
def test_folded_points_are_the_points_within_the_restriction(structure: str) -> None:
    """Every 0/1 point of a group-free enumeration: feasible in the folded program exactly if feasible and within."""
    rng = np.random.default_rng(7)
    seen = 0
    for seed in range(12):
        program = Program.from_problem(random_problem(seed, structure))
        restriction = random_restriction(program, rng)
        folded = Folded.of(program, restriction)
        if not folded.is_possible:
            continue
        for _ in range(200):
            small = rng.random(folded.program.size) < rng.random()
            x = folded.lift(small)
            inside = all(
                n in allowed
                for n, allowed in zip(program.counts(x).tolist(), restriction.counts, strict=True)
            )
            assert folded.program.is_feasible(small) == (program.is_feasible(x) and inside)
            assert folded.program.objective(small) == pytest.approx(program.objective(x), abs=1e-9)
            np.testing.assert_array_equal(folded.project(x), small)
            for mine, full in zip(folded.program.constraints, program.constraints, strict=True):
                assert mine.form.evaluate(folded.program.counts(small)) == full.form.evaluate(
                    program.counts(x)
                )
            seen += inside
    assert seen


def test_decided_units_go_where_nothing_ties_them() -> None:
    program = Program.from_problem(random_problem(0, "chain"))
    kept = np.zeros(program.size, np.bool_)
    kept[program.groups[0].span] = True
    kept[program.groups[1].start] = True
    folded = Folded.of(
        program, Restriction(kept, ~kept & False, tuple(g.counts for g in program.groups), 0.0)
    )
    assert folded.program.size == program.size - kept.sum()
    assert len(folded.program.groups) == len(program.groups) - 1
    assert folded.program.groups[0].counts == tuple(n - 1 for n in program.groups[1].counts if n >= 1)


def test_tied_and_linked_units_stay() -> None:
    tied = Program.from_problem(random_problem(0, "ties"))
    nothing = np.zeros(tied.size, np.bool_)
    every = Restriction(~nothing, nothing, tuple(g.counts for g in tied.groups), 0.0)
    left = Folded.of(tied, every).program
    assert {g.name for g in left.groups} == {
        g.name for g in tied.groups if sum(h.tie == g.tie for h in tied.groups) > 1
    }


def test_restrictions_meet() -> None:
    program = Program.from_problem(random_problem(0, "chain"))
    rng = np.random.default_rng(0)
    first, second = random_restriction(program, rng), random_restriction(program, rng)
    both = first & second
    for _ in range(200):
        x = rng.random(program.size) < rng.random()
        assert both.holds(program, x) == (first.holds(program, x) and second.holds(program, x))
    assert Restriction.none(program).holds(program, np.ones(program.size, np.bool_)) == all(
        g.width in g.counts for g in program.groups
    )
