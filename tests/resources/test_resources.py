"""Resource forms against formulas by hand, and against counts on networks that were really cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.models import LeNet5
from qcqp_prune.program.forms import CountForm, CountFormBuilder
from tests.networks import liven, random_masks

RESOURCES = {"macs": qp.Macs(), "params": qp.Params(), "memory": qp.Memory()}
FLOAT = 4
"""Bytes of a float32."""


def counts_of(graph: qp.ChannelGraph, masks: qp.Masks) -> list[int]:
    return [masks.counts()[g.id] for g in graph.groups]


def lenet5_by_hand(a: int, b: int, c: int) -> dict[str, int]:
    """LeNet-5 with a and b feature maps and c hidden units on 28 x 28 images, 10 classes.

    Maps are 24 x 24 after the first 5 x 5 convolution, 12 x 12 pooled, 8 x 8 after the second, 4 x 4 pooled.
    """
    macs = 24 * 24 * 25 * a + 8 * 8 * 25 * a * b + 16 * b * c + 10 * c
    params = (25 * a + a) + (25 * a * b + b) + (16 * b * c + c) + (10 * c + 10)
    outputs = 24 * 24 * a + 8 * 8 * b + c + 10
    return {"macs": macs, "params": params, "memory": FLOAT * (outputs + params)}


@pytest.fixture(scope="module")
def lenet() -> tuple[nn.Module, qp.ChannelGraph]:
    model = liven(LeNet5())
    return model, qp.trace(model, torch.zeros(1, 1, 28, 28))


def test_the_published_size_of_lenet5() -> None:
    assert lenet5_by_hand(20, 50, 500)["params"] == 431_080  # Han et al. 2015, table 1: 431K


@pytest.mark.parametrize("name", RESOURCES)
def test_lenet5_whole(lenet: tuple[nn.Module, qp.ChannelGraph], name: str) -> None:
    model, graph = lenet
    expected = lenet5_by_hand(20, 50, 500)[name]
    assert RESOURCES[name].form(graph).evaluate([g.width for g in graph.groups]) == expected
    assert RESOURCES[name].measure(model, torch.zeros(1, 1, 28, 28)) == expected


@pytest.mark.parametrize("seed", range(4))
def test_lenet5_cut_at_random(lenet: tuple[nn.Module, qp.ChannelGraph], seed: int) -> None:
    model, graph = lenet
    masks = random_masks(graph, seed)
    small = qp.shrink(model, graph, masks)
    kept = masks.counts()
    expected = lenet5_by_hand(kept["conv1"], kept["conv2"], kept["fc1"])
    for name, resource in RESOURCES.items():
        assert resource.form(graph).evaluate(counts_of(graph, masks)) == expected[name]
        assert resource.measure(small, torch.zeros(1, 1, 28, 28)) == expected[name]


class Blocks(nn.Module):
    """A stem of ``a`` channels, a depthwise 3 x 3, a projection shortcut, batch norms, a classifier; 6 x 6 images."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, stride=2, groups=6)
        self.point = nn.Conv2d(6, 5, 1)
        self.shortcut = nn.Conv2d(6, 5, 1, stride=2, bias=False)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = self.point(torch.relu(self.depthwise(x))) + self.shortcut(x)
        return self.head(F.relu(x).mean((2, 3)))


def blocks_by_hand(a: int, b: int) -> dict[str, int]:
    """``a`` channels of the stem and ``b`` of the sum; 36 positions before the stride and 9 after."""
    macs = 36 * 9 * 3 * a + 9 * 9 * a + 9 * a * b + 9 * a * b + 4 * b
    params = 27 * a + 2 * a + (9 * a + a) + (a * b + b) + a * b + (4 * b + 4)
    outputs = 36 * a + 9 * a + 9 * b + 9 * b + 4
    return {"macs": macs, "params": params, "memory": FLOAT * (outputs + params)}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_counts_are_of_one_sample(batch: int, seed: int) -> None:
    model, example = liven(Blocks()), torch.zeros(batch, 3, 6, 6)
    graph = qp.trace(model, example)
    masks = random_masks(graph, seed)
    small = qp.shrink(model, graph, masks)
    kept = masks.counts()
    channels = {g.id: kept[g.id] for g in graph.groups if g.frozen_reason is None}
    assert channels.keys() == {"stem", "point"}
    whole, part = blocks_by_hand(6, 5), blocks_by_hand(channels["stem"], channels["point"])
    for name, resource in RESOURCES.items():
        form = resource.form(graph)
        assert form.evaluate([g.width for g in graph.groups]) == whole[name]
        assert resource.measure(model, example) == whole[name]
        assert form.evaluate(counts_of(graph, masks)) == part[name]
        assert resource.measure(small, example) == part[name]


