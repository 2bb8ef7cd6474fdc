"""Operators that divide channels into runs: grouped convolutions, group norms, shuffles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcqp_prune.errors import MaskMismatchError
from qcqp_prune.graph.trace import trace
from tests.networks import keep, liven, prune_and_check, random_masks, reasons, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(a: int, b: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, **{"padding": k // 2, "bias": False, **options})


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def check(model: nn.Module, *, mixes: bool = False, modules: bool = True):
    graph = trace(liven(model), X)
    for seed in range(3):
        _, checked = prune_and_check(model, X, graph, random_masks(graph, seed), mixes=mixes)
        assert checked.realisation == "modules" or not modules
    prune_and_check(model, X, graph, random_masks(graph, 3), realisation="graph", mixes=mixes)
    return graph


def ties(graph) -> dict[str, str | None]:
    return {g.id: g.tie for g in graph.groups if g.frozen_reason is None}


def test_depthwise() -> None:
    #  x(3) -> a(4) -> depthwise(4) -> b(5): linear in the count
    model = nn.Sequential(conv(3, 4), nn.SiLU(), conv(4, 4, groups=4), conv(4, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 4, "3": 5}
    assert graph.is_depthwise(graph.layers[1])
    masks = keep(graph, **{"0": [0, 3], "3": [1]})
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 2 + 2 + 2 * 1) + 4
    small, _ = prune_and_check(model, X, graph, masks)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (2, 2, 2)


def test_depthwise_with_multiplier_2() -> None:
    #  a(4) -> depthwise(8): unit c owns outputs 2 c and 2 c + 1
    model = nn.Sequential(conv(3, 4), nn.SiLU(), conv(4, 8, groups=4), nn.SiLU(), conv(8, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 4, "4": 5}
    masks = keep(graph, **{"0": [1, 2, 3], "4": [0, 1]})
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 3 + 6 * 1 + 6 * 2) + 2 * 4
    small, _ = prune_and_check(model, X, graph, masks)
    assert torch.equal(small[4].weight, model[4].weight[:2, 2:])


def test_groups_with_one_output_each() -> None:
    #  a(6) -> 3 groups of 2 inputs and 1 output: each group is one unit
    model = nn.Sequential(conv(3, 6), nn.SiLU(), conv(6, 3, groups=3), conv(3, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 3, "3": 5}
    assert uses(graph, keep(graph, **{"0": [0]}))["macs"] == 36 * 9 * (3 * 2 + 2 + 1 * 5) + 5 * 4


def test_grouped_convolution_keeps_equal_counts() -> None:
    #  a(6) -> 2 groups, 3 -> 2 each -> b(5): inputs of both groups are tied, and so are outputs
    model = nn.Sequential(conv(3, 6), nn.SiLU(), conv(6, 4, groups=2), nn.SiLU(), conv(4, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 3, "0#2": 3, "2": 2, "2#2": 2, "4": 5}
    assert ties(graph) == {"0": "0", "0#2": "0", "2": "2", "2#2": "2", "4": None}
    masks = keep(graph, **{"0": [0, 1], "0#2": [1, 2], "2": [0], "2#2": [1], "4": [0, 1, 2]})
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 4 + 2 * (2 * 1) + 2 * 3) + 3 * 4
    assert uses(graph, masks)["params"] == 9 * (12 + 4 + 6) + 3 * 4 + 4
    small, _ = prune_and_check(model, X, graph, masks)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (2, 4, 2)
    expected = torch.cat([model[2].weight[:1, :2], model[2].weight[3:, 1:]])
    assert torch.equal(small[2].weight, expected)
    with pytest.raises(MaskMismatchError, match="must be equal"):
        prune_and_check(model, X, graph, keep(graph, **{"0": [0, 1], "0#2": [1]}))


def test_groups_that_are_built_unlike_go_by_column() -> None:
    #  [a(4) | b(2)] -> 2 groups of 3: the second run is 1 of a and 2 of b, so position j of both runs is one unit
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(3, 2), conv(6, 4, groups=2)
            self.head = head(4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.tanh(torch.cat([self.a(x), self.b(x)], 1))
            return self.head(self.c(y))

    graph = check(Net(), modules=False)
    sides = graph.axes[graph.layers[2].in_axis]
    assert sides[:3].tolist() == sides[3:].tolist()


def test_grouped_convolution_of_the_input_is_kept() -> None:
    graph = check(nn.Sequential(conv(3, 6, groups=3), nn.SiLU(), conv(6, 5), head(5)))
    assert widths(graph, free=True) == {"2": 5}
    assert reasons(graph)["0"] == "network input"


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(groups: int) -> None:
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(groups, 6), nn.SiLU(), conv(6, 5), head(5))
    graph = check(model, mixes=True)
    expected = {1: {"0": 6}, 2: {"0": 3, "0#2": 3}, 6: {"0": 6}}[groups]
    assert widths(graph, free=True) == {**expected, "3": 5}
    assert ties(graph)["0"] == ("0" if groups == 2 else None)
    small, _ = prune_and_check(model, X, graph, random_masks(graph, 0, 0.34), mixes=True)
    assert small[1].num_channels == 2
    assert small[1].num_groups == {1: 1, 2: 2, 6: 2}[groups]


def test_layer_norm_over_channels_and_plane() -> None:
    model = nn.Sequential(conv(3, 6), nn.LayerNorm((6, 6, 6)), nn.SiLU(), conv(6, 5), head(5))
    graph = check(model, mixes=True)
    assert widths(graph, free=True) == {"0": 6, "3": 5}
    masks = keep(graph, **{"0": [0, 5]})
    assert uses(graph, masks)["params"] == 27 * 2 + 2 * 2 * 36 + 9 * 2 * 5 + 5 * 4 + 4
    small, _ = prune_and_check(model, X, graph, masks, mixes=True)
    assert small[1].normalized_shape == (2, 6, 6)


class Shuffle(nn.Module):
    """As ShuffleNet has it."""

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@pytest.mark.parametrize("shuffle", [Shuffle(), nn.ChannelShuffle(2)])
def test_channel_shuffle(shuffle: nn.Module) -> None:
    #  a(6) = [0 1 2 | 3 4 5] -> [0 3 1 4 2 5]: channels c and c + 3 are one unit
    model = nn.Sequential(conv(3, 6), shuffle, nn.SiLU(), conv(6, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 3, "3": 5}
    small, _ = prune_and_check(model, X, graph, keep(graph, **{"0": [0, 2]}))
    assert torch.equal(small[0].weight, model[0].weight[[0, 2, 3, 5]])
    assert torch.equal(small[3].weight, model[3].weight[:, [0, 1, 4, 5]])


def test_pixel_shuffle() -> None:
    #  a(12) -> pixel shuffle(3): channels 4 c to 4 c + 3 are one unit; 6 x 6 becomes 12 x 12
    model = nn.Sequential(conv(3, 12), nn.PixelShuffle(2), nn.SiLU(), conv(3, 5), head(5))
    graph = check(model)
    assert widths(graph, free=True) == {"0": 3, "3": 5}
    masks = keep(graph, **{"0": [1], "3": [0, 1]})
    assert uses(graph, masks)["macs"] == 9 * (36 * 3 * 4 + 144 * 1 * 2) + 2 * 4


def test_pixel_unshuffle() -> None:
    #  a(3) -> pixel unshuffle(12): unit c owns channels 4 c to 4 c + 3
    graph = check(nn.Sequential(conv(3, 3), nn.PixelUnshuffle(2), nn.SiLU(), conv(12, 5), head(5)))
    assert widths(graph, free=True) == {"0": 3, "3": 5}
    assert uses(graph, keep(graph, **{"0": [2]}))["macs"] == 9 * (36 * 3 + 9 * 4 * 5) + 5 * 4


def test_transposed_convolution() -> None:
    #  a(6) -> transposed(4), stride 2, kernel 2: 36 read positions, 4 weights each
    up = nn.ConvTranspose2d(6, 4, 2, stride=2)
    graph = check(nn.Sequential(conv(3, 6), nn.SiLU(), up, nn.SiLU(), conv(4, 5), head(5)))
    assert widths(graph, free=True) == {"0": 6, "2": 4, "4": 5}
    masks = keep(graph, **{"0": [0, 1, 2], "2": [3], "4": [0]})
    assert uses(graph, masks)["macs"] == 36 * 9 * 3 * 3 + 36 * 4 * 3 * 1 + 144 * 9 * 1 * 1 + 4


def test_transposed_convolution_with_groups() -> None:
    #  a(6) -> 2 groups, 3 -> 2 each
    up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
    model = nn.Sequential(conv(3, 6), nn.SiLU(), up, nn.SiLU(), conv(4, 5), head(5))
    graph = check(model)
    assert ties(graph) == {"0": "0", "0#2": "0", "2": "2", "2#2": "2", "4": None}
    masks = keep(graph, **{"0": [0, 1], "0#2": [1, 2], "2": [0], "2#2": [1]})
    assert uses(graph, masks)["macs"] == 36 * 9 * 3 * 4 + 36 * 4 * 2 * (2 * 1) + 144 * 9 * 2 * 5 + 5 * 4
    small, _ = prune_and_check(model, X, graph, masks)
    expected = torch.cat([model[2].weight[:2, :1], model[2].weight[4:, 1:]])
    assert torch.equal(small[2].weight, expected)


def test_transposed_depthwise() -> None:
    up = nn.ConvTranspose2d(6, 6, 2, stride=2, groups=6)
    graph = check(nn.Sequential(conv(3, 6), nn.SiLU(), up, nn.SiLU(), conv(6, 5), head(5)))
    assert widths(graph, free=True) == {"0": 6, "4": 5}
    assert uses(graph, keep(graph, **{"0": [0, 4]}))["macs"] == 36 * (9 * 6 + 4 * 2) + 144 * 9 * 2 * 5 + 20


def test_unequal_kernels_of_grouped_one_dimensional_convolutions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv1d(3, 6, 3)
            self.b = nn.Conv1d(6, 6, 3, groups=2)
            self.c = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.silu(self.b(F.silu(self.a(x.flatten(2))))).mean(2))

    check(Net())
