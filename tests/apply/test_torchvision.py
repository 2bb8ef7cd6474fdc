"""torchvision's classification models: traced, pruned to half their multiply-adds, verified."""

from __future__ import annotations

import pytest
import torch

import qcqp_prune as qp
from tests.networks import difference, run
from tests.zoo import build, lively

FAST = ("mobilenet_v3_small", "squeezenet1_0", "shufflenet_v2_x0_5", "resnet18")
SLOW = (
    "resnet50",
    "vgg16_bn",
    "densenet121",
    "mobilenet_v2",
    "efficientnet_b0",
    "regnet_y_400mf",
    "googlenet",
    "convnext_tiny",
)


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW)])
def test_half_the_multiply_adds(name: str) -> None:
    example = torch.randn((1, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    model = lively(build(name), example)
    # With floors: the objective by itself leaves single channels in early layers, through which little passes.
    graph = qp.trace(model, example, min_keep=0.25)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=2000))
    small, verification = qp.shrink_and_verify(model, graph, report.masks)

    counts = {c.resource: c for c in verification.counts}
    assert all(c.predicted == c.measured for c in counts.values())
    limit = report.usage["macs"].limit
    assert limit == report.usage["macs"].dense // 2
    assert counts["macs"].measured <= limit
    assert verification.max_relative_error <= verification.tolerance
    # The check would be empty on a network whose output hardly depends on its input.
    other = torch.randn(example.shape, generator=torch.Generator().manual_seed(1))
    assert difference(run(small, other), run(small, example)) > 1e-3
    # Channels are chunked in unequal parts in ShuffleNet's own forward: only its graph can be rewritten.
    assert verification.realisation == ("graph" if name.startswith("shufflenet") else "modules")
    for layer in graph.layers:
        kept = report.masks.flat(graph)[graph.axes[layer.out_axis]]
        assert graph.why_not_pruned(layer) is None or kept.all()
