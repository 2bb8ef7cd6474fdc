"""The quadratic form against what zeroed inputs do to the outputs of each layer, computed by the layers themselves."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
import qcqp_prune.importance.readers as readers_module
from qcqp_prune.certify import certify
from qcqp_prune.program.program import Program
from qcqp_prune.solve.result import Reason
from qcqp_prune.testing import exhaustive
from tests.networks import liven
from tests.scored import (
    Dense,
    Depthwise,
    Flattened,
    Grouped,
    Kind,
    Residual,
    batches_for,
    by_columns,
)


class Joined(nn.Module):
    """Two branches that one layer reads side by side, the first of which another reads alone; one output."""

    shape = (2, 5, 5)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(2, 3, 3), nn.Conv2d(2, 3, 3, bias=False), nn.Conv2d(6, 2, 2)
        self.d, self.out = nn.Conv2d(3, 2, 1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.relu(self.a(x)), torch.relu(self.b(x))
        joined = self.c(torch.cat([first, second], 1))
        return self.out(torch.cat([joined.mean((2, 3)), torch.relu(self.d(first)).mean((2, 3))], 1))


class Twice(nn.Module):
    """A layer that is called twice, with padding."""

    shape = (2, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.b(torch.relu(self.a(x))))))
        return self.out(x.mean((2, 3)))


class ToOne(nn.Module):
    """Any of the networks with one output, of which a random sign is no matter."""

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.body, self.one = kind(), nn.Linear(3, 1)
        self.shape = kind.shape

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.body(x))


NETWORKS = {
    "joined": Joined,
    "twice": Twice,
    **{
        kind.__name__.lower(): lambda kind=kind: ToOne(kind)
        for kind in (Dense, Depthwise, Grouped, Flattened)
    },
}


def made(name: str) -> tuple[nn.Module, qp.ChannelGraph, list[tuple[Tensor, Tensor]]]:
    model = liven(NETWORKS[name]()).eval()
    graph = qp.trace(model, torch.zeros(1, *model.shape))
    generator = torch.Generator().manual_seed(1)
    batches = [(torch.randn(4, *model.shape, generator=generator), torch.zeros(4)) for _ in range(2)]
    return model, graph, batches


def change(model: nn.Module, graph: qp.ChannelGraph, x: Tensor, kept: np.ndarray, *, centred: bool) -> float:
    """Half the squared change of each layer's outputs, weighed by squared derivatives, when what it reads is zeroed."""
    first = {layer.weight: layer for layer in reversed(graph.layers)}
    calls: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)
    handles = []
    for name, module in model.named_modules():
        if f"{name}.weight" in first:

            def keep(m: nn.Module, i: tuple[Tensor], o: Tensor, name: str = name) -> None:
                o.retain_grad()
                calls[name].append((i[0].detach(), o))

            handles.append(module.register_forward_hook(keep))
    model(x).sum().backward()
    for handle in handles:
        handle.remove()
    total = 0.0
    for name, seen in calls.items():
        module, layer = model.get_submodule(name), first[f"{name}.weight"]
        if getattr(module, "groups", 1) == len(graph.axes[layer.in_axis]):
            continue  # depthwise
        gates = torch.from_numpy(kept[graph.axes[layer.in_axis]]).float()
        deltas, curvature = [], 0.0
        for read, out in seen:
            zeroed = read * gates.reshape(1, -1, *[1] * (read.ndim - 2))
            deltas.append((module(zeroed) - out).detach().double().transpose(0, 1).flatten(1))
            curvature = curvature + out.grad.double().transpose(0, 1).flatten(1).square().sum(1) / len(x)
        delta = torch.cat(deltas, 1)
        if centred and module.bias is not None and len(seen) == 1:  # a bias of one call only
            delta = delta - delta.mean(1, keepdim=True)
        total += float((delta.square().mean(1) * curvature).sum()) / 2
    return total


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_form_is_what_layers_lose(name: str, centred: bool) -> None:
    model, graph, batches = made(name)
    form = qp.OutputChange(batches, centred=centred)(model, graph)
    x = torch.cat([x for x, _ in batches])
    full = np.ones(graph.unit_count, np.bool_)
    rng = np.random.default_rng(0)
    free = np.flatnonzero(~graph.stays)
    for _ in range(8):
        kept = full.copy()
        kept[free[rng.random(len(free)) < 0.5]] = False
        expected = change(model, graph, x, kept, centred=centred)
        assert form.evaluate(full) - form.evaluate(kept) == pytest.approx(expected, rel=1e-4)
    nothing = full.copy()
    nothing[free] = False
    assert form.evaluate(nothing) == pytest.approx(0.0, abs=1e-9 * form.evaluate(full))


