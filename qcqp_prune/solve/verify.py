"""The independent check of a backend's answer, from the original problem and in integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from qcqp_prune.errors import BackendError
from qcqp_prune.program.coefficients import BoolArray, LowRank
from qcqp_prune.program.problem import PruningProblem, allowed_counts
from qcqp_prune.program.program import Program
from qcqp_prune.solve.result import RawSolution, Reason, relative_gap

INTEGRALITY = 1e-4
RELATIVE, FLOOR = 1e-6, 1e-9


@dataclass(frozen=True, eq=False)
class Checked:
    """An answer that passed: the rounded point, its recomputed worth, and a bound that is not below it."""

    x: BoolArray
    objective: float
    bound: float | None


def tolerance(value: float, program: Program) -> float:
    """What rounding may add to an objective: relative, with a floor relative to the terms that it is summed from."""
    return RELATIVE * abs(value) + FLOOR * _magnitude(program)


def is_closed(program: Program, objective: float | None, bound: float | None, gap_limit: float) -> bool:
    """Whether a bound proves an objective to within a relative gap.

    To an objective of exactly 0 no gap is relative: the bound must then be 0 to within rounding of the terms.
    """
    if objective is None or bound is None or not math.isfinite(bound):
        return False
    gap = relative_gap(objective, bound)
    return bound <= tolerance(0.0, program) if gap is None else gap <= gap_limit


def _magnitude(program: Program) -> float:
    """At least the sum of the sizes of all terms."""
    total = abs(program.constant) + float(np.abs(program.linear).sum())
    for pair in program.pairs:
        if isinstance(pair.coef, LowRank):
            total += float(np.abs(pair.coef.left).sum(0) @ np.abs(pair.coef.right).sum(0))
        elif isinstance(pair.coef, np.ndarray):
            total += float(np.abs(pair.coef).sum())
        else:
            total += abs(pair.coef) * program.groups[pair.first].width * program.groups[pair.second].width
    return total


def checked(problem: PruningProblem, program: Program, raw: RawSolution, name: str) -> Checked | None:
    """Recompute everything a backend claims; None where it holds no point.

    Raises:
        BackendError: the point is fractional or of another shape, breaks a budget, an allowed count or a tie, is
            worth something else than claimed, or is worth more than the claimed bound.
    """
    bound = _checked_bound(raw, name)
    if raw.x is None:
        if raw.termination.reason in (Reason.OPTIMAL, Reason.SEARCH_ENDED):
            raise _error(name, f"it reports {raw.termination.reason.name} without a selection")
        return None
    x = _rounded(raw, program, name)
    mask = program.mask(x)
    _require_budgets(problem, mask, name)
    objective = problem.objective.evaluate(mask)
    if not math.isfinite(objective):
        raise _error(name, f"its selection is worth {objective}")
    slip = tolerance(objective, program)
    if raw.objective is not None and not abs(raw.objective - objective) <= slip:
        raise _error(
            name, f"it claims an objective of {raw.objective!r}, its selection is worth {objective!r}"
        )
    if bound is not None and bound < objective:
        if bound < objective - slip:
            raise _error(name, f"it claims the bound {bound!r}, its own selection is worth {objective!r}")
        bound = objective
    return Checked(x, objective, bound)


def _rounded(raw: RawSolution, program: Program, name: str) -> BoolArray:
    x = np.asarray(raw.x)
    if x.shape != (program.size,):
        raise _error(name, f"it returned {x.shape} values for {program.size} variables")
    if x.dtype == np.bool_:
        return x
    values = x.astype(np.float64)
    nearest = np.rint(values)
    off = np.abs(values - nearest)
    if not (off <= INTEGRALITY).all() or not np.isin(nearest, (0.0, 1.0)).all():
        worst = int(np.argmax(np.where(np.isnan(off), np.inf, np.maximum(off, np.abs(nearest - 0.5) - 0.5))))
        raise _error(name, f"variable {worst} has the value {values[worst]!r}, which is neither 0 nor 1")
    return np.asarray(nearest == 1.0)


def _require_budgets(problem: PruningProblem, mask: BoolArray, name: str) -> None:
    counts = problem.counts(mask).tolist()
    graph, every = problem.graph, allowed_counts(problem.graph)
    if not graph.links.hold(mask, exempt=graph.stays):
        raise _error(name, "it keeps a unit without its whole, or a whole without any of its parts")
    if not graph.needs.hold(counts):
        raise _error(name, "it empties a part of a block without the rest of it")
    ties: dict[str, int] = {}
    for group, allowed, n in zip(graph.groups, every, counts, strict=True):
        if n not in allowed:
            raise _error(name, f"it keeps {n} of {group.width} units of {group.id!r}, which is not allowed")
        if group.tie is not None and ties.setdefault(group.tie, n) != n:
            raise _error(name, f"it keeps unequal counts in the tied groups {group.tie!r}")
    used = problem.usage(mask)
    for row in problem.budgeted:
        if row.limit is not None and used[row.resource] > row.limit:
            raise _error(
                name,
                f"it uses {used[row.resource]:,} {row.unit} of {row.resource}, the budget is {row.limit:,}",
            )
        if row.least is not None and used[row.resource] < row.least:
            raise _error(
                name,
                f"it uses {used[row.resource]:,} {row.unit} of {row.resource}, at least {row.least:,} were asked for",
            )


def _checked_bound(raw: RawSolution, name: str) -> float | None:
    if raw.bound is None or raw.bound == math.inf:
        return None
    if not math.isfinite(raw.bound):
        raise _error(name, f"it claims the bound {raw.bound!r}")
    return float(raw.bound)


def _error(name: str, what: str) -> BackendError:
    return BackendError(
        f"the answer of solver {name!r} failed the check and is refused: {what}. Choose another solver, and "
        "report this with the problem file"
    )
