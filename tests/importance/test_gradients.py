"""Gates against gradients of real gates, Fisher against gradients of single samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.importance import fisher
from tests.networks import entries_kept, liven, random_masks
from tests.scored import (
    NETWORKS,
    Dense,
    Kind,
    Normed,
    Overwriting,
    Packed,
    Recurrent,
    batches_for,
    by_columns,
    layers,
    sum_over_kept,
    traced,
)

NORM_OF = {Normed: {"a": "bn_a", "b": "bn_b"}, Overwriting: {"b": "bn"}}


def gated(kind: Kind, model: nn.Module, graph: qp.ChannelGraph, batches: list[tuple[Tensor, Tensor]]):
    """Worth of the units: gates of 1 are multiplied with what modules return, and autograd does the rest."""
    modules, norms = dict(model.named_modules()), NORM_OF.get(kind, {})
    worth = np.zeros(graph.unit_count)
    for x, y in batches:
        gates: dict[str, Tensor] = {}

        def multiply(name: str, gates: dict[str, Tensor] = gates):
            def hook(module: nn.Module, _: object, out: Tensor) -> Tensor:
                gates[name] = torch.ones(out.shape[1], requires_grad=True)
                return out * gates[name].reshape(1, -1, *[1] * (out.ndim - 2))

            return hook

        handles = [
            modules[norms.get(layer.name, layer.name)].register_forward_hook(multiply(layer.name))
            for layer in graph.layers
        ]
        loss = F.cross_entropy(model(x), y)
        slopes = dict(zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True))
        for handle in handles:
            handle.remove()
        for layer in graph.layers:
            of_weight = [m.name for m in graph.layers if m.weight == layer.weight]
            slope = sum(slopes[name].double().numpy() for name in of_weight) / len(of_weight)
            units = graph.axes[layer.out_axis]
            for unit in np.unique(units):
                worth[unit] += abs(slope[units == unit].sum()) / len(batches)
    return worth


@pytest.mark.parametrize("kind", [*NETWORKS, Normed, Overwriting])
def test_gates_are_gradients_of_gates(kind: Kind) -> None:
    model, graph = traced(kind)
    model.eval()
    batches = batches_for(kind)
    form = qp.Taylor(batches, form="gate")(model, graph)
    assert form.pairs == ()
    assert form.unit == "loss"
    np.testing.assert_allclose(
        form.unary, gated(kind, model, graph, batches), rtol=2e-4, atol=1e-7 * form.unary.max()
    )


def test_gates_of_parts_of_a_weight_and_of_hidden_layers() -> None:
    """By hand: sums of w dL/dw and b dL/db over the rows of each unit, signs kept within it."""
    model, graph = traced(Packed)
    (batch,) = batches_for(Packed, 1)
    form = qp.Taylor([batch], form="gate")(model, graph)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    rows = (model.in_weight * model.in_weight.grad).sum(1) + model.in_bias * model.in_bias.grad
    layer = next(x for x in graph.layers if x.rows == (6, 10))
    np.testing.assert_allclose(form.unary[graph.axes[layer.out_axis]], rows[6:].abs().detach(), rtol=1e-4)

    model, graph = traced(Recurrent)
    (batch,) = batches_for(Recurrent, 1)
    form = qp.Taylor([batch], form="gate")(model, graph)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    lstm = model.memory
    expected = np.zeros(5)
    for suffix in ("ih_l0", "hh_l0"):
        weight, bias = getattr(lstm, f"weight_{suffix}"), getattr(lstm, f"bias_{suffix}")
        rows = (weight * weight.grad).sum(1) + bias * bias.grad
        expected += rows.detach().double().reshape(4, 5).sum(0).abs().numpy()
    (hidden,) = [k for k, g in enumerate(graph.groups) if g.frozen_reason is None]
    np.testing.assert_allclose(form.unary[graph.units(hidden)], expected, rtol=1e-4)


def samplewise(model: nn.Module, weight: Tensor, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Half of the squared weights times the mean square of gradients, one backward pass for each sample."""
    model.eval()
    squares, count = torch.zeros(weight.shape, dtype=torch.float64), 0
    for x, y in batches:
        for k in range(len(x)):
            loss = F.cross_entropy(model(x[k : k + 1]), y[k : k + 1])
            squares += torch.autograd.grad(loss, weight)[0].double().square()
            count += 1
    uses = sum(m.weight is weight for m in layers(model)) or 1
    return 0.5 * weight.detach().double().square() * squares / count / uses


