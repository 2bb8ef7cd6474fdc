"""Bounds for every limit lie above the optimum at every limit; prices are slopes; curves are written and drawn."""

from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

import qcqp_prune as qp
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.report.pareto import pareto_html, pareto_table
from qcqp_prune.report.prices import price_lines
from qcqp_prune.solve.curve import BoundCurve
from qcqp_prune.solve.pareto import pareto
from qcqp_prune.solve.proof import Tangent, useful_tangents
from qcqp_prune.solve.result import TracePoint
from qcqp_prune.testing import STRUCTURES, chain_problem, exhaustive, random_problem


def at_limit(problem: PruningProblem, limit: int) -> PruningProblem:
    rows = tuple(replace(r, limit=limit) if r.resource == "macs" else r for r in problem.rows)
    return replace(problem, rows=rows)


def some_limits(problem: PruningProblem, count: int = 6) -> list[int]:
    row = problem.rows[0]
    return np.linspace(row.smallest, row.dense, count).astype(int).tolist()


@pytest.mark.parametrize("structure", sorted(STRUCTURES))
def test_one_solve_bounds_every_limit(structure: str) -> None:
    problem = random_problem(7, structure)
    report = qp.solve(problem, "decomposition", options=qp.SolveOptions(work_limit=8, gap_limit=0.0))
    curve = report.bound_curve("macs")
    assert curve.at(curve.solved) == report.bound
    bounds = []
    for limit in some_limits(problem):
        best = exhaustive(at_limit(problem, limit)).objective
        bound = curve.at(limit)
        assert bound is not None
        assert bound >= best - 1e-9 * abs(best)
        bounds.append(bound)
    assert bounds == sorted(bounds)
    assert curve.at(10 * curve.dense) == curve.at(curve.dense)


