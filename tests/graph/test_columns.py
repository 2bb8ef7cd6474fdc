"""Kernel columns as units: which layers get them, what they are linked with, and what they cost."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.trace import trace
from qcqp_prune.models import resnet20
from tests.networks import keep, uses

X = torch.zeros(1, 2, 5, 5)


class Chain(nn.Module):
    """x (2, 5, 5) - first 3x3 -> 3 - norm, relu - second 1x2, stride 2 -> 4 (output)"""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 4, (1, 2), stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.norm(self.first(x))))


def pairs(graph: ChannelGraph) -> set[tuple[str, str]]:
    """Links as ``group[unit]`` names."""
    names = [f"{g.id}[{k}]" for g in graph.groups for k in range(g.width)]
    return {
        (names[w], names[p])
        for w, p in zip(graph.links.wholes.tolist(), graph.links.parts.tolist(), strict=True)
    }


def columns_by_layer(graph: ChannelGraph) -> dict[str, int]:
    """Columns of each filter, of the layers that have columns."""
    return {
        x.name: len(graph.axes[x.columns]) // len(graph.axes[x.out_axis])
        for x in graph.layers
        if x.columns is not None
    }


def notes(graph: ChannelGraph) -> str:
    return "\n".join(note.text for note in graph.notes if note.where == "columns")


def test_each_filter_is_linked_with_its_columns() -> None:
    graph = trace(Chain(), X, columns=True)
    assert [(g.id, g.width) for g in graph.groups][-2:] == [("first.columns", 27), ("second.columns", 8)]
    expected = {(f"first[{j}]", f"first.columns[{9 * j + t}]") for j in range(3) for t in range(9)}
    expected |= {(f"second[{j}]", f"second.columns[{2 * j + t}]") for j in range(4) for t in range(2)}
    assert pairs(graph) == expected
    assert notes(graph) == ""


def test_a_column_is_one_kernel_position_of_one_filter() -> None:
    graph = trace(Chain(), X, columns=True)
    spec = next(t for t in graph.tensors if t.name == "first.weight")
    mask = keep(graph, first_columns=[0, 5, 13, 26]).flat(graph)
    assert np.argwhere(graph.kernel_mask(spec, mask)).tolist() == [[0, 0], [0, 5], [1, 4], [2, 8]]


def test_counts_by_hand() -> None:
    graph = trace(Chain(), X, columns=True)
    plain = trace(Chain(), X)
    assert uses(graph) == uses(plain)
    # filters 0 and 2 of first with 5 columns, second with 3 of its 8; second gives 3 x 2 outputs
    masks = keep(graph, first=[0, 2], first_columns=[0, 1, 2, 3, 18], second_columns=[0, 1, 7])
    used = uses(graph, masks)
    assert used["macs"] == 25 * 2 * 5 + 6 * 2 * 3
    assert used["params"] == (2 * 5 + 2) + 2 * 2 + 2 * 3
    assert used["memory"] == 4 * (25 * 2 + 6 * 4) + 4 * used["params"]


def test_off_unless_asked_for() -> None:
    graph = trace(Chain(), X)
    assert len(graph.links) == 0
    assert columns_by_layer(graph) == {}
    assert trace(Chain(), X, columns=False).fingerprint == graph.fingerprint
    assert trace(Chain(), X, columns=True).fingerprint != graph.fingerprint


def test_by_name_or_glob() -> None:
    assert columns_by_layer(trace(Chain(), X, columns="sec*")) == {"second": 2}
    assert columns_by_layer(trace(Chain(), X, columns=["first", "second"])) == {"first": 9, "second": 2}
    with pytest.raises(qp.UnknownLayerError, match="did you mean 'first'"):
        trace(Chain(), X, columns=["fist"])


@pytest.mark.parametrize("wrong", [3, None, [1], [""]])
def test_other_values_are_refused(wrong: object) -> None:
    with pytest.raises(qp.InvalidOptionError, match="give True for everything that can have it"):
        trace(Chain(), X, columns=wrong)  # type: ignore[arg-type]


def test_survives_json() -> None:
    graph = trace(Chain(), X, columns=True)
    again = ChannelGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.fingerprint == graph.fingerprint
    assert pairs(again) == pairs(graph)
    assert uses(again) == uses(graph)


class Zoo(nn.Module):
    """Layers in a row, each of a kind that has no columns, between two convolutions that have them."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv2d(2, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 3, padding=1)
        self.round = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.sub = Same(4, 4, 3)
        self.hooked = nn.Conv2d(4, 4, 3, padding=1)
        self.hooked.register_forward_hook(lambda module, args, out: None)
        self.read = nn.Conv2d(4, 4, 3, padding=1)
        self.end = nn.Conv2d(4, 3, 2)
        self.kept = nn.Conv2d(3, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.round(self.up(self.grouped(self.one(self.start(x)))))
        x = self.read(self.hooked(self.sub(self.twice(self.twice(x)))))
        return self.kept(self.end(x * self.read.weight.mean()))


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.pad(x, (1, 1, 1, 1)))


