"""Importances made from others, against sums over single weights and against all selections."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qcqp_prune as qp
from qcqp_prune.importance import Importance
from qcqp_prune.pipeline import describe
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.ranks import worth_alone
from tests.networks import liven, random_masks
from tests.scored import (
    NETWORKS,
    Dense,
    Kind,
    Residual,
    batches_for,
    by_columns,
    layers,
    sum_over_kept,
    traced,
)


@pytest.mark.parametrize("kind", [*NETWORKS, Residual])
def test_worth_alone_is_what_the_form_loses(kind: Kind) -> None:
    model, graph = traced(kind)
    form = qp.Magnitude()(model, graph)
    full = np.ones(graph.unit_count, np.bool_)
    for unit, worth in enumerate(worth_alone(form)):
        gone = full.copy()
        gone[unit] = False
        assert worth == pytest.approx(form.evaluate(full) - form.evaluate(gone), abs=1e-12)


def test_worth_alone_counts_a_pair_with_itself_once() -> None:
    """Every kind of coefficient, units that occur several times, and pairs of a unit with itself."""
    rng = np.random.default_rng(0)
    rows, cols = np.asarray([0, 1, 1, 2]), np.asarray([1, 2, 3, 0, 1])
    low = qp.LowRank(rng.normal(size=(4, 2)), rng.normal(size=(5, 2)))
    terms = [qp.PairTerm(rows, cols, c) for c in (0.7, rng.normal(size=(4, 5)), low)]
    form = qp.PairwiseForm(rng.normal(size=4), tuple(terms), constant=2.0)
    for unit, worth in enumerate(worth_alone(form)):
        mask = np.arange(4) != unit
        assert worth == pytest.approx(form.evaluate(np.ones(4, np.bool_)) - form.evaluate(mask))


def size_of(weight: Tensor) -> Tensor:
    return weight.detach().double().abs().reshape(*weight.shape[:2], -1).sum(-1)


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("by", ["layer", "macs"])
def test_layers_are_on_one_scale_and_pairs_stay(kind: Kind, by: str) -> None:
    model, graph = traced(kind)
    form = qp.Normalised(qp.Magnitude(), by)(model, graph)  # type: ignore[arg-type]
    work = dict.fromkeys([id(m.weight) for m in layers(model)], 0.0)
    for module in layers(model):
        sides: list[int] = []

        def look(m: nn.Module, read: tuple[Tensor], made: Tensor, sides: list[int] = sides) -> None:
            plane = read[0] if isinstance(m, nn.ConvTranspose2d) else made
            sides.append(math.prod(plane.shape[2:]))

        handle = module.register_forward_hook(look)
        model(torch.zeros(1, *kind.shape))
        handle.remove()
        work[id(module.weight)] = module.weight.numel() * sides[0]
    total = sum(work[id(m.weight)] for m in layers(model))

    def score(weight: Tensor) -> Tensor:
        share = work[id(weight)] / total if by == "macs" else 1.0
        return size_of(weight) / size_of(weight).sum() * share

    full = np.ones(graph.unit_count, np.bool_)
    assert form.evaluate(full) == pytest.approx(1.0 if by == "macs" else len(layers(model)))
    for seed in range(4):
        masks = random_masks(graph, seed)
        expected = sum_over_kept(model, graph, masks, score)
        assert form.evaluate(masks.flat(graph)) == pytest.approx(expected, rel=1e-5)


def test_scores_of_units_are_scaled_too() -> None:
    model, graph = traced(Dense)
    raw = qp.GeometricMedian()(model, graph).unary
    scaled = qp.Normalised(qp.GeometricMedian())(model, graph).unary
    for name in ("a", "b"):
        units = graph.axes[next(x.out_axis for x in graph.layers if x.name == name)]
        np.testing.assert_allclose(scaled[units], raw[units] / raw[units].sum())


@pytest.mark.parametrize("importance", [qp.Magnitude(), qp.Random(3), qp.Lamp()])
def test_groups_are_on_one_scale(importance: Importance) -> None:
    model, graph = traced(Dense)
    form = qp.Normalised(importance, "group")(model, graph)
    raw = worth_alone(importance(model, graph))
    for g in range(len(graph.groups)):
        own = raw[graph.units(g)]
        expected = own / own.sum() if own.any() else own
        np.testing.assert_allclose(form.unary[graph.units(g)], expected, atol=1e-15)
    assert form.pairs == ()


def test_a_layer_of_zeros_stays_zero() -> None:
    model, graph = traced(Dense)
    nn.init.zeros_(model.b.weight)
    form = qp.Normalised(qp.Magnitude())(model, graph)
    assert form.evaluate(np.ones(graph.unit_count, np.bool_)) == pytest.approx(1.0)
    nn.init.zeros_(model.a.weight)
    for nothing in (qp.Concave(qp.Magnitude(), 0), qp.Lamp(), qp.Normalised(qp.Magnitude(), "group")):
        assert not nothing(model, graph).unary.any()


def chain() -> tuple[nn.Module, qp.ChannelGraph]:
    model = liven(nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in ((3, 4), (4, 5), (5, 2)))))
    return model, qp.trace(model, torch.zeros(1, 3))


@pytest.mark.parametrize("power", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.8])
def test_the_best_of_the_program_is_the_best_of_the_concave_function(power: float, budget: float) -> None:
    """All selections of a small network: the linear objective's optimum is that of the function it stands for."""
    model, graph = chain()
    worth = worth_alone(qp.Magnitude()(model, graph))

    def utility(mask: np.ndarray) -> float:
        value = 0.0
        for g in range(len(graph.groups)):
            if graph.groups[g].frozen_reason is None:
                whole = worth[graph.units(g)].sum()
                kept = worth[graph.units(g)][mask[graph.units(g)]].sum()
                value += whole * (math.log(kept / whole) if power == 0 else (kept / whole) ** power / power)
        return value

    problem = PruningProblem.build(graph, qp.Concave(qp.Magnitude(), power)(model, graph), {"macs": budget})
    free = np.flatnonzero(~graph.stays)
    best = -math.inf
    for bits in range(2 ** len(free)):
        mask = np.ones(graph.unit_count, np.bool_)
        mask[free] = [bits >> k & 1 for k in range(len(free))]
        if (problem.counts(mask) > 0).all() and problem.usage(mask)["macs"] <= problem.limits["macs"]:
            best = max(best, utility(mask))
    found = qp.solve(problem, "highs").masks.flat(graph)
    assert utility(found) == pytest.approx(best, rel=1e-9)
    assert problem.usage(found)["macs"] <= problem.limits["macs"]


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_gains_fall_and_the_last_unit_has_its_own_worth(power: float) -> None:
    """Of many equal units the last to come adds what the importance says, by the slope of 1 where all is kept."""
    model = nn.Sequential(nn.Linear(2, 1000, bias=False), nn.Linear(1000, 2, bias=False))
    nn.init.ones_(model[0].weight)
    nn.init.ones_(model[1].weight)
    graph = qp.trace(model, torch.zeros(1, 2))
    hidden = graph.axes[graph.layers[0].out_axis]
    plain = worth_alone(qp.Magnitude()(model, graph))[hidden]
    gains = qp.Concave(qp.Magnitude(), power)(model, graph).unary[hidden]
    assert (np.diff(gains[1:]) < 0).all() if power < 1 else np.allclose(gains, plain)
    assert gains[-1] == pytest.approx(plain[0], rel=1e-3)


