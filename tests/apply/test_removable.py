"""Networks without some of their residual branches: what they compute and cost, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.removed import Skipped
from qcqp_prune.errors import MaskMismatchError, PlanError, VerificationError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from tests.networks import liven, random_masks
from tests.removable import EVERY, Bottleneck, Nested, Plain, Projected, X


def removed(graph: ChannelGraph, *names: str) -> Masks:
    """Everything kept but the named blocks and what is in them."""
    flat = np.ones(graph.unit_count, np.bool_)
    for b, block in enumerate(graph.blocks):
        if block.name in names:
            flat[block.unit] = False
            for g in graph.emptied_with(b):
                flat[graph.units(g)] = False
            for other in graph.blocks:
                flat[other.unit] &= other.outer != b
    return Masks.from_flat(graph, flat)


@pytest.mark.parametrize("model", EVERY)
def test_identities(model: Callable[[], nn.Module]) -> None:
    net = liven(model())
    graph = qp.trace(net, X, blocks=True)
    for seed in range(3):
        small, checked = qp.shrink_and_verify(net, graph, random_masks(graph, seed))
        assert checked.max_relative_error < 1e-10
        assert {c.resource for c in checked.counts} >= {"macs", "params", "memory"}
        assert not any(p.numel() == 0 for p in small.parameters())


def test_nothing_of_the_branch_is_left() -> None:
    """Neither the norm's constant behind the last convolution nor the sigmoid's half is added."""
    for model in (Plain(), Bottleneck()):
        net = liven(model)
        graph = qp.trace(net, X, blocks=True)
        x = torch.randn(3, 3, 4, 4)
        net.eval()
        wanted = net.head(torch.relu(net.norm(net.stem(x))).mean((2, 3)))
        small = qp.shrink(net, graph, removed(graph, "block"))
        torch.testing.assert_close(small.eval()(x), wanted, rtol=1e-5, atol=1e-5)
        assert isinstance(small.block, Skipped)
        assert not any(name.startswith("block") for name in small.state_dict())
        rewritten = qp.shrink(net, graph, removed(graph, "block"), realisation="graph")
        torch.testing.assert_close(rewritten(x), wanted, rtol=1e-5, atol=1e-5)
        assert not any(name.startswith("block") for name in rewritten.state_dict())


def test_a_block_within_one_that_stays_or_goes() -> None:
    net = liven(Nested())
    graph = qp.trace(net, X, blocks=True)
    inner = qp.shrink(net, graph, removed(graph, "outer.inner"))
    assert isinstance(inner.outer.inner, Skipped)
    both = qp.shrink(net, graph, removed(graph, "outer", "outer.inner"))
    assert isinstance(both.outer, Skipped)
    flat = removed(graph, "outer").flat(graph)
    flat[next(b.unit for b in graph.blocks if b.name == "outer.inner")] = True
    with pytest.raises(MaskMismatchError, match="empty a part of a residual branch"):
        qp.shrink(net, graph, Masks.from_flat(graph, flat))


def test_half_a_branch_is_refused() -> None:
    graph = qp.trace(Bottleneck(), X, blocks=True)
    first, second = graph.blocks[0].groups
    for groups in ([first], [second], [first, second]):
        flat = np.ones(graph.unit_count, np.bool_)
        for g in groups:
            flat[graph.units(g)] = False
        with pytest.raises(MaskMismatchError, match="empty a part of a residual branch"):
            qp.shrink(Bottleneck(), graph, Masks.from_flat(graph, flat))
    flat = np.ones(graph.unit_count, np.bool_)
    flat[graph.blocks[0].unit] = False
    with pytest.raises(MaskMismatchError, match="empty a part of a residual branch"):
        qp.shrink(Bottleneck(), graph, Masks.from_flat(graph, flat))


class Wired(Plain):
    """The branch stands in the model's own forward."""

    def forward(self, x: Tensor) -> Tensor:
        y, b = torch.relu(self.norm(self.stem(x))), self.block
        return self.head((y + b.norm_b(b.b(torch.relu(b.norm_a(b.a(y)))))).mean((2, 3)))


def test_a_branch_in_the_models_own_forward_is_rewritten() -> None:
    net = liven(Wired())
    graph = qp.trace(net, X, blocks=True)
    masks = removed(graph, "block")
    small, checked = qp.shrink_and_verify(net, graph, masks)
    assert checked.realisation == "graph"
    assert "block" in checked.note
    with pytest.raises(VerificationError, match="without blocks"):
        qp.shrink(net, graph, masks, realisation="modules")
    small.train()(torch.randn(4, 3, 4, 4)).sum().backward()


def test_saved_and_loaded(tmp_path: Path) -> None:
    for model in (Plain, Wired):
        net = liven(model())
        graph = qp.trace(net, X, blocks=True)
        masks = removed(graph, "block")
        small = qp.shrink(net, graph, masks)
        folder = qp.save(small, tmp_path / model.__name__, graph=graph, masks=masks)
        again = qp.load(folder, model)
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(again.eval()(x), small.eval()(x))
    with pytest.raises(PlanError, match="belongs to a residual branch"):
        qp.save(net, tmp_path / "dense", graph=graph, masks=masks)


def test_budgets_below_all_branches_are_met() -> None:
    """The branch costs more than the rest: without it a budget can be met that nothing meets with it."""
    net = liven(Plain())
    stem_and_head = 16 * 3 * 9 * 1 + 5
    small, _ = qp.prune(net, X, budgets={"macs": stem_and_head}, solver="scip", blocks=True)
    assert isinstance(small.block, Skipped)
    with pytest.raises(qp.InfeasibleError):
        qp.prune(net, X, budgets={"macs": stem_and_head}, solver="scip")


def test_projected_stages_keep_their_branch() -> None:
    net = liven(Projected())
    graph = qp.trace(net, X, blocks=True)
    assert not graph.blocks
    qp.shrink(net, graph, random_masks(graph, 0))


@pytest.mark.parametrize("first", [True, False])
def test_transformers(first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first)
    net = liven(
        nn.Sequential(
            nn.Linear(4, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3)
        )
    )
    graph = qp.trace(net, torch.randn(2, 5, 4), blocks=True, units=("widths", "heads", "stream"))
    assert len(graph.blocks) == 4
    for seed in range(2):
        assert qp.shrink_and_verify(net, graph, random_masks(graph, seed))[1].max_relative_error < 1e-8


class Recurrent(nn.Module):
    """a(8) -+-> lstm(5) -> b(8) -> + -> head(3)"""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.lstm = nn.Linear(4, 8), nn.LSTM(8, 5, batch_first=True)
        self.b, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return self.head(y + self.b(self.lstm(y)[0]))


def test_a_recurrent_branch() -> None:
    net, x = liven(Recurrent()), torch.randn(2, 5, 4)
    graph = qp.trace(net, x, blocks=True)
    assert len(graph.blocks) == 1
    small = qp.shrink(net, graph, removed(graph, graph.blocks[0].name))
    torch.testing.assert_close(small(x), net.head(torch.tanh(net.a(x))), rtol=1e-5, atol=1e-5)
