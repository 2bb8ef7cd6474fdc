"""Networks with branches. In the pictures an arrow that two lines share is a tie."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.graph.trace import trace
from qcqp_prune.models.resnet import BasicBlock
from tests.networks import keep, liven, prune_and_check, random_masks, reasons, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(a: int, b: int, k: int = 3) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, bias=False)


class Net(nn.Module):
    """Named layers, a forward given as a function, then a mean over the plane and a linear map to 4."""

    def __init__(self, forward, channels: int, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.body, self.head = forward, nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self, x).mean((2, 3)))


def check(model: nn.Module, x: Tensor = X, *, mixes: bool = False, modules: bool = True):
    """Trace, then random masks in both realisations; the modules' own forward must do where ``modules``."""
    graph = trace(liven(model), x)
    for seed in range(3):
        _, checked = prune_and_check(model, x, graph, random_masks(graph, seed), mixes=mixes)
        assert checked.realisation == "modules" or not modules
    prune_and_check(model, x, graph, random_masks(graph, 3), realisation="graph", mixes=mixes)
    return graph


def test_residual_shares_its_channels() -> None:
    #  x(3) -> a(8) ─┬─> b(5) -> c(8) ─(+)─> head
    #                └───────────────────┘        a and c are one group
    graph = check(
        Net(
            lambda m, x: (y := torch.tanh(m.a(x))) + m.c(torch.tanh(m.b(y))),
            8,
            a=conv(3, 8),
            b=conv(8, 5),
            c=conv(5, 8),
        )
    )
    assert widths(graph, free=True) == {"a": 8, "b": 5}
    assert uses(graph)["macs"] == 36 * 9 * (3 * 8 + 8 * 5 + 5 * 8) + 8 * 4
    half = keep(graph, a=[0, 1, 2, 3], b=[0])
    assert uses(graph, half)["macs"] == 36 * 9 * (3 * 4 + 4 * 1 + 1 * 4) + 4 * 4
    assert uses(graph, half)["params"] == 9 * (3 * 4 + 4 * 1 + 1 * 4) + 4 * 4 + 4


def test_zero_padded_shortcut_of_a_cifar_resnet() -> None:
    #  x(3) -> stem(4) ─┬─> conv1(8) -> conv2(8) ──────(+)─> head
    #                   └─> every 2nd pixel, [2 | 4 | 2] ┘
    #  stream: 2 channels of conv2 alone, 4 shared with the stem, 2 of conv2 alone
    block = BasicBlock(4, 8, stride=2)
    graph = check(Net(lambda m, x: m.block(torch.tanh(m.stem(x))), 8, stem=conv(3, 4), block=block))
    assert widths(graph, free=True) == {"stem": 4, "block.conv1": 8, "block.conv2": 4}
    stream = graph.axes[next(x for x in graph.layers if x.name == "block.conv2").out_axis]
    names = [graph.groups[g].id for g in graph.group_of_unit[stream]]
    assert names == ["block.conv2"] * 2 + ["stem"] * 4 + ["block.conv2"] * 2
    masks = keep(graph, stem=[1, 2], block_conv2=[0, 3], block_conv1=[0, 1, 2])
    assert uses(graph, masks)["macs"] == 9 * (36 * 3 * 2 + 9 * 2 * 3 + 9 * 3 * 4) + 4 * 4
    model = Net(
        lambda m, x: m.block(torch.tanh(m.stem(x))), 8, stem=conv(3, 4), block=BasicBlock(4, 8, stride=2)
    )
    small, checked = prune_and_check(liven(model), X, graph, masks)
    assert small.block.shortcut.pad.padding == (0, 0, 0, 0, 1, 1)
    assert checked.realisation == "modules"


def test_residual_onto_the_input_is_kept() -> None:
    #  x(3) ─┬─> a(8) -> b(3) ─(+)─> head
    #        └──────────────────┘
    graph = check(Net(lambda m, x: x + m.b(torch.tanh(m.a(x))), 3, a=conv(3, 8), b=conv(8, 3)))
    assert widths(graph, free=True) == {"a": 8}
    assert graph.why_not_pruned(graph.layers[1]) == "network input"


