"""Reports and masks survive the way through JSON, and say what is not known."""

from __future__ import annotations

import json

import numpy as np
import pytest

from qcqp_prune.errors import MaskMismatchError, PlanError
from qcqp_prune.graph.masks import Masks
from qcqp_prune.solve.backend import available_solvers
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import Reason, Termination, relative_gap
from qcqp_prune.solve.run import solve
from qcqp_prune.testing import random_problem


@pytest.mark.parametrize("solver", ["auto", "block_coordinate", "highs"])
def test_report_round_trip(solver: str) -> None:
    problem = random_problem(1, "two_budgets")
    report = solve(problem, solver, seed=5)
    text = json.dumps(report.to_json(), allow_nan=False)
    back = SolveReport.from_json(json.loads(text))
    assert back == report
    assert back.gap == report.gap
    assert back.seed == 5
    assert back.termination.sentence.endswith(report.termination.sentence[-20:])


def test_usage_is_recomputed_and_complete() -> None:
    problem = random_problem(3, "two_budgets")
    report = solve(problem, "highs")
    used = problem.usage(report.masks.flat(problem.graph))
    for row in problem.rows:
        entry = report.usage[row.resource]
        assert (entry.used, entry.limit, entry.dense, entry.smallest) == (
            used[row.resource],
            row.limit,
            row.dense,
            row.smallest,
        )
        assert entry.slack == (None if row.limit is None else row.limit - used[row.resource])
        assert 0 < entry.share <= 1


def test_no_bound_no_gap() -> None:
    report = solve(random_problem(1), "block_coordinate")
    assert report.bound is None
    assert report.gap is None
    assert report.termination.reason is Reason.SEARCH_ENDED


@pytest.mark.parametrize(
    ("objective", "bound", "gap"),
    [
        (10.0, 11.0, 0.1),
        (10.0, 10.0, 0.0),
        (-4.0, -3.0, 0.25),
        (5.0, None, None),
        (0.0, 1.0, None),
        (5.0, float("inf"), None),
    ],
)
def test_gap(objective: float, bound: float | None, gap: float | None) -> None:
    assert relative_gap(objective, bound) == (None if gap is None else pytest.approx(gap))


def test_every_reason_is_a_sentence_with_a_remedy() -> None:
    for reason in Reason:
        sentence = Termination(reason).sentence
        assert sentence.endswith(".")
        assert ":" in sentence


@pytest.mark.parametrize("damage", ["schema", "masks", "usage", "termination"])
def test_damaged_reports_are_refused(damage: str) -> None:
    data = solve(random_problem(1), "highs").to_json()
    if damage == "schema":
        data["schema"] = 99
    else:
        del data[damage]
    with pytest.raises(PlanError, match="solve again"):
        SolveReport.from_json(data)


def test_masks_belong_to_their_graph() -> None:
    problem, other = random_problem(0), random_problem(1)
    flat = np.ones(problem.graph.unit_count, np.bool_)
    flat[0] = False
    masks = Masks.from_flat(problem.graph, flat)
    assert masks.flat(problem.graph).tolist() == flat.tolist()
    assert Masks.from_json(json.loads(json.dumps(masks.to_json()))) == masks
    assert masks != Masks.from_flat(problem.graph, ~flat)
    assert len({masks, Masks.from_json(masks.to_json())}) == 1
    with pytest.raises(MaskMismatchError, match="use the graph"):
        masks.flat(other.graph)
    with pytest.raises(MaskMismatchError, match="one entry for each group"):
        Masks(masks.fingerprint, {"g0": flat}).flat(problem.graph)
    with pytest.raises(MaskMismatchError, match="make it from this graph"):
        Masks.from_flat(problem.graph, flat[:-1])
    with pytest.raises(ValueError, match="read-only"):
        masks.keep["g0"][0] = True


@pytest.mark.parametrize("entry", [{"width": 2, "kept": [2]}, {"width": 2, "kept": [0, 0]}, {"width": 2}, 5])
def test_damaged_masks_are_refused(entry: object) -> None:
    with pytest.raises(PlanError):
        Masks.from_json({"schema": 1, "fingerprint": "x", "keep": {"g": entry}})


def test_solvers_are_listed_with_classes() -> None:
    listed = {info.name: info for info in available_solvers()}
    assert {"scip", "highs", "block_coordinate", "pyomo"} <= set(listed)
    assert all(info.availability.ok for info in listed.values())
    assert "nonconvex" in str(listed["highs"].classes[0])
