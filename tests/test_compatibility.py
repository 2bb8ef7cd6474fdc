"""What the compatibility matrix asks of a network."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from benchmarks.compatibility_row import asked


class Beside(nn.Module):
    """x(10) -> a(20) -> b(10), and beside it layers that stay: x(10) -> (width) -> (10)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 20), nn.Linear(20, 10)
        self.stays = nn.Sequential(nn.Linear(10, width), nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) + self.stays(x)


@pytest.mark.parametrize(
    ("width", "floor", "limit"),
    [
        # 20 * 20 MACs that may go and 20 * width that stay: half of all is 20 * (10 + width / 2).
        (10, 0.25, 300),  # 5 channels and what stays: 20 * (5 + 10)
        (12, 0.2, 320),  # 20 * (4 + 12), where 5 channels would be too many
        (17, 0.05, 370),  # 20 * (1 + 17) at least, 20 * (2 + 17) is too much
        (18, 0.05, 380),
        (40, 1, 20 * 41),  # more stays than half of it
    ],
)
def test_the_largest_floor_that_leaves_half(width: int, floor: float, limit: int) -> None:
    graph = qp.trace(Beside(width), torch.zeros(1, 10), ignored_layers="stays.*")
    floored, budget, about = asked(graph)
    assert (about["min_keep"], budget) == (floor, limit)
    assert ("least" in about["asked"]) == (width == 40)
    least = 1 if width == 40 else round(20 * floor)
    assert [g.min_keep for g in floored.groups if g.frozen_reason is None] == [least]
