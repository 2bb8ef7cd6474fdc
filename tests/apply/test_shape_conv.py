"""Convolutions cut by kernel columns: the module by itself, and networks that have some."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import qcqp_prune as qp
from qcqp_prune.apply.shape_conv import ShapeConv2d, column_index
from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.graph.trace import trace
from qcqp_prune.models import resnet20
from qcqp_prune.resources import AcceleratorCycles, PeakMemory
from tests.graph.test_columns import Chain, Stream
from tests.networks import all_kept, difference, keep, liven, prune_and_check, random_masks, run

# PyTorch's own convolution says that it pads once more.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

GEOMETRIES: list[dict[str, Any]] = [
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (2, 4), "stride": (1, 3), "padding": (0, 2)},
    {"kernel_size": 3, "dilation": (2, 1), "padding": (2, 0)},
    {"kernel_size": 4, "padding": "same"},
    {"kernel_size": (1, 3), "padding": "valid", "stride": (2, 1)},
    {"kernel_size": 5, "stride": 3, "dilation": 2, "padding": 4},
    {"kernel_size": (7, 5), "padding": (3, 2)},
    {"kernel_size": 3, "dilation": (10, 2), "padding": (10, 2)},  # taps that see padding only
]


def pair(seed: int = 0, **geometry: Any) -> tuple[nn.Conv2d, ShapeConv2d, np.ndarray]:
    """A convolution with random columns at zero, and the one that has the others only."""
    torch.manual_seed(seed)
    conv = nn.Conv2d(3, 4, **geometry).double()
    kept = np.random.default_rng(seed).random((4, conv.weight[0, 0].numel())) < 0.4
    kept[1] = False  # a filter without a column: its bias alone
    kept[0] = True
    with torch.no_grad():
        conv.weight *= torch.from_numpy(kept).reshape(4, 1, *conv.kernel_size)
    rows = [conv.weight.detach().flatten(2)[k % 4, :, k // 4] for k in column_index(kept).tolist()]
    return conv, ShapeConv2d(conv, nn.Parameter(torch.stack(rows)), kept), kept


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_computes_what_the_convolution_with_zeros_computes(geometry: dict[str, Any]) -> None:
    conv, shape, _ = pair(**geometry)
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    torch.testing.assert_close(shape(x), conv(x))
    torch.testing.assert_close(shape(x[0]), conv(x[0]))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_goes_back_to_the_convolution_with_zeros(geometry: dict[str, Any]) -> None:
    conv, shape, kept = pair(**geometry)
    again = shape.dense()
    assert torch.equal(again.weight, conv.weight)
    assert torch.equal(shape.kept(), torch.from_numpy(kept))
    x = torch.randn(1, 3, 11, 10, dtype=torch.float64)
    assert torch.equal(again(x), conv(x))
    with torch.no_grad():
        for tensor in again.parameters():
            tensor *= torch.randn_like(tensor)
    shape.take(again)
    torch.testing.assert_close(shape(x), again(x))


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_multiplies_for_its_columns_only(geometry: dict[str, Any]) -> None:
    _, shape, kept = pair(**geometry)
    x = torch.randn(2, 3, 11, 10, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        out = shape(x)
    assert counter.get_total_flops() == 2 * 2 * out.shape[2] * out.shape[3] * 3 * int(kept.sum())
    assert shape.weight.numel() == 3 * int(kept.sum())


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_are_those_of_the_convolution(stride: int) -> None:
    conv, shape, kept = pair(kernel_size=3, stride=stride, padding=1)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    for module, own in zip((conv, shape), inputs, strict=True):
        module(own).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    full = conv.weight.grad.flatten(2).permute(2, 0, 1)
    torch.testing.assert_close(shape.weight.grad, full[torch.from_numpy(kept.T)])


def test_weights_of_other_columns_are_refused() -> None:
    _, shape, kept = pair(kernel_size=3, padding=1)
    again = copy.deepcopy(shape)
    again.load_state_dict(shape.state_dict())
    moved = kept.copy()
    moved[2], moved[3] = kept[3], kept[2]
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    other = ShapeConv2d(conv, nn.Parameter(shape.weight.detach().clone()), moved)
    with pytest.raises(RuntimeError, match="other kernel columns"):
        other.load_state_dict(shape.state_dict())


@pytest.mark.parametrize("stride", [1, 2])
def test_exports_and_compiles(stride: int) -> None:
    _, shape, _ = pair(kernel_size=3, stride=stride, padding=1)
    x = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(shape, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(5, 3, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(program(more), shape(more))
    compiled = torch.compile(shape, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), shape(x))


def test_runs_in_mixed_precision() -> None:
    _, shape, _ = pair(kernel_size=3, padding=1)
    shape.float()
    x = torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = shape(x)
    torch.testing.assert_close(out.float(), shape(x), rtol=0.1, atol=0.1)


def net(**geometry: Any) -> nn.Module:
    return liven(
        nn.Sequential(
            nn.Conv2d(2, 4, **geometry),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 5, 2, padding=1),
            nn.Tanh(),
            nn.Conv2d(5, 3, 3, stride=2, padding=1, bias=False),
        )
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("seed", range(3))
def test_random_columns_of_networks(geometry: dict[str, Any], seed: int) -> None:
    model, x = net(**geometry), torch.randn(2, 2, 9, 8)
    graph = trace(model, x, columns=True)
    small, checked = prune_and_check(model, x, graph, random_masks(graph, seed))
    assert checked.realisation == "modules"
    assert checked.column_layers
    assert all(isinstance(small.get_submodule(path), ShapeConv2d) for path in checked.column_layers)


def test_whole_filters_leave_a_plain_convolution() -> None:
    model, x = liven(Chain()), torch.randn(1, 2, 5, 5)
    graph = trace(model, x, columns=True)
    masks = keep(graph, first=[0, 2], first_columns=[*range(9), *range(18, 27)])
    small, checked = prune_and_check(model, x, graph, masks)
    assert checked.column_layers == ()
    assert type(small.first) is nn.Conv2d
    assert small.first.weight.shape == (2, 2, 3, 3)


def test_one_column_less_is_a_matrix_of_columns() -> None:
    model, x = liven(Chain()), torch.randn(1, 2, 5, 5)
    graph = trace(model, x, columns=True)
    masks = keep(graph, first=[0, 2], first_columns=[*range(8), *range(18, 27)])
    small, checked = prune_and_check(model, x, graph, masks)
    assert checked.column_layers == ("first",)
    assert small.first.weight.shape == (17, 2)
    assert (small.first.in_channels, small.first.out_channels) == (2, 2)
    assert small.second.weight.shape == (4, 2, 1, 2)


def test_an_output_without_columns_is_its_bias() -> None:
    model, x = (
        liven(nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3))),
        torch.randn(1, 2, 5, 5),
    )
    graph = trace(model, x, columns="2")
    small, _ = prune_and_check(model, x, graph, keep(graph, **{"2_columns": [4]}))
    assert run(small, x)[0][0, 1].item() == pytest.approx(model[2].bias[1].item())


def test_a_stream_channel_may_have_columns_in_one_writer_only() -> None:
    model, x = liven(Stream(nn.Conv2d(2, 3, 1))), torch.randn(1, 2, 5, 5)
    graph = trace(model, x, columns=True)
    masks = keep(graph, a_columns=[0, 10], b_columns=[20], side_columns=[0])
    small, checked = prune_and_check(model, x, graph, masks)
    assert checked.column_layers == ("a", "b", "side")
    assert small.side.weight.shape == (1, 2)
    assert small.b.out_channels == 3


def test_resources_that_know_channels_only_take_a_layer_as_one() -> None:
    """Peak memory is measured on the smaller network; cycles are those of the engine on the layer's channels."""
    model, x = liven(Chain()), torch.randn(1, 2, 5, 5)
    graph = trace(model, x, columns=True)
    masks = keep(graph, first=[0, 2], first_columns=[0, 20], second_columns=[3])
    _, checked = shrink_and_verify(model, graph, masks, resources=[PeakMemory(), AcceleratorCycles()])
    counts = {c.resource: c.predicted for c in checked.counts}
    assert counts["peak_memory"] == 4 * 2 * (2 * 25)  # two maps of two channels, before and after the norm
    form = AcceleratorCycles().form(graph)
    kept = np.bincount(graph.group_of_unit[masks.flat(graph)], minlength=len(graph.groups))
    assert form.evaluate(kept) == 25 * 1 * 1 + 6 * 1 * 1


