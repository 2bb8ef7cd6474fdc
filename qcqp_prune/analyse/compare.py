"""Masks of any origin side by side on one instance: worth, use, distance, and what the differences cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from qcqp_prune.analyse.relax import RelaxedMasks, rounded, thresholded
from qcqp_prune.errors import InvalidOptionError, MaskMismatchError
from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.graph.masks import Masks
from qcqp_prune.program.coefficients import FloatArray
from qcqp_prune.program.problem import PruningProblem
from qcqp_prune.program.program import Program
from qcqp_prune.solve.report import SolveReport
from qcqp_prune.solve.result import relative_gap

SCHEMA_VERSION = 1
PROVED = 1e-4
"""The relative gap at which ``solve`` calls a selection best unless told otherwise."""


@dataclass(frozen=True)
class GroupDifference:
    """Where a selection differs from the reference.

    Attributes:
        group: id of the group.
        kept, reference_kept: how many units each keeps.
        jaccard: units that both keep over units that one of them keeps.
        cost: what the objective loses where only this group of the reference is replaced, budgets apart.
    """

    group: str
    kept: int
    reference_kept: int
    jaccard: float
    cost: float


@dataclass(frozen=True)
class Origin:
    """One selection of a comparison.

    Attributes:
        name: what it was called.
        objective: its worth on the instance.
        gap: by how much the best bound lies above it, relatively; None without a bound.
        used: by resource, its exact use.
        feasible: whether it meets all budgets, floors, multiples, ties and links.
        bound: that comes with it, None where none does or where it is of other budgets or another objective.
        jaccard: of all prunable units with the reference's.
        rank_correlation: Spearman's, between its relaxed values and the reference's picks over the prunable units; None
            for masks without relaxed values, or where one of the two is constant.
        threshold_objective: worth of the same values cut at a threshold in place of being rounded by the solver.
        bound_gap: by how much its own bound lies above the reference's objective, relatively: the integrality gap of a
            relaxation where the reference is proved best.
        groups: where it differs from the reference, the costliest first.
    """

    name: str
    objective: float
    gap: float | None
    used: Mapping[str, int]
    feasible: bool
    bound: float | None
    jaccard: float
    rank_correlation: float | None
    threshold_objective: float | None
    bound_gap: float | None
    groups: tuple[GroupDifference, ...]


@dataclass(frozen=True)
class Comparison:
    """All origins on one instance.

    Attributes:
        limits: by resource, the budget.
        reference: the origin that the others are compared with.
        bound: the lowest of all valid bounds, None where there is none.
        proved: whether the reference is proved best.
        origins: the best objective first; those that break a budget at the end.
    """

    limits: Mapping[str, int]
    reference: str
    bound: float | None
    proved: bool
    origins: tuple[Origin, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for ``json.dump``."""
        return {"schema": SCHEMA_VERSION, **asdict(self)}

    def __getitem__(self, name: str) -> Origin:
        """The origin of that name."""
        return next(o for o in self.origins if o.name == name)


Selection = Masks | SolveReport | RelaxedMasks


