"""The exact optimum of a small problem by trying every mask. Works on the problem itself, not on the program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from qcqp_prune.errors import InfeasibleError, SolverIncapableError
from qcqp_prune.program.coefficients import BoolArray, FloatArray, IntArray
from qcqp_prune.program.forms import CountForm, PairwiseForm, UseForm
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.tables import Shares

LIMIT = 18
CHUNK = 1 << 14


@dataclass(frozen=True, eq=False)
class Optimum:
    """The best mask over all units, its worth, and how many masks met every constraint."""

    mask: BoolArray
    objective: float
    feasible: int


def exhaustive(problem: PruningProblem, *, limit: int = LIMIT) -> Optimum:
    """Try all ``2^n`` masks of the ``n`` units that are not frozen.

    Args:
        problem: any problem with few units.
        limit: most units that may be free.

    Raises:
        SolverIncapableError: more units are free than ``limit``.
        InfeasibleError: no mask meets every constraint.
    """
    graph = problem.graph
    frozen = np.asarray([g.frozen_reason is not None for g in graph.groups], dtype=np.bool_)
    free = np.flatnonzero(~frozen[graph.group_of_unit])
    if len(free) > limit:
        raise SolverIncapableError(
            f"{len(free)} free units make 2^{len(free)} masks: freeze some, or raise limit above {limit}"
        )
    best_value, best_mask, feasible = -np.inf, None, 0
    for masks in _masks(graph.unit_count, free):
        counts = np.stack([masks[:, graph.units(g)].sum(1) for g in range(len(graph.groups))], axis=1)
        masks = masks[_is_feasible(problem, counts) & _linked(problem, masks)]
        feasible += len(masks)
        if not len(masks):
            continue
        values = _values(problem.objective, masks)
        k = int(values.argmax())
        if values[k] > best_value:
            best_value, best_mask = float(values[k]), masks[k]
    if best_mask is None:
        raise _infeasible(problem)
    return Optimum(best_mask, best_value, feasible)


def _masks(unit_count: int, free: IntArray) -> Iterator[BoolArray]:
    total = 1 << len(free)
    for start in range(0, total, CHUNK):
        codes = np.arange(start, min(start + CHUNK, total), dtype=np.int64)
        masks = np.ones((len(codes), unit_count), np.bool_)
        masks[:, free] = (codes[:, None] >> np.arange(len(free))) & 1 == 1
        yield masks


def _is_feasible(problem: PruningProblem, counts: IntArray) -> BoolArray:
    """Which rows of ``counts`` meet every constraint, ``(masks,)``."""
    ok = np.ones(len(counts), np.bool_)
    first: dict[str, int] = {}
    for g, group in enumerate(problem.graph.groups):
        ok &= np.isin(counts[:, g], group.counts())
        if group.tie is not None:
            ok &= counts[:, g] == counts[:, first.setdefault(group.tie, g)]
    for g, needed in problem.graph.needs.pairs:
        ok &= (counts[:, g] == 0) | (counts[:, needed] > 0)
    for row in problem.budgeted:
        uses = _uses(row.form, counts)
        ok &= (uses <= (row.limit or 0)) & (uses >= (row.least or 0))
    return ok


def _linked(problem: PruningProblem, masks: BoolArray) -> BoolArray:
    """Which rows of ``masks`` keep a whole exactly when they keep one of its parts, ``(masks,)``."""
    graph = problem.graph
    ok = np.ones(len(masks), np.bool_)
    for whole in graph.links.heads.tolist():
        parts = graph.links.parts[graph.links.wholes == whole]
        any_part = masks[:, parts].any(1)
        group = graph.groups[graph.group_of_unit[whole]]
        stays = group.counts() == [group.width]
        ok &= (masks[:, whole] | ~any_part) if stays else masks[:, whole] == any_part
    return ok


def _uses(form: UseForm, counts: IntArray) -> IntArray:
    """The use at each row of ``counts``, by the definition of the form, term by term."""
    return np.asarray(np.max([_part_uses(part, counts) for part in form.parts], axis=0), np.int64)


def _part_uses(form: CountForm, counts: IntArray) -> IntArray:
    total = form.constant + counts @ form.linear
    for coefficient, first, second in form.products:
        total = total + coefficient * _sums(first, counts) * _sums(second, counts)
    for table in form.tables:
        row = (_sums(table.first, counts)[:, None] > table.first_levels).sum(1)
        col = (_sums(table.second, counts)[:, None] > table.second_levels).sum(1)
        total = total + table.values[row, col]
    return np.asarray(total)


def _sums(shares: Shares, counts: IntArray) -> IntArray:
    total = np.zeros(len(counts), np.int64)
    for g, share in shares:
        total += share * counts[:, g]
    return total


def _values(objective: PairwiseForm, masks: BoolArray) -> FloatArray:
    x = masks.astype(np.float64)
    values = objective.constant + x @ objective.unary
    for term in objective.pairs:
        values = values + ((x[:, term.rows] @ term.dense()) * x[:, term.cols]).sum(1)
    return np.asarray(values)


def _infeasible(problem: PruningProblem) -> InfeasibleError:
    row = problem.budgeted[0]
    return InfeasibleError(
        "no mask meets every budget: raise a budget or lower min_keep",
        resource=row.resource,
        limit=row.limit or 0,
        smallest=row.smallest,
    )
