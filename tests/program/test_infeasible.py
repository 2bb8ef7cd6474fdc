"""What an infeasible budget is blamed on: contributions worked out by hand, and recomputed by building the problem."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.errors import InfeasibleError
from qcqp_prune.graph.channels import ChannelGraph, Group
from qcqp_prune.program.forms import CountFormBuilder, PairwiseForm
from qcqp_prune.program.problem import BudgetRow, PruningProblem, least_counts
from qcqp_prune.testing import random_problem


class Net(nn.Module):
    """1 -> 6 -> 8 channels on 8 x 8 pixels, and 10 classes: 576 a + 576 a b + 10 b MACs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.b = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.head = nn.Linear(8, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


def refused(budgets: object, **limits: object) -> InfeasibleError:
    graph = qp.trace(Net(), torch.zeros(1, 1, 8, 8), **limits)  # type: ignore[arg-type]
    with pytest.raises(InfeasibleError) as caught:
        PruningProblem.build(graph, PairwiseForm(np.zeros(graph.unit_count)), budgets)  # type: ignore[arg-type]
    return caught.value


def given_back(error: InfeasibleError) -> dict[tuple[str, tuple[str, ...]], int]:
    return {(c.kind, c.groups): c.gives_back for c in error.causes}


def test_min_keep_by_hand() -> None:
    error = refused({"macs": 5000}, min_keep=4)
    assert (error.resource, error.limit, error.smallest) == ("macs", 5000, 576 * 4 + 576 * 16 + 40)
    # The classes are not in the user's hand, but they are what the last layer costs.
    assert given_back(error) == {
        ("min_keep", ("a",)): 576 * 3 + 576 * 12,
        ("min_keep", ("b",)): 576 * 12 + 30,
        ("frozen", ("head",)): 4 * 6,
    }
    assert [c.gives_back for c in error.causes] == sorted((c.gives_back for c in error.causes), reverse=True)
    assert error.conflicts[0].lifted == 576 + 576 + 10
    text = str(error)
    assert "what holds it up" in text
    assert "8,640  a: at least 4 are kept (min_keep)" in text
    assert "without ignored_layers, min_keep and round_to: 1,162, which meets the budget" in text
    assert "lower min_keep" in text
    assert "round_to, " not in text.splitlines()[-1]
    assert "ignored_layers" not in text.splitlines()[-1]


def test_ignored_layer_and_round_to() -> None:
    error = refused({"macs": "10%"}, ignored_layers=["a"], round_to={"b": 4})
    assert error.smallest == 576 * 6 + 576 * 24 + 40
    assert given_back(error) == {
        ("ignored", ("a",)): 576 * 5 + 576 * 20,
        ("round_to", ("b",)): 576 * 18 + 30,
        ("frozen", ("head",)): 4 * 9,
    }
    last = str(error).splitlines()[-1]
    assert "take layers out of ignored_layers, or lower round_to" in last


def test_two_floors_that_hold_a_count_up_together_are_one_cause() -> None:
    error = refused({"macs": 2000}, min_keep={"b": 4}, round_to={"b": 4})
    # Either alone leaves b at 4: lifting one of them gives nothing back.
    assert given_back(error)["min_keep+round_to", ("b",)] == 576 * 3 + 30
    assert "b: at least 4 are kept (min_keep) and kept in multiples of 4 (round_to)" in str(error)


def test_limits_that_leave_no_choice_are_the_users() -> None:
    error = refused({"macs": 6000}, min_keep={"a": 6})
    assert given_back(error)["min_keep", ("a",)] == 576 * 5 + 576 * 5
    assert error.conflicts[0].lifted == 576 + 576 + 10


def test_only_budgets_that_are_too_small_by_themselves_are_blamed() -> None:
    error = refused({"macs": 5000, "params": "90%"}, min_keep=4)
    assert [c.resource for c in error.conflicts] == ["macs"]
    both = refused({"macs": 5000, "params": 100}, min_keep=4)
    assert {c.resource: c.smallest for c in both.conflicts} == {"macs": 11560, "params": 36 + 144 + 40}
    assert "2 of the budgets, each too small by itself" in str(both)
    assert "raise macs to 11,560" in str(both)
    assert "params to 220" in str(both)


def test_the_nearest_budget_is_feasible_and_one_less_is_not() -> None:
    error = refused({"macs": 5000, "params": 100}, min_keep=4)
    graph = qp.trace(Net(), torch.zeros(1, 1, 8, 8), min_keep=4)
    objective = PairwiseForm(np.zeros(graph.unit_count))
    nearest = {c.resource: c.smallest for c in error.conflicts}
    percent = {c.resource: f"{c.nearest_percent:.2f}%" for c in error.conflicts}
    for budgets in (nearest, percent):
        PruningProblem.build(graph, objective, budgets)
    for name in nearest:
        with pytest.raises(InfeasibleError):
            PruningProblem.build(graph, objective, {**nearest, name: nearest[name] - 1})


def test_without_a_floor_the_message_says_so() -> None:
    error = refused({"macs": 500}, ignored_layers=())
    assert error.smallest == 576 + 576 + 10
    assert given_back(error) == {("frozen", ("head",)): 9}
    assert "without ignored_layers" not in str(error)
    assert (
        str(error).splitlines()[-1] == "What to do: raise macs to 1,162 (3.73%), the nearest that can be met"
    )


def tied_problem(limit: int) -> PruningProblem:
    """Two tied groups, one of them in multiples of three; cost ``5 n_0 + 7 n_1``, and ten groups of width 4."""
    groups = (
        Group("left", 6, multiple_of=3, tie="left"),
        Group("right", 6, tie="left"),
        *(Group(f"g{k}", 4, min_keep=2 + k % 2) for k in range(10)),
    )
    graph = ChannelGraph("tied", groups, (), (), (), (), 1)
    builder = CountFormBuilder(len(groups))
    builder.add_counts(1, {0: 5, 1: 7})
    for k in range(10):
        builder.add_counts(1 + k, {k + 2: 1})
    form = builder.build()
    dense, smallest = form.evaluate([g.width for g in groups]), form.evaluate(least_counts(graph))
    row = BudgetRow("macs", "MAC", form, dense, smallest, limit)
    return PruningProblem(graph, PairwiseForm(np.zeros(graph.unit_count)), (row,))


def test_ties_and_the_length_of_the_list() -> None:
    with pytest.raises(InfeasibleError) as caught:
        tied_problem(10).require_feasible()
    found = given_back(caught.value)
    assert found["round_to", ("left", "right")] == (3 - 1) * (5 + 7)
    assert found["tie", ("left", "right")] == (3 - 1) * 7
    assert len(found) == 12
    lines = str(caught.value).splitlines()
    assert [line for line in lines if line.startswith("  ")][5] == "  and 7 more"


def test_contributions_are_those_of_problems_without_the_floor() -> None:
    problem = tied_problem(10)
    with pytest.raises(InfeasibleError) as caught:
        problem.require_feasible()
    for k in range(10):
        groups = list(problem.graph.groups)
        groups[k + 2] = replace(groups[k + 2], min_keep=1)
        graph = replace(problem.graph, groups=tuple(groups))
        saved = problem.rows[0].smallest - problem.rows[0].form.evaluate(least_counts(graph))
        assert given_back(caught.value)["min_keep", (f"g{k}",)] == saved


def test_a_floor_that_holds_linked_groups_up_answers_for_them_too() -> None:
    problem = random_problem(0, "free_sharing")
    first = problem.graph.groups[0]
    graph = replace(problem.graph, groups=(replace(first, min_keep=2), *problem.graph.groups[1:]))
    before, after = least_counts(problem.graph), least_counts(graph)
    assert (
        sum(n > m for n, m in zip(after, before, strict=True)) > 1
    )  # the groups that it is a part of follow
    form = problem.rows[0].form
    row = replace(problem.rows[0], smallest=form.evaluate(after), limit=0)
    with pytest.raises(InfeasibleError) as caught:
        replace(problem, graph=graph, rows=(row,)).require_feasible()
    assert given_back(caught.value)["min_keep", (first.id,)] == form.evaluate(after) - form.evaluate(before)
