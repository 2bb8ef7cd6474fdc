"""`ignored_layers`, `round_to`, `min_keep`, and what is written to a file."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.errors import InvalidOptionError, PlanError, UnknownLayerError
from qcqp_prune.graph.channels import SCHEMA_VERSION, ChannelGraph
from qcqp_prune.graph.inputs import make_inputs
from qcqp_prune.graph.trace import trace
from qcqp_prune.models.resnet import BasicBlock
from qcqp_prune.program.problem import allowed_counts
from tests.networks import liven, prune_and_check, random_masks, reasons, widths

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    """x(3) -> stem(8) -> stage.0(12) -> stage.1(20) -> head(4)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.stage = nn.Sequential(nn.Conv2d(8, 12, 3), nn.SiLU(), nn.Conv2d(12, 20, 3))
        self.norm = nn.BatchNorm2d(20)
        self.head = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.stage(torch.tanh(self.stem(x)))).mean((2, 3)))


@pytest.mark.parametrize(
    ("ignored", "left"),
    [
        ("stem", {"stage.0", "stage.2"}),
        (["stem", "stage.2"], {"stage.0"}),
        ("stage", {"stem"}),
        ("stage.*", {"stem"}),
        ("s*", set()),
        ("*.0", {"stem", "stage.2"}),
        (lambda m: m.stem, {"stage.0", "stage.2"}),
        (lambda m: [m.stage, "stem"], set()),
        (lambda m: m, set()),
        ([], {"stem", "stage.0", "stage.2"}),
    ],
)
def test_ignored_layers(ignored: Any, left: set[str]) -> None:
    model = liven(Net())
    graph = trace(model, X, ignored_layers=ignored(model) if isinstance(ignored, Callable) else ignored)
    assert set(widths(graph, free=True)) == left
    for name in {"stem", "stage.0", "stage.2"} - left:
        assert "ignored_layers" in (reasons(graph)[name] or "")
    prune_and_check(model, X, graph, random_masks(graph, 0))


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ("stam", "no layer is called 'stam': did you mean 'stem'"),
        (["stem", "stage.3"], "did you mean 'stage.2'"),
        ("norm", "'norm' is a BatchNorm2d with no convolution or linear layer in it"),
        ("stage.1", "'stage.1' is a SiLU"),
        ("conv*", "no layer is called 'conv"),
        (lambda m: Net().stem, "a Conv2d that is no part of Net"),
    ],
)
def test_unknown_ignored_layers(ignored: Any, message: str) -> None:
    model = Net()
    chosen = ignored(model) if isinstance(ignored, Callable) else ignored
    with pytest.raises(UnknownLayerError, match=message.replace("*", r"\*")):
        trace(model, X, ignored_layers=chosen)


@pytest.mark.parametrize("ignored", [3, [3], None, [None], ["stem", 1.0]])
def test_ignored_layers_of_another_type(ignored: Any) -> None:
    with pytest.raises(InvalidOptionError, match="give modules, names or globs"):
        trace(Net(), X, ignored_layers=ignored)


def counts(graph: ChannelGraph) -> dict[str, list[int]]:
    allowed = allowed_counts(graph)
    return {g.id: a for g, a in zip(graph.groups, allowed, strict=True) if g.frozen_reason is None}


def test_round_to() -> None:
    assert counts(trace(Net(), X, round_to=4)) == {
        "stem": [4, 8],
        "stage.0": [4, 8, 12],
        "stage.2": [4, 8, 12, 16, 20],
    }
    #  8 divides none of 12 and 20: multiples of 8, or all
    graph = trace(Net(), X, round_to=8)
    assert counts(graph) == {"stage.0": [8, 12], "stage.2": [8, 16, 20]}
    assert reasons(graph)["stem"] == "min_keep or round_to leaves none of 8 free"


def test_round_to_by_layer() -> None:
    graph = trace(Net(), X, round_to={"*": 2, "stage.*": 5})
    assert counts(graph)["stem"] == [2, 4, 6, 8]
    assert counts(graph)["stage.0"] == [5, 10, 12]
    with pytest.raises(UnknownLayerError, match="did you mean"):
        trace(Net(), X, round_to={"stag.0": 2})


def test_min_keep() -> None:
    graph = trace(Net(), X, min_keep={"stem": 3, "stage.0": 0.5, "stage.2": 100})
    assert counts(graph) == {"stem": [3, 4, 5, 6, 7, 8], "stage.0": [6, 7, 8, 9, 10, 11, 12]}
    assert reasons(graph)["stage.2"] == "min_keep or round_to leaves none of 20 free"
    assert min(counts(trace(Net(), X, min_keep=0.3))["stage.2"]) == 6
    assert min(counts(trace(Net(), X, min_keep=0))["stem"]) == 1  # a layer never loses all
    both = trace(Net(), X, min_keep=0.3, round_to=4)
    assert counts(both) == {"stem": [4, 8], "stage.0": [4, 8, 12], "stage.2": [8, 12, 16, 20]}