def test_pairs_lie_within_groups_and_between_those_that_one_layer_reads() -> None:
    model, graph, batches = made("joined")
    program = Program.from_problem(
        qp.PruningProblem.build(graph, qp.OutputChange(batches)(model, graph), budgets={"macs": "60%"})
    )
    within, joined = [(0, 0), (1, 1), (2, 2), (3, 3)], [(0, 1), (2, 3)]
    assert [(p.first, p.second) for p in program.pairs] == sorted(within + joined)


@pytest.mark.parametrize(
    "solver",
    [
        "scip",
        "highs:cardinality_rlt",
        "highs:perspective",
        "pyomo",
        "decomposition",
        "block_coordinate",
        "auto",
    ],
)
def test_every_solver_takes_it(solver: str, tmp_path: Path) -> None:
    model, graph, batches = made("joined")
    form = qp.OutputChange(batches)(model, graph)
    for budget in ("70%", "40%"):
        problem = qp.PruningProblem.build(graph, form, budgets={"macs": budget})
        best = exhaustive(problem).objective
        report = qp.solve(problem, solver, time_limit=20)
        assert report.objective == pytest.approx(best, rel=1e-9)
        if solver == "block_coordinate":
            assert report.bound is None
            continue
        assert report.bound is not None
        assert report.bound >= best * (1 - 1e-9)
        if solver == "decomposition":
            report.write_certificate(tmp_path / "proof.json")
            assert certify(tmp_path / "proof.json").bound >= best
        else:
            assert report.termination.reason is Reason.OPTIMAL


def test_behind_the_last_layer_it_is_the_squared_change_of_the_output() -> None:
    """Three hidden units, of which two are copies with opposite weights: without both nothing changes."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[2.0, -2.0, 1.0], [1.0, -1.0, 3.0]]))
    graph = qp.trace(model, torch.zeros(1, 2))
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    form = qp.OutputChange([(x, torch.zeros(2))])(model, graph)
    hidden = graph.axes[graph.layers[0].out_axis]
    full = np.ones(graph.unit_count, np.bool_)

    def lost(*units: int) -> float:
        kept = full.copy()
        kept[hidden[list(units)]] = False
        return form.evaluate(full) - form.evaluate(kept)

    assert lost(0) == pytest.approx(0.5 * (1 + 9) / 2 * (4 + 1))  # half of E[h^2] |w|^2
    assert lost(0, 1) == pytest.approx(0.0, abs=1e-9)
    assert lost(2) == pytest.approx(0.5 * 4 / 2 * (1 + 9))
    problem = qp.PruningProblem.build(graph, form, budgets={"macs": "34%"})
    assert exhaustive(problem).mask.tolist()[hidden[0] : hidden[2] + 1] == [False, False, True]


def test_a_weight_whose_products_are_not_held_gives_linear_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    model, graph, batches = made("flattened")
    with_pairs = qp.OutputChange(batches)(model, graph)
    wide = next(x for x in graph.layers if x.name == "body.b")
    monkeypatch.setattr(readers_module, "LARGEST", len(graph.axes[wide.in_axis]) - 1)
    form = qp.OutputChange(batches)(model, graph)
    read = np.unique(graph.axes[wide.in_axis])
    assert len(form.pairs) == len(with_pairs.pairs) - 1
    assert not any(np.isin(term.rows, read).any() for term in form.pairs)
    with torch.no_grad():
        read_by_it = torch.relu(model.body.a(torch.cat([x for x, _ in batches]))).flatten(1)
    made_by_it = model.body.b(read_by_it).detach().requires_grad_()
    model.one(model.body.c(torch.relu(made_by_it))).sum().backward()
    curvature = made_by_it.grad.double().square().mean(0)
    weighed = curvature @ model.body.b.weight.detach().double().square()
    by_column = read_by_it.double().square().mean(0) * weighed / 2
    expected = np.zeros(graph.unit_count)
    np.add.at(expected, graph.axes[wide.in_axis], by_column.numpy())
    np.testing.assert_allclose(form.unary[read], expected[read], rtol=1e-4)


def test_what_it_cannot_say_is_refused() -> None:
    model = liven(Residual())
    example = torch.zeros(1, *Residual.shape)
    batches = batches_for(Residual, 1)
    with pytest.raises(qp.InvalidOptionError, match=r"third factor: trace without blocks"):
        qp.OutputChange(batches)(model, qp.trace(model, example, blocks=True))
    with pytest.raises(qp.InvalidOptionError, match="OutputChange says nothing of"):
        qp.OutputChange(batches)(model, qp.trace(model, example, sharing="free"))
    columns, graph = by_columns(Dense)
    with pytest.raises(qp.InvalidOptionError, match=r"says nothing of a\.columns"):
        qp.OutputChange(batches_for(Dense, 1))(columns, graph)
    with pytest.raises(qp.InvalidOptionError, match="OutputChange was given no batch"):
        qp.OutputChange([])(model, qp.trace(model, example))
