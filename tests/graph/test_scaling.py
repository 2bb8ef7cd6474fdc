"""Tracing and grouping grow linearly with depth: every further block costs the same work, in calls and in labels."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.graph.axes import LabelTable
from qcqp_prune.graph.export import export
from qcqp_prune.graph.forest import Forest
from qcqp_prune.graph.inputs import as_call
from qcqp_prune.graph.trace import trace
from tests.networks import widths

DEPTHS = (8, 24, 40)


class Shuffle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        x += self.body(x)
        return x


class Heads(nn.Module):
    """Self-attention of four heads, then a feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.rest = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, 4, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
        return x + self.rest(x)


def deep(kind: str, layers: int) -> tuple[nn.Module, Tensor]:
    if kind == "attention":
        return nn.Sequential(*(Heads() for _ in range(layers)), nn.Linear(16, 3)), torch.randn(1, 5, 16)
    parts: list[nn.Module] = [nn.Conv2d(3, 32, 3, padding=1)]
    for _ in range(layers):
        conv = nn.Conv2d(32, 32, 3, padding=1, groups=4 if kind == "grouped" else 1)
        block = nn.Sequential(conv, nn.BatchNorm2d(32), nn.ReLU())
        parts.append(Residual(block) if kind in ("residual", "free") else block)
        parts += [Shuffle()] if kind == "shuffled" else []
    network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return network, torch.randn(1, 3, 8, 8)


def work(kind: str, layers: int, patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Calls of functions, and labels that are looked up, of everything that comes after the export."""
    model, x = deep(kind, layers)
    program = export(model.eval(), as_call(x))
    calls = labels = 0

    def count(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    def find(self: Forest, members: Any) -> Any:
        nonlocal labels
        labels += members.size
        return found(self, members)

    found = Forest.find
    with patch.context() as patched:
        patched.setattr("qcqp_prune.graph.trace.export", lambda *_: program)
        patched.setattr(Forest, "find", find)
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            trace(model, x, sharing="free" if kind == "free" else "strict")
        finally:
            sys.setprofile(before)
    return calls, labels


@pytest.mark.parametrize("kind", ["plain", "residual", "free", "grouped", "shuffled", "attention"])
def test_each_further_block_costs_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    work(kind, 2, monkeypatch)  # what is set up once
    small, middle, large = (work(kind, depth, monkeypatch) for depth in DEPTHS)
    for a, b, c in zip(small, middle, large, strict=True):
        assert b - a > 0
        assert abs((c - b) / (b - a) - 1) < 0.02


def test_a_look_over_all_labels_at_every_block_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The count sees a walk that resolves everything each time an operator looks."""

    def everything(self: LabelTable, labels: Any) -> Any:
        return self.classes()[labels]

    monkeypatch.setattr(LabelTable, "find", everything)
    small, middle, large = (work("shuffled", depth, monkeypatch)[1] for depth in DEPTHS)
    assert large - middle > 1.5 * (middle - small)


@pytest.mark.parametrize(
    ("kind", "groups"), [("plain", 41), ("residual", 1), ("grouped", 164), ("shuffled", 41)]
)
def test_groups_of_a_deep_network(kind: str, groups: int) -> None:
    graph = trace(*deep(kind, 40))
    assert len(graph.layers) == (82 if kind == "residual" else 42)
    assert len(widths(graph, free=True)) == groups
