"""Continuous relaxations of the mask problem, and what becomes of their values: rounding by solver and by threshold."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from qcqp_prune.errors import InvalidOptionError, MaskMismatchError, SolverIncapableError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.problem import PruningProblem, allowed_counts
from qcqp_prune.program.program import Program
from qcqp_prune.program.relaxed import rounding_worth
from qcqp_prune.solve.backend import get_backend
from qcqp_prune.solve.options import SolveOptions
from qcqp_prune.solve.run import solve


@dataclass(frozen=True, eq=False)
class RelaxedMasks:
    """Masks between 0 and 1.

    Attributes:
        fingerprint: of the channel graph that they belong to.
        values: ``(units,) float64`` in [0, 1]; 1 for units that stay.
        by: the relaxation that they solve, or where they come from.
        bound: on the objective of any selection that meets the limits, None where they prove none.
        limits: by resource, the budgets that the bound is for.
        seconds: that it took.
        converged: whether the method ended by itself.
    """

    fingerprint: str
    values: FloatArray
    by: str
    bound: float | None = None
    limits: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    converged: bool = True

    @classmethod
    def of(cls, graph: ChannelGraph, values: npt.ArrayLike, by: str = "given") -> RelaxedMasks:
        """Values from elsewhere, such as the indicators of a regulariser.

        Raises:
            MaskMismatchError: there is another number of them, or one is no number from 0 to 1.
        """
        array = np.asarray(values, np.float64)
        if array.shape != (graph.unit_count,):
            raise MaskMismatchError(
                f"relaxed masks of this graph have shape ({graph.unit_count},), not {array.shape}: make them for it"
            )
        if not ((array >= 0) & (array <= 1)).all():
            raise MaskMismatchError("a relaxed mask lies outside of [0, 1]: scale the values first")
        return cls(graph.fingerprint, np.where(graph.stays, 1.0, array), by)


def relax(
    problem: PruningProblem,
    by: str = "cardinality_rlt",
    *,
    time_limit: float | None = 60.0,
    work_limit: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> RelaxedMasks:
    """Solve the continuous relaxation of the mask problem.

    Args:
        problem: objective and budgets.
        by: ``mccormick``, ``cardinality_rlt`` or ``perspective``: the linear reduction whose integrality is dropped.
        time_limit: seconds; the bound of an unfinished method is valid, only weaker.
        work_limit: iterations.
        stop: polled; True ends the method.

    Raises:
        InvalidOptionError: there is no such relaxation.
        SolverIncapableError: it does not fit into memory.
        InfeasibleError: no selection meets the budgets.

    References:
        McCormick (1976); Adams and Sherali (1986); Frangioni and Gentile (2006); see the reductions.
    """
    if not by:
        raise InvalidOptionError("name a relaxation: mccormick, cardinality_rlt or perspective")
    program = Program.from_problem(problem)
    options = SolveOptions(time_limit=time_limit, work_limit=work_limit)
    if stop is not None:
        options = replace(options, stop=stop)
    started = time.perf_counter()
    raw = get_backend(f"relaxation:{by}").solve(program, options)
    values = np.ones(problem.graph.unit_count)
    if raw.relaxed is not None:
        values[program.units] = np.clip(raw.relaxed, 0.0, 1.0)
    elif program.size:
        raise SolverIncapableError(
            f"the {by} relaxation gives no point ({raw.termination.reason.value}): take another one"
        )
    return RelaxedMasks(
        problem.graph.fingerprint,
        values,
        by,
        raw.bound,
        problem.limits,
        time.perf_counter() - started,
        bool(raw.statistics.get("converged", 1.0)),
    )


def thresholded(problem: PruningProblem, relaxed: RelaxedMasks) -> Masks:
    """Keep the units whose value reaches a threshold, the lowest that meets the budgets: what is done without a solver.

    In each group the number of them is raised to the next count that is allowed, equally in tied groups.

    Raises:
        InvalidOptionError: units are linked, so that a threshold alone makes no selection.
    """
    graph = _same(problem.graph, relaxed)
    if len(graph.links):
        raise InvalidOptionError(
            "units of this graph are linked, which a threshold cannot obey: round by a solver"
        )
    levels = np.unique(np.concatenate([relaxed.values, [2.0]]))  # the last one keeps what must be kept only
    low, high = 0, len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if _meets(problem, _above(graph, relaxed.values, levels[middle])):
            high = middle
        else:
            low = middle + 1
    return Masks.from_flat(graph, _above(graph, relaxed.values, levels[low]))


def _above(graph: ChannelGraph, values: FloatArray, threshold: float) -> BoolArray:
    wanted = [int((values[graph.units(g)] >= threshold).sum()) for g in range(len(graph.groups))]
    by_tie: dict[str, int] = {}
    for group, n in zip(graph.groups, wanted, strict=True):
        if group.tie is not None:
            by_tie[group.tie] = max(n, by_tie.get(group.tie, 0))
    keep = np.zeros(graph.unit_count, np.bool_)
    for g, (group, allowed) in enumerate(zip(graph.groups, allowed_counts(graph), strict=True)):
        n = wanted[g] if group.tie is None else by_tie[group.tie]
        count = min(m for m in allowed if m >= min(n, allowed[-1]))
        span = graph.units(g)
        keep[span.start + np.argsort(-values[span], kind="stable")[:count]] = True
    return keep


def _meets(problem: PruningProblem, mask: BoolArray) -> bool:
    used = problem.usage(mask)
    return all(used[resource] <= limit for resource, limit in problem.limits.items())


def rounded(problem: PruningProblem, relaxed: RelaxedMasks, **options: Any) -> Masks:
    """Round relaxed masks by an exact solver: the selection that meets the budgets and keeps the most of them.

    In each group the largest values are kept, as by a threshold; how many, is as near to the relaxed counts as budgets,
    floors and ties allow (``rounding_worth``).

    Args:
        problem: whose budgets to meet.
        relaxed: the values.
        options: of ``qp.solve``, such as ``solver`` and ``time_limit``.
    """
    _same(problem.graph, relaxed)
    return solve(problem.with_objective(rounding_worth(problem, relaxed.values)), **options).masks


def _same(graph: ChannelGraph, relaxed: RelaxedMasks) -> ChannelGraph:
    if graph.fingerprint != relaxed.fingerprint:
        raise MaskMismatchError(
            "these relaxed masks belong to another graph: relax this problem, or make them for its graph"
        )
    return graph
