"""Tracing and grouping grow linearly with depth: four times the layers take less than eight times as long."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.graph.trace import trace
from tests.networks import widths


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def deep(kind: str, layers: int) -> nn.Module:
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(layers):
        conv = nn.Conv2d(32, 32, 3, padding=1, groups=4 if kind == "grouped" else 1)
        block = nn.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU())
        parts.append(Residual(block) if kind == "residual" else block)
        parts += [Shuffle()] if kind == "shuffled" else []
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "residual", "grouped", "shuffled"])
def test_time_grows_linearly(kind: str) -> None:
    x = torch.randn(1, 3, 8, 8)
    trace(deep(kind, 10), x)  # what PyTorch sets up once
    seconds = {}
    for layers in (50, 200):
        start = time.perf_counter()
        graph = trace(deep(kind, layers), x)
        seconds[layers] = time.perf_counter() - start
        assert len(graph.layers) == layers + 2
    assert seconds[200] < 8 * seconds[50]
    assert (
        len(widths(graph, free=True)) == {"plain": 201, "residual": 1, "grouped": 804, "shuffled": 201}[kind]
    )
