"""What is refused when tracing, and that the message says what to do."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qcqp_prune.errors import NothingToPruneError, TraceError
from qcqp_prune.graph.trace import trace
from qcqp_prune.importance import Magnitude
from qcqp_prune.program.problem import PruningProblem
from tests.networks import assert_untouched, reasons, snapshot

X = torch.randn(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).mean((2, 3)))


class DataDependent(Net):
    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if y.sum() > 0:
            y = y * 2
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 4, 8, 8), "does not run on the example inputs .*: give inputs of the shape"),
        (torch.randn(2, 3), "does not run on the example inputs"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "does not run on the example inputs"),
        ((X, X), "does not run on the example inputs"),
        ({"image": X}, "does not run on the example inputs"),
        ((), "holds no tensor"),
        ("image", "holds no tensor but str"),
        (None, "holds no tensor but NoneType"),
        (((2, 3, 8, 8),), "holds no tensor"),
    ],
)
def test_wrong_example_inputs(inputs: Any, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        trace(Net(), inputs)


def test_an_input_that_is_no_plain_value() -> None:
    class Odd(Net):
        def forward(self, x: Tensor, how: Any) -> Tensor:
            return super().forward(x)

    with pytest.raises(TraceError, match="example input"):
        trace(Odd(), (X, object()))


def test_control_flow_on_values() -> None:
    with pytest.raises(
        TraceError, match=r"torch\.export cannot follow .*remove control flow that depends on tensor"
    ):
        trace(DataDependent(), X)


def test_a_scripted_module() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3)))
        traced = torch.jit.trace(Net().eval(), X)
    for module in (scripted, traced):
        with pytest.raises(TraceError, match=r"scripted module, which cannot be traced: pass the nn\.Module"):
            trace(module, X)


def test_no_module() -> None:
    with pytest.raises(TraceError, match=r"the model is a function: pass a torch\.nn\.Module"):
        trace(lambda x: x, X)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), "it has no layer with a weight"),
        (nn.Conv2d(3, 8, 3), "network output"),
        (nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 2, 3)), "its last channel"),
    ],
)
def test_nothing_to_prune(model: nn.Module, message: str) -> None:
    graph = trace(model, X)
    with pytest.raises(NothingToPruneError, match=message):
        PruningProblem.build(graph, Magnitude()(model, graph), "50%")


def test_a_failed_trace_leaves_the_model_as_it_was() -> None:
    model = DataDependent().train()
    model.a.eval()
    model.head.weight.requires_grad_(False)
    before = snapshot(model)
    for inputs in (X, torch.randn(1, 1)):
        with pytest.raises(TraceError):
            trace(model, inputs)
    assert_untouched(model, before)


def test_tracing_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 3)).train()
    model[1].eval()
    before = snapshot(model)
    trace(model, X)
    assert_untouched(model, before)


class Chooses(nn.Module):
    """What becomes of (batch, 6, 8) between two layers is given."""

    def __init__(self, forward: Callable[[Chooses, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.head, self.chooses = nn.Linear(8, 8), nn.Linear(8, 4), forward
        self.gate, self.experts = nn.Linear(8, 3), nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.chooses(self, self.a(x)))


def by_where(_: Chooses, x: Tensor) -> Tensor:
    rows, columns = torch.where(x[..., 0] > 0)
    return x[rows, columns]


def sparse_mixture(net: Chooses, x: Tensor) -> Tensor:
    x = x.flatten(0, 1)
    value, index = net.gate(x).softmax(-1).topk(2)
    out = torch.zeros_like(x)
    for k, expert in enumerate(net.experts):
        rows, columns = torch.where(index == k)
        out.index_add_(0, rows, value[rows, columns, None] * expert(x[rows]))
    return out


@pytest.mark.parametrize(
    ("forward", "operator"),
    [
        (by_where, "where"),
        (sparse_mixture, "where"),
        (lambda _, x: x[x[..., 0] > 0], "index"),
        (lambda _, x: x * torch.nonzero(x[0, :, 0] > 0).shape[0], "nonzero"),
        (lambda _, x: x.masked_select(x > 0).sum() + x, "masked_select"),
    ],
)
def test_sizes_that_depend_on_values(forward: Callable[[Chooses, Tensor], Tensor], operator: str) -> None:
    expected = (
        rf"Chooses makes a tensor whose size depends on values \(aten::{operator}\), .*: compute all pos"
    )
    with pytest.raises(TraceError, match=expected):
        trace(Chooses(forward), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0)))


def test_where_with_three_arguments_and_values_in_numbers_are_followed() -> None:
    graph = trace(Chooses(lambda _, x: torch.where(x > 0, x, 2 * x) * x.sum().item()), torch.randn(2, 6, 8))
    assert reasons(graph)["a"] is None


@pytest.mark.parametrize(
    "forward",
    [
        lambda net, x: torch.vmap(net.experts[0])(x),
        lambda _, x: x * torch.vmap(lambda k: k + 1)(torch.arange(6))[:, None],
    ],
)
def test_a_mapped_function(forward: Callable[[Chooses, Tensor], Tensor]) -> None:
    with pytest.raises(
        TraceError, match=r"runs under torch\.vmap, .*: let the layers and operators take the"
    ):
        trace(Chooses(forward), torch.randn(2, 6, 8))
