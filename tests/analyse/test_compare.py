"""Relaxed masks beside exact ones: bounds in the right order, roundings that obey budgets, comparisons by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import qcqp_prune as qp
from qcqp_prune.analyse import RelaxedMasks, compare, relax, rounded, thresholded
from qcqp_prune.errors import InvalidOptionError, MaskMismatchError
from qcqp_prune.program.forms import PairwiseForm
from qcqp_prune.testing import chain_problem, exhaustive, random_problem

RELAXATIONS = ("mccormick", "cardinality_rlt", "perspective")


def line() -> qp.PruningProblem:
    """Two layers of 3 and 2 units: MACs 2a + ab + b of 14; worths 5, 3, 1 and 4, 2."""
    model = nn.Sequential(
        nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False)
    )
    graph = qp.trace(model, torch.zeros(1, 2))
    return qp.PruningProblem.build(graph, PairwiseForm(whole(graph, [5, 3, 1, 4, 2], 0.0)), {"macs": 8})


def whole(graph: qp.ChannelGraph, inner: list[float], frozen: float = 1.0) -> np.ndarray:
    """Values of the five units that may go, and one for the input's and output's."""
    values = np.full(graph.unit_count, frozen)
    values[~graph.stays] = inner
    return values


def kept(graph: qp.ChannelGraph, inner: list[int]) -> qp.Masks:
    return qp.Masks.from_flat(graph, whole(graph, inner) > 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("structure", ["chain", "residual", "concat"])
def test_relaxations_bound_the_optimum_in_order(structure: str) -> None:
    """Cardinality-RLT holds McCormick's rows and more, so its bound is no higher; none is below the optimum."""
    for seed in range(4):
        problem = random_problem(seed, structure)
        best = exhaustive(problem)
        found = {by: relax(problem, by, time_limit=20) for by in RELAXATIONS}
        scale = max(abs(best.objective), 1.0)
        for relaxed in found.values():
            assert relaxed.bound is not None
            assert relaxed.bound >= best.objective - 1e-7 * scale
            assert ((relaxed.values >= 0) & (relaxed.values <= 1)).all()
            assert (relaxed.values[problem.graph.stays] == 1).all()
        assert found["cardinality_rlt"].bound <= found["mccormick"].bound + 1e-3 * scale  # type: ignore[operator]


def test_rounding_by_solver_and_by_threshold_on_a_line() -> None:
    """By hand at 8 of 14 MACs: values .9 .8 .1 | .7 .2 keep two and one: 4 + 2 + 1 = 7."""
    problem = line()
    relaxed = RelaxedMasks.of(problem.graph, whole(problem.graph, [0.9, 0.8, 0.1, 0.7, 0.2]))
    for masks in (rounded(problem, relaxed, solver="highs"), thresholded(problem, relaxed)):
        assert masks.flat(problem.graph)[~problem.graph.stays].tolist() == [True, True, False, True, False]


@pytest.mark.parametrize("structure", ["chain", "residual", "ties", "multiple_of", "two_budgets"])
def test_roundings_obey_the_problem(structure: str) -> None:
    rng = np.random.default_rng(3)
    for seed in range(4):
        problem = random_problem(seed, structure)
        relaxed = RelaxedMasks.of(problem.graph, rng.random(problem.graph.unit_count))
        found = compare(
            problem,
            {"solver": rounded(problem, relaxed, solver="highs"), "threshold": thresholded(problem, relaxed)},
        )
        assert all(origin.feasible for origin in found.origins)


def test_a_comparison_by_hand() -> None:
    problem = line()
    graph = problem.graph
    mine = kept(graph, [1, 1, 0, 1, 0])  # worth 12, 7 MACs
    other = kept(graph, [1, 0, 1, 1, 0])  # worth 10
    large = kept(graph, [1] * 5)  # worth 15, 14 MACs
    values = RelaxedMasks.of(graph, whole(graph, [0.9, 0.8, 0.1, 0.7, 0.2]))
    found = compare(problem, {"mine": mine, "other": other, "all": large, "values": values}, solver="highs")
    assert [o.name for o in found.origins][2:] == ["other", "all"]
    assert found.reference in ("mine", "values")
    assert found["mine"].objective == 12
    assert found["all"].used["macs"] == 14
    assert not found["all"].feasible
    assert found["other"].jaccard == pytest.approx(2 / 4)
    (group,) = found["other"].groups
    assert (group.kept, group.reference_kept, group.jaccard, group.cost) == (2, 2, pytest.approx(1 / 3), 2.0)
    # Ranks of .9 .8 .1 .7 .2 against picks 1 1 0 1 0, ties averaged.
    ranks, picks = np.asarray([5, 4, 1, 3, 2.0]), np.asarray([4, 4, 1.5, 4, 1.5])
    assert found["values"].rank_correlation == pytest.approx(np.corrcoef(ranks, picks)[0, 1])
    assert found["values"].threshold_objective == 12
    assert found.bound is None
    assert not found.proved


def test_bounds_of_other_budgets_prove_nothing_here() -> None:
    problem = chain_problem("tiny")
    tight = replace(problem, rows=chain_problem("tiny", fractions=(("macs", 0.25),)).rows)
    report, relaxed = qp.solve(tight, "highs"), relax(tight, "cardinality_rlt")
    found = compare(problem, {"report": report, "relaxed": relaxed}, solver="block_coordinate")
    assert found.bound is None
    own = qp.solve(problem, "highs")
    found = compare(
        problem, {"own": own, "report": report, "relaxed": relax(problem)}, solver="block_coordinate"
    )
    assert found.reference == "own"
    assert found.proved
    assert found["relaxed"].bound_gap == pytest.approx(
        (found["relaxed"].bound - own.objective) / own.objective
    )  # type: ignore[operator]
    assert found["report"].gap is not None
    assert found["report"].gap > 0


def test_bad_input() -> None:
    problem = line()
    graph = problem.graph
    with pytest.raises(InvalidOptionError, match="nothing to compare"):
        compare(problem, {})
    with pytest.raises(InvalidOptionError, match="no selection is called 'x'"):
        compare(problem, {"a": kept(graph, [1] * 5)}, reference="x")
    with pytest.raises(MaskMismatchError, match="make them for it"):
        RelaxedMasks.of(graph, [0.5])
    with pytest.raises(MaskMismatchError, match="outside"):
        RelaxedMasks.of(graph, whole(graph, [0.5, 2, 0, 0, 0]))
    with pytest.raises(InvalidOptionError, match="no reduction 'best'"):
        relax(problem, "best")
    with pytest.raises(MaskMismatchError, match="another graph"):
        rounded(chain_problem("tiny"), RelaxedMasks.of(graph, np.ones(graph.unit_count)))
