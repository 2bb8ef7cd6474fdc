"""The published CIFAR-10 ResNets at the paper's budgets: met exactly, verified, and with a proved gap."""

from __future__ import annotations

from math import floor
from pathlib import Path

import pytest
import torch

import qcqp_prune as qp
from qcqp_prune import models

pytestmark = pytest.mark.data

FILES = {
    "resnet20": "resnet20-12fca82f.th",
    "resnet32": "resnet32-d509ac18.th",
    "resnet56": "resnet56-4bfd9763.th",
}
BUDGETS = [
    pytest.param({"macs": 58}, marks=pytest.mark.slow),
    pytest.param({"macs": 50}, marks=pytest.mark.slow),
    pytest.param({"macs": 46}, marks=pytest.mark.slow),
    {"macs": 50, "params": 50},
]
LARGEST_GAP = 0.02


@pytest.mark.parametrize("percent", BUDGETS, ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()))
@pytest.mark.parametrize(
    "name",
    [
        "resnet20",
        pytest.param("resnet32", marks=pytest.mark.slow),
        pytest.param("resnet56", marks=pytest.mark.slow),
    ],
)
def test_published_networks(pretrained_root: Path, name: str, percent: dict[str, int]) -> None:
    model = getattr(models, name)(pretrained=pretrained_root / FILES[name])
    graph = qp.trace(model, torch.zeros(1, 3, 32, 32))
    budgets = {resource: f"{share}%" for resource, share in percent.items()}
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), budgets)
    report = qp.solve(problem, solver="auto", time_limit=20)
    small, verification = qp.shrink_and_verify(model, graph, report.masks)

    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for resource, share in percent.items():
        kind = {"macs": qp.Macs, "params": qp.Params}[resource]()
        assert kind.measure(small, x) <= floor(kind.measure(model, x) * share / 100)
    assert report.bound is not None
    assert report.bound >= report.objective
    assert report.gap is not None
    assert report.gap < LARGEST_GAP
    assert {c.resource for c in verification.counts} == {"macs", "memory", "params"}
    assert all(c.predicted == c.measured == report.usage[c.resource].used for c in verification.counts)
    assert verification.max_relative_error <= 1e-4
    assert verification.caution == ""
    assert verification.realisation == "modules"
