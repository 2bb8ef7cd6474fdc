"""What is seen of activations and sensitivities against hooks and Jacobians; geometric medians against loops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import qcqp_prune as qp
from qcqp_prune.importance.layerwise import Layerwise
from tests.networks import liven
from tests.scored import (
    NETWORKS,
    Dense,
    Flattened,
    Kind,
    Overwriting,
    Packed,
    Recurrent,
    Residual,
    batches_for,
    by_columns,
    traced,
)

STATISTICS: dict[str, Callable[[list[float]], float]] = {
    "mean": lambda x: sum(abs(v) for v in x) / len(x),
    "apoz": lambda x: sum(v != 0 for v in x) / len(x),
    "std": lambda x: math.sqrt(sum((v - sum(x) / len(x)) ** 2 for v in x) / len(x)),
}


@pytest.mark.parametrize("statistic", STATISTICS)
@pytest.mark.parametrize("kind", [*NETWORKS, Overwriting])
def test_activations_are_of_all_that_a_layer_reads_from_a_unit(kind: Kind, statistic: str) -> None:
    model, graph = traced(kind)
    batches = [*batches_for(kind, 2), tuple(t[:2] for t in batches_for(kind, 1)[0])]
    form = qp.Activation(batches, statistic)(model, graph)  # type: ignore[arg-type]
    modules = dict(model.named_modules())
    read: dict[str, list[Tensor]] = {layer.name: [] for layer in graph.layers}
    for name, seen in read.items():
        modules[name].register_forward_hook(lambda m, i, o, seen=seen: seen.append(i[0].detach().clone()))
    model.eval()
    for x, _ in batches:
        model(x)
    expected = np.zeros(graph.unit_count)
    for layer in graph.layers:
        values = torch.cat(read[layer.name]).double()
        units = graph.axes[layer.in_axis]
        for unit in np.unique(units):
            expected[unit] += STATISTICS[statistic](values[:, units == unit].flatten().tolist())
    np.testing.assert_allclose(form.unary, expected, rtol=1e-5, atol=1e-9)
    assert form.pairs == ()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("bound", ["exact", "lower"])
@pytest.mark.parametrize("kind", [Dense, Flattened, Overwriting, Residual])
def test_sensitivity_is_the_mean_size_of_the_jacobian(kind: Kind, bound: str, frozen: bool) -> None:
    """Each layer's output is made an input by a hook that adds to it, and autograd's Jacobian is taken."""
    model, graph = traced(kind)
    model.requires_grad_(not frozen)
    batches = batches_for(kind, 2)
    form = qp.NeuronSensitivity(batches, bound)(model, graph)  # type: ignore[arg-type]
    modules = dict(model.eval().named_modules())
    expected = np.zeros(graph.unit_count)
    for layer in graph.layers:
        sizes = []
        for x, _ in batches:
            shapes: list[torch.Size] = []
            handle = modules[layer.name].register_forward_hook(lambda m, i, o, s=shapes: s.append(o.shape))
            model(x)
            handle.remove()

            def shifted(delta: Tensor, x: Tensor = x, name: str = layer.name) -> Tensor:
                handle = modules[name].register_forward_hook(lambda m, i, o: o + delta)
                out = model(x)
                handle.remove()
                return out

            slopes = jacobian(shifted, torch.zeros(shapes[0]))  # (samples, outputs, samples, channels, ...)
            own = torch.stack([slopes[n, :, n] for n in range(len(x))])
            size = own.sum(1).abs() if bound == "lower" else own.abs().sum(1)
            sizes.append((size / own.shape[1]).movedim(1, 0).flatten(1))
        values = torch.cat(sizes, 1).double().mean(1).numpy()
        np.add.at(expected, graph.axes[layer.out_axis], values)
    np.testing.assert_allclose(form.unary, expected, rtol=1e-4, atol=1e-7)
    assert all(p.requires_grad != frozen and p.grad is None for p in model.parameters())


def test_sensitivity_by_hand() -> None:
    """y = V relu(p): a unit that is on in one of two samples has half of the mean size of its column of V."""
    model = nn.Sequential(nn.Linear(1, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([0.0, 5.0]))
        model[2].weight.copy_(torch.tensor([[3.0, 1.0], [-2.0, -4.0]]))
    graph = qp.trace(model, torch.zeros(2, 1))
    batches = [(torch.tensor([[1.0], [-1.0]]), torch.zeros(2))]
    hidden = graph.axes[graph.layers[0].out_axis]
    exact = qp.NeuronSensitivity(batches)(model, graph).unary[hidden]
    assert exact.tolist() == pytest.approx([(3 + 2) / 2 / 2, (1 + 4) / 2])
    lower = qp.NeuronSensitivity(batches, "lower")(model, graph).unary[hidden]
    assert lower.tolist() == pytest.approx([(3 - 2) / 2 / 2, (4 - 1) / 2])


def test_attention_is_seen() -> None:
    """Heads, parts of a weight and a batch that is not the first dimension."""
    model, graph = traced(Packed)
    for score in (qp.Activation, qp.NeuronSensitivity):
        form = score(batches_for(Packed, 1))(model, graph)
        assert (form.unary[~graph.stays] > 0).all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_medians_are_sums_of_distances_within_a_group(kind: Kind) -> None:
    model, graph = traced(kind)
    form = qp.GeometricMedian()(model, graph)
    expected = np.zeros(graph.unit_count)
    modules = dict(model.named_modules())
    for layer in graph.layers:
        module = modules[layer.name]
        weight = module.weight.detach().double()
        if isinstance(module, nn.ConvTranspose2d):
            runs = weight.reshape(module.groups, -1, *weight.shape[1:])
            filters = [[run[:, o].flatten() for o in range(run.shape[1])] for run in runs]
        else:
            groups = getattr(module, "groups", 1)
            filters = [[row.flatten() for row in run] for run in weight.chunk(groups)]
        units = iter(graph.axes[layer.out_axis].tolist())
        for run in filters:
            for one in run:
                expected[next(units)] += sum(math.sqrt(float(((one - f) ** 2).sum())) for f in run)
    np.testing.assert_allclose(form.unary, expected, rtol=1e-9)
    assert form.pairs == ()


def test_medians_by_hand() -> None:
    """Filters at 0, 1 and 3 on a line: the sums of distances are 4, 3 and 5."""
    model = nn.Sequential(nn.Linear(1, 3), nn.Linear(3, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0], [1.0], [3.0]]))
    graph = qp.trace(model, torch.zeros(1, 1))
    worth = qp.GeometricMedian()(model, graph).unary[graph.axes[graph.layers[0].out_axis]]
    assert worth.tolist() == pytest.approx([4.0, 3.0, 5.0])


SCORERS = {
    "GeometricMedian": lambda kind: qp.GeometricMedian(),
    "NeuronSensitivity": lambda kind: qp.NeuronSensitivity(batches_for(kind, 1)),
    "Activation": lambda kind: qp.Activation(batches_for(kind, 1)),
    "Taylor": lambda kind: qp.Taylor(batches_for(kind, 1), form="gate"),
}


@pytest.mark.parametrize("name", SCORERS)
def test_what_lies_in_a_block_counts_while_the_block_is_there(name: str) -> None:
    """Scores of the stream that come from inside of the branch are pairs with the branch's unit."""
    model = liven(Residual())
    graph = qp.trace(model, torch.zeros(1, *Residual.shape), blocks=True)
    form = SCORERS[name](Residual)(model, graph)
    plain = SCORERS[name](Residual)(model, without := qp.trace(model, torch.zeros(1, *Residual.shape)))
    full = np.ones(graph.unit_count, np.bool_)
    assert form.evaluate(full) == pytest.approx(plain.evaluate(np.ones(without.unit_count, np.bool_)))
    (block,) = graph.blocks
    gone = full.copy()
    gone[block.unit] = False
    for g in block.groups:
        gone[graph.units(g)] = False
    kept = 0.0
    inside = {graph.layers[k].name for k in block.layers}
    assert inside == {"a", "b"}
    alone = SCORERS[name](Residual).scores(model, graph)
    for layer in graph.layers:
        if layer.name not in inside:
            kept += float(alone(layer).values.sum())
    assert form.evaluate(gone) == pytest.approx(kept)


