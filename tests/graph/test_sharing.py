"""Weights used more than once, and models with unusual inputs and outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qcqp_prune.apply.masked import masked
from qcqp_prune.apply.shrink import shrink_and_verify
from qcqp_prune.graph.trace import trace
from qcqp_prune.importance.magnitude import Magnitude
from tests.networks import difference, keep, liven, prune_and_check, random_masks, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def conv(a: int, b: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, **{"padding": 1, "bias": False, **options})


class TwoConvolutionsOneWeight(nn.Module):
    """x(3) -> a(8) -> b(8) -> c(8) -> head, where c has b's weight and a bias of its own.

    c reads b's outputs with the dimension that b reads a's with, so all three are one group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.a = conv(3, 8)
        self.b, self.c = conv(8, 8, bias=True), conv(8, 8, bias=True)
        self.c.weight = self.b.weight
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.a(x))
        return self.head(self.c(torch.tanh(self.b(y))).mean((2, 3)))


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_two_convolutions_share_a_weight(realisation: str) -> None:
    model = liven(TwoConvolutionsOneWeight())
    graph = trace(model, X)
    assert widths(graph, free=True) == {"a": 8}
    assert [x.name for x in graph.layers] == ["a", "b", "c", "head"]
    spec = next(t for t in graph.tensors if t.name == "b.weight")
    assert spec.aliases == ("c.weight",)
    masks = random_masks(graph, 0, 0.5)
    assert uses(graph, masks)["params"] == 27 * 4 + (9 * 16 + 2 * 4) + 4 * 4 + 4
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 4 + 16 + 16) + 16
    small, _ = prune_and_check(model, X, graph, masks, realisation=realisation)
    assert small.b.weight is small.c.weight


def test_a_module_called_twice() -> None:
    #  x(3) -> a(8) -> b(8) -> b(8) -> head: b's inputs are a's outputs and its own
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(torch.tanh(self.b(torch.tanh(self.a(x))))).mean((2, 3)))

    model = liven(Net())
    graph = trace(model, X)
    assert [x.name for x in graph.layers] == ["a", "b", "b@2", "head"]
    assert len(widths(graph, free=True)) == 1
    masks = random_masks(graph, 0, 0.5)
    assert uses(graph, masks)["macs"] == 36 * 9 * (3 * 4 + 2 * 16) + 16
    prune_and_check(model, X, graph, masks)
    prune_and_check(model, X, graph, masks, realisation="graph")


def test_a_tied_linear_map_and_its_transpose() -> None:
    #  x(6) -> a(8) -> b(8) -> b turned: what b reads and what its transpose makes are the outputs, and stay
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(torch.tanh(self.b(torch.tanh(self.a(x)))), self.b.weight.t())

    model, x = liven(Autoencoder()), torch.randn(2, 6)
    graph = trace(model, x)
    # The last map's weight is square, of the parameter's shape, and turned all the same.
    assert [(x.weight, x.op) for x in graph.layers[1:]] == [
        ("b.weight", "linear"),
        ("b.weight", "linear_transposed"),
    ]
    assert widths(graph, free=True) == {"b": 8}
    masks = keep(graph, b=[1, 2, 6])
    assert uses(graph, masks)["macs"] == 6 * 8 + 8 * 3 + 3 * 8
    prune_and_check(model, x, graph, masks)
    prune_and_check(model, x, graph, masks, realisation="graph")