def test_concatenation_as_in_densenet() -> None:
    #  x(3) -> a(4) ─┬─> b(2) ─┬─> [a | b](6) -> c(3) -> [a | b | c](9) -> d(5) -> head
    def forward(m, x):
        y = torch.tanh(m.a(x))
        y = torch.cat([y, torch.tanh(m.b(y))], 1)
        y = torch.cat([y, torch.tanh(m.c(m.norm(y)))], 1)
        return m.d(y)

    graph = check(
        Net(forward, 5, a=conv(3, 4), b=conv(4, 2), norm=nn.BatchNorm2d(6), c=conv(6, 3), d=conv(9, 5))
    )
    assert widths(graph, free=True) == {"a": 4, "b": 2, "c": 3, "d": 5}
    masks = keep(graph, a=[0, 1, 3], b=[1], c=[0, 2], d=[0])
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 3 + 3 * 1 + 4 * 2 + 6 * 1) + 4
    assert uses(graph, masks)["params"] == 9 * (9 + 3 + 8 + 6) + 2 * 4 + 4 + 4


def test_concatenation_of_a_split_of_a_concatenation() -> None:
    #  [a(4) | b(4)] -> split 3, 5 -> [second(5) | first(3)] -> c(6) -> head
    def forward(m, x):
        y = torch.cat([torch.tanh(m.a(x)), m.b(x)], 1)
        first, second = torch.split(y, [3, 5], 1)
        return m.c(torch.cat([second, first], 1))

    graph = check(Net(forward, 6, a=conv(3, 4), b=conv(3, 4), c=conv(8, 6)), modules=False)
    # a's fourth channel is in the second part, its first three are in the first: two groups
    assert widths(graph, free=True) == {"a": 3, "a#2": 1, "b": 4, "c": 6}
    assert {g.id: g.min_keep for g in graph.groups}["a#2"] == 0  # b keeps the second part from being empty


def test_chunk_and_concatenate() -> None:
    #  a(8) -> chunk 4, 4 -> [tanh(second) | first] -> b(5) -> head; equal halves keep chunk(2) right
    def forward(m, x):
        first, second = m.a(x).chunk(2, 1)
        return m.b(torch.cat([torch.tanh(second), first], 1))

    graph = check(Net(forward, 5, a=conv(3, 8), b=conv(8, 5)))
    halves = [g for g in graph.groups if g.id in ("a", "a#2")]
    assert [(g.width, g.tie) for g in halves] == [(4, "a"), (4, "a")]


def test_slice_and_concatenate() -> None:
    #  a(8) -> [ a[3:] | tanh(a[:3]) ] -> b(5) -> head; numbers are written into forward
    def forward(m, x):
        y = m.a(x)
        return m.b(torch.cat([y[:, 3:], torch.tanh(y[:, :3])], 1))

    graph = check(Net(forward, 5, a=conv(3, 8), b=conv(8, 5)), modules=False)
    assert widths(graph, free=True) == {"a": 3, "a#2": 5, "b": 5}


def test_slices_from_the_end() -> None:
    def forward(m, x):
        y = m.a(x)
        return m.b(torch.cat([y[:, -3:], y[:, :-3], y[:, 2:4]], 1))

    graph = check(Net(forward, 5, a=conv(3, 8), b=conv(10, 5)), modules=False)
    #  0, 1 and 4 are in the second slice, 2 and 3 in the second and third, 5 to 7 in the first
    assert widths(graph, free=True) == {"a": 3, "a#2": 2, "a#3": 3, "b": 5}


def test_squeeze_and_excite() -> None:
    #  a(8) ─┬─> pool -> down(2) -> up(8) -> sigmoid ─(x)─> b(5) -> head
    #        └────────────────────────────────────────┘
    def forward(m, x):
        y = m.a(x)
        scale = torch.sigmoid(m.up(torch.tanh(m.down(F.adaptive_avg_pool2d(y, 1)))))
        return m.b(y * scale)

    graph = check(Net(forward, 5, a=conv(3, 8), down=conv(8, 2, 1), up=conv(2, 8, 1), b=conv(8, 5)))
    assert widths(graph, free=True) == {"a": 8, "down": 2, "b": 5}
    masks = keep(graph, a=[0, 1, 2], down=[1], b=[0, 4])
    assert uses(graph, masks)["macs"] == 36 * 9 * (9 + 6) + 3 * 1 + 1 * 3 + 2 * 4