def compare(
    problem: PruningProblem,
    selections: Mapping[str, Selection],
    *,
    reference: str | None = None,
    **rounding: Any,
) -> Comparison:
    """Lay masks of any origin side by side.

    Relaxed masks are rounded by the solver (``rounded``), and by a threshold beside it.

    Args:
        problem: the instance: objective and budgets.
        selections: by name masks, reports of solves of this problem (with their bounds), or relaxed masks.
        reference: the one to compare with; the best feasible one where None.
        rounding: options of ``qp.solve`` for the rounding of relaxed masks.

    Raises:
        InvalidOptionError: there are no selections, or none is called as the reference is.
        MaskMismatchError: masks belong to another graph.
    """
    if not selections:
        raise InvalidOptionError("there is nothing to compare: give masks, reports or relaxed masks by name")
    if reference is not None and reference not in selections:
        raise InvalidOptionError(f"no selection is called {reference!r}: choose from {', '.join(selections)}")
    graph = problem.graph
    masks = {name: _mask(problem, s, rounding) for name, s in selections.items()}
    worth = {name: problem.objective.evaluate(mask) for name, mask in masks.items()}
    program = Program.from_problem(problem)
    feasible = {name: _is_selection(program, mask) for name, mask in masks.items()}
    ranking = sorted(masks, key=lambda name: (not feasible[name], -worth[name]))
    best = ranking[0] if reference is None else reference
    bounds = {name: _bound(problem, s, worth[name]) for name, s in selections.items()}
    bound = min((b for b in bounds.values() if b is not None), default=None)
    free = ~graph.stays
    origins = []
    for name in ranking:
        mask, given = masks[name], selections[name]
        values = given.values if isinstance(given, RelaxedMasks) else None
        origins.append(
            Origin(
                name,
                worth[name],
                relative_gap(worth[name], bound) if feasible[name] else None,
                problem.usage(mask),
                feasible[name],
                bounds[name],
                _jaccard(mask[free], masks[best][free]),
                None if values is None else _rank_correlation(values[free], masks[best][free]),
                _by_threshold(problem, given),
                None if (own := bounds[name]) is None else relative_gap(worth[best], own),
                _differences(problem, mask, masks[best]),
            )
        )
    gap = relative_gap(worth[best], bound) if feasible[best] else None
    return Comparison(problem.limits, best, bound, gap is not None and gap <= PROVED, tuple(origins))


def _is_selection(program: Program, mask: BoolArray) -> bool:
    """Whether a mask meets budgets and bands, allowed and tied counts, and links."""
    fixed = np.ones(len(mask), np.bool_)
    fixed[program.units] = False
    return bool(mask[fixed].all()) and program.is_feasible(mask[program.units])


def _mask(problem: PruningProblem, selection: Selection, rounding: Mapping[str, Any]) -> BoolArray:
    if isinstance(selection, RelaxedMasks):
        return rounded(problem, selection, **rounding).flat(problem.graph)
    masks = selection.masks if isinstance(selection, SolveReport) else selection
    if not isinstance(masks, Masks):
        raise MaskMismatchError(
            f"a {type(selection).__name__} is no selection: give Masks, a SolveReport or RelaxedMasks"
        )
    return masks.flat(problem.graph)


def _bound(problem: PruningProblem, selection: Selection, worth: float) -> float | None:
    """The bound that comes with a selection, where it speaks of this instance."""
    if isinstance(selection, RelaxedMasks):
        return selection.bound if dict(selection.limits) == problem.limits else None
    if not isinstance(selection, SolveReport):
        return None
    limits = {name: use.limit for name, use in selection.usage.items() if use.limit is not None}
    same = limits == problem.limits and np.isclose(selection.objective, worth, rtol=1e-9)
    return selection.bound if same else None


def _by_threshold(problem: PruningProblem, selection: Selection) -> float | None:
    if not isinstance(selection, RelaxedMasks) or len(problem.graph.links):
        return None
    return problem.objective.evaluate(thresholded(problem, selection).flat(problem.graph))


def _differences(
    problem: PruningProblem, mask: BoolArray, reference: BoolArray
) -> tuple[GroupDifference, ...]:
    graph: ChannelGraph = problem.graph
    whole = problem.objective.evaluate(reference)
    found = []
    for g, group in enumerate(graph.groups):
        span = graph.units(g)
        mine, theirs = mask[span], reference[span]
        if (mine == theirs).all():
            continue
        changed = reference.copy()
        changed[span] = mine
        cost = whole - problem.objective.evaluate(changed)
        found.append(
            GroupDifference(group.id, int(mine.sum()), int(theirs.sum()), _jaccard(mine, theirs), cost)
        )
    return tuple(sorted(found, key=lambda d: -d.cost))


def _jaccard(a: BoolArray, b: BoolArray) -> float:
    either = int((a | b).sum())
    return int((a & b).sum()) / either if either else 1.0


def _rank_correlation(values: FloatArray, picks: BoolArray) -> float | None:
    if picks.all() or not picks.any() or np.ptp(values) == 0:
        return None
    return float(spearmanr(values, picks).statistic)