def test_free_sums() -> None:
    """What writes a sum scores it; what reads a sum says nothing of who writes it."""
    model = liven(Residual())
    graph = qp.trace(model, torch.zeros(1, *Residual.shape), sharing="free")
    assert len(graph.links)
    for name in ("GeometricMedian", "NeuronSensitivity", "Taylor"):
        form = SCORERS[name](Residual)(model, graph)
        writers = [x for x in graph.layers if x.name != "head"]
        assert all((form.unary[graph.axes[x.out_axis]] > 0).any() for x in writers)
    with pytest.raises(qp.InvalidOptionError, match="Activation says nothing of"):
        SCORERS["Activation"](Residual)(model, graph)


@pytest.mark.parametrize("name", SCORERS)
def test_columns_are_refused(name: str) -> None:
    model, graph = by_columns(Dense)
    with pytest.raises(qp.InvalidOptionError, match=r"says nothing of a\.columns"):
        SCORERS[name](Dense)(model, graph)


@pytest.mark.parametrize("name", ["NeuronSensitivity", "Activation"])
def test_hidden_units_that_cannot_be_seen_are_refused(name: str) -> None:
    model, graph = traced(Recurrent)
    scorer = SCORERS[name](Recurrent)
    if name == "NeuronSensitivity":
        with pytest.raises(qp.InvalidOptionError, match=r"says nothing of memory.*ignored_layers"):
            scorer(model, graph)
    else:
        assert (scorer(model, graph).unary > 0).any()  # the head reads them all