def test_lamp_by_hand() -> None:
    """Shares of squared weights 0.1 + 0.5, 0.4 + 0.3 and 0.5 + 0.2 of three hidden units."""
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-2.0], [5**0.5]]))
        model[1].weight.copy_(torch.tensor([[5**0.5, 3**0.5, -(2**0.5)]]))
    graph = qp.trace(model, torch.zeros(1, 1))
    form = qp.Lamp()(model, graph)
    hidden = graph.axes[graph.layers[0].out_axis]
    # 0.7 and 0.7 are equal to rounding, in some order; then comes 0.6.
    assert sorted(form.unary[hidden].tolist()) == pytest.approx([0.6 / 2.0, 0.5, 1.0], rel=1e-6)
    assert form.unary[hidden][0] == pytest.approx(0.3, rel=1e-6)


def test_lamp_is_a_loop_over_units() -> None:
    model, graph = traced(Dense)
    form = qp.Lamp()(model, graph)
    a, b = (m.weight.detach().double().square() for m in (model.a, model.b))
    energy = [float(a[j].sum() / a.sum() + b[:, j].sum() / b.sum()) for j in range(4)]
    expected = [energy[j] / sum(e for e in energy if e >= energy[j]) for j in range(4)]
    units = graph.axes[next(x.out_axis for x in graph.layers if x.name == "a")]
    assert form.unary[units].tolist() == pytest.approx(expected)
    assert form.pairs == ()


