"""Traced networks with kernel columns, solved exactly and cut."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.shape_conv import ShapeConv2d
from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.testing import exhaustive
from tests.networks import liven


class Tiny(nn.Module):
    """x (1, 4, 4) - a 1x3 -> 2 channels, - b 1x1 -> the same 2; their sum - mid 1x2 -> 2 - head 1x1 -> 2 (output)"""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, (1, 3), padding=(0, 1))
        self.b = nn.Conv2d(1, 2, 1)
        self.mid = nn.Conv2d(2, 2, (1, 2))
        self.head = nn.Conv2d(2, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mid(torch.relu(self.a(x) + self.b(x)))))


@pytest.mark.parametrize("solver", ["highs", "scip"])
@pytest.mark.parametrize("budgets", [{"macs": "45%"}, {"macs": "70%", "params": "60%"}])
def test_the_optimum_of_a_traced_network(solver: str, budgets: dict[str, str]) -> None:
    model, x = liven(Tiny()), torch.randn(1, 1, 4, 4)
    graph = qp.trace(model, x, columns=True)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), budgets)
    best = exhaustive(problem)
    report = qp.solve(problem, solver, time_limit=60, gap_limit=0.0)
    assert report.objective == pytest.approx(best.objective, rel=1e-6)
    assert best.feasible > 10
    small, checked = shrink_and_verify(model, graph, report.masks)
    for row in problem.budgeted:
        measured = next(c.measured for c in checked.counts if c.resource == row.resource)
        assert measured <= row.limit
    assert any(isinstance(m, ShapeConv2d) for m in small.modules())


def test_columns_are_worth_more_than_channels_alone_at_the_same_budget() -> None:
    model, x = liven(Tiny()), torch.randn(1, 1, 4, 4)
    best = {}
    for columns in (False, True):
        graph = qp.trace(model, x, columns=columns)
        problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
        best[columns] = exhaustive(problem)
    assert best[True].objective > best[False].objective