def test_broadcast_addition() -> None:
    #  a(8) ─┬─> mean over the plane, expanded ─(+)─> b(5) -> head
    #        └──────────────────────────────────┘
    def forward(m, x):
        y = m.a(x)
        return m.b(y + y.square().mean((2, 3), keepdim=True).expand_as(y))

    graph = check(Net(forward, 5, a=conv(3, 8), b=conv(8, 5)))
    assert widths(graph, free=True) == {"a": 8, "b": 5}


def test_spatial_attention() -> None:
    #  a(8) ─┬─> [mean over channels | max over channels](2) -> g(1) -> sigmoid ─(x)─> b(5) -> head
    #        └───────────────────────────────────────────────────────────────────┘
    def forward(m, x):
        y = m.a(x)
        pooled = torch.cat([y.mean(1, keepdim=True), y.max(1, keepdim=True)[0]], 1)
        return m.b(y * torch.sigmoid(m.g(pooled)))

    graph = check(Net(forward, 5, a=conv(3, 8), g=conv(2, 1), b=conv(8, 5)), mixes=True)
    assert widths(graph, free=True) == {"a": 8, "b": 5}
    assert reasons(graph)["g"] == "a single channel is broadcast over many"
    assert "carries no channels" in reasons(graph)["g.in"]


def test_normalisation_by_a_norm_over_channels() -> None:
    #  a(8) -> a / |a|_2 over channels -> b(5) -> head: expand inside F.normalize
    graph = check(
        Net(lambda m, x: m.b(F.normalize(m.a(x), dim=1)), 5, a=conv(3, 8), b=conv(8, 5)), mixes=True
    )
    assert widths(graph, free=True) == {"a": 8, "b": 5}


def test_one_tensor_joined_twice() -> None:
    #  a(8) + a(8) + tanh(a(8)) -> [a | a](16) -> b(5) -> head: each unit of a is read twice by b
    def forward(m, x):
        y = m.a(x)
        y = y + y + torch.tanh(y)
        return m.b(torch.cat([y, y], 1))

    graph = check(Net(forward, 5, a=conv(3, 8), b=conv(16, 5)))
    assert widths(graph, free=True) == {"a": 8, "b": 5}
    assert uses(graph, keep(graph, a=[0, 1, 2], b=[2]))["macs"] == 36 * 9 * (9 + 6 * 1) + 4


def test_scale_parameter_of_each_channel() -> None:
    #  x(3) -> a(8) ─┬─> b(8) * scale ─(+)─> head
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 4)
            self.scale = nn.Parameter(torch.ones(8, 1, 1))
            self.register_buffer("shift", torch.randn(1, 8, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(self.a(x))
            return self.head((y + self.scale * self.b(y) + self.shift).mean((2, 3)))

    model = Scaled()
    graph = check(model)
    assert widths(graph, free=True) == {"a": 8}
    assert uses(graph, keep(graph, a=[1]))["params"] == 27 + 9 + 1 + 4 + 4
    small, _ = prune_and_check(model, X, graph, keep(graph, a=[1, 6]))
    assert small.scale.shape == (2, 1, 1)
    assert small.shift.shape == (1, 2, 1, 1)


@pytest.mark.parametrize("own", [True, False])
def test_padding_of_channels(own: bool) -> None:
    #  a(4) -> [1 | 4 | 3] ─(+)─ b(8) -> head; as a module, and as a call with numbers written into forward
    pad = nn.ConstantPad3d((0, 0, 0, 0, 1, 3), 0.5) if own else nn.Identity()

    def forward(m, x):
        y = torch.tanh(m.a(x))
        padded = m.pad(y) if own else F.pad(y, (0, 0, 0, 0, 1, 3), value=0.5)
        return padded + m.b(y)

    graph = check(Net(forward, 8, a=conv(3, 4), b=conv(4, 8), pad=pad), modules=own)
    assert sorted(widths(graph, free=True).values()) == [4, 4]


def test_padded_channels_that_nothing_joins_stay() -> None:
    graph = check(Net(lambda m, x: m.b(F.pad(m.a(x), (0, 0, 0, 0, 1, 3))), 5, a=conv(3, 4), b=conv(8, 5)))
    assert widths(graph, free=True) == {"a": 4, "b": 5}
    assert reasons(graph)["b.in"] == "no layer makes it"
