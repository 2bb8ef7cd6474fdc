"""Branching on counts: sound wherever it stops, tighter than the root, and checked by the independent checker."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qcqp_prune as qp
from qcqp_prune.certify import Rejected, certify
from qcqp_prune.program.program import Program
from qcqp_prune.solve.certificate import Certificate
from qcqp_prune.solve.proof import Branching
from qcqp_prune.solve.result import Reason
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem
from qcqp_prune_solvers.decomposition.backend import DecompositionBackend
from qcqp_prune_solvers.decomposition.branching import Tree
from qcqp_prune_solvers.decomposition.relaxation import Relaxation


def tree_of(program: Program, x: np.ndarray, steps: int) -> tuple[Tree, list[float]]:
    relaxation = Relaxation(program, x.astype(float), 0)
    root = min(
        (s for s, _ in zip(relaxation.steps(lambda: False), range(8), strict=False)), key=lambda s: s.bound
    )
    tree, bounds = Tree(relaxation, root), [root.bound]
    for progress, _ in zip(tree.steps(lambda: -1e6, lambda: False), range(steps), strict=False):
        bounds.append(progress.bound)
    return tree, bounds


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_the_tree_is_a_bound_wherever_it_is_left(structure: str) -> None:
    problem = random_problem(5, structure)
    program, best = Program.from_problem(problem), exhaustive(problem)
    for steps in (1, 3, 10, 60):
        tree, bounds = tree_of(program, best.mask[program.units], steps)
        assert min(*bounds, tree.bound, tree.root.proof().bound) >= best.objective - 1e-12
        assert all(later <= earlier for earlier, later in itertools.pairwise(bounds))
        assert tree.root.proof().bound == tree.bound


def test_branching_closes_a_small_chain_that_the_root_leaves_open() -> None:
    problem = chain_problem("tiny")
    report = qp.solve(problem, "decomposition", options=qp.SolveOptions(work_limit=2000, gap_limit=1e-6))
    assert report.termination.reason is Reason.OPTIMAL
    root = next(point for point in report.trace if point.work >= 24)
    assert root.bound is not None
    assert root.bound > 1.01 * report.objective
    assert report.objective == pytest.approx(qp.solve(problem, "highs", gap_limit=0.0).objective, rel=1e-6)


@pytest.mark.parametrize("structure", ["chain", "residual", "ties", "two_budgets", "columns"])
def test_the_checker_accepts_the_tree_and_no_other_cut(tmp_path: Path, structure: str) -> None:
    problem = random_problem(6, structure)
    program, best = Program.from_problem(problem), exhaustive(problem)
    x = best.mask[program.units]
    tree, _ = tree_of(program, x, 90)
    proof = tree.root.proof()
    assert isinstance(proof, Branching)
    assert proof.bound <= tree.root.step.bound
    path = tmp_path / "c.json"
    Certificate(problem, x, best.objective, proof.bound, proof).write(path)
    assert best.objective <= certify(path).bound <= proof.bound
    swapped = replace(proof, low=proof.high, high=proof.low)
    Certificate(problem, x, best.objective, best.objective - 1e-3, swapped).write(path)
    with pytest.raises(Rejected):
        certify(path)


def test_a_case_without_a_point_is_priced_out() -> None:
    """The wider half of the counts exceeds the budget at once: its bound must fall below any selection's worth."""
    problem = random_problem(0, "chain")
    program = Program.from_problem(problem)
    least = np.asarray([g.counts[0] for g in program.groups])
    use = program.constraints[0].form.evaluate(least)
    tight = replace(program, constraints=(replace(program.constraints[0], limit=use),))
    found = DecompositionBackend().solve(tight, qp.SolveOptions(work_limit=4000, gap_limit=1e-9))
    assert found.bound is not None
    assert found.objective is not None
    assert found.bound >= found.objective - 1e-12
    x = np.asarray(found.x, np.bool_)
    assert np.array_equal(tight.counts(x), least)
