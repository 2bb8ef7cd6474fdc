"""Ranges before solving and budget lines after it, on a network small enough to count by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from qcqp_prune.graph.trace import trace
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.program.problem import PruningProblem, allowed_counts
from qcqp_prune.report import budget_lines, feasible_ranges
from qcqp_prune.testing import random_problem
from qcqp_prune.testing.instances import LINKED


def chain() -> nn.Sequential:
    """2 -> 4 -> 3 -> 2 features: 2*4 + 4*3 + 3*2 = 26 MACs, the same number of parameters."""
    return nn.Sequential(
        nn.Linear(2, 4, bias=False), nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)
    )


def test_ranges() -> None:
    ranges = {r.resource: r for r in feasible_ranges(trace(chain(), torch.zeros(1, 2)))}
    assert (ranges["macs"].smallest, ranges["macs"].largest) == (2 * 1 + 1 * 1 + 1 * 2, 26)
    # 4 bytes for each weight, and for each of the 1 + 1 + 2 outputs, of 4 + 3 + 2
    assert (ranges["memory"].smallest, ranges["memory"].largest) == (4 * 5 + 4 * 4, 4 * 26 + 4 * 9)


def test_lines_after_solving() -> None:
    graph = trace(chain(), torch.zeros(1, 2))
    problem = PruningProblem.build(graph, PairwiseForm(np.ones(graph.unit_count)), {"macs": "60%"})
    mask = np.ones(graph.unit_count, np.bool_)
    for name, kept in {"0": 2, "1": 2}.items():
        k = next(i for i, g in enumerate(graph.groups) if g.id == name)
        mask[graph.units(k)] = np.arange(graph.groups[k].width) < kept
    lines = budget_lines(problem, {"macs": "60%"}, mask)
    macs = lines[0]  # those with a budget come first
    assert (macs.resource, macs.requested, macs.limit) == ("macs", "60%", 15)  # floor(0.6 * 26)
    assert (macs.used, macs.dense, macs.smallest) == (2 * 2 + 2 * 2 + 2 * 2, 26, 5)
    assert macs.slack == 3
    # a third unit of the first layer costs 2 + 2, one of the second 2 + 2
    assert macs.cheapest_step == 4
    params = next(x for x in lines if x.resource == "params")
    assert (params.requested, params.limit, params.slack) == (None, None, None)


def test_a_step_is_that_of_round_to_and_of_tied_groups() -> None:
    graph = trace(chain(), torch.zeros(1, 2), round_to={"0": 2})
    problem = PruningProblem.build(graph, PairwiseForm(np.ones(graph.unit_count)), {"macs": "60%"})
    mask = np.ones(graph.unit_count, np.bool_)
    k = next(i for i, g in enumerate(graph.groups) if g.id == "0")
    mask[graph.units(k)] = np.arange(4) < 2
    macs = budget_lines(problem, "60%", mask)[0]
    assert macs.requested == "60%"
    assert macs.cheapest_step == 2 * (2 + 3)  # two units at once, each with 2 inputs and 3 outputs


def test_nothing_can_be_added_to_the_whole_network() -> None:
    graph = trace(chain(), torch.zeros(1, 2))
    problem = PruningProblem.build(graph, PairwiseForm(np.ones(graph.unit_count)), {"macs": "100%"})
    assert budget_lines(problem, "100%", np.ones(graph.unit_count, np.bool_))[0].cheapest_step is None


@pytest.mark.parametrize("structure", LINKED)
def test_the_next_unit_is_charged_with_the_wholes_that_it_brings_along(structure: str) -> None:
    """Against every single unit that could be added, with all that follows, counted one by one."""
    rng = np.random.default_rng(0)
    seen = 0
    for seed in range(12):
        problem = random_problem(seed, structure)
        graph, allowed = problem.graph, allowed_counts(problem.graph)
        mask = rng.random(graph.unit_count) < 0.5
        for g, group in enumerate(graph.groups):
            mask[graph.units(g)] |= group.frozen_reason is not None
        mask = graph.links.closed(mask) | (mask & ~np.isin(np.arange(graph.unit_count), graph.links.heads))
        counts = problem.counts(mask)
        if any(n not in a for n, a in zip(counts.tolist(), allowed, strict=True)):
            continue
        line = budget_lines(problem, {"macs": "50%"}, mask)[0]
        costs = []
        for unit in np.flatnonzero(~mask).tolist():
            if unit in graph.links.heads:
                continue
            more = mask.copy()
            more[unit] = True
            more |= graph.links.closed(more)
            if all(n in a for n, a in zip(problem.counts(more).tolist(), allowed, strict=True)):
                costs.append(problem.usage(more)["macs"] - problem.usage(mask)["macs"])
        assert line.cheapest_step == min(costs, default=None)
        seen += 1
    assert seen >= 4