def test_layers_that_have_none_say_why() -> None:
    graph = trace(Zoo(), X, columns=True, ignored_layers=["kept"])
    assert columns_by_layer(graph) == {"start": 9, "end": 4}
    said = {line.rpartition(": ")[2]: line for line in notes(graph).splitlines()}
    for layer, word in {
        "one": "1 x 1",
        "grouped": "grouped",
        "up": "conv_transpose2d",
        "round": "circular",
        "twice, twice@2": "more than once",
        "sub": "plain nn.Conv2d",
        "hooked": "hooks",
        "read": "read elsewhere",
        "kept": "ignored_layers",
    }.items():
        assert word in said[layer]
    assert len(said) == 9


def test_a_linear_layer_asked_for_by_name_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    assert notes(trace(model, X, columns=True)) == ""
    assert "a linear has no kernel columns: 2" in notes(trace(model, X, columns="*"))


class Stream(nn.Module):
    """x - a ->+-> (stream of 3) - head; b reads the stream and adds to it; ``side`` is added too."""

    def __init__(self, side: nn.Module) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 3, 3, padding=1)
        self.b = nn.Conv2d(3, 3, 3, padding=1)
        self.side = side
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x) + self.side(x)
        return self.head(y + self.b(y))


def test_a_stream_channel_is_a_whole_of_the_columns_of_all_that_write_it() -> None:
    graph = trace(Stream(nn.Conv2d(2, 3, 3, padding=1)), X, columns=True)
    parts = {p for whole, p in pairs(graph) if whole == "a[1]"}
    assert parts == {f"{layer}.columns[{9 + t}]" for layer in ("a", "b", "side") for t in range(9)}
    assert len(graph.links) == 3 * 27


def test_an_identity_shortcut_adds_no_parts() -> None:
    graph = trace(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), Add(nn.Conv2d(3, 3, 3, padding=1))), X, columns=True
    )
    assert columns_by_layer(graph) == {"0": 9, "1.body": 9}


class Add(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def test_the_filters_of_a_projection_are_columns_where_others_write_the_same_stream() -> None:
    graph = trace(Stream(nn.Conv2d(2, 3, 1)), X, columns=True)
    assert columns_by_layer(graph) == {"a": 9, "side": 1, "b": 9}
    assert ("a[2]", "side.columns[2]") in pairs(graph)
    said = notes(graph)
    assert "its kernel is 1 x 1: head\n" in said
    assert "one column for each filter" in said
    # the projection keeps 2 of its 3 filters, in a stream of 3
    used, dense = uses(graph, keep(graph, side_columns=[0, 2])), uses(graph)
    assert dense["macs"] - used["macs"] == 25 * 2
    assert dense["params"] - used["params"] == 2


def test_a_layer_that_was_not_asked_for_takes_part_with_its_filters() -> None:
    graph = trace(Stream(nn.Conv2d(2, 3, 3, padding=1)), X, columns="b")
    assert columns_by_layer(graph) == {"a": 1, "side": 1, "b": 9}
    used, dense = uses(graph, keep(graph, a_columns=[1])), uses(graph)
    assert dense["macs"] - used["macs"] == 25 * 9 * 2 * 2


@pytest.mark.parametrize(
    "side",
    [nn.ConvTranspose2d(2, 3, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect")],
)
def test_none_where_another_writer_of_the_stream_can_have_none(side: nn.Module) -> None:
    graph = trace(Stream(side), X, columns=True)
    assert columns_by_layer(graph) == {}
    assert "also written by side" in notes(graph)


def test_writers_of_a_stream_that_is_kept_anyway_do_not_matter() -> None:
    graph = trace(Stream(nn.ConvTranspose2d(2, 3, 3, padding=1)), X, columns=True, ignored_layers=["side"])
    assert columns_by_layer(graph) == {"a": 9, "b": 9}


def test_a_depthwise_convolution_passes_on_what_others_write() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1))
    graph = trace(model, X, columns=True)
    assert columns_by_layer(graph) == {"0": 9}
    assert {p for whole, p in pairs(graph) if whole == "0[0]"} == {f"0.columns[{t}]" for t in range(9)}


def test_resnet20_has_as_many_columns_as_kernel_positions_and_filters() -> None:
    graph = trace(resnet20(), torch.zeros(1, 3, 32, 32), columns=True)
    assert sum(len(graph.axes[x.columns]) for x in graph.layers if x.columns is not None) == 9 * (
        16 + 6 * 16 + 6 * 32 + 6 * 64
    )
    # strict sharing: the first stage's 16 stream channels run through all stages, written by 1 + 9 convolutions
    stream = graph.axes[graph.layers[0].out_axis]
    assert all((graph.links.wholes == unit).sum() == 9 * 10 for unit in stream.tolist())
