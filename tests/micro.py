"""What every test of a micro-network does: grouping as stated by hand, then cut by masks and by an exact solver."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.channels import ChannelGraph
from tests.networks import liven, prune_and_check, random_masks, uses


class Net(nn.Module):
    """Named layers, and a forward that is given as a function of them and the inputs."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body = forward

    def forward(self, *x: Tensor) -> Any:
        return self.body(self, *x)


def conv(a: int, b: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **options)


def verified(
    model: nn.Module,
    x: Any,
    *,
    free: Mapping[str, int],
    kept: Mapping[str, str],
    macs: int,
    mixes: bool = False,
    options: Mapping[str, Any] | None = None,
) -> ChannelGraph:
    """Check a network against what was worked out by hand, and cut it in every way.

    Args:
        free: units of each group that may be pruned.
        kept: a part of the reason of each group that may not.
        macs: of the whole network, from the textbook.
        mixes: see ``prune_and_check``.
        options: of ``trace``.
    """
    graph = qp.trace(liven(model), x, **(options or {}))
    assert {g.id: g.width for g in graph.groups if g.frozen_reason is None} == dict(free)
    reasons = {g.id: g.frozen_reason for g in graph.groups if g.frozen_reason is not None}
    assert reasons.keys() == kept.keys(), reasons
    assert all(kept[name] in reason for name, reason in reasons.items()), reasons
    assert uses(graph)["macs"] == macs
    for seed, realisation in enumerate(("auto", "auto", "graph")):
        masks = random_masks(graph, seed)
        prune_and_check(model, x, graph, masks, realisation=realisation, mixes=mixes, live=False)
    problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
    _, checked = prune_and_check(model, x, graph, qp.solve(problem, "highs").masks, mixes=mixes)
    measured = {count.resource: count.measured for count in checked.counts}["macs"]
    assert 0.2 * macs < measured <= macs // 2
    return graph


def groups(graph: ChannelGraph, layer: str, side: str = "out") -> list[str]:
    """The group of each position of a layer's outputs or inputs."""
    found = next(x for x in graph.layers if x.name == layer)
    units = graph.axes[found.out_axis if side == "out" else found.in_axis]
    return [graph.groups[g].id for g in graph.group_of_unit[units]]


def units(graph: ChannelGraph, layer: str, side: str = "out") -> list[int]:
    """The unit of each position, numbered by first appearance along it."""
    found = next(x for x in graph.layers if x.name == layer)
    flat = graph.axes[found.out_axis if side == "out" else found.in_axis]
    seen: dict[int, int] = {}
    return [seen.setdefault(int(u), len(seen)) for u in flat]


def same(graph: ChannelGraph, first: tuple[str, str], second: tuple[str, str]) -> bool:
    """Whether two sides of layers hold the same units in the same order."""
    axes = []
    for layer, side in (first, second):
        found = next(x for x in graph.layers if x.name == layer)
        axes.append(graph.axes[found.out_axis if side == "out" else found.in_axis])
    return bool(np.array_equal(*axes))