def test_price_is_the_slope_of_the_bound() -> None:
    problem = chain_problem("tiny")
    report = qp.solve(problem, "decomposition", options=qp.SolveOptions(work_limit=20))
    price, limit = report.prices["macs"], problem.budgeted[0].limit
    assert limit is not None
    assert report.bound is not None
    assert price > 0
    more = qp.solve(
        at_limit(problem, limit + limit // 20), "decomposition", options=qp.SolveOptions(work_limit=40)
    )
    # The promise is about the optimum, so about any selection that is found there.
    assert more.objective <= report.bound + price * (limit // 20)
    assert more.objective > report.objective
    moved = report.bound_curve("macs").at(limit + 10)
    assert moved is not None
    assert moved <= report.bound + 10 * price + 1e-12


def test_curve_is_the_lowest_line_and_a_bound_serves_lower_limits() -> None:
    curve = BoundCurve("macs", "MACs", 100, 200, 5.0, ((6.0, 0.1), (7.0, 0.0)))
    assert curve.at(100) == 5.0
    assert curve.at(50) == pytest.approx(1.0)  # 6 - 0.1 * 50, below what was proved at 100
    assert curve.at(95) == 5.0
    assert curve.at(101) == pytest.approx(6.1)
    assert curve.at(150) == 7.0
    assert curve.at(1000) == 7.0
    assert BoundCurve("macs", "MACs", 100, 200, 5.0, ()).at(101) is None
    assert BoundCurve("macs", "MACs", 100, 200, 5.0, ()).at(99) == 5.0


def test_useful_tangents_keep_what_is_lowest_somewhere() -> None:
    rng = np.random.default_rng(0)
    tangents = [
        Tangent(float(1 + price**2 * 1e4), {"macs": float(price)}) for price in rng.uniform(0, 0.02, 500)
    ]
    kept = useful_tangents(tangents, {"macs": 100})
    assert len(kept) <= 66
    assert min(t.bound for t in kept) == min(t.bound for t in tangents)
    for change in (-100.0, -50.0, 0.0, 50.0, 100.0):
        lowest = min(t.at({"macs": change}) for t in tangents)
        assert min(t.at({"macs": change}) for t in kept) == pytest.approx(lowest, abs=1e-3)


def test_reports_carry_prices_through_json_and_events() -> None:
    seen: list[TracePoint] = []
    options = qp.SolveOptions(work_limit=8, gap_limit=0.0, on_event=seen.append)
    report = qp.solve(random_problem(3, "two_budgets"), "decomposition", options=options)
    assert set(report.prices) == {"macs", "memory"}
    assert any(set(p.prices) == {"macs", "memory"} for p in seen)
    text = json.dumps(report.to_json(), allow_nan=False)
    again = qp.SolveReport.from_json(json.loads(text))
    assert again.prices == report.prices
    assert again.tangents == report.tangents
    assert again.trace == report.trace
    assert again.bound_curve("memory").at(50) == report.bound_curve("memory").at(50)
    with pytest.raises(qp.InvalidOptionError, match="choose from macs, memory"):
        report.bound_curve("params")
    older = json.loads(text)
    del older["tangents"], older["prices"]
    for point in older["trace"]:
        point.pop("prices")
    assert qp.SolveReport.from_json(older).prices == {}


def test_prices_in_words() -> None:
    report = qp.solve(chain_problem("tiny"), "decomposition", options=qp.SolveOptions(work_limit=10))
    limit = report.usage["macs"].limit
    assert limit is not None
    assert 1000 <= limit < 10**6
    (line,) = price_lines(report)
    worth = 1000 * report.prices["macs"]
    assert f"price of macs: 1k more macs can add {worth:.3g} at most" in line
    assert f"({worth / report.objective:.3%} of" in line
    assert price_lines(replace(report, tangents=())) == []


def test_pareto_front_between_optima() -> None:
    problem = random_problem(1, "residual")
    limits = some_limits(problem, 5)
    front = pareto(problem, limits[::-1], bounds=2, time_limit=4.0)
    assert [p.limit for p in front.points] == limits
    assert len(front.reports) == 2
    for point in front.points:
        best = exhaustive(at_limit(problem, point.limit)).objective
        assert point.used <= point.limit
        assert point.objective <= best + 1e-9
        assert point.bound is not None
        assert point.bound >= best - 1e-9
        flat = point.masks.flat(problem.graph)
        assert problem.usage(flat)["macs"] == point.used
        assert problem.objective.evaluate(flat) == pytest.approx(point.objective)
    worths = [p.objective for p in front.points]
    assert worths == sorted(worths)
    between = (limits[1] + limits[2]) // 2
    bound = front.bound(between)
    assert bound is not None
    assert bound >= exhaustive(at_limit(problem, between)).objective - 1e-9


def test_pareto_front_as_files() -> None:
    problem = random_problem(1, "chain")
    front = pareto(problem, some_limits(problem, 3), bounds=1, time_limit=2.0)
    data = json.loads(json.dumps(front.to_json(), allow_nan=False, default=float))
    assert [p["limit"] for p in data["points"]] == [p.limit for p in front.points]
    rows = list(csv.DictReader(io.StringIO(front.to_csv())))
    assert [float(r["objective"]) for r in rows] == [p.objective for p in front.points]
    page = pareto_html(front)
    drawing = ET.fromstring(page[page.index("<svg") : page.index("</svg>") + 6])
    circles = [tag for tag in drawing if tag.tag == "circle"]
    assert len(circles) == 3
    line = next(tag for tag in drawing if tag.tag == "polyline").attrib["points"].split()
    # Upwards on a page is down in y: the bound is above each selection drawn at the same place.
    heights = {round(float(x), 1): float(y) for x, y in (p.split(",") for p in line)}
    for circle in circles:
        nearest = min(heights, key=lambda x: abs(x - float(circle.attrib["cx"])))
        assert heights[nearest] <= float(circle.attrib["cy"]) + 1.5
    assert pareto_table(front).row_count == 3


def test_pareto_bad_input() -> None:
    problem = random_problem(1, "chain")
    row = problem.rows[0]
    with pytest.raises(qp.InvalidOptionError, match="choose from macs, memory"):
        pareto(problem, [row.dense], resource="time")
    for limits, bounds, seconds in (([], 1, 1.0), ([row.dense], -1, 1.0), ([row.dense], 1, 0.0)):
        with pytest.raises(qp.InvalidOptionError, match="give at least one limit"):
            pareto(problem, limits, bounds=bounds, time_limit=seconds)
    with pytest.raises(qp.InfeasibleError):
        pareto(problem, [row.smallest - 1, row.dense])
    front = pareto(problem, [row.dense], bounds=0, time_limit=1.0)
    assert front.points[0].bound is None
    assert "no solver gave a bound" in front.notes[0]
    assert "polyline" not in pareto_html(front)