def test_a_column_of_a_removed_filter_is_refused() -> None:
    model, x = Chain(), torch.randn(1, 2, 5, 5)
    graph = trace(model, x, columns=True)
    with pytest.raises(qp.MaskMismatchError, match=r"first\.columns that belongs to one they remove"):
        qp.shrink(model, graph, keep(graph, first=[0, 2]))
    with pytest.raises(qp.MaskMismatchError, match="all kernel columns of second"):
        qp.shrink(model, graph, keep(graph, second_columns=[]))


class Sliced(nn.Module):
    """A forward with a channel count written into it, which only a rewritten graph can shrink."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 3, padding=1), nn.Conv2d(4, 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        return self.b(y[:, :4] * 2) + y[:, 4:].mean((1, 2, 3), keepdim=True)


@pytest.mark.parametrize("seed", range(3))
def test_columns_in_a_rewritten_graph(seed: int) -> None:
    model, x = liven(Sliced()), torch.randn(2, 2, 6, 6)
    graph = trace(model, x, columns=True)
    small, checked = prune_and_check(
        model, x, graph, random_masks(graph, seed), realisation="graph", mixes=True
    )
    assert checked.realisation == "graph"
    assert set(checked.column_layers) <= {"a", "b"}
    assert checked.column_layers
    assert any(node.op == "call_module" for node in small.graph.nodes)


def cut(model: nn.Module, x: Tensor, seed: int = 1) -> tuple[ChannelGraph, Masks, nn.Module]:
    graph = trace(model, x, columns=True)
    masks = random_masks(graph, seed)
    small, checked = shrink_and_verify(model, graph, masks)
    assert checked.column_layers
    return graph, masks, small


@pytest.mark.parametrize("make", [Chain, Sliced])
def test_saved_and_loaded(make: type[nn.Module], tmp_path: Path) -> None:
    x = torch.randn(2, 2, 6, 6)
    graph, masks, small = cut(liven(make()), x)
    qp.save(small, tmp_path / "small", graph=graph, masks=masks)
    again = qp.load(tmp_path / "small", make)
    assert all(torch.equal(a, b) for a, b in zip(run(again, x), run(small, x), strict=True))
    assert again.state_dict().keys() == small.state_dict().keys()


def test_trains() -> None:
    x = torch.randn(16, 2, 9, 8, generator=torch.Generator().manual_seed(3))
    _, _, small = cut(net(kernel_size=3, padding=1).train(), x)
    target = torch.randn(run(small, x)[0].shape, generator=torch.Generator().manual_seed(4)).float()
    optimiser = torch.optim.SGD(small.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = (small(x) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in small.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    other = copy.deepcopy(small)
    assert torch.equal(run(other, x)[0], run(small, x)[0])
    assert other[0].weight is not small[0].weight


@pytest.mark.parametrize("seed", range(2))
def test_resnet20(seed: int) -> None:
    model, x = liven(resnet20()), torch.randn(1, 3, 32, 32)
    graph = trace(model, x, columns=True)
    masks = random_masks(graph, seed)
    _, checked = prune_and_check(model, x, graph, masks)
    assert checked.realisation == "modules"
    assert len(checked.column_layers) >= 17


def test_resnet20_with_all_columns_is_the_same_network() -> None:
    model, x = liven(resnet20()), torch.randn(1, 3, 32, 32)
    graph = trace(model, x, columns=True)
    small, checked = shrink_and_verify(model, graph, all_kept(graph))
    assert checked.column_layers == ()
    assert difference(run(small, x), run(model, x)) == 0