@pytest.mark.parametrize("amount", [0, -1, 1.5, True, "8", None, {"stem": 0}])
def test_round_to_is_a_positive_integer(amount: Any) -> None:
    with pytest.raises(InvalidOptionError, match="positive integer"):
        trace(Net(), X, round_to=amount)


@pytest.mark.parametrize("amount", [-1, 1.5, float("nan"), -0.1, True, "half", {"stem": 2.0}])
def test_min_keep_is_a_number_or_a_share(amount: Any) -> None:
    with pytest.raises(InvalidOptionError, match="share"):
        trace(Net(), X, min_keep=amount)


def test_round_to_counts_channels_of_the_layer_not_units() -> None:
    #  groups of 2: each half keeps equally many, so 4 channels are 2 units of each half
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 8, 1, groups=2), nn.SiLU(), nn.Conv2d(8, 4, 1)
    )
    graph = trace(liven(model), X, round_to=4)
    halves = [g for g in graph.groups if g.tie == "0"]
    assert [(g.width, g.multiple_of) for g in halves] == [(8, 2), (8, 2)]
    small, _ = prune_and_check(model, X, graph, random_masks(graph, 1, 0.5))
    assert small[0].out_channels % 4 == 0
    #  pixel shuffle: 4 channels are one unit
    shuffled = trace(
        nn.Sequential(nn.Conv2d(3, 32, 3), nn.PixelShuffle(2), nn.Conv2d(8, 4, 3)), X, round_to=8
    )
    assert counts(shuffled)["0"] == [2, 4, 6, 8]


def test_round_to_of_every_layer_of_a_concatenation() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 12, 3), nn.Conv2d(20, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1)).mean((2, 3))

    graph = trace(liven(Cat()), X, round_to=4)
    assert counts(graph) == {"a": [4, 8], "b": [4, 8, 12]}


def test_round_to_of_a_zero_padded_stream() -> None:
    #  [4 | 8 | 4] of conv2, of which the middle is the stem's: each part is a multiple of 4, so the whole is
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block, self.head = (
                nn.Conv2d(3, 8, 3),
                BasicBlock(8, 16, stride=2),
                nn.Linear(16, 4),
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(torch.tanh(self.stem(x))).mean((2, 3)))

    model = liven(Padded())
    graph = trace(model, X, round_to=4)
    assert counts(graph) == {
        "stem": [4, 8],
        "block.conv1": [4, 8, 12, 16],
        "block.conv2": [0, 4, 8],
    } or counts(graph)["block.conv2"] == [4, 8]
    small, _ = prune_and_check(model, X, graph, random_masks(graph, 1, 0.5))
    assert small.block.conv2.out_channels % 4 == 0


# -- files --------------------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    model = liven(Net())
    graph = trace(model, X, round_to=2, min_keep={"stem": 3}, ignored_layers="stage.2")
    again = ChannelGraph.from_json(json.loads(json.dumps(graph.to_json())))
    assert again.to_json() == graph.to_json()
    assert again.fingerprint == graph.fingerprint
    assert again.groups == graph.groups
    assert all(np.array_equal(a, b) for a, b in zip(again.axes, graph.axes, strict=True))
    prune_and_check(model, X, again, random_masks(again, 0))
    for a, b in zip(make_inputs(graph, seed=3)[0], make_inputs(again, seed=3)[0], strict=True):
        assert torch.equal(a, b)


def tampered(**changes: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(trace(Net(), X).to_json()))
    return {**data, **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "not a channel graph file"),
        ({"schema": SCHEMA_VERSION}, "not a channel graph file"),
        (tampered(schema=99), "schema 99"),
        (tampered(fingerprint="0" * 64), "does not match its own fingerprint"),
        (tampered(groups=[]), "fingerprint|not a channel graph"),
        (tampered(layers=[]), "does not match its own fingerprint"),
        (tampered(axes="abc"), "not a channel graph file"),
        (tampered(tensors=None), "not a channel graph file"),
        (tampered(groups=[{"id": "stem"}]), "not a channel graph file"),
    ],
)
def test_a_changed_file_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        ChannelGraph.from_json(data)


def test_a_changed_owner_of_a_position_is_refused() -> None:
    data = tampered()
    data["axes"][0][0], data["axes"][0][1] = data["axes"][0][1], data["axes"][0][0]
    with pytest.raises(PlanError, match="fingerprint"):
        ChannelGraph.from_json(data)


def test_the_fingerprint_is_of_the_structure() -> None:
    same = {trace(liven(Net(), seed), X, round_to=r).fingerprint for seed, r in ((0, 1), (1, 1), (1, 4))}
    assert len(same) == 1
    wider = Net()
    wider.stem, wider.stage[0] = nn.Conv2d(3, 9, 3), nn.Conv2d(9, 12, 3)
    assert trace(wider, X).fingerprint not in same
