"""Networks without branches, each small enough to count by hand. Planes are 6 x 6, convolutions keep the size."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qcqp_prune.graph.trace import trace
from tests.networks import keep, liven, prune_and_check, random_masks, reasons, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(a: int, b: int, **options) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, **{"padding": 1, "bias": False, **options})


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4))


def test_plain_chain() -> None:
    #  x(3) -> conv 8 -> bn -> relu -> conv 5 -> pool -> linear 4
    model = liven(
        nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.LeakyReLU(0.1), conv(8, 5, bias=True), head(5))
    )
    graph = trace(model, X)
    assert widths(graph) == {"0": 8, "0.in": 3, "3": 5, "4.2": 4}
    assert reasons(graph) == {"0": None, "0.in": "network input", "3": None, "4.2": "network output"}
    assert [(x.name, x.op, x.weight) for x in graph.layers] == [
        ("0", "conv2d", "0.weight"),
        ("3", "conv2d", "3.weight"),
        ("4.2", "linear", "4.2.weight"),
    ]
    assert graph.batch == 2
    assert uses(graph)["macs"] == 36 * 9 * (3 * 8 + 8 * 5) + 5 * 4
    assert uses(graph)["params"] == 9 * 3 * 8 + 2 * 8 + 9 * 8 * 5 + 5 + 5 * 4 + 4
    assert uses(graph)["memory"] == 4 * (36 * (8 + 5) + 4 + uses(graph)["params"])

    masks = keep(graph, **{"0": [0, 3, 7], "3": [1, 4]})
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 3 + 3 * 2) + 2 * 4
    assert uses(graph, masks)["params"] == 9 * 3 * 3 + 2 * 3 + 9 * 3 * 2 + 2 + 2 * 4 + 4
    small, checked = prune_and_check(model, X, graph, masks)
    assert checked.realisation == "modules"
    assert (small[0].out_channels, small[1].num_features, small[3].in_channels) == (3, 3, 3)
    assert torch.equal(small[3].weight, model[3].weight[[1, 4]][:, [0, 3, 7]])


def test_batch_norm_without_affine_or_statistics() -> None:
    model = nn.Sequential(
        conv(3, 8),
        nn.BatchNorm2d(8, affine=False),
        nn.SiLU(),
        conv(8, 5),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.SiLU(),
        head(5),
    )
    graph = trace(liven(model), X)
    assert widths(graph, free=True) == {"0": 8, "3": 5}
    assert uses(graph)["params"] == 9 * 3 * 8 + 9 * 8 * 5 + 2 * 5 + 5 * 4 + 4
    prune_and_check(model, X, graph, random_masks(graph, 1))


@pytest.mark.parametrize(
    "options",
    [
        {"padding": "same"},
        {"padding_mode": "circular"},
        {"padding_mode": "reflect"},
        {"padding_mode": "replicate"},
        {"padding": 2, "dilation": 2},
    ],
)
def test_padding_of_a_convolution(options: dict) -> None:
    model = liven(nn.Sequential(conv(3, 8, **options), nn.SiLU(), conv(8, 5, **options), head(5)))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"0": 8, "2": 5}
    assert uses(graph)["macs"] == 36 * 9 * (3 * 8 + 8 * 5) + 20
    for seed in range(2):
        prune_and_check(model, X, graph, random_masks(graph, seed), realisation=("modules", "graph")[seed])


def test_flatten_of_a_7_by_7_map() -> None:
    #  x(3, 7, 7) -> conv 6 -> flatten 294 -> linear 4: channel c owns columns 49 c to 49 c + 48
    model = liven(nn.Sequential(conv(3, 6), nn.Tanh(), nn.Flatten(), nn.Linear(294, 4)))
    x = torch.randn(2, 3, 7, 7)
    graph = trace(model, x)
    assert widths(graph, free=True) == {"0": 6}
    linear = graph.layers[1]
    assert graph.axis_counts(linear.in_axis) == {0: 49}
    masks = keep(graph, **{"0": [1, 4]})
    assert uses(graph, masks)["macs"] == 49 * 9 * 3 * 2 + 98 * 4
    small, _ = prune_and_check(model, x, graph, masks)
    columns = [*range(49, 98), *range(4 * 49, 5 * 49)]
    assert torch.equal(small[3].weight, model[3].weight[:, columns])
    assert small[3].in_features == 98


class ChannelsLastFlatten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = conv(3, 6), nn.Linear(216, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(torch.tanh(self.conv(x)).permute(0, 2, 3, 1).flatten(1))


def test_permute_then_flatten() -> None:
    #  (6, 6, 6) -> permute -> flatten: channel c owns columns c, c + 6, c + 12, ...
    model = liven(ChannelsLastFlatten())
    graph = trace(model, X)
    assert widths(graph, free=True) == {"conv": 6}
    small, _ = prune_and_check(model, X, graph, keep(graph, conv=[0, 2]))
    columns = [position * 6 + channel for position in range(36) for channel in (0, 2)]
    assert torch.equal(small.linear.weight, model.linear.weight[:, columns])


@pytest.mark.parametrize("dims", [1, 3])
def test_one_and_three_dimensions(dims: int) -> None:
    make = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    norm = {1: nn.BatchNorm1d, 3: nn.BatchNorm3d}[dims]
    pool = {1: nn.MaxPool1d, 3: nn.MaxPool3d}[dims]
    flat = 5 * 2**dims
    model = nn.Sequential(
        make(3, 8, 3, padding=1),
        norm(8),
        nn.SiLU(),
        pool(2),
        make(8, 5, 1),
        nn.Flatten(),
        nn.Linear(flat, 4),
    )
    x = torch.randn(2, 3, *[4] * dims)
    graph = trace(liven(model), x)
    assert widths(graph, free=True) == {"0": 8, "4": 5}
    assert uses(graph)["macs"] == 4**dims * 3**dims * 3 * 8 + 2**dims * 8 * 5 + flat * 4
    prune_and_check(model, x, graph, random_masks(graph, 0))


def test_nested_sequential_names_layers_by_path() -> None:
    block = nn.Sequential(nn.Sequential(conv(3, 8), nn.SiLU()), nn.Sequential(nn.Sequential(conv(8, 5))))
    model = liven(nn.Sequential(block, head(5)))
    graph = trace(model, X)
    assert [x.name for x in graph.layers] == ["0.0.0", "0.1.0.0", "1.2"]
    prune_and_check(model, X, graph, random_masks(graph, 2))


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.idle, self.b = conv(3, 8), conv(8, 8), conv(8, 5)
        self.head = head(5)
        self.loose = nn.Parameter(torch.randn(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.b(torch.tanh(self.a(x))))


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_unused_parameters_stay_and_are_counted(realisation: str) -> None:
    model = liven(Unused())
    graph = trace(model, X)
    assert uses(graph)["params"] == 9 * (3 * 8 + 8 * 8 + 8 * 5) + 24 + 7
    small, _ = prune_and_check(model, X, graph, keep(graph, a=[0, 1]), realisation=realisation)
    assert dict(small.named_parameters())["idle.weight"].shape == (8, 8, 3, 3)
    assert small.state_dict().keys() == model.state_dict().keys()


def test_weight_norm_is_of_the_kept_part() -> None:
    weight_norm = nn.utils.parametrizations.weight_norm
    model = liven(nn.Sequential(weight_norm(conv(3, 8)), nn.SiLU(), weight_norm(conv(8, 5)), head(5)))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"0": 8, "2": 5}
    assert graph.layers[0].weight == "0.parametrizations.weight.original1"
    for seed, realisation in enumerate(("modules", "graph")):
        prune_and_check(model, X, graph, random_masks(graph, seed), realisation=realisation, mixes=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_the_old_weight_norm_whose_weight_has_a_history(realisation: str, ran: bool) -> None:
    weight_norm = nn.utils.weight_norm
    model = liven(nn.Sequential(weight_norm(conv(3, 8)), nn.SiLU(), weight_norm(conv(8, 5)), head(5)))
    if ran:
        model(X).sum().backward()
    graph = trace(model, X)
    assert widths(graph, free=True) == {"0": 8, "2": 5}
    small, _ = prune_and_check(
        model, X, graph, random_masks(graph, 1, 0.5), realisation=realisation, mixes=True
    )
    small(X).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    trained = trace(small, X)
    prune_and_check(small, X, trained, random_masks(trained, 1, 0.5), realisation=realisation, mixes=True)


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize("weight_norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
def test_a_weight_norm_with_one_number_for_all(weight_norm: Callable[..., nn.Module]) -> None:
    model = liven(nn.Sequential(nn.Linear(6, 8), nn.SiLU(), weight_norm(nn.Linear(8, 5), dim=None)))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"0": 8}
    prune_and_check(model, X, graph, random_masks(graph, 1, 0.5), mixes=True)


class Standardised(nn.Conv2d):
    """Weight standardisation, as batch norm over the weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        flat = nn.functional.batch_norm(flat, None, None, training=True, momentum=0.0)
        return nn.functional.conv2d(x, flat.reshape_as(self.weight), self.bias, padding=1)


@pytest.mark.parametrize("inputs", [2, 8])
def test_standardised_weights(inputs: int) -> None:
    """Also where the kernel is larger than the number of inputs."""
    model = liven(nn.Sequential(conv(3, inputs), nn.SiLU(), Standardised(inputs, 5, 3), nn.SiLU(), head(5)))
    graph = trace(model, X)
    assert widths(graph, free=True) == {"0": inputs, "2": 5}
    for seed, realisation in enumerate(("modules", "graph")):
        prune_and_check(model, X, graph, random_masks(graph, seed), realisation=realisation, mixes=True)


def test_a_batch_that_layers_do_not_share() -> None:
    class Constant(nn.Module):
        """The second linear map is applied to a parameter: its cost does not grow with the batch."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(6, 8), nn.Linear(8, 4)
            self.table = nn.Parameter(torch.randn(2, 6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.tanh(self.a(x)) * torch.tanh(self.b(self.table)).sum(0))

    model, x = liven(Constant()), torch.randn(2, 3)
    graph = trace(model, x)
    assert uses(graph)["macs"] == 3 * 8 + 2 * 6 * 8 + 8 * 4
    prune_and_check(model, x, graph, keep(graph, a=[0, 5, 6]))
