"""The search on programs with links: the strict restriction, steps with what they bring along, patterns."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import qcqp_prune as qp
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.testing import exhaustive, random_problem
from qcqp_prune.testing.instances import LINKED, Sketch
from qcqp_prune_solvers.search.linked import LinkedState, fill
from qcqp_prune_solvers.search.merged import merged


@pytest.mark.parametrize("structure", LINKED)
@pytest.mark.parametrize("seed", range(5))
def test_points_of_the_strict_restriction_are_worth_and_cost_the_same(structure: str, seed: int) -> None:
    program, rng = Program.from_problem(random_problem(seed, structure)), np.random.default_rng(seed)
    small = merged(program)
    assert small is not None
    for _ in range(30):
        y = rng.random(small.program.size) < 0.6
        x = small.expanded(y)
        assert program.links.hold(x)
        assert program.objective(x) == pytest.approx(small.program.objective(y))
        for full, part in zip(program.constraints, small.program.constraints, strict=True):
            assert full.form.evaluate(program.counts(x)) == part.form.evaluate(small.program.counts(y))
        if small.program.is_feasible(y):
            assert program.is_feasible(x)


@pytest.mark.parametrize("structure", LINKED)
def test_moves_keep_value_gradient_and_links_exact(structure: str) -> None:
    program, rng = Program.from_problem(random_problem(3, structure)), np.random.default_rng(0)
    state = LinkedState(program, np.ones(program.size, np.bool_))
    for _ in range(50):
        state.go_to(rng.random(program.size) < 0.5)
        assert program.links.hold(state.x)
        assert state.value == pytest.approx(program.objective(state.x))
        np.testing.assert_allclose(state.gradient, program.gradient(state.x.astype(float)), atol=1e-12)
        assert np.array_equal(state.counts, program.counts(state.x))


@pytest.mark.parametrize("structure", LINKED)
@pytest.mark.parametrize("on", [True, False])
def test_a_step_is_charged_with_all_that_it_brings_along(structure: str, on: bool) -> None:
    """Counts are additive, so the predicted use of a step is exact where no two switched groups share a product."""
    program, rng = Program.from_problem(random_problem(1, structure)), np.random.default_rng(1)
    state = LinkedState(program, np.ones(program.size, np.bool_))
    checked = 0
    for _ in range(30):
        state.reset(rng.random(program.size) < 0.6)
        weights = rng.normal(size=program.size)
        brought = state.cascades(weights, on=on)
        for unit in np.flatnonzero(state.leaf & (state.x != on)).tolist():
            x = state.x.copy()
            x[unit] = on
            changed = program.links.closed(x) != state.x
            assert brought[unit] == pytest.approx(weights[changed].sum())
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("structure", LINKED)
def test_patterns_are_the_best_of_all_that_obey_the_links(structure: str) -> None:
    program, rng = Program.from_problem(random_problem(2, structure)), np.random.default_rng(2)
    state = LinkedState(program, np.ones(program.size, np.bool_))
    leaves = np.flatnonzero(state.leaf)
    linked = np.unique(np.concatenate([program.links.wholes, program.links.parts]))
    for _ in range(10):
        worth = np.zeros(program.size)
        worth[linked] = rng.normal(size=len(linked))
        best = -np.inf
        free = [u for u in leaves.tolist() if u in linked]
        for bits in itertools.product([False, True], repeat=len(free)):
            x = np.zeros(program.size, np.bool_)
            x[free] = bits
            best = max(best, float(worth[program.links.closed(x)].sum()))
        assert float(worth[state.pattern(worth)].sum()) == pytest.approx(best)


@pytest.mark.parametrize("structure", LINKED)
def test_search_comes_near_the_optimum(structure: str) -> None:
    losses = []
    for seed in range(12):
        problem = random_problem(seed, structure)
        best = exhaustive(problem).objective
        found = qp.solve(problem, "block_coordinate").objective
        assert found <= best + 1e-9 * abs(best)
        losses.append((best - found) / abs(best))
    assert np.mean(losses) < 0.01


@pytest.mark.parametrize("structure", LINKED)
@pytest.mark.parametrize("work", [1, 40, None])
def test_no_unit_that_loses_nothing_fits_any_more(structure: str, work: int | None) -> None:
    for seed in range(4):
        program = Program.from_problem(random_problem(seed, structure))
        raw = get_backend("block_coordinate").solve(program, SolveOptions(work_limit=work))
        assert raw.x is not None
        x = np.asarray(raw.x, np.bool_)
        assert program.is_feasible(x)
        leaves = np.setdiff1d(np.arange(program.size), program.links.wholes)
        for unit in leaves[~x[leaves]].tolist():
            more = x.copy()
            more[unit] = True
            more = program.links.closed(more)
            assert not program.is_feasible(more) or program.objective(more) < program.objective(x)


def test_steps_that_cost_nothing_alone_and_too_much_together_end() -> None:
    """With both inputs of a product empty, one more of either costs nothing, and one of each exceeds the budget."""
    sketch = Sketch(np.random.default_rng(0), fraction=0.0)
    empty = [sketch.group(4, min_keep=0) for _ in range(2)]
    sketch.layer(*empty)
    sketch.products[0] = (*empty, 100)
    part, whole = sketch.group(2), sketch.group(2)
    sketch.link(whole, part, range(2))
    sketch.linear.append((part, 5))
    program = Program.from_problem(sketch.problem())
    x = np.zeros(program.size, np.bool_)
    x[program.groups[part].start] = True
    state = LinkedState(program, x)
    assert program.is_feasible(state.x)
    assert not state.counts[empty].any()
    fill(state)
    assert program.is_feasible(state.x)
    assert state.counts[empty].max() == 4


@pytest.mark.parametrize("solver", ["block_coordinate", "decomposition"])
def test_a_budget_below_whole_sets_is_met_by_their_parts(solver: str) -> None:
    """Two filters fit with one column each; the least of the strict restriction, two with all of theirs, does not."""
    sketch = Sketch(np.random.default_rng(0), fraction=0.1)
    source = sketch.group(2, frozen_reason="input")
    filters, columns = sketch.group(4, multiple_of=2), sketch.group(12)
    sketch.link(filters, columns, np.repeat(range(4), 3).tolist())
    sketch.layer(source, columns)
    problem = sketch.problem()
    program = Program.from_problem(problem)
    small = merged(program)
    assert small is not None
    assert not small.program.counts_within(np.asarray([g.counts[0] for g in small.program.groups]))
    report = qp.solve(problem, solver)
    assert program.is_feasible(report.masks.flat(problem.graph)[program.units])
    assert report.objective <= exhaustive(problem).objective + 1e-9