@pytest.mark.parametrize("kind", [*NETWORKS, Normed, Overwriting])
@pytest.mark.parametrize("at_once", [1, 10**7])
def test_fisher_is_a_loop_over_samples(kind: Kind, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher, "AT_ONCE", at_once)
    model, graph = traced(kind)
    batches = [*batches_for(kind, 2), tuple(t[:3] for t in batches_for(kind, 1)[0])]
    form = qp.Fisher(batches)(model, graph)
    assert form.unit == "loss"

    def score(weight: Tensor) -> Tensor:
        entries = samplewise(model, weight, batches)
        return entries.reshape(*weight.shape[:2], -1).sum(-1)

    for seed in range(3):
        masks = random_masks(graph, seed)
        expected = sum_over_kept(model, graph, masks, score)
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_fisher_by_hand() -> None:
    """Half the mean of w^2 ((y - t) x)^2: two weights, two samples, loss (y - t)^2 / 2."""
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [2.0]]))
        model[1].weight.copy_(torch.tensor([[3.0, -1.0]]))
    graph = qp.trace(model, torch.zeros(1, 1))
    batch = (torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 1.0]))  # outputs 1, 2; errors 1, 1
    form = qp.Fisher([batch], lambda y, t: 0.5 * (y[:, 0] - t).square().mean())(model, graph)
    mean = (1 + 4) / 2
    # unit 0: first weight 1, gradient 3 e x; second weight 3, gradient e x. Unit 1: 2 and -e x; -1 and 2 e x.
    hidden = graph.axes[graph.layers[0].out_axis]
    assert form.unary[hidden].tolist() == pytest.approx([0.5 * mean * (9 + 9), 0.5 * mean * (4 + 4)])


def test_fisher_of_columns_is_the_sum_over_kept_entries() -> None:
    model, graph = by_columns(Dense)
    batches = batches_for(Dense, 2)
    form = qp.Fisher(batches)(model, graph)
    scores = {f"{n}.weight": samplewise(model, getattr(model, n).weight, batches) for n in ("a", "b")}
    for seed in range(3):
        masks = random_masks(graph, seed)
        expected = sum(
            float(scores[spec.name][torch.from_numpy(entries_kept(graph, spec, masks.flat(graph)))].sum())
            for spec in graph.tensors
            if spec.name in scores
        )
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-4)


