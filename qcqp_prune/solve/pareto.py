"""Selections for many limits of one resource, and above them a bound that holds for every limit."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from qcqp_prune.errors import InvalidOptionError
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.problem import BudgetRow, PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.auto import choose
from qcqp_prune.solve.backend import Backend, Role
from qcqp_prune.solve.curve import BoundCurve
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import Reason, relative_gap
from qcqp_prune.solve.run import solve

SCHEMA_VERSION = 1
FORMAT = "qcqp-prune pareto curve"
SEARCH_SHARE = 0.4
"""Of the time, for selections; the rest is for bounds."""


@dataclass(frozen=True)
class ParetoPoint:
    """The best selection found for one limit.

    Attributes:
        limit, used: of the resource.
        objective: worth of the selection.
        bound: that no selection within the limit exceeds, None where nothing was proved.
        masks: the selection.
    """

    limit: int
    used: int
    objective: float
    bound: float | None
    masks: Masks

    @property
    def gap(self) -> float | None:
        """``(bound - objective) / |objective|``."""
        return relative_gap(self.objective, self.bound)


@dataclass(frozen=True)
class ParetoFront:
    """A trade-off between a resource and what is kept, certified from above.

    Attributes:
        resource, unit: that varies.
        dense: its use by the whole network.
        points: by limit, ascending; objectives never fall.
        curves: bounds for every limit; the lowest of them counts.
        reports: of the solves that gave the bounds, with their certificates.
        notes: what a reader should know.
    """

    resource: str
    unit: str
    dense: int
    points: tuple[ParetoPoint, ...]
    curves: tuple[BoundCurve, ...]
    reports: tuple[SolveReport, ...] = ()
    notes: tuple[str, ...] = ()

    def bound(self, limit: float) -> float | None:
        """That no selection within a limit exceeds, whether or not it is one of the points."""
        return _lowest(self.curves, limit)

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        points = [
            {
                "limit": p.limit,
                "used": p.used,
                "objective": p.objective,
                "bound": p.bound,
                "gap": p.gap,
                "masks": p.masks.to_json(),
            }
            for p in self.points
        ]
        return {
            "format": FORMAT,
            "schema": SCHEMA_VERSION,
            "resource": self.resource,
            "unit": self.unit,
            "dense": self.dense,
            "points": points,
            "curves": [curve.to_json() for curve in self.curves],
            "notes": list(self.notes),
        }

    def to_csv(self) -> str:
        """One line for each point; an empty field where nothing was proved."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["limit", "share", "used", "objective", "bound", "gap"])
        for p in self.points:
            writer.writerow([p.limit, p.limit / self.dense, p.used, p.objective, p.bound, p.gap])
        return text.getvalue()


def pareto(
    problem: PruningProblem,
    limits: Sequence[int],
    *,
    resource: str = "macs",
    bounds: int = 3,
    time_limit: float = 60.0,
    options: SolveOptions | None = None,
) -> ParetoFront:
    """Solve for several limits of one resource, and bound all limits at once.

    Selections come from a search at each limit, started from the one below. Bounds come from a few limits only: their
    multipliers prove a bound at every limit, because a limit enters a Lagrangian bound as ``price * limit``.

    Args:
        problem: with any limit of the resource; its other budgets stay.
        limits: of the resource, in its unit.
        resource: that varies.
        bounds: at how many of the limits a bounding solver runs; the least and the largest are among them.
        time_limit: seconds for everything.
        options: seed and threads, and whoever listens.

    Raises:
        InvalidOptionError: there is no limit, no such resource, or a number makes no sense.
        InfeasibleError: no selection meets a limit.
    """
    row = _row(problem, resource)
    ordered = sorted({int(limit) for limit in limits})
    if not ordered or bounds < 0 or not time_limit > 0:
        raise InvalidOptionError(
            f"{len(ordered)} limits, {bounds} bounds and {time_limit} s: give at least one limit, no negative number "
            "of bounds, and a positive time"
        )
    problems = [_with_limit(problem, resource, limit) for limit in ordered]
    for each in problems:
        each.require_feasible()
    team = choose(Program.from_problem(problems[len(problems) // 2]))
    run = _Run(row, options or SolveOptions())
    for backend, _ in team[Role.SEARCHES][:1]:
        for each in problems:
            run.solve(each, backend, SEARCH_SHARE * time_limit / len(problems))
    anchors = np.unique(np.linspace(0, len(problems) - 1, bounds).round().astype(int)).tolist()
    for backend, _ in (team[Role.BOUNDS] or team[Role.PROVES])[:1]:
        for k in anchors:
            run.bound(problems[k], backend, (1 - SEARCH_SHARE) * time_limit / len(anchors))
    return run.front(ordered)


def _row(problem: PruningProblem, resource: str) -> BudgetRow:
    for row in problem.rows:
        if row.resource == resource:
            return row
    known = ", ".join(row.resource for row in problem.rows)
    raise InvalidOptionError(f"no resource is called {resource!r}: choose from {known}")


def _with_limit(problem: PruningProblem, resource: str, limit: int) -> PruningProblem:
    rows = tuple(replace(r, limit=limit) if r.resource == resource else r for r in problem.rows)
    return replace(problem, rows=rows)


class _Run:
    """Selections and curves so far."""

    def __init__(self, row: BudgetRow, options: SolveOptions) -> None:
        self._row, self._options = row, options
        self._held: list[tuple[int, float, Masks]] = []
        self._reports: list[SolveReport] = []
        self._stopped = False

    def solve(self, problem: PruningProblem, backend: Backend, seconds: float) -> SolveReport | None:
        """One solve from the best selection that its limit allows; None once the user stopped."""
        if self._stopped:
            return None
        start = self._best(_row(problem, self._row.resource).limit or 0)
        report = solve(
            problem,
            backend,
            time_limit=max(seconds, 0.05),
            warm_start=None if start is None else start[2],
            options=self._options,
        )
        used = report.usage[self._row.resource].used
        self._held.append((used, report.objective, report.masks))
        self._stopped = report.termination.reason is Reason.INTERRUPTED
        return report

    def bound(self, problem: PruningProblem, backend: Backend, seconds: float) -> None:
        """The same for the sake of the bound."""
        report = self.solve(problem, backend, seconds)
        if report is not None and report.bound is not None:
            self._reports.append(report)

    def front(self, limits: Sequence[int]) -> ParetoFront:
        row = self._row
        curves = tuple(report.bound_curve(row.resource) for report in self._reports)
        points = []
        for limit in limits:
            best = self._best(limit)
            if best is not None:
                used, objective, masks = best
                points.append(ParetoPoint(limit, used, objective, _lowest(curves, limit), masks))
        notes = [] if curves else ["no solver gave a bound in the time allowed: raise the time limit"]
        if self._stopped:
            notes.append("interrupted: limits that were not reached have the selections of lower ones")
        return ParetoFront(
            row.resource, row.unit, row.dense, tuple(points), curves, tuple(self._reports), tuple(notes)
        )

    def _best(self, limit: int) -> tuple[int, float, Masks] | None:
        within = [held for held in self._held if held[0] <= limit]
        return max(within, key=lambda held: held[1], default=None)


def _lowest(curves: Sequence[BoundCurve], limit: float) -> float | None:
    return min((value for c in curves if (value := c.at(limit)) is not None), default=None)