class Named(nn.Module):
    """Keyword inputs of which one is a plain value, a dict as output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 5), nn.Linear(5, 4)

    def forward(self, image: Tensor, extra: dict[str, Tensor], scale: float = 1.0) -> dict[str, Any]:
        y = torch.tanh(self.b(torch.tanh(self.a(image)) * scale))
        return {"logits": self.head(y.mean((2, 3))) + extra["shift"], "maps": [y, None]}


@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_keyword_inputs_and_a_dict_as_output(realisation: Any) -> None:
    model = liven(Named())
    inputs = {"image": X, "extra": {"shift": torch.randn(2, 4)}, "scale": 0.5}
    graph = trace(model, inputs)
    assert widths(graph, free=True) == {"a": 8}  # b's maps are an output
    masks = keep(graph, a=[0, 3])
    small, _ = shrink_and_verify(model, graph, masks, realisation=realisation)
    with torch.no_grad():
        got, want = small(**inputs), masked(model, graph, masks)(**inputs)
    assert set(got) == {"logits", "maps"}
    tensors = [[x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)] for out in (got, want)]
    assert difference(*tensors) < 1e-5


@pytest.mark.parametrize(
    "inputs",
    [X, (X,), [X], {"x": X}, ((X,), {}), ((), {"x": X})],
    ids=["tensor", "tuple", "list", "dict", "call", "keywords"],
)
def test_ways_to_give_example_inputs(inputs: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = conv(3, 8), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.a(x)).mean((2, 3)))

    model = liven(Net())
    graph = trace(model, inputs)
    assert widths(graph, free=True) == {"a": 8}
    shrink_and_verify(model, graph, keep(graph, a=[5]))


def test_integer_inputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(11, 6)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(self.table(ids).mean(1))))

    model, ids = liven(Net()), torch.randint(0, 11, (3, 7))
    graph = trace(model, ids)
    assert widths(graph, free=True) == {"a": 8}
    assert graph.inputs[0].dtype == "int64"
    shrink_and_verify(model, graph, keep(graph, a=[1, 2]))


class Tied(nn.Module):
    """x(7) -> a(6) -> square(6) -> square and a again, transposed: an autoencoder with one weight for both ways."""

    def __init__(self, back: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> None:
        super().__init__()
        self.a, self.square = nn.Linear(7, 6), nn.Linear(6, 6)
        self.bias, self.back = nn.Parameter(torch.zeros(6)), back

    def forward(self, x: Tensor) -> Tensor:
        code = self.square(torch.tanh(self.a(x)))
        return self.back(torch.tanh(self.back(code, self.square.weight, self.bias)), self.a.weight, None)


TRANSPOSED: dict[str, Callable[[Tensor], Tensor]] = {
    "t": lambda w: w.t(),
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(-1, 0),
    "permute": lambda w: w.permute(-1, 0),
    "three times": lambda w: w.t().T.transpose(0, 1),
}


@pytest.mark.parametrize("how", TRANSPOSED)
def test_a_weight_that_is_read_transposed(how: str) -> None:
    """Layers and scores are those of a product with the matrix itself."""
    x = torch.randn(3, 7)
    model = liven(Tied(lambda y, w, bias: F.linear(y, TRANSPOSED[how](w), bias)))
    plain = liven(Tied(lambda y, w, bias: y @ w if bias is None else y @ w + bias))
    graph, wanted = trace(model, x), trace(plain, x)
    assert widths(graph, free=True) == widths(wanted, free=True) == {"a": 6, "square": 6}
    assert [(g.op, g.name, g.weight) for g in graph.layers] == [
        (g.op, g.name, g.weight) for g in wanted.layers
    ]
    assert uses(graph) == uses(wanted)
    masks = random_masks(graph, 3, 0.5)
    scores, others = Magnitude()(model, graph), Magnitude()(plain, wanted)
    assert scores.evaluate(masks.flat(graph)) == pytest.approx(others.evaluate(masks.flat(graph)), rel=1e-12)
    for seed, realisation in enumerate(("auto", "graph")):
        prune_and_check(model, x, graph, random_masks(graph, seed, 0.5), realisation=realisation)


def test_a_weight_that_is_turned_back_is_read_as_it_is() -> None:
    def back(y: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(y, w.t() if bias is None else w.t().t(), bias)

    model, x = liven(Tied(back)), torch.randn(3, 7)
    graph = trace(model, x)
    assert [g.op for g in graph.layers] == ["linear", "linear", "linear", "linear_transposed"]
    prune_and_check(model, x, graph, random_masks(graph, 1, 0.5))
