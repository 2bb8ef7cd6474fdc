"""Importances against sums over single weights, written as loops that know nothing of groups or pairs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from tests.networks import entries_kept, liven, random_masks
from tests.scored import (
    NETWORKS,
    Dense,
    Flattened,
    Grouped,
    Kind,
    Normed,
    batches_for,
    by_columns,
    kernel_loop,
    layers,
    sum_over_kept,
    traced,
)


def norm_of(rows: list[list[float]]) -> float:
    return math.sqrt(sum(v * v for row in rows for v in row))


def paper(weight: Tensor) -> Tensor:
    norm = math.sqrt(sum(w * w for w in weight.detach().double().flatten().tolist()))
    return torch.tensor(kernel_loop(weight, lambda kernel: sum(abs(w) for w in kernel) / norm))


def authors(weight: Tensor) -> Tensor:
    rows = kernel_loop(weight, lambda kernel: sum(abs(w) for w in kernel))
    return torch.tensor([[v / norm_of(rows) for v in row] for row in rows], dtype=torch.float64)


def l2(weight: Tensor) -> Tensor:
    rows = kernel_loop(weight, lambda kernel: math.sqrt(sum(w * w for w in kernel)))
    return torch.tensor([[v / norm_of(rows) for v in row] for row in rows], dtype=torch.float64)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize(("variant", "score"), [("paper", paper), ("authors", authors), ("l2", l2)])
def test_magnitude_is_the_sum_over_kept_weights(
    kind: Kind, variant: str, score: Callable[[Tensor], Tensor]
) -> None:
    model, graph = traced(kind)
    form = qp.Magnitude(variant)(model, graph)
    for seed in range(12):
        masks = random_masks(graph, seed)
        expected = sum_over_kept(model, graph, masks, score)
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-5)


def test_only_pairs_of_units_that_may_both_go_are_held() -> None:
    # x(2) -> a(4) -> b(3) -> output: of each layer one side stays. With one more layer between them it has a pair.
    model, graph = traced(Dense)
    assert qp.Magnitude()(model, graph).pairs == ()
    deeper = liven(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 5), nn.Linear(5, 3)))
    graph = qp.trace(deeper, torch.randn(2, 2))
    (term,) = qp.Magnitude()(deeper, graph).pairs
    assert (len(term.rows), len(term.cols)) == (5, 4)


def mean_square(output: Tensor, target: Tensor) -> Tensor:
    return (output - target[:, None]).square().mean()


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("loss", [None, mean_square])
def test_taylor_is_the_sum_over_kept_pairs(kind: Kind, loss: Callable[..., Tensor] | None) -> None:
    model, graph = traced(kind)
    batches = batches_for(kind)
    form = qp.Taylor(batches, loss)(model, graph)
    assert form.unit == "loss"

    products: dict[int, list[Tensor]] = {id(m.weight): [] for m in layers(model)}
    for x, y in batches:
        model.zero_grad()
        (loss or F.cross_entropy)(model(x), y).backward()
        for p in {id(m.weight): m.weight for m in layers(model)}.values():
            products[id(p)].append((p * p.grad).detach().clone())

    def score(weight: Tensor) -> Tensor:
        uses = sum(m.weight is weight for m in layers(model))
        signed = [kernel_loop(p, sum) for p in products[id(weight)]]
        rows, cols = weight.shape[:2]
        mean = [
            [sum(abs(s[i][j]) for s in signed) / (len(signed) * uses) for j in range(cols)]
            for i in range(rows)
        ]
        return torch.tensor(mean, dtype=torch.float64)

    for seed in range(8):
        masks = random_masks(graph, seed)
        expected = sum_over_kept(model, graph, masks, score)
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_taylor_leaves_gradients_and_modes_alone() -> None:
    model, graph = traced(Dense)
    model.train()
    model.b.eval()
    model.a.weight.grad = torch.full_like(model.a.weight, 3.0)
    qp.Taylor(batches_for(Dense))(model, graph)
    assert (model.training, model.a.training, model.b.training) == (True, True, False)
    assert torch.equal(model.a.weight.grad, torch.full_like(model.a.weight, 3.0))
    assert model.b.weight.grad is None


def test_batch_norm_scales_add_up_on_the_units_that_they_scale() -> None:
    model = Normed()
    with torch.no_grad():
        model.bn_a.weight.copy_(torch.tensor([1.0, -2.0, 3.0, 0.0]))
        model.bn_b.weight.copy_(torch.tensor([0.5, 0.25, -4.0, 8.0]))
    graph = qp.trace(model, torch.zeros(1, 2, 3, 3))
    form = qp.BatchNormScale()(model, graph)
    assert form.pairs == ()
    channels = graph.axes[next(x.out_axis for x in graph.layers if x.name == "a")]
    for kept, expected in [([0], 1.5), ([1], 2.25), ([2], 7.0), ([3], 8.0), ([0, 1, 2, 3], 18.75)]:
        flat = np.zeros(graph.unit_count, np.bool_)
        flat[channels[kept]] = True
        assert form.evaluate(flat) == expected


@pytest.mark.parametrize("model", [Normed(affine=False), Dense()], ids=["no scale", "no batch norm"])
def test_no_batch_norm_scale_is_refused(model: nn.Module) -> None:
    graph = qp.trace(model, torch.zeros(1, 2, 5, 5))
    with pytest.raises(qp.InvalidScoreError, match="use Magnitude or Taylor"):
        qp.BatchNormScale()(model, graph)


def test_a_zero_layer_scores_zero() -> None:
    model, graph = traced(Dense)
    masks = random_masks(graph, 3)
    nn.init.zeros_(model.b.weight)
    with torch.no_grad():
        norm = math.sqrt(sum(w * w for w in model.a.weight.double().flatten().tolist()))
        kept = entries_kept(graph, next(t for t in graph.tensors if t.name == "a.weight"), masks.flat(graph))
        expected = sum(abs(w) for w in model.a.weight.double()[torch.from_numpy(kept)].tolist()) / norm
    assert qp.Magnitude()(model, graph).evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-9)


IMPORTANCES = {
    "paper": lambda: qp.Magnitude(),
    "authors": lambda: qp.Magnitude("authors"),
    "l2": lambda: qp.Magnitude("l2"),
    "taylor": lambda: qp.Taylor(batches_for(Dense)),
}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", IMPORTANCES)
def test_broken_weights_are_named(name: str, value: float) -> None:
    model, graph = traced(Dense)
    with torch.no_grad():
        model.b.weight[1, 2, 0, 1] = value
    with pytest.raises(qp.InvalidScoreError, match=r"b\.weight holds NaN or infinity: repair or retrain"):
        IMPORTANCES[name]()(model, graph)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_batch_norm_scales_are_refused(value: float) -> None:
    model = Normed()
    with torch.no_grad():
        model.bn_b.weight[2] = value
    graph = qp.trace(model, torch.zeros(1, 2, 3, 3))
    with pytest.raises(qp.InvalidScoreError, match=r"bn_b\.weight holds NaN or infinity: repair or retrain"):
        qp.BatchNormScale()(model, graph)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_another_model_is_refused(name: str) -> None:
    _, graph = traced(Dense)
    expected = r"a\.weight has shape \(5, 2, 3, 3\), not \(4, 2, 3, 3\): trace this model"
    with pytest.raises(qp.MaskMismatchError, match=expected):
        IMPORTANCES[name]()(Flattened(), graph)


@pytest.mark.parametrize("name", IMPORTANCES)
def test_a_model_without_the_layer_is_refused(name: str) -> None:
    _, graph = traced(Dense)
    with pytest.raises(qp.MaskMismatchError, match=r"a\.weight is missing: trace this model"):
        IMPORTANCES[name]()(nn.Sequential(nn.Conv2d(2, 4, 3)), graph)


def test_taylor_without_batches() -> None:
    model, graph = traced(Dense)
    for batch, found in (
        (torch.zeros(4, 2), "a Tensor"),
        ((torch.zeros(4, 2),), "a tuple of 1 (Tensor)"),
        ([torch.zeros(4, 2), [0, 1]], "a list of 2 (Tensor, list)"),
        ((), "a tuple of 0 ()"),
    ):
        with pytest.raises(
            qp.InvalidOptionError, match=re.escape(f"was given {found} as a batch: give a loader of pairs")
        ):
            qp.Taylor([batch])(model, graph)
    with pytest.raises(qp.InvalidOptionError, match="no batch: pass a loader with at least one"):
        qp.Taylor([])(model, graph)
    used_up = iter(batches_for(Dense))
    qp.Taylor(used_up)(model, graph)
    with pytest.raises(qp.InvalidOptionError, match="one-shot iterators run dry"):
        qp.Taylor(used_up)(model, graph)


def test_taylor_without_gradients() -> None:
    model, graph = traced(Dense)
    model.b.weight.requires_grad_(False)
    with pytest.raises(qp.InvalidOptionError, match=r"b\.weight .* requires_grad_\(True\)"):
        qp.Taylor(batches_for(Dense))(model, graph)


def test_taylor_with_a_loss_that_overflows() -> None:
    model, graph = traced(Dense)
    broken = qp.Taylor(batches_for(Dense), lambda output, _: (output * math.inf).sum())
    with pytest.raises(qp.InvalidScoreError, match="NaN or infinite: check the loss and the data"):
        broken(model, graph)


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(qp.InvalidOptionError, match="choose paper, authors or l2"):
        qp.Magnitude("l3")  # type: ignore[arg-type]


def test_scores_of_another_graph_are_refused() -> None:
    model, graph = traced(Dense)
    _, other = traced(Grouped)
    with pytest.raises(qp.InvalidScoreError, match="compute the importance on this graph"):
        qp.PruningProblem.build(other, qp.Magnitude()(model, graph), "50%")


def sum_over_entries(
    model: nn.Module, graph: qp.ChannelGraph, masks: qp.Masks, score: Callable[[Tensor], Tensor]
) -> float:
    """Scores of single weights, added up where the weight stays.

    Args:
        score: from a weight to one score for each of its entries.
    """
    total = 0.0
    weights = dict(model.named_parameters())
    for spec in graph.tensors:
        if spec.name.endswith("weight"):
            stays = torch.from_numpy(entries_kept(graph, spec, masks.flat(graph)))
            total += float(score(weights[spec.name])[stays].sum())
    return total


@pytest.mark.parametrize("variant", ["paper", "authors", "l2"])
def test_magnitude_of_columns_is_the_sum_over_kept_entries(variant: str) -> None:
    def score(weight: Tensor) -> Tensor:
        by_kernel = weight.detach().abs().double().flatten(2).sum(2)
        norm = by_kernel.norm() if variant == "authors" else weight.detach().double().norm()
        return weight.detach().abs().double() / norm

    model, graph = by_columns(Dense)
    form = qp.Magnitude(variant)(model, graph)  # type: ignore[arg-type]
    for seed in range(12):
        masks = random_masks(graph, seed)
        expected = sum_over_entries(model, graph, masks, score)
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-6)


def test_one_entry_of_the_magnitude_of_columns() -> None:
    """Only column (j=2, a=1, b=0) of b and input 3: one weight."""
    model, graph = by_columns(Dense)
    flat = np.zeros(graph.unit_count, np.bool_)
    names = [f"{g.id}[{k}]" for g in graph.groups for k in range(g.width)]
    for unit in ("a[3]", "b[2]", "b.columns[10]"):
        flat[names.index(unit)] = True
    weight = model.b.weight
    expected = abs(weight[2, 3, 1, 0].item()) / weight.double().norm().item()
    assert qp.Magnitude()(model, graph).evaluate(flat) == pytest.approx(expected, rel=1e-6)


def test_magnitude_of_filters_beside_columns_is_that_of_their_kernels() -> None:
    """A projection in a stream has its filters as columns: their kernels score as they do without."""
    model = liven(Projection(), 0)
    graph = qp.trace(model, torch.zeros(1, *Projection.shape), columns="body")
    assert {x.name for x in graph.layers if x.columns is not None} == {"side", "body"}
    for variant in ("paper", "authors", "l2"):
        form = qp.Magnitude(variant)(model, graph)
        without = qp.Magnitude(variant)(
            model, graph_without := qp.trace(model, torch.zeros(1, *Projection.shape))
        )
        if variant != "l2":
            full = np.ones(graph.unit_count, np.bool_), np.ones(graph_without.unit_count, np.bool_)
            assert form.evaluate(full[0]) == pytest.approx(without.evaluate(full[1]), rel=1e-9)
        names = [f"{g.id}[{k}]" for g in graph.groups for k in range(g.width)]
        flat = np.isin(names, ["side.columns[1]", "side.in[0]"])
        kernel = model.side.weight[1, 0].detach().double()
        value = {"paper": kernel.abs().sum(), "authors": kernel.abs().sum(), "l2": kernel.norm()}[variant]
        whole = model.side.weight.detach().double()
        norm = whole.abs().sum((2, 3)).norm() if variant == "authors" else whole.norm()
        assert form.evaluate(flat) == pytest.approx(float(value / norm), rel=1e-6)


class Projection(nn.Module):
    """Two convolutions of the input, added up."""

    shape = (1, 4, 4)

    def __init__(self) -> None:
        super().__init__()
        self.side = nn.Conv2d(1, 3, 3, padding=1)
        self.body = nn.Conv2d(1, 3, 3, padding=1)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.side(x) + self.body(x)))


def test_taylor_of_columns_is_the_sum_over_kept_entries() -> None:
    model, graph = by_columns(Dense)
    batches = batches_for(Dense)
    form = qp.Taylor(batches)(model, graph)
    scores: dict[int, Tensor] = {}
    for inputs, targets in batches:
        loss = F.cross_entropy(model(inputs), targets)
        weights = [m.weight for m in layers(model)]
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            entry = (weight.detach().double() * gradient.double()).abs() / len(batches)
            scores[id(weight)] = scores.get(id(weight), torch.zeros_like(entry)) + entry
    for seed in range(6):
        masks = random_masks(graph, seed)
        expected = sum_over_entries(model, graph, masks, lambda weight: scores[id(weight)])
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-5)
