"""Links between units: closing, checking, counts, and the exact models that carry them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import qcqp_prune as qp
from qcqp_prune.graph.channels import ChannelGraph, Group
from qcqp_prune.graph.links import Links
from qcqp_prune.program.forms import CountFormBuilder
from qcqp_prune.program.problem import allowed_counts
from qcqp_prune.program.program import Program
from qcqp_prune.testing import exhaustive, random_problem
from qcqp_prune.testing.instances import Sketch

# wholes 0, 1 with parts 2, 3 and 3, 4; whole 5 with part 0
PAIRS = [(0, 2), (0, 3), (1, 3), (1, 4), (5, 0)]


def _bits(*on: int) -> np.ndarray:
    return np.isin(np.arange(6), on)


def test_closing_settles_parts_before_wholes() -> None:
    links = Links.of(PAIRS)
    assert np.array_equal(links.closed(_bits(2)), _bits(2, 0, 5))
    assert np.array_equal(links.closed(_bits(4, 0, 5)), _bits(4, 1))


def test_exactly_the_closed_masks_hold() -> None:
    links = Links.of(PAIRS)
    for bits in itertools.product([False, True], repeat=6):
        mask = np.asarray(bits)
        assert links.hold(mask) == np.array_equal(links.closed(mask), mask)


def test_an_exempt_whole_needs_no_part_but_parts_need_it() -> None:
    links, exempt = Links.of([(0, 1)]), np.asarray([True, False])
    assert links.hold(np.asarray([True, False]), exempt)
    assert not links.hold(np.asarray([True, False]))
    assert not links.hold(np.asarray([False, True]), exempt)


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        Links.of([(0, 1), (1, 2), (2, 0)])


def test_json_round_trip() -> None:
    links = Links.of(PAIRS)
    again = Links.from_json(links.to_json())
    assert np.array_equal(again.wholes, links.wholes)
    assert np.array_equal(again.parts, links.parts)
    assert len(Links.from_json(Links.none().to_json())) == 0


def _graph(groups: list[Group], pairs: list[tuple[int, int]]) -> ChannelGraph:
    return ChannelGraph("linked", tuple(groups), (), (), (), (), 1, links=Links.of(pairs))


def test_floors_pass_through_links_both_ways() -> None:
    # filters 0..2, columns 3..8 (two a filter): 5 columns need 3 filters; 2 filters need 2 columns
    pairs = [(k // 2, 3 + k) for k in range(6)]
    many_columns = _graph([Group("r", 3), Group("q", 6, min_keep=5)], pairs)
    assert allowed_counts(many_columns) == [[3], [5, 6]]
    many_filters = _graph([Group("r", 3, min_keep=2), Group("q", 6)], pairs)
    assert allowed_counts(many_filters) == [[2, 3], [2, 3, 4, 5, 6]]


def test_counts_cut_off_are_those_that_no_mask_has() -> None:
    graph = _graph(
        [Group("v", 3, min_keep=2), Group("u", 2), Group("w", 3)], [(0, 3), (1, 4), (0, 5), (1, 6), (2, 7)]
    )
    reached: list[set[int]] = [set(), set(), set()]
    for bits in itertools.product([False, True], repeat=8):
        mask = np.asarray(bits)
        counts = [int(mask[graph.units(g)].sum()) for g in range(3)]
        if graph.links.hold(mask) and all(n in graph.groups[g].counts() for g, n in enumerate(counts)):
            for g, n in enumerate(counts):
                reached[g].add(n)
    assert all(seen <= set(allowed) for seen, allowed in zip(reached, allowed_counts(graph), strict=True))
    assert [min(seen) for seen in reached] == [a[0] for a in allowed_counts(graph)]


def test_a_part_that_is_always_kept_keeps_its_whole() -> None:
    problem = random_problem(1, "free_sharing")
    graph = problem.graph
    groups = list(graph.groups)
    groups[0] = Group(groups[0].id, groups[0].width, frozen_reason="ignored")
    frozen = qp.PruningProblem(
        ChannelGraph("linked", tuple(groups), (), (), (), (), 1, links=graph.links),
        problem.objective,
        problem.rows,
    )
    best = exhaustive(frozen)
    assert best.mask[graph.units(1)].all(), "the stream channels of a frozen producer"
    assert Program.from_problem(frozen).is_feasible(best.mask[Program.from_problem(frozen).units])


@pytest.mark.parametrize("solver", ["highs", "highs:perspective", "scip", "pyomo:highs"])
@pytest.mark.parametrize("structure", ["free_sharing", "columns"])
@pytest.mark.parametrize("seed", range(3))
def test_exact_backends_reach_the_exhaustive_optimum(solver: str, structure: str, seed: int) -> None:
    problem = random_problem(seed, structure)
    best = exhaustive(problem)
    report = qp.solve(problem, solver, time_limit=60, gap_limit=0.0)
    assert report.objective == pytest.approx(best.objective, rel=1e-6)
    assert problem.graph.links.hold(report.masks.flat(problem.graph), problem.graph.stays)


def test_a_whole_that_its_parts_leave_no_choice_still_needs_them() -> None:
    """Filters in threes and at least one column: all filters stay, and each of them needs a column."""
    sketch = Sketch(np.random.default_rng(0), fraction=0.0)
    source, filters = sketch.group(2), sketch.group(3, min_keep=0, multiple_of=3)
    columns = sketch.group(6)
    sketch.link(filters, columns, [0, 0, 1, 1, 2, 2])
    sketch.layer(source, columns)
    sketch.layer(filters, sketch.group(2))
    problem = sketch.problem()
    assert allowed_counts(problem.graph)[1:3] == [[3], [3, 4, 5, 6]]
    report = qp.solve(problem, "highs", gap_limit=0.0)
    assert report.objective == pytest.approx(exhaustive(problem).objective, rel=1e-6)
    kept = report.masks.keep["g2"]
    assert kept.reshape(3, 2).any(axis=1).all()


def test_tied_groups_of_unlike_width_are_refused() -> None:
    graph = _graph([Group("a", 3, tie="t"), Group("b", 4, tie="t")], [])
    with pytest.raises(qp.InvalidOptionError, match="b has 4 units and is tied to groups of 3"):
        allowed_counts(graph)


def test_slopes_and_substitution_agree_with_evaluation() -> None:
    builder, rng = CountFormBuilder(3), np.random.default_rng(0)
    builder.add_counts(5, {0: 1, 2: 3})
    builder.add_product(2, {0: 1, 1: 2}, {1: 1, 2: 1})
    form = builder.build()
    wide = form.substituted({0: {0: 1}, 1: {0: 2, 1: 1}, 2: {1: 3}}, 2)
    for _ in range(50):
        n = rng.integers(0, 9, size=3)
        for g in range(3):
            assert form.slopes(n)[g] == form.evaluate(n + np.eye(3, dtype=np.int64)[g]) - form.evaluate(n)
        m = rng.integers(0, 9, size=2)
        assert wide.evaluate(m) == form.evaluate([m[0], 2 * m[0] + m[1], 3 * m[1]])


def test_a_stair_is_shared_by_the_units_up_to_it() -> None:
    builder = CountFormBuilder(1)
    builder.add_table([0, 10, 30], [{0: 1}], [[2, 4, 8]])
    form = builder.build()
    # from 1 the stair to 10 is two units away, from 4 the one to 30 is one away, beyond it there is none
    assert [float(form.slopes(np.asarray([n]))[0]) for n in (1, 4, 6)] == [5.0, 20.0, 0.0]
    assert form.substituted({0: {0: 1, 1: 1}}, 2).evaluate([2, 1]) == form.evaluate([3])
