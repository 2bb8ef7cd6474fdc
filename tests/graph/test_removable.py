"""Which residual branches may be removed as a whole, what goes with them, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.errors import InvalidOptionError, UnknownLayerError
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.needs import Needs
from qcqp_prune.program.problem import allowed_counts, least_counts
from qcqp_prune.resources import AcceleratorCycles, Macs, Params
from tests.removable import (
    Bottleneck,
    Dense,
    Depthwise,
    Grouped,
    InPlaceInput,
    Nested,
    Plain,
    Projected,
    ReadElsewhere,
    Squeezed,
    Subtracted,
    SubtractedFrom,
    X,
)


def traced(model: nn.Module, **options: object) -> ChannelGraph:
    return qp.trace(model, X, blocks=options.pop("blocks", True), **options)  # type: ignore[arg-type]


def ids(graph: ChannelGraph) -> list[tuple[str, list[str]]]:
    return [(block.name, [graph.groups[g].id for g in block.groups]) for block in graph.blocks]


def why(graph: ChannelGraph) -> str:
    assert not graph.blocks
    return "; ".join(note.text for note in graph.notes)


def test_a_branch_of_two_convolutions() -> None:
    """x(3) -> stem(6) -+-> a(4) -> norm -> b(6) -> norm -> + -> relu -> head(5), planes of 4 x 4."""
    graph = traced(Plain())
    assert ids(graph) == [("block", ["block.a"])]
    assert [(g.id, g.counts()) for g in graph.groups[-1:]] == [("block (block)", [0, 1])]
    assert len(graph.needs) == 2
    counts = np.asarray([g.width for g in graph.groups])
    inner, unit = graph.blocks[0].groups[0], int(graph.group_of_unit[graph.blocks[0].unit])
    counts[[inner, unit]] = 0
    # What is left: the stem 3 x 6 x 9 on 16 positions with its norm, and the head.
    assert Macs().form(graph).evaluate(counts) == 16 * 3 * 6 * 9 + 6 * 5
    assert Params().form(graph).evaluate(counts) == 3 * 6 * 9 + 2 * 6 + 6 * 5 + 5
    counts[unit] = 1
    counts[inner] = 2
    branch = 2 * 6 * 9 * 2 + 2 * 2 + 2 * 6
    assert Params().form(graph).evaluate(counts) == 3 * 6 * 9 + 2 * 6 + 6 * 5 + 5 + branch


def test_blocks_are_off_by_default() -> None:
    assert not qp.trace(Plain(), X).blocks


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Bottleneck, [("block", ["block.a", "block.b"])]),
        (Squeezed, [("block", ["block.expand", "block.squeeze"])]),
        (Depthwise, [("block", ["block.wide"])]),
        (Subtracted, [("block", ["block.a"])]),
        (Nested, [("outer", ["outer.enter"]), ("outer.inner", ["outer.inner.a"])]),
    ],
)
def test_groups_inside(model: Callable[[], nn.Module], expected: list[tuple[str, list[str]]]) -> None:
    assert sorted(ids(traced(model()))) == expected


def test_a_block_within_a_block_needs_it() -> None:
    graph = traced(Nested())
    outer, inner = (next(b for b in graph.blocks if b.name == name) for name in ("outer", "outer.inner"))
    assert inner.outer == graph.blocks.index(outer)
    assert outer.outer is None
    own = [int(graph.group_of_unit[b.unit]) for b in (outer, inner)]
    assert (own[1], own[0]) in graph.needs.pairs
    assert (own[0], own[1]) not in graph.needs.pairs


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Projected, "both of its sides compute something"),
        (ReadElsewhere, "no residual branch"),
        (InPlaceInput, "changes in place what it reads"),
        (SubtractedFrom, "subtracted from"),
        (Dense, "both the inputs and the outputs of block.a"),
    ],
)
def test_branches_that_stay(model: Callable[[], nn.Module], reason: str) -> None:
    assert reason in why(traced(model()))


def test_a_dense_branch_on_a_frozen_stream_is_a_block_of_its_own() -> None:
    graph = traced(Dense(), ignored_layers=["stem"])
    assert ids(graph) == [("block.a", [])]
    counts = np.asarray([g.width for g in graph.groups])
    whole = Macs().form(graph).evaluate(counts)
    counts[graph.group_of_unit[graph.blocks[0].unit]] = 0
    assert whole - Macs().form(graph).evaluate(counts) == 16 * 6 * 6 * 9


def test_ignored_layers_keep_their_branch() -> None:
    graph = traced(Bottleneck(), ignored_layers=["block.b"])
    assert "block.b is in ignored_layers" in why(graph)


def test_floors_hold_while_the_branch_is_there() -> None:
    graph = traced(Plain(), min_keep={"block.a": 3})
    (inner,) = graph.blocks[0].groups
    assert allowed_counts(graph)[inner] == [0, 3, 4]
    assert least_counts(graph)[inner] == 0
    assert traced(Plain(), round_to=4).groups[inner].counts() == [0, 4]
    assert traced(Plain(), min_keep={"block.a": 4}).groups[inner].counts() == [0, 4]


def test_groups_of_equal_counts_are_empty_together() -> None:
    graph = traced(Grouped())
    tied = [g for g, group in enumerate(graph.groups) if group.tie is not None]
    assert tied
    assert set(tied) <= set(graph.blocks[0].groups)


def test_names_and_globs() -> None:
    assert len(traced(Nested(), blocks="outer.inner").blocks) == 1
    assert len(traced(Nested(), blocks=["outer"]).blocks) == 2
    with pytest.raises(UnknownLayerError, match="names no residual branch"):
        traced(Plain(), blocks="blok")
    with pytest.raises(InvalidOptionError, match="give True"):
        traced(Plain(), blocks=3)
    with pytest.raises(InvalidOptionError, match="at once"):
        traced(Plain(), sharing="free")
    with pytest.raises(InvalidOptionError, match="at once"):
        traced(Plain(), columns=True)


def test_a_graph_with_blocks_is_written_and_read() -> None:
    graph = traced(Nested())
    again = ChannelGraph.from_json(graph.to_json())
    assert again.blocks == graph.blocks
    assert again.needs == graph.needs
    assert again.fingerprint == graph.fingerprint != qp.trace(Nested(), X).fingerprint


def test_cycles_and_scores_go_with_the_branch() -> None:
    """A depthwise convolution on the stream inside the branch costs and is worth something only while that is there."""
    model = Depthwise()
    graph = traced(model)
    counts = np.asarray([g.width for g in graph.groups])
    unit, (inner,) = int(graph.group_of_unit[graph.blocks[0].unit]), graph.blocks[0].groups
    counts[[unit, inner]] = 0
    # Left: the stem, ceil(3 / 4) ceil(6 / 4) on 16 positions, and the head, ceil(6 / 4) ceil(5 / 4) on one.
    assert AcceleratorCycles(4, 4).form(graph).evaluate(counts) == 16 * 2 + 2 * 2
    mask = np.ones(graph.unit_count, np.bool_)
    mask[graph.blocks[0].unit] = False
    mask[graph.units(inner)] = False
    worth = qp.Magnitude()(model, graph).evaluate(mask)
    left = [w.detach().double() for w in (model.stem.weight, model.head.weight)]
    assert worth == pytest.approx(sum(float(w.abs().sum() / w.norm()) for w in left), rel=1e-6)


def test_needs() -> None:
    """Groups 0 and 1 need each other, 2 needs 1, 3 is equal to 2."""
    needs = Needs(((0, 1), (1, 0), (2, 1)))
    ties = [0, 1, 2, 2]
    assert [needs.hold(n) for n in ([0, 0, 0, 5], [1, 0, 0, 0], [0, 0, 1, 1])] == [True, False, False]
    assert needs.families(ties) == ((0, 1), (2, 3))
    assert needs.settled([[0, 1], [0, 2], [1, 2], [1, 2]], ties) == [[1], [2], [1, 2], [1, 2]]
    assert needs.settled([[0], [0, 2], [0, 2], [0, 2]], ties) == [[0], [0], [0], [0]]
    assert needs.completed([0, 0, 1, 1], [[0, 3], [0, 2], [0, 1], [0, 1]], ties) == [3, 2, 1, 1]


def test_transformers() -> None:
    for first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=first)
        model = nn.Sequential(
            nn.Linear(4, 8), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(8, 3)
        )
        graph = qp.trace(model, torch.randn(2, 5, 4), blocks=True)
        assert [block.name for block in graph.blocks] == ["1.layers.0.self_attn", "1.layers.0"]


def test_relu_of_a_sum_is_looked_through() -> None:
    graph = traced(Plain())
    assert (graph.blocks[0].module, graph.blocks[0].after) == ("block", "relu")


class Unlike(nn.Module):
    """The identity is a slice of the stem's channels: the sum is no sum of like tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.head = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 1, 3, padding=1),
            nn.Linear(6, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.stem(x))
        return self.head((y + self.a(y)).mean((2, 3)))


def test_a_broadcast_branch_stays() -> None:
    assert "no residual branch" in why(traced(Unlike()))
