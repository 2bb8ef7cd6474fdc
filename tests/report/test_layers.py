"""The table of layers, against numbers worked out by hand and against the network that was really cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from qcqp_prune.apply.shrink import shrink
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.trace import trace
from qcqp_prune.report import LayerRow, layer_rows, other_parameters
from qcqp_prune.report.layers import KEPT_BY_CHOICE


class Hand(nn.Module):
    """a: 3 -> 4 channels, 3 x 3, bias, 8 x 8 pixels; b: 4 -> 6, 1 x 1; head: 6 -> 5, bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.b = nn.Conv2d(4, 6, 1, bias=False)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(torch.relu(self.bn(self.a(x)))).mean((2, 3)))


class Mixed(nn.Module):
    """Grouped, depthwise with multiplier 2, transposed and tied layers, and one that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(8, 16, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(16, 6, 2, stride=2)
        self.twice = nn.Conv2d(6, 6, 1)
        self.tied = nn.Conv2d(6, 6, 1)
        self.tied.weight = self.twice.weight
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.depthwise(torch.relu(self.grouped(self.a(x)))))
        x = torch.relu(self.twice(x)) + x
        x = torch.relu(self.twice(x)) + self.tied(x)
        return self.head(x.mean((2, 3)))


def masks_of(graph: ChannelGraph, counts: dict[str, int]) -> Masks:
    """Keep the last ``counts[g]`` units of the groups named, all of the others."""
    flat = np.ones(graph.unit_count, np.bool_)
    for k, group in enumerate(graph.groups):
        flat[graph.units(k)] = np.arange(group.width) >= group.width - counts.get(group.id, group.width)
    return Masks.from_flat(graph, flat)


def test_numbers_worked_out_by_hand() -> None:
    graph = trace(Hand(), torch.zeros(1, 3, 8, 8))
    flat = masks_of(graph, {"a": 1}).flat(graph)
    assert layer_rows(graph, flat) == (
        # 64 pixels x 9 x 3 x 4 = 6,912; weight 108 + bias 4
        LayerRow("a", "conv2d", (3, 3), (4, 1), (6912, 1728), (112, 28), None),
        # 64 pixels x 4 x 6 = 1,536
        LayerRow("b", "conv2d", (4, 1), (6, 6), (1536, 384), (24, 6), KEPT_BY_CHOICE),
        LayerRow("head", "linear", (6, 6), (5, 5), (30, 30), (35, 35), "network output"),
    )
    rest = other_parameters(graph, flat)
    assert (rest.before, rest.after) == (8, 2)  # scale and shift of the batch norm


def test_kernel_columns_worked_out_by_hand() -> None:
    graph = trace(Hand(), torch.zeros(1, 3, 8, 8), columns=True)
    rows = layer_rows(graph, masks_of(graph, {"a.columns": 5}).flat(graph))
    # 64 pixels x 3 inputs x 5 of 36 columns; 15 weights and all of 4 biases
    assert rows[0] == LayerRow("a", "conv2d", (3, 3), (4, 4), (6912, 960), (112, 19), None, (36, 5))
    assert rows[1].columns is None


def test_an_ignored_layer_says_so() -> None:
    graph = trace(Hand(), torch.zeros(1, 3, 8, 8), ignored_layers=["b"])
    rows = layer_rows(graph, masks_of(graph, {"a": 1}).flat(graph))
    assert rows[1].why_not == "in ignored_layers (b)"


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_add_up_to_the_network_that_was_cut(batch: int) -> None:
    torch.manual_seed(0)
    model = Mixed()
    x = torch.randn(batch, 3, 6, 6)
    graph = trace(model, x)
    counts = {g.id: max(g.width // 2, 1) for g in graph.groups if g.frozen_reason is None}
    masks = masks_of(graph, counts)
    small = shrink(model, graph, masks)
    rows, rest = layer_rows(graph, masks.flat(graph)), other_parameters(graph, masks.flat(graph))
    for which, network in enumerate((model, small)):
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            network.eval()(x)
        assert sum(r.macs[which] for r in rows) * 2 * batch == counter.get_total_flops()
        total = sum(r.params[which] for r in rows) + (rest.before, rest.after)[which]
        assert total == sum(p.numel() for p in network.parameters())
    assert sum(r.macs[0] for r in rows) > sum(r.macs[1] for r in rows)
    by_name = {r.name: r for r in rows}
    assert by_name["twice@2"].params == (0, 0)  # counted in the first call's row
    for name in ("a", "grouped", "depthwise", "up", "twice", "tied", "head"):
        module = small.get_submodule(name)
        inputs = module.in_features if isinstance(module, nn.Linear) else module.in_channels
        outputs = module.out_features if isinstance(module, nn.Linear) else module.out_channels
        assert (by_name[name].inputs[1], by_name[name].outputs[1]) == (inputs, outputs)
