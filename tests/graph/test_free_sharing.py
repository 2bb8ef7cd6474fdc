"""Free sharing in the channel graph: which units there are, how they are linked, and what each costs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import qcqp_prune as qp
from qcqp_prune.graph.channels import ChannelGraph
from qcqp_prune.program.problem import allowed_counts
from qcqp_prune.testing import exhaustive
from tests import residuals
from tests.networks import keep, liven, reasons, uses, widths

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def free(model: torch.nn.Module, **options: object) -> ChannelGraph:
    return qp.trace(model, X, sharing="free", **options)  # type: ignore[arg-type]


def parts(graph: ChannelGraph, whole: str) -> list[list[str]]:
    """For each unit of a group what it is made of, as ``group[number]``."""
    names = [f"{g.id}[{k}]" for g in graph.groups for k in range(g.width)]
    ids = [g.id for g in graph.groups]
    units = range(*graph.units(ids.index(whole)).indices(graph.unit_count))
    return [sorted(names[p] for p in graph.links.parts[graph.links.wholes == u].tolist()) for u in units]


def test_a_sum_has_units_of_its_own() -> None:
    graph = free(residuals.Identity())
    assert widths(graph, free=True) == {"a": 6, "b": 6, "c.in": 6, "c": 5}
    assert parts(graph, "c.in") == [[f"a[{k}]", f"b[{k}]"] for k in range(6)]
    assert len(graph.links) == 12
    assert ChannelGraph.from_json(graph.to_json()).fingerprint == graph.fingerprint
    assert graph.notes == ()


def test_costs_by_hand() -> None:
    graph = free(residuals.Identity())
    masks = keep(graph, a=[0, 1, 2], b=[2, 4], c_in=[0, 1, 2, 4], c=[1, 3, 4])
    pairs = 3 * 3 + 3 * 2 + 4 * 3
    assert uses(graph, masks) == {
        "macs": 36 * 9 * pairs + 3 * 4,
        "params": 9 * pairs + 3 * 4 + 4,
        "memory": 4 * (36 * (3 + 2 + 3) + 4) + 4 * (9 * pairs + 3 * 4 + 4),
    }


def test_strict_is_the_default_and_has_no_links() -> None:
    graph = qp.trace(residuals.Identity(), X)
    assert widths(graph, free=True) == {"a": 6, "c": 5}
    assert len(graph.links) == 0
    with pytest.raises(qp.QcqpPruneError, match="strict, free"):
        qp.trace(residuals.Identity(), X, sharing="loose")  # type: ignore[arg-type]


def test_a_chain_of_sums_and_norms_between() -> None:
    graph = free(residuals.PreActivation())
    assert parts(graph, "c.in") == [[f"a[{k}]", f"b[{k}]"] for k in range(6)]
    assert parts(graph, "head.in") == [[f"c.in[{k}]", f"c[{k}]"] for k in range(6)]
    # bn2 is s's own: dropping a channel of s saves its two parameters and nine for each output of c
    dense, less = uses(graph), uses(graph, keep(graph, a=[0], b=[0], c_in=[0]))
    assert dense["params"] - less["params"] == 5 * (27 + 2 * 1) + (9 * (36 - 1)) + 5 * (2 + 9 * 6)


def test_padding_has_one_part_and_needs_no_sum() -> None:
    graph = free(residuals.Padded())
    assert widths(graph, free=True) == {"a": 4, "b": 3, "b#2": 4, "head.in": 4}
    assert parts(graph, "head.in") == [[f"a[{k}]", f"b#2[{k}]"] for k in range(4)]
    names = [graph.groups[g].id for g in graph.group_of_unit[graph.axes[graph.layers[-1].in_axis]]]
    assert names == ["b", *4 * ["head.in"], "b", "b"]


def test_a_sum_that_no_layer_reads_gives_way_to_its_parts() -> None:
    graph = free(residuals.Three())
    assert widths(graph, free=True) == {"a": 5, "b": 5, "c": 5, "head.in": 5}
    assert parts(graph, "head.in") == [[f"a[{k}]", f"b[{k}]", f"c[{k}]"] for k in range(5)]


def test_a_tensor_added_to_itself_is_one() -> None:
    graph = free(residuals.Doubled())
    assert widths(graph, free=True) == {"a": 5}
    assert len(graph.links) == 0


def test_an_output_stays_whole_and_its_parts_may_go() -> None:
    graph = free(residuals.Output())
    why = reasons(graph)
    assert (why["head.in"], why["a"], why["b"]) == ("network output", None, None)
    (kept,) = graph.kept_sums
    assert (kept.index, kept.dim, kept.positions) == (0, -3, tuple(range(6)))


def test_a_part_that_stays_keeps_its_sum() -> None:
    graph = free(residuals.PreActivation(), ignored_layers=["b"])
    why = reasons(graph)
    assert why["b"] == why["c.in"] == why["head.in"] == "in ignored_layers (b)"
    assert (why["a"], why["c"]) == (None, None)


def test_one_unit_may_be_part_of_two_sums() -> None:
    graph = free(residuals.Branches())
    assert parts(graph, "p.in") == [[f"a[{k}]", f"b[{k}]"] for k in range(5)]
    assert parts(graph, "q.in") == [[f"a[{k}]", f"c[{k}]"] for k in range(5)]


def test_parameters_follow_what_they_are_added_to() -> None:
    graph = free(residuals.Context())
    assert widths(graph, free=True) == {"a": 6, "g": 6, "head.in": 6}
    shift = next(t for t in graph.tensors if t.name == "shift")
    assert shift.axes[0] == graph.layers[-1].in_axis


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (residuals.GatedByPart, "tied to the sum itself"),
        (residuals.Unrolled, "tied to the sum itself"),
        (residuals.GroupNormed, "must keep equally many"),
        (residuals.GroupsOfSum, "tied to channels that other layers write"),
        (residuals.ProductOfSums, "tied to channels that other layers write"),
        (residuals.SeenLater, "the old value is used again"),
    ],
)
def test_contradictions_are_shared_strictly_and_said(model: type[torch.nn.Module], why: str) -> None:
    graph, strict = free(model()), qp.trace(model(), X)
    assert len(graph.links) == 0
    assert widths(graph) == widths(strict)
    assert any(why in note.text and "shared strictly" in note.text for note in graph.notes)


def test_floors_and_multiples_of_a_sum_follow_its_parts() -> None:
    graph = free(residuals.Identity(), min_keep={"b": 4}, round_to={"a": 2})
    allowed = dict(zip([g.id for g in graph.groups], allowed_counts(graph), strict=True))
    assert allowed["a"] == [2, 4, 6]
    assert allowed["b"] == [4, 5, 6]
    assert allowed["c.in"] == [4, 6]


class Tiny(residuals.Identity):
    """Widths 3, 3, 2 in place of 6, 6, 5."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = residuals.conv(3, 3), residuals.conv(3, 3), residuals.conv(3, 2)
        self.head = torch.nn.Linear(2, 4)


@pytest.mark.parametrize("seed", range(3))
def test_the_optimum_is_found_and_beats_strict_sharing(seed: int) -> None:
    model = liven(Tiny(), seed)
    best = {}
    for sharing in ("strict", "free"):
        graph = qp.trace(model, X, sharing=sharing)  # type: ignore[arg-type]
        problem = qp.PruningProblem.build(graph, qp.Magnitude()(model, graph), {"macs": "50%"})
        best[sharing] = exhaustive(problem).objective
        report = qp.solve(problem, "highs", gap_limit=0.0)
        assert report.objective == pytest.approx(best[sharing], rel=1e-6)
        assert graph.links.hold(report.masks.flat(graph), np.ones(graph.unit_count, np.bool_))
    assert best["free"] >= best["strict"] - 1e-9
