"""Networks as torchvision defines them: traced, cut to half their multiply-adds, and verified."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qcqp_prune as qp
from tests.networks import prune_and_check, random_masks
from tests.zoo import lively, torchvision_models

SIDES = {
    "mobilenet_v3_small": 64,
    "squeezenet1_0": 64,
    "shufflenet_v2_x0_5": 64,
    "resnet18": 64,
}
SLOW_SIDES = {
    "resnet50": 64,
    "vgg16_bn": 64,
    "densenet121": 64,
    "mobilenet_v2": 64,
    "efficientnet_b0": 64,
    "regnet_y_400mf": 64,
    "googlenet": 64,
    "convnext_tiny": 64,
}
WORK = 2
"""Sweeps of the search: enough to meet the budget; how good the choice is does not matter here."""

LEAST = 0.25
"""Share of each layer that stays: random weights are all alike, so that the best choice may cut a stage to one channel,
which a ReLU then silences, and equal outputs would prove nothing."""

REWRITTEN = {"shufflenet_v2_x0_5"}  # its forward reshapes to channel numbers that are written into it

TIED_TO_ONE = {
    "shufflenet_v2_x0_5": 4
}  # its shuffles tie all channels of a stage, of which one group must stay


def alive(name: str, example: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "googlenet" else {}
    return lively(getattr(torchvision_models(), name)(weights=None, **options), example)


CASES = [*SIDES.items(), *(pytest.param(*item, marks=pytest.mark.slow) for item in SLOW_SIDES.items())]


@pytest.mark.parametrize(("name", "side"), CASES)
def test_random_halves(name: str, side: int) -> None:
    """Random masks, checked without the library's own verification; all but the classifier can be pruned."""
    example = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    model = alive(name, example)
    graph = qp.trace(model, example)
    free = [layer.name for layer in graph.layers if graph.why_not_pruned(layer) is None]
    assert len(free) == len(graph.layers) - 1 - TIED_TO_ONE.get(name, 0)
    _, checked = prune_and_check(model, example, graph, random_masks(graph, 0, 0.5), mixes=True)
    assert checked.realisation == ("graph" if name in REWRITTEN else "modules")
    assert checked.caution == ""


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        ("resnet18", 8),
        pytest.param("resnet50", 16, marks=pytest.mark.slow),
        pytest.param("mobilenet_v2", 10, marks=pytest.mark.slow),
        pytest.param("convnext_tiny", 18, marks=pytest.mark.slow),
    ],
)
def test_sums_shared_freely(name: str, sums: int) -> None:
    """Each sum keeps channels of its own, and each is put together from unlike operands."""
    example = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    model = alive(name, example)
    graph = qp.trace(model, example, sharing="free")
    assert graph.notes == ()
    _, checked = prune_and_check(model, example, graph, random_masks(graph, 0, 0.6), mixes=True)
    assert checked.realisation == "graph"
    assert checked.note.split("; ")[0] == f"{sums} additions join layers that keep different channels"
    assert checked.caution == ""


@pytest.mark.parametrize(("name", "side"), CASES)
def test_half_the_multiply_adds(name: str, side: int) -> None:
    example = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    model = alive(name, example)
    graph = qp.trace(model, example, min_keep=LEAST)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=WORK))
    small, verification = qp.shrink_and_verify(model, graph, report.masks)

    dense, limit = report.usage["macs"].dense, report.usage["macs"].limit
    assert dense == qp.Macs().measure(model, example)
    assert limit == dense // 2
    assert 0 <= report.usage["macs"].slack < dense // 100

    assert [c.resource for c in verification.counts] == ["macs", "memory", "params"]
    for count in verification.counts:
        assert count.predicted == count.measured == report.usage[count.resource].used
    assert qp.Macs().measure(small, example) <= limit
    assert verification.max_relative_error <= verification.tolerance
    assert verification.caution == ""
    assert verification.realisation == ("graph" if name in REWRITTEN else "modules")
    assert not torch.equal(outputs(small, example), outputs(small, -example))

    for layer in graph.layers:
        groups = set(graph.group_of_unit[graph.axes[layer.out_axis]].tolist())
        frozen = all(graph.groups[g].frozen_reason is not None for g in groups)
        assert bool(graph.why_not_pruned(layer)) == frozen, layer.name
    assert "network output" in graph.why_not_pruned(graph.layers[-1])


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)
