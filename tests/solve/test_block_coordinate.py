"""The search is always feasible, uses the budget up, and keeps its books exactly."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from qcqp_prune.graph.needs import Needs
from qcqp_prune.program.program import Program
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.result import Reason
from qcqp_prune.testing import STRUCTURES, chain_problem, random_problem
from qcqp_prune.testing.instances import BLOCKED, LINKED
from qcqp_prune_solvers.search.blocks import sweep
from qcqp_prune_solvers.search.moves import drop_to_budget, fill
from qcqp_prune_solvers.search.state import State
from qcqp_prune_solvers.search.structure import Structure
from tests.within import within_program

# Programs with links have a search, and tests, of their own.
UNLINKED = [s for s in STRUCTURES if s not in (*LINKED, *BLOCKED)]


def addable_steps(program: Program, x: np.ndarray) -> list[tuple[int, float]]:
    """Tie classes that could take their next allowed count within every budget, with the best gain of doing so.

    Written without the search's own bookkeeping.
    """
    counts, found = program.counts(x), []
    for tie in sorted({g.tie for g in program.groups}):
        members = [k for k, g in enumerate(program.groups) if g.tie == tie]
        allowed = program.groups[members[0]].counts
        level = allowed.index(int(counts[members[0]]))
        if level + 1 == len(allowed):
            continue
        larger = counts.copy()
        larger[members] = allowed[level + 1]
        if program.counts_feasible(larger):
            after = x.copy()
            for k in members:
                span = program.groups[k].span
                gains = np.where(x[span], -np.inf, program.gradient(x.astype(float))[span])
                best = np.argsort(-gains)[: allowed[level + 1] - allowed[level]]
                after[span.start + best] = True
            found.append((tie, program.objective(after) - program.objective(x)))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_no_swap_gains_where_groups_are_coupled_with_themselves(seed: int) -> None:
    program = within_program(seed, width=16)
    raw = get_backend("block_coordinate").solve(program, SolveOptions(seed=seed))
    assert raw.x is not None
    value = program.objective(raw.x)
    for group in program.groups:
        units = np.arange(group.start, group.start + group.width)
        for i, j in itertools.product(units[raw.x[units]], units[~raw.x[units]]):
            swapped = raw.x.copy()
            swapped[[i, j]] = False, True
            assert program.objective(swapped) <= value + 1e-9 * abs(value)


@pytest.mark.parametrize("work", [1, 40, None])
@pytest.mark.parametrize("structure", UNLINKED)
def test_feasible_and_no_step_fits(structure: str, work: int | None) -> None:
    for seed in range(4):
        program = Program.from_problem(random_problem(seed, structure))
        raw = get_backend("block_coordinate").solve(program, SolveOptions(work_limit=work))
        assert raw.x is not None
        assert raw.bound is None
        assert program.is_feasible(raw.x)
        left = addable_steps(program, raw.x)
        assert all(gain < 1e-9 for _, gain in left)
        if structure != "negative":
            assert left == []


@pytest.mark.parametrize(
    "fractions", [(("macs", 0.5),), (("params", 0.3),), (("macs", 0.5), ("params", 0.5))]
)
def test_realistic_size(fractions: tuple[tuple[str, float], ...]) -> None:
    program = Program.from_problem(chain_problem("resnet20", fractions=fractions))
    raw = get_backend("block_coordinate").solve(program, SolveOptions())
    assert raw.termination.reason is Reason.SEARCH_ENDED
    assert raw.x is not None
    assert program.is_feasible(raw.x)
    assert addable_steps(program, raw.x) == []
    assert raw.objective == pytest.approx(program.objective(raw.x), rel=1e-12)


def test_beats_the_uniform_selection_and_repeats() -> None:
    program = Program.from_problem(chain_problem("resnet20"))
    backend = get_backend("block_coordinate")
    first, second, other = (backend.solve(program, SolveOptions(seed=s)) for s in (0, 0, 1))
    assert np.array_equal(first.x, second.x)
    assert first.objective == pytest.approx(other.objective, rel=2e-3)
    uniform = first.trace[0].incumbent
    assert uniform is not None
    assert first.objective > uniform


@pytest.mark.parametrize("structure", STRUCTURES)
def test_moves_keep_value_gradient_and_use_exact(structure: str) -> None:
    rng = np.random.default_rng(0)
    program = Program.from_problem(random_problem(9, structure))
    structure_ = Structure.of(program)
    state = State(structure_, np.ones(program.size, np.bool_))
    drop_to_budget(state)
    for _ in range(60):
        t = int(rng.integers(len(structure_.members)))
        if rng.random() < 0.5 and state.step_up[t]:
            state.raise_class(t)
        elif state.step_down[t]:
            state.lower_class(t)
        state.reselect(int(rng.integers(len(structure_.members))))
        assert state.value == pytest.approx(program.objective(state.x), abs=1e-9)
        assert state.gradient == pytest.approx(program.gradient(state.x.astype(float)), abs=1e-9)
        counts = program.counts(state.x)
        used = [c.form.evaluate(counts) - c.form.constant for c in program.constraints]
        assert state.used.tolist() == used


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fill_takes_a_step_that_fits_exactly(structure: str) -> None:
    """Budgets are set to the use of a point one step above the least counts: the fill must not stop short of it."""
    program = Program.from_problem(random_problem(2, structure))
    least = np.zeros(program.size, np.bool_)
    for group in program.groups:
        least[group.start : group.start + group.counts[0]] = True
    for tie in sorted({g.tie for g in program.groups}):
        counts = program.counts(least)
        members = [k for k, g in enumerate(program.groups) if g.tie == tie]
        counts[members] = program.groups[members[0]].counts[1]
        exact = [replace(c, limit=c.form.evaluate(counts)) for c in program.constraints]
        # Steps within a pattern know nothing of blocks.
        tight = replace(program, constraints=tuple(exact), linear=np.abs(program.linear) + 10, needs=Needs())
        state = State(Structure.of(tight), least)
        assert (tie, True) in [(t, gain > 0) for t, gain in addable_steps(tight, least)]
        fill(state)
        assert addable_steps(tight, state.x) == []


@pytest.mark.parametrize("structure", UNLINKED)
def test_blocks_never_lose(structure: str) -> None:
    for seed in range(5):
        program = Program.from_problem(random_problem(seed, structure))
        prepared = Structure.of(program)
        state = State(prepared, np.ones(program.size, np.bool_))
        assert drop_to_budget(state)
        fill(state)
        for colour in prepared.colours:
            before = state.value
            gained = sweep(state, colour)
            assert state.value >= before
            assert gained == (state.value > before)
            assert program.is_feasible(state.x)


def test_a_block_with_one_budget_is_solved_to_within_one_step() -> None:
    """With b fixed at its unit 0, group a is a knapsack of equal costs: the best units by worth are taken."""
    program = Program.from_problem(random_problem(0, "chain"))
    prepared = Structure.of(program)
    for colour in prepared.colours:
        state = State(prepared, np.ones(program.size, np.bool_))
        drop_to_budget(state)
        sweep(state, colour)
        for t in colour.tolist():
            (g,) = prepared.members[t]
            span = program.groups[g].span
            kept, dropped = state.gradient[span][state.x[span]], state.gradient[span][~state.x[span]]
            assert not len(dropped) or kept.min() >= dropped.max() - 1e-12