def test_chance_is_repeatable() -> None:
    model, graph = traced(Dense)
    first, again, other = (qp.Random(seed)(model, graph).unary for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.isclose(first, other).any()
    assert ((first >= 0) & (first < 1)).all()


@pytest.mark.parametrize(
    "importance", [qp.Lamp(), qp.Concave(qp.Magnitude()), qp.Normalised(qp.Magnitude(), "group")]
)
@pytest.mark.parametrize("option", [{"columns": True}, {"sharing": "free"}, {"blocks": True}])
def test_every_kind_of_unit_has_a_worth(importance: Importance, option: dict[str, object]) -> None:
    """Kernel columns, free sums and blocks: what may go and has weights is worth something, and a solver takes it."""
    model = liven(Residual())
    graph = qp.trace(model, torch.zeros(1, *Residual.shape), **option)  # type: ignore[arg-type]
    form = importance(model, graph)
    weighted = np.concatenate([graph.axes[x.made_axis] for x in graph.layers])
    assert (form.unary[weighted][~graph.stays[weighted]] > 0).all()
    problem = PruningProblem.build(graph, form, "50%")
    report = qp.solve(problem, "highs")
    assert report.masks is not None
    assert problem.usage(report.masks.flat(graph))["macs"] <= problem.limits["macs"]


def test_what_cannot_be_made_is_refused() -> None:
    for make in (qp.Normalised, qp.Concave):
        with pytest.raises(qp.InvalidOptionError, match=r"such as Magnitude\(\)"):
            make("magnitude")
        with pytest.raises(qp.InvalidOptionError, match=r"such as Magnitude\(\)"):
            make(qp.Magnitude)
    with pytest.raises(qp.InvalidOptionError, match="choose from layer, group, macs"):
        qp.Normalised(qp.Magnitude(), "group norm")  # type: ignore[arg-type]
    with pytest.raises(qp.InvalidOptionError, match="Random does not score layer by layer"):
        qp.Normalised(qp.Random(), "macs")
    with pytest.raises(qp.InvalidOptionError, match="give 0 or more"):
        qp.Random(-1)
    for power in (-0.1, 1.1, math.nan):
        with pytest.raises(qp.InvalidOptionError, match="from 0"):
            qp.Concave(qp.Magnitude(), power)


def test_less_than_nothing_has_no_concave_function() -> None:
    model, graph = chain()
    with pytest.raises(qp.InvalidScoreError, match="without negative scores"):
        qp.Concave(lambda m, g: qp.PairwiseForm(-np.arange(float(g.unit_count))))(model, graph)


def test_importances_in_words() -> None:
    nested = qp.Concave(qp.Normalised(qp.Taylor(batches_for(Dense), form="gate")), 0.25)
    assert describe(nested) == "Concave(Normalised(Taylor(gate), layer), power=0.25)"
    assert describe(qp.Random(7)) == "Random(seed=7)"


def test_columns_keep_their_pairs() -> None:
    model, graph = by_columns(Dense)
    form = qp.Normalised(qp.Magnitude())(model, graph)
    assert form.evaluate(np.ones(graph.unit_count, np.bool_)) == pytest.approx(2.0)
    assert form.pairs