@pytest.mark.parametrize("name", ["NeuronSensitivity", "Activation"])
def test_bad_data_are_refused(name: str) -> None:
    model, graph = traced(Dense)
    score = getattr(qp, name)
    with pytest.raises(qp.InvalidOptionError, match=f"{name} was given no batch"):
        score([])(model, graph)
    with pytest.raises(qp.InvalidOptionError, match=f"{name} was given a Tensor as a batch"):
        score([torch.zeros(4, 2, 5, 5)])(model, graph)
    used_up = iter(batches_for(Dense))
    score(used_up)(model, graph)
    with pytest.raises(qp.InvalidOptionError, match="one-shot iterators run dry"):
        score(used_up)(model, graph)
    with pytest.raises(qp.InvalidOptionError, match="choose"):
        score([], "most")
    with torch.no_grad():
        model.a.bias[1] = math.inf
    with pytest.raises(qp.InvalidScoreError, match=r"a\.bias holds NaN or infinity"):
        score(batches_for(Dense))(model, graph)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "score",
    [
        lambda data: qp.Activation(data),
        lambda data: qp.Activation(data, "apoz"),
        lambda data: qp.Activation(data, "std"),
        lambda data: qp.NeuronSensitivity(data),
        lambda data: qp.NeuronSensitivity(data, "lower"),
    ],
    ids=["mean", "apoz", "std", "exact", "lower"],
)
def test_data_that_are_not_finite_are_refused(score: Callable[..., Layerwise], value: float) -> None:
    """One entry of one sample: a count of what is not zero, and slopes of ReLUs, are finite all the same."""
    model, graph = traced(Dense)
    x = torch.randn(4, 2, 5, 5)
    x[2, 0, 1, 1] = value
    with pytest.raises(qp.InvalidScoreError, match=" of a is NaN or infinite"):
        score([(x, torch.zeros(4))])(model, graph)
