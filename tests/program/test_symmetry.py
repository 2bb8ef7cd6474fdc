"""Interchangeable units: found where a swap changes nothing, ordered without loss."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcqp_prune.program.program import Program
from qcqp_prune.program.symmetry import interchangeable, ordered
from qcqp_prune.testing import STRUCTURES, random_problem
from qcqp_prune.testing.instances import LINKED


def with_twins(program: Program, group: int, units: tuple[int, ...]) -> Program:
    """The same program, with units of one group made equal to the first of them."""
    start = program.groups[group].start
    linear = program.linear.copy()
    linear[[start + u for u in units]] = linear[start + units[0]]
    pairs = []
    for pair in program.pairs:
        coef = pair.coef
        if isinstance(coef, np.ndarray):
            coef = coef.copy()
            if pair.first == pair.second == group:
                both = coef + coef.T
                for u in units[1:]:
                    both[u], both[:, u] = both[units[0]], both[:, units[0]]
                for u, v in itertools.combinations(units, 2):
                    both[u, v] = both[v, u] = 0.5
                coef = np.triu(both, 1)
            elif pair.first == group:
                coef[list(units)] = coef[units[0]]
            elif pair.second == group:
                coef[:, list(units)] = coef[:, [units[0]]]
        pairs.append(replace(pair, coef=coef))
    return replace(program, linear=linear, pairs=tuple(pairs))


def swap_changes_nothing(program: Program, i: int, j: int, rng: np.random.Generator) -> bool:
    for _ in range(60):
        x = rng.random(program.size) < 0.5
        y = x.copy()
        y[[i, j]] = x[[j, i]]
        if abs(program.objective(x) - program.objective(y)) > 1e-12 * abs(program.objective(x)):
            return False
        if program.is_feasible(x) != program.is_feasible(y):
            return False
    return True


@pytest.mark.parametrize("structure", [*STRUCTURES, *LINKED])
def test_exactly_the_pairs_whose_swap_changes_nothing(structure: str) -> None:
    rng = np.random.default_rng(3)
    for seed in range(3):
        program = with_twins(Program.from_problem(random_problem(seed, structure)), 0, (0, 1))
        classes = interchangeable(program)
        together = {(int(i), int(j)) for c in classes for i, j in itertools.combinations(c, 2)}
        linked = {*program.links.wholes.tolist(), *program.links.parts.tolist()}
        for group in program.groups:
            for i, j in itertools.combinations(range(group.start, group.start + group.width), 2):
                if not {i, j} & linked:
                    assert ((i, j) in together) == swap_changes_nothing(program, i, j, rng), (i, j)
                else:
                    assert (i, j) not in together


def test_ordering_keeps_worth_and_counts() -> None:
    rng = np.random.default_rng(0)
    program = with_twins(Program.from_problem(random_problem(1, "chain")), 1, (0, 1))
    classes = interchangeable(program)
    assert [c.tolist() for c in classes] == [[program.groups[1].start, program.groups[1].start + 1]]
    for _ in range(100):
        x = rng.random(program.size) < 0.5
        y = ordered(classes, x)
        assert program.objective(y) == pytest.approx(program.objective(x), rel=1e-12)
        np.testing.assert_array_equal(program.counts(x), program.counts(y))
        assert all((np.diff(y[c].astype(int)) <= 0).all() for c in classes)
