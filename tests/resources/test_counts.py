"""Exact counts against hand formulas, on whole networks and on parts of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qcqp_prune.graph.trace import trace
from qcqp_prune.models import LeNet5, LeNet300, densenet40, resnet20, vgg16_bn
from qcqp_prune.resources import Macs, Memory, Params
from tests.networks import hooked_macs, keep, liven, prune_and_check, random_masks, uses, widths


def test_a_parameter_that_is_handed_to_a_module() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = nn.Linear(4, 3)

        def forward(self, x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
            return self.map(torch.cat([token, x], 1))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.inner = nn.Parameter(torch.zeros(1, 1, 4)), Inner()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, self.token.expand(x.shape[0], -1, -1))

    assert Macs().measure(Outer(), torch.randn(2, 5, 4)) == 6 * 4 * 3


def test_lenet_5_by_hand() -> None:
    model, x = LeNet5(), torch.randn(1, 1, 28, 28)
    graph = trace(model, x)
    sizes = [tuple(p.shape) for name, p in model.named_parameters() if "weight" in name]
    (c1, _, k, _), (c2, _, _, _), (f1, flat), (classes, _) = sizes
    first, second = 28 - k + 1, (28 - k + 1) // 2 - k + 1
    macs = first**2 * k * k * c1 + second**2 * k * k * c1 * c2 + flat * f1 + f1 * classes
    params = k * k * c1 + c1 + k * k * c1 * c2 + c2 + flat * f1 + f1 + f1 * classes + classes
    elements = first**2 * c1 + second**2 * c2 + f1 + classes
    assert uses(graph) == {"macs": macs, "params": params, "memory": 4 * (params + elements)}
    assert flat == c2 * (second // 2) ** 2


def test_lenet_300_by_hand() -> None:
    graph = trace(LeNet300(), torch.randn(3, 1, 28, 28))
    assert uses(graph)["macs"] == 784 * 300 + 300 * 100 + 100 * 10
    assert uses(graph)["params"] == 784 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    kept = keep(graph, **{next(iter(widths(graph, free=True))): list(range(120))})
    assert uses(graph, kept)["macs"] == 784 * 120 + 120 * 100 + 100 * 10


def test_resnet_20_by_hand() -> None:
    #  a stem; 3 stages of 3 blocks of 2 convolutions: 16 x 32^2, 32 x 16^2, 64 x 8^2; a linear map
    graph = trace(resnet20(), torch.randn(1, 3, 32, 32))
    stages = 9 * (1024 * 6 * 16 * 16 + 256 * (16 * 32 + 5 * 32 * 32) + 64 * (32 * 64 + 5 * 64 * 64))
    assert uses(graph)["macs"] == 1024 * 9 * 3 * 16 + stages + 640 == 40_551_040
    assert uses(graph)["params"] == 269_722
    assert len(widths(graph, free=True)) == 12  # 9 inner widths, the stem's stream, two of later stages alone


@pytest.mark.parametrize(
    ("build", "side"), [(resnet20, 32), (densenet40, 32), (vgg16_bn, 32), (LeNet5, 28), (LeNet300, 28)]
)
def test_our_own_models(build, side: int) -> None:
    channels = 1 if side == 28 else 3
    model, x = liven(build()), torch.randn(1, channels, side, side)
    graph = trace(model, x)
    assert uses(graph)["macs"] == hooked_macs(model, x)
    assert uses(graph)["params"] == sum(p.numel() for p in model.parameters())
    small, checked = prune_and_check(model, x, graph, random_masks(graph, 0, 0.5))
    assert checked.realisation == "modules"
    assert uses(graph, random_masks(graph, 0, 0.5))["macs"] == hooked_macs(small, x)
    prunable = [x for x in graph.layers if graph.why_not_pruned(x) is None]
    assert len(prunable) == len(graph.layers) - 1  # all but the classifier


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_counts_are_of_one_sample(batch: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 4))
    graph = trace(model, torch.randn(batch, 3, 8, 8))
    assert uses(graph)["macs"] == 36 * 9 * 24 + 288 * 4
    for resource in (Macs(), Params(), Memory()):
        assert resource.measure(model, torch.randn(batch, 3, 8, 8)) == uses(graph)[resource.name]


def test_a_measure_that_does_not_divide() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.table = nn.Linear(3, 5), nn.Parameter(torch.randn(1, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + self.a(self.table)

    with pytest.raises(ValueError, match="measure with a batch of 1"):
        Macs().measure(Fixed(), torch.randn(2, 3))


def test_measuring_leaves_the_mode_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
    mean = model[1].running_mean.clone()
    for resource in (Macs(), Params(), Memory()):
        resource.measure(model, torch.randn(2, 3, 8, 8))
    assert model.training
    assert torch.equal(model[1].running_mean, mean)


def test_depthwise_costs_are_linear() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, groups=8, bias=False), nn.Conv2d(16, 4, 1))
    graph = trace(model, torch.randn(1, 3, 8, 8))
    form = Macs().form(graph)
    group = {g.id: k for k, g in enumerate(graph.groups)}
    # 64 positions x 3 inputs, 36 positions x 9 x 2 outputs for each unit, and 2 columns of the last layer
    pairs = {(int(a), int(b)): int(c) for a, b, c in zip(form.rows, form.cols, form.coefs, strict=True)}
    assert form.linear[group["0"]] == 36 * 9 * 2
    assert pairs[tuple(sorted((group["0"], group["0.in"])))] == 64
    assert pairs[tuple(sorted((group["0"], group["2"])))] == 36 * 2
