"""Budgets: what can be reached before solving, and what was used after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qcqp_prune.graph.channels import BoolArray, ChannelGraph
from qcqp_prune.program.problem import (
    BudgetRow,
    Budgets,
    BudgetValue,
    PruningProblem,
    Resource,
    allowed_counts,
    counted_resources,
    least_counts,
    tie_classes,
)


@dataclass(frozen=True)
class ResourceRange:
    """The smallest and the largest use of a resource that a selection can reach."""

    resource: str
    unit: str
    smallest: int
    largest: int


@dataclass(frozen=True)
class BudgetLine:
    """One resource after solving, in exact integers.

    Attributes:
        resource, unit: which, and in what the numbers are.
        requested: what the user wrote, None where the resource is only reported.
        limit: largest allowed use that this came to.
        used: by the selection.
        dense, smallest: use of the whole network, and the least attainable.
        cheapest_step: what the cheapest further unit (or step of ``round_to`` units) would add, None where nothing can
            be added.
    """

    resource: str
    unit: str
    requested: BudgetValue | None
    limit: int | None
    used: int
    dense: int
    smallest: int
    cheapest_step: int | None

    @property
    def slack(self) -> int | None:
        """What is left of the budget."""
        return None if self.limit is None else self.limit - self.used

    @property
    def share(self) -> float:
        """Use as a share of the dense network's."""
        return self.used / self.dense if self.dense else 1.0


def feasible_ranges(graph: ChannelGraph, resources: Sequence[Resource] = ()) -> tuple[ResourceRange, ...]:
    """What selections of this graph can use at least and at most, for every known resource."""
    least, full = least_counts(graph), [g.width for g in graph.groups]
    forms = [(resource, resource.form(graph)) for resource in counted_resources(resources).values()]
    return tuple(ResourceRange(r.name, r.unit, f.evaluate(least), f.evaluate(full)) for r, f in forms)


def budget_lines(
    problem: PruningProblem, requested: Budgets | None, mask: BoolArray
) -> tuple[BudgetLine, ...]:
    """One line for each resource, those with a budget first.

    Args:
        problem: that was solved.
        requested: the budgets as the user wrote them, None for none.
        mask: ``(unit_count,) bool``, True = kept.
    """
    asked = {} if requested is None else requested if isinstance(requested, Mapping) else {"macs": requested}
    used = problem.usage(mask)
    rows = sorted(problem.rows, key=lambda row: row.limit is None)
    return tuple(
        BudgetLine(
            resource=row.resource,
            unit=row.unit,
            requested=asked.get(row.resource),
            limit=row.limit,
            used=used[row.resource],
            dense=row.dense,
            smallest=row.smallest,
            cheapest_step=_cheapest_step(problem, row, mask),
        )
        for row in rows
    )


def _cheapest_step(problem: PruningProblem, row: BudgetRow, mask: BoolArray) -> int | None:
    """The least that raising one group, or one set of tied groups, to its next allowed count adds to a resource.

    A unit with wholes adds what they cost, too, where it is their first part.
    """
    groups = problem.graph.groups
    counts = problem.counts(mask)
    allowed = allowed_counts(problem.graph)
    ties: dict[str, list[int]] = {}
    for g, group in enumerate(groups):
        ties.setdefault(f"tie {group.tie}" if group.tie is not None else f"group {g}", []).append(g)
    classes = tie_classes([g.tie or f"group {k}" for k, g in enumerate(groups)])
    base = row.form.evaluate(counts)
    linked = {link.whole for link in problem.graph.count_links} | {
        link.part for link in problem.graph.count_links
    }
    steps = [row.form.evaluate(problem.counts(raised)) - base for raised in _raised(problem, mask, allowed)]
    for members in ties.values():
        if linked & set(members):
            continue
        larger = [n for n in allowed[members[0]] if n > counts[members[0]]]
        if larger:
            raised = counts.copy()
            raised[members] = larger[0]
            if len(problem.graph.needs):  # a closed branch opens as a whole
                raised = np.asarray(
                    problem.graph.needs.completed(raised.tolist(), allowed, classes), np.int64
                )
            steps.append(row.form.evaluate(raised) - base)
    return min(steps, default=None)


def _raised(problem: PruningProblem, mask: BoolArray, allowed: list[list[int]]) -> Iterator[BoolArray]:
    """Masks with one more part kept, and all wholes that it brings along; one for each kind of part."""
    graph = problem.graph
    links = graph.links
    leaves = np.setdiff1d(links.parts, links.wholes)
    kinds = graph.group_of_unit.astype(np.float64)
    weights = np.random.default_rng(0).random(len(graph.groups))
    for level in reversed(links.levels or ()):
        brings = level[~mask[links.wholes[level]]]
        # What a part brings along is told by a sum of random weights of groups: equal sums are equal groups.
        np.add.at(
            kinds,
            links.parts[brings],
            weights[graph.group_of_unit[links.wholes[brings]]] + kinds[links.wholes[brings]],
        )
    leaves = leaves[~mask[leaves]]
    for unit in leaves[np.unique(kinds[leaves], return_index=True)[1]].tolist():
        raised = mask.copy()
        raised[unit] = True
        raised |= links.closed(raised)
        counts = problem.counts(raised)
        if all(n in a for n, a in zip(counts.tolist(), allowed, strict=True)):
            yield raised
