"""Experts of a mixture that is computed as a whole: each goes with the row of the gate that weighs it."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.graph.units import REASONS
from tests.networks import difference, keep, liven, prune_and_check, reasons, run, uses, widths

EXPERTS, WIDTH, HIDDEN = 4, 6, 5
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
IMAGE = torch.randn(1, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class Mixture(nn.Module):
    """softmax(gate(x)) weighs four networks 6 -> 5 -> 6, held as two stacks of matrices; then a head.

    x(6) -> w1(4, 6, 5) -> relu -> w2(4, 5, 6) -> sum over 4 of gate * y -> head(3)
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.gate, self.head = how, nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.w1 = nn.Parameter(torch.zeros(EXPERTS, WIDTH, HIDDEN))
        self.b1 = nn.Parameter(torch.zeros(EXPERTS, 1, HIDDEN))
        self.w2 = nn.Parameter(torch.zeros(EXPERTS, HIDDEN, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gate(x).softmax(-1)
        if self.how == "einsum":
            y = (torch.einsum("nd,edf->enf", x, self.w1) + self.b1).relu()
            y = torch.einsum("enf,efd->end", y, self.w2)
            return self.head(torch.einsum("ne,end->nd", gates, y))
        y = torch.bmm(x.expand(EXPERTS, -1, -1), self.w1) + self.b1
        y = torch.bmm(y.relu(), self.w2)
        return self.head((gates.t()[:, :, None] * y).sum(0))


class Conditional(nn.Module):
    """A convolution whose kernel is a mixture of four, weighed by what the image is.

    conv(3, 6) -> gate(4) of its mean; sum over 4 of gate * w(4, 8, 6, 3, 3) is the kernel of the next -> conv(8, 2)
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.a, self.c = how, nn.Conv2d(3, 6, 1), nn.Conv2d(8, 2, 1)
        self.gate, self.w = nn.Linear(6, EXPERTS), nn.Parameter(torch.zeros(EXPERTS, 8, 6, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        n, _, height, width = x.shape
        gates = self.gate(x.mean((2, 3)))
        if self.how == "sum":
            kernel = (gates[0].softmax(-1)[:, None, None, None, None] * self.w).sum(0)
            y = F.conv2d(x, kernel, padding=1)
        elif self.how == "einsum":
            y = F.conv2d(x, torch.einsum("e,eoikl->oikl", gates[0].sigmoid(), self.w), padding=1)
        else:  # a kernel for each sample
            kernel = (gates.sigmoid() @ self.w.view(EXPERTS, -1)).view(n * 8, 6, 3, 3)
            x = x.reshape(1, n * 6, height, width)
            y = F.conv2d(x, kernel, padding=1, groups=n).view(n, 8, height, width)
        return self.c(y.relu()).mean((2, 3))


def without(model: nn.Module, gone: list[int], *, softmax: bool) -> nn.Module:
    """The whole network with some experts that weigh nothing: a logit of minus infinity, as far as floats go."""
    full = copy.deepcopy(model)
    with torch.no_grad():
        full.gate.weight[gone] = 0
        full.gate.bias[gone] = -1e4 if softmax else -1e3  # of which the sigmoid is zero
    return full


@pytest.mark.parametrize("how", ["einsum", "bmm"])
def test_experts_of_stacked_matrices(how: str) -> None:
    model, left, gone = liven(Mixture(how)), [0, 3], [1, 2]
    graph = qp.trace(model, X)
    assert widths(graph, free=True) == {"gate": EXPERTS}
    mixing = EXPERTS * WIDTH if how == "einsum" else 0
    one = WIDTH + 2 * WIDTH * HIDDEN  # its row of the gate, and its two matrices
    assert uses(graph)["macs"] == EXPERTS * one + mixing + WIDTH * 3
    small, checked = prune_and_check(model, X, graph, keep(graph, gate=left), mixes=True)
    assert checked.realisation == ("modules" if how == "einsum" else "graph")
    parts = dict(small.named_parameters())
    for name in ("gate.weight", "gate.bias", "w1", "b1", "w2"):
        assert torch.equal(parts[name], dict(model.named_parameters())[name][left]), name
    assert difference(run(small, X), run(without(model, gone, softmax=True), X)) < 1e-7


@pytest.mark.parametrize("how", ["sum", "einsum", "sample"])
def test_experts_of_a_kernel(how: str) -> None:
    model, left, gone = liven(Conditional(how)), [1, 2, 3], [0]
    graph = qp.trace(model, IMAGE)
    assert widths(graph, free=True) == {"gate": EXPERTS}
    small, _ = prune_and_check(model, IMAGE, graph, keep(graph, gate=left), mixes=True)
    assert torch.equal(small.w, model.w[left])
    assert torch.equal(small.gate.weight, model.gate.weight[left])
    assert difference(run(small, IMAGE), run(without(model, gone, softmax=how == "sum"), IMAGE)) < 1e-7
    elements = 8 * 6 * 9 + 6 + 1  # of a kernel, a row of the gate and its bias
    assert uses(graph)["params"] - uses(graph, keep(graph, gate=left))["params"] == elements


@pytest.mark.parametrize("make", [lambda: Mixture("bmm"), lambda: Conditional("sum")])
def test_experts_stay_where_they_are_not_asked_for(make) -> None:
    model = liven(make())
    graph = qp.trace(model, X if isinstance(model, Mixture) else IMAGE, units=["widths"])
    assert reasons(graph)["gate"] == REASONS["experts"]


def test_widths_of_experts_may_go_instead() -> None:
    model = liven(Mixture("bmm"))
    graph = qp.trace(model, X, units=["widths"])
    assert HIDDEN in widths(graph, free=True).values()
    (group,) = (name for name, n in widths(graph, free=True).items() if n == HIDDEN)
    small, _ = prune_and_check(model, X, graph, keep(graph, **{group.replace(".", "_"): [1, 4]}))
    assert torch.equal(dict(small.named_parameters())["w1"], model.w1[:, :, [1, 4]])
    assert torch.equal(dict(small.named_parameters())["w2"], model.w2[:, [1, 4]])


class Listed(nn.Module):
    """The same mixture of modules of their own, whose results are stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.head = nn.Linear(WIDTH, EXPERTS), nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH))
            for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([expert(x) for expert in self.experts], 1)
        return self.head((self.gate(x).softmax(-1)[:, :, None] * y).sum(1))


def test_experts_that_are_modules_lose_widths_only() -> None:
    model = liven(Listed())
    graph = qp.trace(model, X)
    assert "computed apart" in (reasons(graph)["gate"] or "")
    assert list(widths(graph, free=True).values()) == [HIDDEN, WIDTH, HIDDEN, HIDDEN, HIDDEN]
    prune_and_check(model, X, graph, keep(graph, experts_2_0=[0, 3]), mixes=True)