class Tied(nn.Module):
    """Two square layers share one weight; each has its own bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 8)
        self.b = nn.Linear(8, 8)
        self.c = nn.Linear(8, 8)
        self.c.weight = self.b.weight
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.c(torch.relu(self.b(torch.relu(self.a(x)))))))


@pytest.mark.parametrize("seed", range(3))
def test_a_tied_parameter_counts_once_and_its_work_twice(seed: int) -> None:
    model, example = liven(Tied()), torch.zeros(1, 3)
    graph = qp.trace(model, example)
    masks = random_masks(graph, seed)
    small = qp.shrink(model, graph, masks)
    n = masks.counts()["a"]
    params = (3 * n + n) + n * n + 2 * n + (2 * n + 2)
    expected = {
        "macs": 3 * n + 2 * n * n + 2 * n,
        "params": params,
        "memory": FLOAT * (3 * n + 2 + params),
    }
    for name, resource in RESOURCES.items():
        assert resource.form(graph).evaluate(counts_of(graph, masks)) == expected[name]
        assert resource.measure(small, example) == expected[name]


def test_memory_counts_each_element_at_its_own_size() -> None:
    model, example = LeNet5().double(), torch.zeros(1, 1, 28, 28, dtype=torch.float64)
    graph = qp.trace(model, example)
    whole = [g.width for g in graph.groups]
    assert qp.Memory().form(graph).evaluate(whole) == 2 * lenet5_by_hand(20, 50, 500)["memory"]
    assert qp.Memory().measure(model, example) == 2 * lenet5_by_hand(20, 50, 500)["memory"]


def test_measuring_leaves_the_mode_and_the_statistics_alone() -> None:
    model = liven(Blocks()).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for resource in RESOURCES.values():
        resource.measure(model, torch.randn(2, 3, 6, 6))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", RESOURCES)
def test_forms_survive_json(lenet: tuple[nn.Module, qp.ChannelGraph], name: str) -> None:
    _, graph = lenet
    form = RESOURCES[name].form(graph)
    again = CountForm.from_json(json.loads(json.dumps(form.to_json())))
    assert again.constant == form.constant
    assert again.products == form.products
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = [int(rng.integers(0, g.width + 1)) for g in graph.groups]
        assert again.evaluate(counts) == form.evaluate(counts)


def test_a_builder_adds_equal_products_up() -> None:
    builder = CountFormBuilder(3)
    builder.add_constant(7)
    builder.add_counts(2, {0: 3})
    builder.add_product(5, {0: 2}, {1: 1, 2: 1})
    builder.add_product(1, {1: 4, 2: 4}, {0: 1})
    form = builder.build()
    assert len(form.products) == 1
    for x, y, z in [(0, 0, 0), (1, 2, 3), (4, 0, 5)]:
        assert form.evaluate([x, y, z]) == 7 + 6 * x + 10 * x * (y + z) + 4 * (y + z) * x
    assert not form.is_linear


class Channels:
    """A user's own resource: outputs of all layers, to be stored in two bytes each."""

    name = "channels"
    unit = "channels"

    def form(self, graph: qp.ChannelGraph) -> CountForm:
        builder = CountFormBuilder(len(graph.groups))
        for layer in graph.layers:
            builder.add_counts(1, graph.axis_counts(layer.out_axis))
        return builder.build()

    def measure(self, module: nn.Module, example_inputs: Any) -> int:
        return sum(m.weight.shape[0] for m in module.modules() if isinstance(m, nn.Conv2d | nn.Linear))


def test_a_resource_of_the_users_own(lenet: tuple[nn.Module, qp.ChannelGraph]) -> None:
    model, graph = lenet
    problem = qp.PruningProblem.build(
        graph, qp.Magnitude()(model, graph), {"channels": 200, "macs": "60%"}, resources=[Channels()]
    )
    report = qp.solve(problem, "block_coordinate", options=qp.SolveOptions(work_limit=5))
    small, verification = qp.shrink_and_verify(model, graph, report.masks, resources=[Channels()])
    used = small.conv1.out_channels + small.conv2.out_channels + small.fc1.out_features + 10
    assert used <= 200
    assert report.usage["channels"].dense == 20 + 50 + 500 + 10
    count = next(c for c in verification.counts if c.resource == "channels")
    assert count.predicted == count.measured == used == report.usage["channels"].used


def test_a_measure_that_disagrees_is_found_out(lenet: tuple[nn.Module, qp.ChannelGraph]) -> None:
    class Wrong(Channels):
        def measure(self, module: nn.Module, example_inputs: Any) -> int:
            return super().measure(module, example_inputs) + 1

    model, graph = lenet
    with pytest.raises(qp.VerificationError, match=r"channels: predicted .* report it with the model"):
        qp.shrink(model, graph, random_masks(graph, 0), resources=[Wrong()])


def test_a_resource_that_falls_when_more_is_kept_is_refused(lenet: tuple[nn.Module, qp.ChannelGraph]) -> None:
    class Falling(Channels):
        def form(self, graph: qp.ChannelGraph) -> CountForm:
            return CountForm(1000, -np.ones(len(graph.groups), np.int64))

    model, graph = lenet
    with pytest.raises(qp.InvalidBudgetError, match="'channels' has a negative coefficient"):
        qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"channels": 10}, resources=[Falling()])
