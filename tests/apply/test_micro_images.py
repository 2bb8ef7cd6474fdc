"""Small networks of images that break other tools, each with its picture; an arrow that two lines share is a tie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qcqp_prune.apply.shrink import shrink
from qcqp_prune.errors import MaskMismatchError
from tests.micro import Net, conv, groups, same, units, verified
from tests.networks import keep, liven

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
HEAD = {"a.in": "network input", "head": "network output"}
PLANE = 36


def test_pixel_shuffle() -> None:
    #  x(3,6,6) -> a(16,6,6) -> shuffle -> (4,12,12) -> b(5) -> mean -> head(2)
    #  channels 4k .. 4k+3 of a are channel k of b's input: four of a's channels are one unit
    model = Net(
        lambda m, x: m.head(m.b(m.up(torch.tanh(m.a(x)))).mean((2, 3))),
        a=conv(3, 16),
        up=nn.PixelShuffle(2),
        b=conv(4, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * 3 * 16 + 9 * 4 * PLANE * 4 * 5 + 5 * 2
    graph = verified(model, X, free={"a": 4, "b": 5}, kept=HEAD, macs=macs)
    assert units(graph, "a") == [k // 4 for k in range(16)]


def test_chunk_and_cat() -> None:
    #  x(3) -> a(8) -chunk-> u(4), v(4) -> [tanh v | u] -> b(5) -> mean -> head(2)
    #  a's halves stay halves: as many of the first as of the second; b reads them crosswise
    def forward(m, x):
        u, v = m.a(x).chunk(2, 1)
        return m.head(m.b(torch.cat([torch.tanh(v), u], 1)).mean((2, 3)))

    model = Net(forward, a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 8 + 8 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 4, "a#2": 4, "b": 5}, kept=HEAD, macs=macs)
    assert groups(graph, "a") == ["a"] * 4 + ["a#2"] * 4
    assert groups(graph, "b", "in") == ["a#2"] * 4 + ["a"] * 4
    assert len({g.tie for g in graph.groups if g.id in ("a", "a#2")}) == 1


def test_slice_and_cat() -> None:
    #  x(3) -> a(8) ─┬─ [:3] -> b(4) ─┬─ cat -> c(5) -> mean -> head(2)
    #                └─ [3:] ─────────┘
    def forward(m, x):
        y = torch.tanh(m.a(x))
        return m.head(m.c(torch.cat([m.b(y[:, :3]), y[:, 3:]], 1)).mean((2, 3)))

    model = Net(forward, a=conv(3, 8), b=conv(3, 4), c=conv(9, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 8 + 3 * 4 + 9 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 3, "a#2": 5, "b": 4, "c": 5}, kept=HEAD, macs=macs)
    assert groups(graph, "a") == ["a"] * 3 + ["a#2"] * 5
    assert groups(graph, "b", "in") == ["a"] * 3
    assert groups(graph, "c", "in") == ["b"] * 4 + ["a#2"] * 5


def test_depthwise_with_multiplier_2() -> None:
    #  x(3) -> a(4) -> depthwise(8): channels 2k, 2k+1 see channel k -> b(5) -> mean -> head(2)
    #  one unit: a's channel k and the depthwise layer's 2k and 2k+1
    model = Net(
        lambda m, x: m.head(m.b(torch.tanh(m.wide(torch.tanh(m.a(x))))).mean((2, 3))),
        a=conv(3, 4),
        wide=conv(4, 8, groups=4),
        b=conv(8, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * (3 * 4 + 8 + 8 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 4, "b": 5}, kept=HEAD, macs=macs)
    assert units(graph, "wide") == [0, 0, 1, 1, 2, 2, 3, 3]
    assert groups(graph, "b", "in") == ["a"] * 8


def test_residual_onto_the_raw_input() -> None:
    #  x(3) ─┬─> a(8) -> b(3) ─(+)─> c(5) -> mean -> head(2)
    #        └──────────────────┘
    #  what b writes is added to the input, which is not ours to shrink; a and c are free
    model = Net(
        lambda m, x: m.head(m.c(x + m.b(torch.tanh(m.a(x)))).mean((2, 3))),
        a=conv(3, 8),
        b=conv(8, 3),
        c=conv(3, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * (3 * 8 + 8 * 3 + 3 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 8, "c": 5}, kept=HEAD, macs=macs)
    assert groups(graph, "b") == groups(graph, "c", "in") == groups(graph, "a", "in") == ["a.in"] * 3


def test_channel_shuffle() -> None:
    #  x(3) -> a(8) -> view(2 rows, 4 columns) -> transpose -> view(8) -> b(5) -> mean -> head(2)
    #  only whole columns leave a rectangle: channels k and 4+k of a are one unit, and stand side by side for b
    def forward(m, x):
        y = torch.tanh(m.a(x))
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.head(m.b(y).mean((2, 3)))

    model = Net(forward, a=conv(3, 8), b=conv(8, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 8 + 8 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 4, "b": 5}, kept=HEAD, macs=macs)
    assert units(graph, "a") == [0, 1, 2, 3, 0, 1, 2, 3]
    assert units(graph, "b", "in") == [0, 0, 1, 1, 2, 2, 3, 3]


def test_permute_then_flatten() -> None:
    #  x(3,6,6) -> a(6,6,6) -> permute (6,6,6 channels last) -> flatten(216) -> head(2)
    #  column p of the head reads channel p mod 6
    model = Net(
        lambda m, x: m.head(torch.tanh(m.a(x)).permute(0, 2, 3, 1).flatten(1)),
        a=conv(3, 6),
        head=nn.Linear(216, 2),
    )
    graph = verified(model, X, free={"a": 6}, kept=HEAD, macs=9 * PLANE * 3 * 6 + 216 * 2)
    assert units(graph, "head", "in") == [p % 6 for p in range(216)]


def test_broadcast_addition() -> None:
    #  x(3) ─┬─> a(6,6,6) ──────────────(+)─(+)─> c(5) -> mean -> head(2)
    #        ├─> b(6,6,6) -> mean -> (6,1,1)┘  │
    #        └─> d(1,6,6) ─────────────────────┘
    #  a and b are one group; d's one channel goes to all channels, so it stays
    def forward(m, x):
        y = m.a(x) + m.b(x).mean((2, 3), keepdim=True) + m.d(x)
        return m.head(m.c(torch.tanh(y)).mean((2, 3)))

    model = Net(forward, a=conv(3, 6), b=conv(3, 6), d=conv(3, 1), c=conv(6, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 6 + 3 * 6 + 3 * 1 + 6 * 5) + 5 * 2
    kept = {**HEAD, "d": "a single channel is broadcast over many"}
    graph = verified(model, X, free={"a": 6, "c": 5}, kept=kept, macs=macs)
    assert same(graph, ("a", "out"), ("b", "out"))
    assert same(graph, ("a", "out"), ("c", "in"))


def test_spatial_attention() -> None:
    #  x(3) -> a(6) ─┬─> mean, max over channels -> (2) -> gate(1) -> sigmoid ─(*)─> b(5) -> mean -> head(2)
    #                └──────────────────────────────────────────────────────────┘
    #  the mean is over kept channels; the gate's two inputs and one output stay
    def forward(m, x):
        y = torch.tanh(m.a(x))
        pooled = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return m.head(m.b(y * torch.sigmoid(m.gate(pooled))).mean((2, 3)))

    model = Net(forward, a=conv(3, 6), gate=conv(2, 1), b=conv(6, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 6 + 2 * 1 + 6 * 5) + 5 * 2
    kept = {**HEAD, "gate": "broadcast over many", "gate.in": "carries no channels"}
    verified(model, X, free={"a": 6, "b": 5}, kept=kept, macs=macs, mixes=True)


def test_concat_of_split_of_concat() -> None:
    #  x(3) ─┬─> a(4) ─┬─ cat(8) -split-> p(6), q(2) -> [q | tanh p] -> c(5) -> mean -> head(2)
    #        └─> b(4) ─┘
    #  p is all of a and the first half of b, q the second half of b
    def forward(m, x):
        p, q = torch.split(torch.cat([m.a(x), m.b(x)], 1), [6, 2], 1)
        return m.head(m.c(torch.cat([q, torch.tanh(p)], 1)).mean((2, 3)))

    model = Net(forward, a=conv(3, 4), b=conv(3, 4), c=conv(8, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 4 + 3 * 4 + 8 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 4, "b": 2, "b#2": 2, "c": 5}, kept=HEAD, macs=macs)
    assert groups(graph, "c", "in") == ["b#2"] * 2 + ["a"] * 4 + ["b"] * 2


def test_two_convolutions_that_share_a_weight() -> None:
    #  x(3) -> a(6) -> b(6) -> c(6) -> mean -> head(2);  c.weight is b.weight, each has a bias of its own
    #  b's inputs are c's inputs and c's outputs are b's: a, b and c have one set of channels
    model = Net(
        lambda m, x: m.head(m.c(torch.tanh(m.b(torch.tanh(m.a(x))))).mean((2, 3))),
        a=conv(3, 6),
        b=conv(6, 6),
        c=conv(6, 6),
        head=nn.Linear(6, 2),
    )
    model.c.weight = model.b.weight
    macs = 9 * PLANE * (3 * 6 + 6 * 6 + 6 * 6) + 6 * 2
    graph = verified(model, X, free={"a": 6}, kept=HEAD, macs=macs)
    spec = next(t for t in graph.tensors if t.name == "b.weight")
    assert spec.aliases == ("c.weight",)
    small = shrink(model, graph, keep(graph, a=[0, 3]))
    assert small.c.weight is small.b.weight


def test_residual_with_different_strides() -> None:
    #  x(3,6,6) -> a(6,6,6) ─┬─> b(8,3,3) stride 2, 3x3 ─(+)─> c(5) -> mean -> head(2)
    #                        └─> s(8,3,3) stride 2, 1x1 ──┘
    def forward(m, x):
        y = torch.tanh(m.a(x))
        return m.head(m.c(torch.tanh(m.b(y) + m.s(y))).mean((2, 3)))

    model = Net(
        forward,
        a=conv(3, 6),
        b=conv(6, 8, stride=2),
        s=conv(6, 8, 1, stride=2),
        c=conv(8, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * 3 * 6 + 9 * (9 + 1) * 6 * 8 + 9 * 9 * 8 * 5 + 5 * 2
    graph = verified(model, X, free={"a": 6, "b": 8, "c": 5}, kept=HEAD, macs=macs)
    assert same(graph, ("b", "out"), ("s", "out"))


def test_squeeze_and_excitation() -> None:
    #  x(3) -> a(8) ─┬─> mean(8) -> down(3) -> up(8) -> sigmoid ─(*)─> b(5) -> mean -> head(2)
    #                └────────────────────────────────────────────┘
    def forward(m, x):
        y = torch.tanh(m.a(x))
        gate = torch.sigmoid(m.up(F.silu(m.down(y.mean((2, 3))))))
        return m.head(m.b(y * gate[:, :, None, None]).mean((2, 3)))

    model = Net(
        forward,
        a=conv(3, 8),
        down=nn.Linear(8, 3),
        up=nn.Linear(3, 8),
        b=conv(8, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * (3 * 8 + 8 * 5) + 8 * 3 + 3 * 8 + 5 * 2
    graph = verified(model, X, free={"a": 8, "down": 3, "b": 5}, kept=HEAD, macs=macs)
    assert same(graph, ("a", "out"), ("up", "out"))
    assert same(graph, ("a", "out"), ("down", "in"))


def test_transposed_convolution_with_groups() -> None:
    #  x(3,6,6) -> a(8,6,6) -> up: 2 groups of 4 -> 3 each, stride 2, padded output (6,12,12) -> b(5) -> mean -> head(2)
    #  within each group units are free, and both groups keep equally many, of a and of up
    up = nn.ConvTranspose2d(8, 6, 3, stride=2, padding=1, output_padding=1, groups=2)
    model = Net(
        lambda m, x: m.head(m.b(torch.tanh(m.up(torch.tanh(m.a(x))))).mean((2, 3))),
        a=conv(3, 8),
        up=up,
        b=conv(6, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * 3 * 8 + 9 * PLANE * 2 * 4 * 3 + 9 * 4 * PLANE * 6 * 5 + 5 * 2
    free = {"a": 4, "a#2": 4, "up": 3, "up#2": 3, "b": 5}
    graph = verified(model, X, free=free, kept=HEAD, macs=macs)
    ties = {g.id: g.tie for g in graph.groups}
    assert ties["a"] == ties["a#2"] is not None
    assert ties["up"] == ties["up#2"] is not None
    assert ties["a"] != ties["up"]


def test_convolution_after_a_flattened_volume() -> None:
    #  x(3,2,6,6) -> a(6,2,6,6) -> flatten channels and depth (12,6,6) -> b(5) -> mean -> head(2)
    #  channel k of a is inputs 2k and 2k+1 of b
    volume = torch.randn(2, 3, 2, 6, 6, generator=torch.Generator().manual_seed(0))
    model = Net(
        lambda m, x: m.head(m.b(torch.tanh(m.a(x)).flatten(1, 2)).mean((2, 3))),
        a=nn.Conv3d(3, 6, 3, padding=1),
        b=conv(12, 5),
        head=nn.Linear(5, 2),
    )
    macs = 27 * 2 * PLANE * 3 * 6 + 9 * PLANE * 12 * 5 + 5 * 2
    graph = verified(model, volume, free={"a": 6, "b": 5}, kept=HEAD, macs=macs)
    assert units(graph, "b", "in") == [k // 2 for k in range(12)]


def test_layer_norm_over_channels_and_plane() -> None:
    #  x(3,6,6) -> a(6,6,6) -> LayerNorm((6,6,6)) -> b(5) -> mean -> head(2)
    #  mean and variance are of the kept channels' planes; the norm's scale loses planes
    model = Net(
        lambda m, x: m.head(m.b(m.norm(m.a(x))).mean((2, 3))),
        a=conv(3, 6),
        norm=nn.LayerNorm((6, 6, 6)),
        b=conv(6, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * (3 * 6 + 6 * 5) + 5 * 2
    graph = verified(model, X, free={"a": 6, "b": 5}, kept=HEAD, macs=macs, mixes=True)
    small = shrink(model, graph, keep(graph, a=[0, 2, 5]))
    assert small.norm.normalized_shape == (3, 6, 6)
    assert small.norm.weight.shape == (3, 6, 6)


def test_group_norm_whose_groups_do_not_divide_the_kept_count() -> None:
    #  x(3) -> a(8) -> GroupNorm(4 groups of 2) -> b(5) -> mean -> head(2)
    #  six of eight channels do not make four groups: each group keeps one channel, or each keeps both
    model = Net(
        lambda m, x: m.head(m.b(torch.tanh(m.norm(m.a(x)))).mean((2, 3))),
        a=conv(3, 8),
        norm=nn.GroupNorm(4, 8),
        b=conv(8, 5),
        head=nn.Linear(5, 2),
    )
    macs = 9 * PLANE * (3 * 8 + 8 * 5) + 5 * 2
    free = {"a": 2, "a#2": 2, "a#3": 2, "a#4": 2, "b": 5}
    graph = verified(model, X, free=free, kept=HEAD, macs=macs, mixes=True)
    with pytest.raises(MaskMismatchError, match="must be equal"):
        shrink(model, graph, keep(graph, **{"a": [0], "a#2": [1]}))
    one_each = keep(graph, **{"a": [0], "a#2": [1], "a#3": [1], "a#4": [0]})
    small = shrink(model, graph, one_each)
    assert (small.norm.num_groups, small.norm.num_channels) == (4, 4)


def test_a_module_that_is_called_twice() -> None:
    #  x(3) -> a(6) -> b(6) -> tanh -> b(6) -> mean -> head(2)
    #  b reads what it writes, so a's and b's channels are one set; it costs twice, and is stored once
    model = Net(
        lambda m, x: m.head(m.b(torch.tanh(m.b(torch.tanh(m.a(x))))).mean((2, 3))),
        a=conv(3, 6),
        b=conv(6, 6),
        head=nn.Linear(6, 2),
    )
    macs = 9 * PLANE * (3 * 6 + 2 * 6 * 6) + 6 * 2
    graph = verified(model, X, free={"a": 6}, kept=HEAD, macs=macs)
    assert [x.name for x in graph.layers] == ["a", "b", "b@2", "head"]


def test_a_network_that_returns_a_dict() -> None:
    #  x(3) -> a(6) ─┬─> b(4,6,6) ─────────────> {"map": b, "class": head(2)}
    #                └─> c(5) -> mean -> head(2) ──┘
    #  every leaf of the output keeps its size
    def forward(m, x):
        y = torch.tanh(m.a(x))
        return {"map": m.b(y), "class": (m.head(m.c(y).mean((2, 3))),)}

    model = Net(forward, a=conv(3, 6), b=conv(6, 4), c=conv(6, 5), head=nn.Linear(5, 2))
    macs = 9 * PLANE * (3 * 6 + 6 * 4 + 6 * 5) + 5 * 2
    kept = {**HEAD, "b": "network output"}
    graph = verified(model, X, free={"a": 6, "c": 5}, kept=kept, macs=macs)
    out = shrink(liven(model), graph, keep(graph, a=[0, 1], c=[2]))(X)
    assert {name: torch.as_tensor(v[0] if isinstance(v, tuple) else v).shape for name, v in out.items()} == {
        "map": (2, 4, 6, 6),
        "class": (2, 2),
    }
