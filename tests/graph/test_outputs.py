"""What models return and how they are called: containers of all kinds, caches, masks, written dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.apply.verify import double_outputs
from qcqp_prune.graph.inputs import make_inputs
from qcqp_prune.graph.outputs import opened
from tests.networks import keep, liven, random_masks, widths

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


@dataclass
class Pair:
    """A class that PyTorch knows nothing of."""

    first: Tensor
    other: dict[str, Any]


class Memory:
    """Neither a dataclass nor a mapping; it holds itself, and a tensor in a slot of what it holds."""

    def __init__(self, value: Tensor) -> None:
        self.me, self.name, self.layers = self, "memory", [value, None]


class Net(nn.Module):
    """6 -> a(8) -> relu -> b(8) -> relu -> c(3); ``how`` says in what the results are handed out."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.how, self.config = how, SimpleNamespace(use_cache=True)

    def forward(self, x: Tensor) -> Any:
        inner = self.b(self.a(x).relu())
        y = self.c(inner.relu())
        if self.how == "cache":
            return {"y": y, "cache": Memory(inner)} if self.config.use_cache else {"y": y}
        if self.how == "class":
            return Pair(y, {"more": (2 * y, "word")}), Memory(y + 1)
        return {"y": y, "twice": [2 * y, None]}


@pytest.mark.parametrize("how", ["class", "dict"])
@pytest.mark.parametrize("realisation", ["modules", "graph"])
def test_containers(how: str, realisation: str) -> None:
    model = liven(Net(how))
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"a": 8, "b": 8}
    kept = keep(graph, a=[0, 3, 5], b=[1, 2])
    small, checked = qp.shrink_and_verify(model, graph, kept, realisation=realisation)
    assert checked.realisation == realisation
    if realisation == "modules":
        assert type(small(X)) is type(model(X))
    else:
        assert len(torch.utils._pytree.tree_leaves(small(X))) >= (3 if how == "class" else 2)
    assert "forward" not in vars(model)


def test_opened() -> None:
    """Tensors in the order of attributes; a container that PyTorch knows stays one."""
    a, b, c = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)
    first, second = opened((Pair(a, {"x": (b, "word")}), {"m": Memory(c), "n": 3}))
    assert [float(t) for t in first] == [0, 1]
    assert [float(t) for t in second["m"]] == [2]
    assert second["n"] == 3


def test_a_cache_is_no_result() -> None:
    """A cache that the configuration asks for is left out, so that what it holds may shrink; then it is back."""
    model = liven(Net("cache"))
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"a": 8, "b": 8}
    assert model.config.use_cache
    small = qp.shrink(model, graph, keep(graph, b=[0, 1, 2]))
    assert small(X)["cache"].layers[0].shape == (2, 3)

    class Stubborn(Net):
        def forward(self, x: Tensor) -> Any:
            self.config = SimpleNamespace(use_cache=True)
            return super().forward(x)

    graph = qp.trace(liven(Stubborn("cache")), X)
    assert widths(graph, free=True) == {"a": 8}
    assert next(g.frozen_reason for g in graph.groups if g.id == "b") == "network output"


def test_everything_is_back_after_an_error() -> None:
    model = Net("dict")
    with pytest.raises(qp.TraceError):
        qp.trace(model, torch.zeros(2, 5))
    assert "forward" not in vars(model)
    assert model.config.use_cache


def test_a_written_dtype_does_not_loosen_verification() -> None:
    """Half and single precision written into a forward: compared in double all the same, and a small fault is found."""

    class Islands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).to(torch.float16)
            scale = torch.rsqrt(y.float().pow(2).mean(0, keepdim=True) + 1e-6)
            y = (y.float() * scale + torch.zeros(y.shape[-1])).softmax(-1, dtype=torch.float32)
            return self.b(y.to(x.dtype))

    model = liven(Islands())
    graph = qp.trace(model, X)
    masks = random_masks(graph, 0, 0.5)
    small, checked = qp.shrink_and_verify(model, graph, masks)
    assert (checked.dtype, checked.realisation) == ("float64", "modules")
    assert checked.max_relative_error < 1e-12
    assert small(X).dtype == torch.float32
    with torch.no_grad():
        model.a.weight += 1e-6  # a fault that half precision would swallow
    call = make_inputs(graph)
    again = qp.shrink(model, graph, masks)
    difference = double_outputs(small, call)[0] - double_outputs(again, call)[0]
    assert 1e-8 < float(difference.abs().max()) < 1e-4


def test_masks_are_kept_and_numbers_are_drawn() -> None:
    """What a mask hides is part of its meaning: an empty row would make a softmax of nothing."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.a, self.b = nn.Embedding(9, 4), nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, ids: Tensor, mask: Tensor, flags: Tensor) -> Tensor:
            y = self.b(self.a(self.table(ids)).relu()) * flags[..., None]
            return (y + torch.where(mask[..., None] == 1, 0.0, -torch.inf)).softmax(1)

    ids = torch.tensor([[0, 8, 3, 1, 2], [1, 0, 5, 8, 7]])
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    flags = torch.tensor([[True, False, True, True, True]] * 2)
    model = liven(Masked())
    graph = qp.trace(model, (ids, mask, flags))
    again = qp.ChannelGraph.from_json(graph.to_json())
    drawn = [make_inputs(g, seed=s)[0] for g, s in ((graph, 0), (again, 1))]
    for args in drawn:
        assert torch.equal(args[1], mask)
        assert torch.equal(args[2], flags)
        assert (args[1].dtype, args[2].dtype) == (torch.int64, torch.bool)
        assert 0 <= int(args[0].min()) <= int(args[0].max()) <= 8
    assert not torch.equal(drawn[0][0], drawn[1][0])
    qp.shrink(model, graph, random_masks(graph, 0, 0.5))


def test_queries_that_are_repeated_for_each_sample() -> None:
    """Learned queries grow with the batch though no input makes them."""

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries = nn.Parameter(torch.randn(5, 6))
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: Tensor) -> Tensor:
            q = self.b(self.a(self.queries[None].repeat(x.shape[0], 1, 1)).relu())
            return torch.bmm(q, x.transpose(1, 2))

    model, x = liven(Queries()), torch.randn(3, 4, 6)
    graph = qp.trace(model, x)
    assert graph.notes == ()
    assert sum(layer.macs_per_pair for layer in graph.layers if layer.weight) == 2 * 5
    qp.shrink(model, graph, keep(graph, a=[0, 1]))
