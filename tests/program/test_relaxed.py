"""Forms at fractional counts: exact at whole ones, slopes are derivatives, tables are interpolated."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.program.forms import CountFormBuilder, PairwiseForm, PeakForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.relaxed import balanced_worth, relaxed_use, rounding_worth
from qcqp_prune.testing import STRUCTURES, random_problem


@pytest.mark.parametrize("structure", STRUCTURES)
def test_whole_counts_and_slopes(structure: str) -> None:
    rng = np.random.default_rng(0)
    for seed in range(3):
        for row in random_problem(seed, structure).rows:
            form = row.form.parts[0]
            if form.tables:
                continue
            widths = np.asarray([9] * len(form.linear))
            whole = rng.integers(0, widths + 1)
            assert relaxed_use(form, whole)[0] == form.evaluate(whole)
            n = rng.random(len(widths)) * widths
            _, slopes = relaxed_use(form, n)
            for g in range(len(n)):
                ends = [relaxed_use(form, n + s * 1e-5 * (np.arange(len(n)) == g))[0] for s in (1, -1)]
                assert slopes[g] == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6, abs=1e-4)


def test_tables_are_interpolated_between_their_levels() -> None:
    """A staircase of 10 at 4, 30 at 8 and a table of two sums; by hand half way between levels."""
    builder = CountFormBuilder(2)
    builder.add_table(np.asarray([10, 30]), [{0: 1}], [np.asarray([4, 8])])
    builder.add_table(
        np.asarray([[1, 3], [5, 11]]), [{0: 2}, {1: 1}], [np.asarray([8, 16]), np.asarray([2, 4])]
    )
    form = builder.build()
    assert relaxed_use(form, [4, 2])[0] == form.evaluate([4, 2]) == 11
    assert relaxed_use(form, [8, 4])[0] == form.evaluate([8, 4]) == 41
    value, slopes = relaxed_use(form, [6.0, 3.0])
    assert value == pytest.approx(20 + (1 + 3 + 5 + 11) / 4)
    assert slopes.tolist() == pytest.approx([20 / 4 + 2 * (8 - 2) / 8, ((3 - 1) + (11 - 5)) / 2 / 2])
    assert relaxed_use(form, [1.0, 0.5])[0] == 11  # below the first level the first value counts


def test_of_a_maximum_the_largest_step_counts() -> None:
    steps = []
    for g, cost in ((0, 3), (1, 5)):
        builder = CountFormBuilder(2)
        builder.add_counts(cost, {g: 1})
        steps.append(builder.build())
    peak = PeakForm.of(steps)
    assert relaxed_use(peak, [2.5, 1.0])[0] == 7.5
    assert relaxed_use(peak, [2.5, 1.0])[1].tolist() == [3, 0]
    assert relaxed_use(peak, [1.0, 1.0])[1].tolist() == [0, 5]


def test_worth_is_the_logarithm_of_what_layers_retain() -> None:
    """By hand, for selections that keep the largest values of each group, beside that of the whole network."""
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((3, 4), (4, 5), (5, 2))))
    graph = qp.trace(model, torch.zeros(1, 3))
    problem = PruningProblem.build(graph, PairwiseForm(np.zeros(graph.unit_count)), {"macs": "50%"})
    rng = np.random.default_rng(0)
    values = np.where(graph.stays, 1.0, rng.uniform(0.1, 1.0, graph.unit_count))
    worth = balanced_worth(problem, values)
    units = {group.id: graph.units(g) for g, group in enumerate(graph.groups)}
    whole = worth.evaluate(np.ones(graph.unit_count, np.bool_))
    for a, b in ((1, 1), (2, 4), (4, 3)):
        mask, expected = np.ones(graph.unit_count, np.bool_), 0.0
        for name, n in (("0", a), ("1", b)):
            own = values[units[name]]
            mask[units[name]] = own >= np.sort(own)[-n]
            expected += 2 * np.log(own[mask[units[name]]].sum() / own.sum())  # an output here, an input there
        assert worth.evaluate(mask) - whole == pytest.approx(expected, rel=1e-12)


def test_equal_values_are_kept_in_balance() -> None:
    """4 -> 16 -> 16 -> 4 at half: the best product of shares, by enumeration; a linear worth keeps 16 here, 5 there."""
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((4, 16), (16, 16), (16, 4))))
    graph = qp.trace(model, torch.zeros(1, 4))
    problem = PruningProblem.build(graph, PairwiseForm(np.zeros(graph.unit_count)), {"macs": "50%"})
    masks = qp.solve(
        problem.with_objective(balanced_worth(problem, np.ones(graph.unit_count))), "highs"
    ).masks
    kept = tuple(int(masks.keep[name].sum()) for name in ("0", "1"))
    pairs = [(a, b) for a in range(1, 17) for b in range(1, 17) if 4 * a + a * b + 4 * b <= 192]
    assert kept[0] * kept[1] == max(a * b for a, b in pairs)


def test_rounding_finds_relaxed_counts_that_meet_the_budget() -> None:
    """4 -> 16 -> 16 -> 4 with 12 and 6 units at one value each: a budget of exactly what they use gives them back."""
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((4, 16), (16, 16), (16, 4))))
    graph = qp.trace(model, torch.zeros(1, 4))
    problem = PruningProblem.build(
        graph, PairwiseForm(np.zeros(graph.unit_count)), {"macs": 4 * 12 + 12 * 6 + 6 * 4}
    )
    values = np.ones(graph.unit_count)
    units = {group.id: graph.units(g) for g, group in enumerate(graph.groups)}
    for name, level in (("0", 12 / 16), ("1", 6 / 16)):
        values[units[name]] = level
    assert relaxed_use(
        problem.rows[0].form, [values[graph.units(g)].sum() for g in range(len(graph.groups))]
    )[0] == pytest.approx(144)
    masks = qp.solve(problem.with_objective(rounding_worth(problem, values)), "highs").masks
    assert {name: int(masks.keep[name].sum()) for name in ("0", "1")} == {"0": 12, "1": 6}