def looking(output: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy with a look at a value, which no vmap allows."""
    return F.cross_entropy(output, targets) * (1.0 if output.sum().item() < 1e9 else 0.0)


@pytest.mark.parametrize("loss", [F.cross_entropy, looking])
@pytest.mark.parametrize("kind", [Packed, Recurrent])
def test_fisher_takes_samples_one_by_one_where_it_has_to(
    kind: Kind, loss: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    model, graph = traced(kind)
    batches = batches_for(kind, 2)
    with caplog.at_level(logging.INFO):
        form = qp.Fisher(batches, loss)(model, graph)
    assert caplog.text.count("one sample after another") == (loss is looking)
    parameters = dict(model.named_parameters())
    weights = {layer.weight for layer in graph.layers if layer.weight}
    expected = sum(float(samplewise(model, parameters[name], batches).sum()) for name in weights)
    assert form.evaluate(np.ones(graph.unit_count, np.bool_)) == pytest.approx(expected, rel=1e-4)


def test_fisher_leaves_the_model_as_it_was() -> None:
    model, graph = traced(Normed)
    model.train()
    before = {n: (t, t.detach().clone()) for n, t in [*model.named_parameters(), *model.named_buffers()]}
    qp.Fisher(batches_for(Normed, 1))(model, graph)
    after = dict([*model.named_parameters(), *model.named_buffers()])
    assert all(after[n] is t and torch.equal(t, value) for n, (t, value) in before.items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_bias_of_a_layer_whose_weight_is_read_both_ways_is_its_own() -> None:
    """By hand: an autoencoder's way back has no bias, and half of the weight's worth is in each of its two layers."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.head = nn.Linear(7, 6), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(F.linear(torch.tanh(self.a(x)), self.a.weight.t()).sin())
            return y

    model = liven(Tied()).eval()
    x, y = torch.randn(4, 7), torch.tensor([0, 2, 1, 2])
    graph = qp.trace(model, x)
    form = qp.Taylor([(x, y)], form="gate")(model, graph)
    F.cross_entropy(model(x), y).backward()
    products = model.a.weight * model.a.weight.grad
    there, back = (next(g for g in graph.layers if g.name == name) for name in ("a", "a@2"))
    rows = products.sum(1) + model.a.bias * model.a.bias.grad
    np.testing.assert_allclose(form.unary[graph.axes[there.out_axis]], rows.abs().detach() / 2, rtol=1e-4)
    np.testing.assert_allclose(
        form.unary[graph.axes[back.out_axis]], products.sum(0).abs().detach() / 2, rtol=1e-4
    )


SCORERS = {"gate": lambda b: qp.Taylor(b, form="gate"), "fisher": qp.Fisher}


@pytest.mark.parametrize("name", SCORERS)
def test_bad_data_are_refused(name: str) -> None:
    model, graph = traced(Dense)
    who = {"gate": "Taylor", "fisher": "Fisher"}[name]
    with pytest.raises(qp.InvalidOptionError, match=f"{who} was given no batch"):
        SCORERS[name]([])(model, graph)
    with pytest.raises(qp.InvalidOptionError, match=f"{who} was given a Tensor as a batch"):
        SCORERS[name]([torch.zeros(4, 2, 5, 5)])(model, graph)
    used_up = iter(batches_for(Dense))
    SCORERS[name](used_up)(model, graph)
    with pytest.raises(qp.InvalidOptionError, match="one-shot iterators run dry"):
        SCORERS[name](used_up)(model, graph)
    with pytest.raises(qp.InvalidScoreError, match="NaN or infinite"):
        SCORERS[name]([(torch.full((2, 2, 5, 5), math.nan), torch.zeros(2, dtype=torch.long))])(model, graph)
    model.b.weight.requires_grad_(False)
    with pytest.raises(qp.InvalidOptionError, match=r"b\.weight .* requires_grad_\(True\)"):
        SCORERS[name](batches_for(Dense))(model, graph)


class Told(Dense):
    """Two outputs under names."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = super().forward(x)
        return {"size": y.square().sum(1), "logits": y}


WITH_LOSS = {
    "weight": qp.Taylor,
    "gate": lambda b, loss=None: qp.Taylor(b, loss, "gate"),
    "fisher": qp.Fisher,
    "calibrated": qp.Calibrated,
}


@pytest.mark.parametrize("name", ["weight", "gate", "fisher"])
def test_without_a_loss_it_is_of_the_logits_among_the_outputs(name: str) -> None:
    plain, graph = traced(Dense)
    told, its_graph = traced(Told)
    told.load_state_dict(plain.state_dict())
    data = batches_for(Dense)
    expected = WITH_LOSS[name](data)(plain, graph)
    found = WITH_LOSS[name](data)(told, its_graph)
    ones = np.ones(graph.unit_count, np.bool_)
    np.testing.assert_array_equal(found.unary, expected.unary)
    assert found.evaluate(ones) == expected.evaluate(ones)


def vector(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def shaky(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(outputs, targets[:, :7])  # class numbers have one dimension


@pytest.mark.parametrize("name", WITH_LOSS)
def test_a_loss_that_cannot_be_used_is_refused(name: str) -> None:
    """In words that name the loss, whatever PyTorch says of it."""
    who = {"weight": "Taylor", "gate": "Taylor"}.get(name, name.title())
    told, graph = traced(Told)
    data = batches_for(Dense)
    with pytest.raises(
        qp.InvalidOptionError, match=rf"{who}: the loss cross_entropy does not take a dict .*TypeErr"
    ):
        WITH_LOSS[name](data, loss=F.cross_entropy)(told, graph)
    plain, graph = traced(Dense)
    with pytest.raises(
        qp.InvalidOptionError, match=rf"{who}: the loss shaky does not take .*IndexError.*give loss=f"
    ):
        WITH_LOSS[name](data, loss=shaky)(plain, graph)
    if name != "fisher":  # which asks for one sample at a time, of which a vector has one number
        with pytest.raises(qp.InvalidOptionError, match=rf"{who}: the loss vector returns .* single number"):
            WITH_LOSS[name](data, loss=vector)(plain, graph)
    else:
        found = WITH_LOSS[name](data, loss=vector)(plain, graph)
        np.testing.assert_array_equal(found.unary, WITH_LOSS[name](data)(plain, graph).unary)


def test_a_loss_without_a_gradient_is_refused() -> None:
    model, graph = traced(Dense)
    with pytest.raises(qp.InvalidOptionError, match="no gradient towards any weight"):
        qp.Taylor(batches_for(Dense), lambda y, t: F.cross_entropy(y.detach(), t))(model, graph)


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(qp.InvalidOptionError, match="choose weight or gate"):
        qp.Taylor([], form="filter")  # type: ignore[arg-type]
    model, graph = by_columns(Dense)
    with pytest.raises(qp.InvalidOptionError, match=r"says nothing of .*columns=False"):
        qp.Taylor(batches_for(Dense), form="gate")(model, graph)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    bare = liven(nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), nn.Linear(4, 2)))
    graph = qp.trace(bare, torch.zeros(2, 2, 1, 1))
    with pytest.raises(qp.InvalidOptionError, match="1 has no running statistics"):
        qp.Fisher([(torch.zeros(2, 2, 1, 1), torch.zeros(2, dtype=torch.long))])(bare, graph)
    model, graph = traced(Dense)
    with pytest.raises(qp.InvalidOptionError, match="4 inputs and 3 targets"):
        qp.Fisher([(torch.zeros(4, 2, 5, 5), torch.zeros(3, dtype=torch.long))])(model, graph)
